"""Runs of several processes on this machine, over loopback."""

import json
import os
import socket
import subprocess
import sys

import pytest

from aim_jax import train
from aim_jax.distributed import settings
from tests.conftest import ROOT
from tests.test_train import aim_config, codes  # noqa: F401  (fixtures)

SLURM = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}


def test_where_the_other_processes_are_is_found():
    assert settings({}) is None
    assert settings({"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"}) is None
    assert settings({"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert settings(SLURM) == {"cluster_detection_method": "slurm"}
    assert settings({"OMPI_COMM_WORLD_SIZE": "4"}) == {"cluster_detection_method": "ompi"}
    assert settings({"TPU_WORKER_HOSTNAMES": "a,b"}) == {}
    assert settings({"MEGASCALE_COORDINATOR_ADDRESS": "a"}) == {}
    assert settings({}, "auto") == {}
    plain = {"coordinator_address": "a:1", "num_processes": 4, "process_id": 3}
    assert settings(SLURM, "a:1", 4, 3) == plain
    variables = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4"}
    assert settings(SLURM | variables | {"JAX_PROCESS_ID": "3"}) == plain
    assert settings(variables | {"JOB_COMPLETION_INDEX": "3"}) == plain
    with pytest.raises(ValueError, match="JAX_PROCESS_ID belong together"):
        settings(variables)
    with pytest.raises(ValueError, match="--process_id belong together"):
        settings({}, num_processes=2)
    with pytest.raises(ValueError, match="process 4 of 4"):
        settings({}, "a:1", 4, 4)


def run(config, workdir, processes, *options):
    """Runs the training program as `processes` processes with four devices in all."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={4 // processes} "
        "--xla_backend_optimization_level=0",
        "PYTHONPATH": str(ROOT),
    }
    command = [
        sys.executable,
        "launch/train.py",
        "--config",
        config,
        "--workdir",
        workdir,
        *options,
    ]
    together = ["--coordinator", f"localhost:{port}", "--num_processes", processes]
    jobs = [
        subprocess.Popen(
            [*map(str, command), *map(str, together), "--process_id", str(i)],
            cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i in range(processes)
    ]  # fmt: skip
    try:
        outputs = [job.communicate(timeout=300)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0] * processes, "\n\n".join(outputs)


def losses(workdir):
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "val_loss")
    return {(row["step"], name): row[name] for row in rows for name in names if name in row}


def test_processes_train_what_one_process_trains(aim_config, tmp_path):  # noqa: F811
    """Two processes save, four go on with another mesh; the losses are those of one process."""
    aim_config.optimizer.schedule = "constant"  # others depend on the number of steps
    (tmp_path / "config.json").write_text(aim_config.to_json())
    config = tmp_path / "config.py"
    config.write_text(
        "import json\nfrom pathlib import Path\nfrom ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    text = Path(__file__).with_name('config.json').read_text()\n"
        "    return ConfigDict(json.loads(text))\n"
    )
    alone, together = tmp_path / "alone", tmp_path / "together"
    train.train(aim_config, alone)
    run(config, together, 2, "--config.steps=3")
    run(config, together, 4, "--config.mesh.model=2", "--config.mesh.fsdp=True")
    expected, found = losses(alone), losses(together)
    assert found.keys() == expected.keys() and len(found) == 8
    assert found == pytest.approx(expected, rel=1e-5)
    assert (together / "model" / "model.json").is_file()
    same = [(path / "samples" / "step_0000006.png").read_bytes() for path in (alone, together)]
    assert same[0] == same[1]
