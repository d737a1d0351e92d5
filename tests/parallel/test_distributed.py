"""Runs of several processes on this machine, over loopback."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from aim_jax.parallel.ownership import LOCK, owned
from aim_jax.parallel.processes import settings
from aim_jax.parallel.sharding import make_mesh
from aim_jax.training import aim as train
from aim_jax.training import tokenizer as train_vq
from aim_jax.utils.signals import EXIT_LOST, EXIT_STOPPED
from tests.compilation import xla_flags
from tests.conftest import ROOT
from tests.training.test_aim import aim_config, codes  # noqa: F401  (fixtures)
from tests.training.test_tokenizer import config as vq_config  # noqa: F401  (fixture)

SLURM = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NTASKS": "2"}


def test_where_the_other_processes_are_is_found():
    assert settings({}) is None
    assert settings({"SLURM_STEP_NODELIST": "n1", "SLURM_NTASKS": "1"}) is None
    assert settings({"TPU_WORKER_HOSTNAMES": "localhost"}) is None
    assert settings(SLURM) == {"cluster_detection_method": "slurm"}
    assert settings({"OMPI_COMM_WORLD_SIZE": "4"}) == {"cluster_detection_method": "ompi"}
    assert settings(SLURM | {"OMPI_COMM_WORLD_SIZE": "2"}) == {"cluster_detection_method": "ompi"}
    assert settings({"TPU_WORKER_HOSTNAMES": "a,b"}) == {}
    assert settings({"MEGASCALE_COORDINATOR_ADDRESS": "a"}) == {}
    assert settings({}, "auto") == {}
    plain = {"coordinator_address": "a:1", "num_processes": 4, "process_id": 3}
    assert settings(SLURM, "a:1", 4, 3) == plain
    variables = {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4"}
    assert settings(SLURM | variables | {"JAX_PROCESS_ID": "3"}) == plain
    assert settings(variables | {"JOB_COMPLETION_INDEX": "3"}) == plain
    with pytest.raises(ValueError, match="JAX_PROCESS_ID must be set together"):
        settings(variables)
    with pytest.raises(ValueError, match="--process_id must be set together"):
        settings({}, num_processes=2)
    with pytest.raises(ValueError, match="process 4 of 4"):
        settings({}, "a:1", 4, 4)


def start(command, processes):
    """Starts a program as `processes` processes with four devices in all."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": xla_flags(4 // processes),
        "PYTHONPATH": str(ROOT),
    }
    if processes > 1:
        command = [*command, "--coordinator", f"localhost:{port}", "--num_processes", processes]
    return [
        subprocess.Popen(
            [sys.executable, *map(str, command), *(["--process_id", str(i)] * (processes > 1))],
            cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i in range(processes)
    ]  # fmt: skip


def finish(jobs, limit=300):
    """Exit codes and outputs; one that still runs after `limit` seconds fails the test."""
    try:
        outputs = [job.communicate(timeout=limit)[0] for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    return [job.returncode for job in jobs], "\n\n".join(outputs)


def training(config, workdir, *options):
    return ["-m", "aim_jax", "train", "--config", config, "--workdir", workdir, *options]


def run(command, processes):
    """Runs a program to its end."""
    exits, outputs = finish(start(command, processes))
    assert exits == [0] * processes, outputs


def as_file(config, folder):
    """A configuration as a file that programs take."""
    (folder / "config.json").write_text(config.to_json())
    file = folder / "config.py"
    file.write_text(
        "import json\nfrom pathlib import Path\nfrom ml_collections import ConfigDict\n"
        "def get_config():\n"
        "    text = Path(__file__).with_name('config.json').read_text()\n"
        "    return ConfigDict(json.loads(text))\n"
    )
    return file


@pytest.fixture
def config_file(aim_config, tmp_path):  # noqa: F811
    aim_config.optimizer.schedule = "constant"  # others depend on the number of steps
    return as_file(aim_config, tmp_path)


def losses(workdir, names=("loss", "val_loss")):
    file = workdir / "metrics.jsonl"
    rows = [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []
    return {(row["step"], name): row[name] for row in rows for name in names if name in row}


@pytest.mark.slow
def test_processes_train_what_one_process_trains(
    aim_config,  # noqa: F811
    config_file,
    tmp_path,
    monkeypatch,
):
    """One process saves, two resume with another mesh; the losses are those of one process."""
    alone, together = tmp_path / "alone", tmp_path / "together"
    # Programs for one device compile in half the time.
    monkeypatch.setattr(train, "make_mesh", lambda *_: make_mesh(devices=jax.devices()[:1]))
    train.train(aim_config, alone)
    aim_config.steps = 3
    train.train(aim_config, together)
    mesh = ("--config.mesh.model=2", "--config.mesh.fsdp=True")
    run(training(config_file, together, *mesh), 2)
    expected, found = losses(alone), losses(together)
    assert found.keys() == expected.keys() and len(found) == 8
    assert found == pytest.approx(expected, rel=1e-5)
    assert (together / "model" / "model.json").is_file()
    same = [(path / "samples" / "step_0000006.png").read_bytes() for path in (alone, together)]
    assert same[0] == same[1]


@pytest.mark.slow
def test_processes_train_a_split_tokenizer(vq_config, tmp_path):  # noqa: F811
    """Losses, means of uneven shares and pictures of two processes with FSDP are those of one."""
    vq_config.eval_every = vq_config.save_every = vq_config.sample_every = vq_config.steps
    vq_config.model.ch_mult = (1,)  # compiles in two thirds of the time
    vq_config.optimizer.lr = 1e-5  # at large ones Adam makes steps of rounding errors
    command = ["-m", "aim_jax", "train_vq", "--config", as_file(vq_config, tmp_path), "--workdir"]
    alone, together = tmp_path / "alone", tmp_path / "together"
    train_vq.train(vq_config, alone)  # on one device
    run([*command, together, "--config.mesh.fsdp=True"], 2)
    names = ("loss", "hinge_loss", "val_rec_l2", "val_psnr", "val_perplexity")
    expected, found = losses(alone, names), losses(together, names)
    assert found.keys() == expected.keys() and len(found) == 2 * vq_config.steps + 3
    assert found == pytest.approx(expected, rel=1e-4)
    (shown,) = (alone / "samples").iterdir()
    one, two = (
        np.asarray(Image.open(out / "samples" / shown.name), np.int32) for out in (alone, together)
    )
    assert np.ptp(one) > 200 and np.abs(one - two).max() <= 1  # rounding


@pytest.mark.slow
def test_processes_divide_what_is_scored(tiny_model_dir, picture_folder, tmp_path):
    """Two processes draw, reconstruct and score together what one does alone."""
    outs = [tmp_path / "alone", tmp_path / "together"]
    for processes, out in enumerate(outs, start=1):
        run(["-m", "tests.scoring", tiny_model_dir, picture_folder, out], processes)
    for name in ("samples", "reconstructions"):
        images = [(out / name / f"{name}.npz").read_bytes() for out in outs]
        assert images[0] == images[1]
        one, two = (json.loads((out / name / "report.json").read_text())["metrics"] for out in outs)
        assert two == {k: pytest.approx(v, rel=1e-5, abs=1e-6) for k, v in one.items()}
    # The reference was needed twice, and scored once.
    kept = [np.load(*(out / "cache").iterdir()) for out in outs]
    for key in kept[0].files:
        np.testing.assert_allclose(kept[1][key], kept[0][key], atol=1e-5, err_msg=key)
    assert kept[0]["count"] == 48 and kept[0]["features"].shape == (40, 2048)


def test_an_error_of_one_process_ends_it_with_its_code():
    """Which is what tells launchers not to try again; the other one ends as one that lost it."""
    command = ["-m", "tests.ends", "--end", "error", "--heartbeat_seconds", "5"]
    exits, output = finish(start(command, 2), 90)
    assert exits == [EXIT_LOST, 1], output
    assert "error: not on this host" in output and not is_dump(output)


def is_dump(output):
    """Whether an output holds Python's traceback or a dump of the native stack."""
    return "Traceback" in output or "stack trace" in output


def test_a_start_without_the_other_process_is_bounded():
    command = ["-m", "tests.ends", "--end", "late", "--start_seconds", "2"]
    with socket.socket() as nobody:
        nobody.bind(("localhost", 0))  # and does not listen
        port = nobody.getsockname()[1]
        options = ["--coordinator", f"localhost:{port}", "--num_processes", "2"]
        (job,) = start([*command, *options, "--process_id", "1"], 1)
        exits, output = finish([job], 90)
    assert exits == [EXIT_LOST], output
    line = "error: the processes did not all connect within 2 s (--start_seconds)"
    assert output.startswith(line)
    assert len(output.splitlines()) == 1, output


def test_a_process_that_is_killed_during_the_start_ends_the_other_one():
    command = ["-m", "tests.ends", "--end", "killed", "--heartbeat_seconds", "4"]
    exits, output = finish(start(command, 2), 90)
    assert exits == [EXIT_LOST, -signal.SIGKILL], output
    line = "error: process 1 of 2 was lost: it has not answered for 4 s (--heartbeat_seconds); "
    assert output.startswith(line) and output.strip().count("\n") == 0, output


@pytest.mark.slow
def test_the_other_one_may_be_process_0():
    command = ["-m", "tests.ends", "--end", "killed", "--killed", "0", "--heartbeat_seconds", "4"]
    exits, output = finish(start(command, 2), 90)
    assert exits == [-signal.SIGKILL, EXIT_LOST], output
    line = "error: process 0 of 2 was lost: its connection was closed; "
    assert line in output and not is_dump(output)


@pytest.mark.slow
def test_a_signal_during_the_start_ends_all_processes():
    exits, output = finish(start(["-m", "tests.ends", "--end", "signal_at_start"], 2), 90)
    assert exits == [EXIT_STOPPED] * 2, output
    assert output.count("SIGTERM: stopped; the same command resumes") == 2, output


@pytest.mark.slow
def test_processes_of_a_run_are_one_owner_and_are_refused_together(config_file, tmp_path):
    with owned(tmp_path / "run"):
        exits, output = finish(start(training(config_file, tmp_path / "run"), 2))
        assert os.listdir(tmp_path / "run") == [LOCK]
    assert exits == [1, 1] and "Traceback" not in output
    assert output.count(f"error: {tmp_path / 'run'} is in use by process {os.getpid()} on ") == 2


def test_the_last_work_of_process_0_is_waited_for():
    command = ["-m", "tests.ends", "--end", "late", "--heartbeat_seconds", "5"]
    run(command, 2)


def test_a_signal_before_the_first_step_of_a_run_that_goes_on_is_heard():
    exits, output = finish(start(["-m", "tests.ends", "--end", "signal"], 2), 90)
    assert exits == [EXIT_STOPPED] * 2, output


@pytest.mark.slow
def test_one_process_is_stopped_and_one_is_killed(config_file, tmp_path):
    """SIGTERM to one makes all save the same step; when one is gone the others end soon."""

    def running(step):
        options = [f"--config.{k}_every=0" for k in ("eval", "sample", "save")]
        options += ["--config.steps=1000000", "--heartbeat_seconds=10"]
        jobs = start(training(config_file, tmp_path / "run", *options), 2)
        while not any(int(at) >= step for at, _ in (losses(tmp_path / "run") or {(0, ""): 0})):
            assert all(job.poll() is None for job in jobs), finish(jobs)
            time.sleep(0.1)
        return jobs

    jobs = running(2)
    jobs[1].terminate()
    exits, output = finish(jobs)
    assert exits == [EXIT_STOPPED] * 2, output
    saved = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert len(saved) == 1 and f"SIGTERM: saved step {saved[0]}" in output

    jobs = running(int(saved[0]) + 2)
    jobs[1].kill()
    exits, output = finish(jobs, 90)
    # By an error of the exchange or by the heartbeat.
    assert exits[0] == EXIT_LOST and not is_dump(output), output
    assert f"resumed from step {saved[0]}" in output
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == saved
