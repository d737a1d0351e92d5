"""The launchers of clusters, with programs in place of gcloud, git, srun and scontrol."""

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import jobset
from tests.conftest import ROOT

SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
TRAINING = ["--config", "aim_xl", "--workdir", "/mnt/aim/two words", "--config.x=it's"]
ENCODING = ["--program", "extract_codes"]
CODES = ["--", "--tokenizer", "models/aim_l", "--out"]
TPU = ["--name", "a", "--zone", "z", "--accelerator_type", "v5litepod-64"]


def bash(script, *options, **environment):
    """Runs a script of launch/; without what this machine may know of a cluster."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "JAX_"))}
    return subprocess.run(
        ["bash", str(ROOT / "launch" / script), *map(str, options)],
        capture_output=True, text=True, cwd=ROOT, timeout=60, env=kept | environment,
    )  # fmt: skip


def executable(path, source):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + source)
    path.chmod(0o755)


def commands(text):
    """The printed commands as their arguments."""
    subprocess.run(["bash", "-n"], input=text, text=True, check=True)
    return [shlex.split(line, comments=True) for line in text.splitlines()]


def test_scripts_are_clean():
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=path)
    assert shellcheck, "shellcheck comes with the test extra: pip install '.[test]'"
    done = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", ["slurm.sh", "tpu_pod.sh"])
def test_help_has_an_example(script):
    shown = bash(script, "--help")
    assert shown.returncode == 0 and f"launch/{script}" in shown.stdout.split("Example:")[1]


def test_launchers_run_other_programs_with_their_own_options():
    out = bash("slurm.sh", "--dry_run", *ENCODING, *CODES, "codes", SLURM_GPUS_ON_NODE="4")
    assert out.returncode == 0
    assert "aim_jax extract_codes --tokenizer models/aim_l --out codes" in out.stdout
    out = bash(
        "tpu_pod.sh", "train", *TPU, "--slices", "2", "--dry_run", *ENCODING, *CODES, "codes"
    )
    assert out.returncode == 0 and "extract_codes" in out.stdout and "mesh" not in out.stdout
    manifest = jobset.parse(
        [*SET, "--accelerator", "v5e-64", "--slices", "2", *ENCODING, *CODES, "/data/codes"]
    )
    assert "extract_codes" in json.dumps(manifest) and "mesh" not in json.dumps(manifest)


@pytest.mark.parametrize(
    ("script", "options", "message"),
    [
        ("slurm.sh", ["--", "--config", "c"], "needs --config NAME and --workdir DIR"),
        ("slurm.sh", ["--config", "c"], "come after '--'"),
        ("slurm.sh", ["--", *TRAINING], "sbatch --gpus-per-node=N"),
        ("slurm.sh", ["--max_restarts", "x", "--", *TRAINING], "expected an integer, got 'x'"),
        ("tpu_pod.sh", [], "expected create, setup, train"),
        ("tpu_pod.sh", ["all", *TPU[2:], "--", *TRAINING], "--name ''"),
        ("tpu_pod.sh", ["all", "--name", "a", "--", *TRAINING], "--zone is missing"),
        ("tpu_pod.sh", ["all", *TPU[:4], "--", *TRAINING], "--accelerator_type is missing"),
        ("tpu_pod.sh", ["create", *TPU[:5], "h100-8"], "no runtime is known for 'h100-8'"),
        ("tpu_pod.sh", ["create", *TPU, "--spot", "--reserved"], "exclude each other"),
        ("tpu_pod.sh", ["create", *TPU, "--slices", "two"], "expected an integer, got 'two'"),
        (
            "tpu_pod.sh",
            ["create", *TPU, "--", "--config=c"],
            "does not accept options of the training",
        ),
        ("tpu_pod.sh", ["train", *TPU, "--", "--workdir=w"], "needs --config FILE"),
        ("tpu_pod.sh", ["all", *TPU, "--nfs", "--", *TRAINING], "--nfs needs a value"),
    ],
)
def test_bad_input_is_one_error(script, options, message, tmp_path):
    executable(tmp_path / "gcloud", "echo called; exit 1")
    done = bash(script, *options, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 1 and not done.stdout
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert len(done.stderr.splitlines()) == 1


# Slurm


def test_slurm_prints_its_commands():
    done = bash("slurm.sh", "--dry_run", "--python", "py", "--", *TRAINING, SLURM_GPUS_ON_NODE="4")
    export, srun, requeue = commands(done.stdout)
    assert export == ["export", "JAX_LOCAL_DEVICE_IDS=0,1,2,3"]
    assert srun[:2] == ["srun", "--kill-on-bad-exit=0"]
    assert srun[-9:] == ["py", "-m", "aim_jax", "train", *TRAINING]
    assert requeue == ["scontrol", "requeue", "$SLURM_JOB_ID"]


@pytest.mark.parametrize(
    ("codes", "ends"),
    [
        ([75, 75, 0], [75, 75, 0]),  # saved and stopped twice
        ([134, 0], [134, 0]),  # a lost process
        ([1, 0], [1]),  # an error
        ([75, 75, 75, 75], [75, 75, 75]),  # no more than --max_restarts 2
    ],
)
def test_slurm_requeues(codes, ends, tmp_path):
    executable(tmp_path / "srun", 'read -r code < codes; sed -i 1d codes; exit "$code"')
    executable(tmp_path / "scontrol", 'echo "$@" >> requeued')
    executable(tmp_path / ".venv" / "bin" / "python", "exit 99")
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    slurm = {"SLURM_GPUS_ON_NODE": "8", "SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(tmp_path)}
    found, starts = [], 0
    while len(found) == starts:  # what Slurm does
        done = bash(
            "slurm.sh", "--max_restarts", 2, "--", *TRAINING,
            PATH=f"{tmp_path}:{os.environ['PATH']}", SLURM_RESTART_COUNT=str(starts), **slurm,
        )  # fmt: skip
        found.append(done.returncode)
        requeued = tmp_path / "requeued"
        starts = len(requeued.read_text().splitlines()) if requeued.exists() else 0
    assert found == ends
    assert starts == 0 or set(requeued.read_text().splitlines()) == {"requeue 7"}


@pytest.mark.parametrize(("codes", "ends"), [((134, 1), 1), ((134, 75), 134), ((0, 0), 0)])
def test_slurm_does_not_repeat_what_one_process_found_wrong(codes, ends, tmp_path):
    """srun tells the highest code alone."""
    first, second = codes
    tasks = f'CODE={first} "$@" || a=$?; CODE={second} "$@" || b=$?; exit $((a > b ? a : b))'
    executable(
        tmp_path / "srun", f"while [[ $1 == --* ]]; do shift; done; set +e; a=0 b=0; {tasks}"
    )
    executable(tmp_path / "scontrol", "touch requeued")
    executable(tmp_path / ".venv" / "bin" / "python", 'exit "$CODE"')
    done = bash(
        "slurm.sh", "--", *TRAINING, PATH=f"{tmp_path}:{os.environ['PATH']}",
        SLURM_GPUS_ON_NODE="8", SLURM_JOB_ID="7", SLURM_SUBMIT_DIR=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == ends, done.stderr
    assert (tmp_path / "requeued").exists() == (ends == 134)
    assert not list(tmp_path.glob("*.error"))


def test_a_slurm_process_has_all_gpus_of_its_node(tmp_path):
    """JAX takes the SLURM task's own number for its only GPU unless told otherwise."""
    program = tmp_path / "program.py"
    program.write_text(
        "import jax\nfrom aim_jax.parallel import processes\n"
        "jax.distributed.initialize(**processes.settings({'SLURM_STEP_NODELIST': 'localhost',"
        " 'SLURM_NTASKS': '2'}))\nprint(jax.config.read('jax_cuda_visible_devices'))\n"
    )
    executable(tmp_path / "python", f"exec {sys.executable} {program}")  # not the training
    executable(tmp_path / "srun", 'while [[ $1 == --* ]]; do shift; done; "$@"')
    step = {"JOB_ID": os.getpid(), "STEP_NODELIST": "localhost", "NTASKS": 1, "PROCID": 0}
    step["LOCALID"] = 0
    done = bash(
        "slurm.sh", "--python", tmp_path / "python", "--", *TRAINING,
        PATH=f"{tmp_path}:{os.environ['PATH']}", PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu",
        SLURM_GPUS_ON_NODE="4", **{f"SLURM_{name}": str(value) for name, value in step.items()},
    )  # fmt: skip
    assert done.stdout.splitlines() == ["0,1,2,3"], done.stderr


# Cloud TPU


def test_tpu_pod_prints_its_commands():
    options = ["--project", "p", "--slices", 2, "--spot", "--nfs", "10.0.0.2:/share"]
    flags = ["--create_flag=--network=n", "--delete_at_end", "--dry_run"]
    done = bash("tpu_pod.sh", "all", *TPU, *options, *flags, "--", *TRAINING, PATH="/usr/bin:/bin")
    assert done.returncode == 0 and not done.stderr
    describe, create, again, git, scp, setup, start, wait, delete = commands(done.stdout)
    queued, where = ["gcloud", "compute", "tpus", "queued-resources"], ["--zone=z", "--project=p"]
    assert describe == again == [*queued, "describe", "a", *where, "--format=value(state.state)"]
    assert create == [
        *queued, "create", "a", *where, "--node-count=2", "--node-prefix=a",
        "--accelerator-type=v5litepod-64", "--runtime-version=v2-alpha-tpuv5-lite", "--spot",
        "--network=n",
    ]  # fmt: skip
    assert git[:2] == ["git", "-C"] and git[-1] == "HEAD"
    assert scp[:4] == queued and scp[6] == "a:" and {"--worker=all", "--node=all"} <= set(scp)
    for command, remote in ((setup, "setup 10.0.0.2:/share"), (start, None), (wait, "wait")):
        assert command[:6] == [*queued, "ssh", "a"] and command[-1].startswith("--command=")
        assert {*where, "--worker=all", "--node=all", "--batch-size=all"} <= set(command)
        assert remote is None or command[-1].endswith(f"tpu_worker.sh {remote}")
    remote = shlex.split(start[-1].removeprefix("--command="))
    assert remote[:3] == ["bash", "aim_jax/launch/tpu_worker.sh", "start"]
    assert remote[3:5] == ["train", "--coordinator=auto"]
    assert remote[5:] == [*TRAINING, "--config.mesh.slices=2"]
    assert delete == [*queued, "delete", "a", *where, "--force", "--quiet"]


def test_tpu_pod_asks_for_one_slice():
    for tier in ([], ["--reserved"]):
        done = bash("tpu_pod.sh", "create", *TPU, *tier, "--dry_run")
        create = commands(done.stdout)[1]
        assert (
            "--node-id=a" in create
            and create[-1] == (tier or ["--runtime-version=v2-alpha-tpuv5-lite"])[0]
        )
        assert not any(option.startswith("--node-count") for option in create)


# One TPU host, whose home is a folder: ssh runs the command in it. `state` has the states that
# gcloud is yet to show, the last of which stays; `codes` how the trainings will end.
GCLOUD = """
echo "$4" >> "$HOME/calls"
case $4 in
  create) printf 'WAITING_FOR_RESOURCES\\nACTIVE\\n' > "$HOME/state" ;;
  delete) rm "$HOME/state" ;;
  describe)
    [[ -f $HOME/state ]] || exit 1
    head -n 1 "$HOME/state"
    [[ $(wc -l < "$HOME/state") == 1 ]] || sed -i 1d "$HOME/state"
    ;;
  scp) cp "$5" "$HOME/aim_jax.tgz" ;;
  ssh)
    cd "$HOME"
    status=0
    bash -c "${!##--command=}" || status=$?
    read -r state < state
    [[ $state == ACTIVE ]] || exit 255
    exit "$status"
    ;;
esac
"""
PYTHON = """
printf '%s\\n' "$@" > "$HOME/arguments"
read -r code < "$HOME/codes"
sed -i 1d "$HOME/codes"
case $code in
  preempted) echo SUSPENDED > "$HOME/state"; exit 75 ;;
  term) trap 'exit 75' TERM; touch "$HOME/trains"; while true; do sleep 0.05; done ;;
esac
exit "$code"
"""


@pytest.fixture
def tpu_host(tmp_path):
    programs = tmp_path / "bin"
    executable(programs / "gcloud", GCLOUD)
    executable(
        programs / "git", '[[ $3 != archive ]] || tar -czf "${5#*=}" -C "$2" launch/tpu_worker.sh'
    )
    executable(programs / "python3", "")  # its pip
    executable(tmp_path / "python", PYTHON)
    uv = 'if [[ $1 == venv ]]; then mkdir -p .venv/bin; cp "$HOME/python" .venv/bin/python; fi'
    executable(tmp_path / ".local" / "bin" / "uv", uv)
    return {"HOME": str(tmp_path), "PATH": f"{programs}:{os.environ['PATH']}"}


ALL = ["--poll_seconds", 0, "--max_restarts", 3, "--", *TRAINING]


@pytest.mark.parametrize(
    ("codes", "end", "created", "trained"),
    [
        (["75", "0"], 0, 1, 2),  # saved and stopped
        (["preempted", "134", "0"], 0, 2, 3),  # a lost slice, then a lost process
        (["1", "0"], 1, 1, 1),  # an error that repeating will not mend
        (["75"] * 5, 75, 1, 4),  # no more than --max_restarts
    ],
)
def test_tpu_pod_trains_until_it_is_complete(codes, end, created, trained, tpu_host, tmp_path):
    (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
    done = bash("tpu_pod.sh", "all", *TPU, *ALL, **tpu_host)
    assert done.returncode == end, done.stderr
    calls = (tmp_path / "calls").read_text().split()
    assert (calls.count("create"), calls.count("ssh")) == (created, 3 * trained)
    assert calls.count("delete") == created - 1 and "still exists and is billed" in done.stderr
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments == ["-m", "aim_jax", "train", "--coordinator=auto", *TRAINING]
    assert "WAITING_FOR_RESOURCES, 0 of at most 240 minutes" in done.stderr


def test_tpu_pod_replaces_a_slice_that_does_not_answer(tpu_host, tmp_path):
    (tmp_path / "codes").write_text("255\n255\n0\n")  # ACTIVE all the time
    done = bash("tpu_pod.sh", "all", *TPU, "--delete_at_end", *ALL, **tpu_host)
    assert done.returncode == 0 and "does not answer: deleting it" in done.stderr
    calls = (tmp_path / "calls").read_text().split()
    assert calls.count("create") == 2 and calls.count("delete") == 2 and calls[-1] == "delete"


@pytest.mark.parametrize(
    ("state", "message"), [("PROVISIONING", "after 0 minutes"), ("FAILED", "is FAILED")]
)
def test_tpu_pod_does_not_wait_for_ever(state, message, tpu_host, tmp_path):
    executable(tmp_path / "bin" / "gcloud", GCLOUD.replace("WAITING_FOR_RESOURCES\\nACTIVE", state))
    done = bash("tpu_pod.sh", "all", *TPU, "--wait_minutes", 0, *ALL, **tpu_host)
    assert done.returncode == 1 and message in done.stderr
    assert not (tmp_path / "arguments").exists()


def test_delete_lets_the_training_save(tpu_host, tmp_path):
    (tmp_path / "codes").write_text("term\n")
    assert bash("tpu_pod.sh", "create", *TPU, "--poll_seconds", 0, **tpu_host).returncode == 0
    assert bash("tpu_pod.sh", "setup", *TPU, **tpu_host).returncode == 0
    worker = ["bash", str(tmp_path / "aim_jax" / "launch" / "tpu_worker.sh")]
    for answer in ("started", "already running"):  # a second start must not train twice
        start = [*worker, "start", "train"]
        done = subprocess.run(start, env=os.environ | tpu_host, capture_output=True, text=True)
        assert done.returncode == 0 and answer in done.stdout
    waited = time.monotonic()
    while not (tmp_path / "trains").exists():
        assert time.monotonic() - waited < 30
        time.sleep(0.05)
    assert bash("tpu_pod.sh", "delete", *TPU, **tpu_host).returncode == 0
    assert (tmp_path / "aim_jax_run" / "status").read_text() == "75\n"
    assert not (tmp_path / "state").exists()


# Kubernetes


def violations(value, schema, path="manifest"):
    """What a structural schema of Kubernetes says against a value; unknown fields count."""
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}
    either = schema.get("x-kubernetes-int-or-string")
    expected = (int, str) if either else kinds[schema["type"]]
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        return [f"{path}: {value!r} is no {schema.get('type', 'integer or string')}"]
    found = []
    if value not in schema.get("enum", [value]):
        found.append(f"{path}: {value!r} is none of {schema['enum']}")
    if isinstance(value, list):
        for i, item in enumerate(value):
            found += violations(item, schema["items"], f"{path}[{i}]")
    elif isinstance(value, dict) and ("properties" in schema or "additionalProperties" in schema):
        known, others = schema.get("properties", {}), schema.get("additionalProperties")
        missing = set(schema.get("required", [])) - value.keys()
        found += [f"{path}: {key} is missing" for key in sorted(missing)]
        for key, item in value.items():
            if key in known or others:
                found += violations(item, known.get(key, others), f"{path}.{key}")
            else:
                found.append(f"{path}: unknown field {key}")
    return found


SCHEMA = json.loads((ROOT / "tests" / "jobset_schema.json").read_text())
SET = ["--name", "aim-xl", "--image", "repository/image:tag", "--claim", "claim"]
IN_POD = ["--", "--config", "aim_xl", "--workdir", "/data/two words"]
SETS = {
    "a slice": [*SET, "--accelerator", "v5e-64", *IN_POD],
    "slices": [*SET, "--accelerator", "v5p-128", "--slices", "2", *IN_POD],
    "a node": [*SET, "--accelerator", "gpu-8", *IN_POD],
    "nodes": [*SET, "--accelerator", "gpu-8", "--nodes", "4", "--node_selector", "a/b=c", *IN_POD],
}


@pytest.mark.parametrize("options", SETS.values(), ids=SETS)
def test_jobset_fits_the_schema(options):
    done = subprocess.run(
        [sys.executable, "launch/jobset.py", *options], capture_output=True, text=True, cwd=ROOT
    )
    assert violations(json.loads(done.stdout), SCHEMA) == []


def test_the_schema_finds_mistakes():
    manifest = jobset.parse(SETS["nodes"])
    pod = ["spec", "replicatedJobs", 0, "template", "spec", "template", "spec"]
    mistakes = [
        (["spec", "failurePolicy", "maxRestart"], 3, "unknown field maxRestart"),
        (["spec", "failurePolicy", "maxRestarts"], "3", "'3' is no integer"),
        (["spec", "failurePolicy", "restartStrategy"], "Never", "is none of"),
        ([*pod, "containers", 0, "command"], "python", "is no array"),
        ([*pod, "containers", 0, "env", 0], {"value": "1"}, "name is missing"),
    ]
    for path, value, message in mistakes:
        wrong = copy.deepcopy(manifest)
        place = wrong
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        found = violations(wrong, SCHEMA)
        assert len(found) == 1 and message in found[0]


@pytest.mark.network
def test_jobset_fits_the_official_schema():
    import urllib.request

    import yaml

    url = (
        "https://raw.githubusercontent.com/kubernetes-sigs/jobset/main/config/components/crd/bases/"
    )
    with urllib.request.urlopen(url + "jobset.x-k8s.io_jobsets.yaml") as answer:
        definition = yaml.safe_load(answer)
    [version] = [v for v in definition["spec"]["versions"] if v["name"] == "v1alpha2"]
    for options in SETS.values():
        assert violations(jobset.parse(options), version["schema"]["openAPIV3Schema"]) == []


def test_jobset_of_tpu_slices():
    manifest = jobset.parse(SETS["slices"])
    [workers] = manifest["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    pod = job["template"]["spec"]
    [container] = pod["containers"]
    assert (workers["replicas"], job["completions"], job["parallelism"]) == (2, 16, 16)
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
        "cloud.google.com/gke-tpu-topology": "4x4x4",
    }
    assert container["command"] == [
        "python",
        "-m",
        "aim_jax",
        "train",
        *IN_POD[1:],
        "--config.mesh.slices=2",
    ]
    assert "JAX_COORDINATOR_ADDRESS" not in {entry["name"] for entry in container["env"]}


def test_jobset_of_gpu_nodes():
    from aim_jax.parallel.processes import settings

    manifest = jobset.parse(SETS["nodes"])
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    [container] = job["template"]["spec"]["containers"]
    environment = {entry["name"]: entry["value"] for entry in container["env"]}
    assert job["completions"] == 4 and job["backoffLimit"] == 0
    assert environment["JAX_LOCAL_DEVICE_IDS"] == "0,1,2,3,4,5,6,7"
    assert settings(environment | {"JOB_COMPLETION_INDEX": "3"}) == {
        "coordinator_address": "aim-xl-workers-0-0.aim-xl:8476",
        "num_processes": 4,
        "process_id": 3,
    }
    assert job["template"]["spec"]["nodeSelector"] == {"a/b": "c"}
    # Exit codes 1 and 2 end the set; all others, and lost pods, start it again.
    [rule] = job["podFailurePolicy"]["rules"]
    assert rule == {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [1, 2]}}
    policy = manifest["spec"]["failurePolicy"]
    [final] = policy["rules"]
    assert policy["maxRestarts"] == 20
    assert (final["action"], final["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    alone = jobset.parse(SETS["a node"])["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert "JAX_NUM_PROCESSES" not in json.dumps(alone)


def test_sizes_of_tpu_slices():
    assert jobset.tpu("v5e-8") == ("tpu-v5-lite-podslice", "2x4", 1, 8)
    assert jobset.tpu("v5e-64") == ("tpu-v5-lite-podslice", "8x8", 16, 4)
    assert jobset.tpu("v6e-256") == ("tpu-v6e-slice", "16x16", 64, 4)
    assert jobset.tpu("v5p-8") == ("tpu-v5p-slice", "2x2x1", 1, 4)
    assert jobset.tpu("v5p-64") == ("tpu-v5p-slice", "2x4x4", 8, 4)
    assert jobset.tpu("v4-512") == ("tpu-v4-podslice", "4x8x8", 64, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([*SET, "--accelerator", "v5e-48", *IN_POD], "there is no slice v5e-48"),
        ([*SET, "--accelerator", "v6e-512", *IN_POD], "from 4 to 256"),
        ([*SET, "--accelerator", "h100", *IN_POD], "unknown accelerator 'h100'"),
        ([*SET, "--accelerator", "gpu-8", "--slices", "2", *IN_POD], "--slices is for TPUs"),
        ([*SET, "--accelerator", "v5e-64", "--nodes", "2", *IN_POD], "--nodes is for GPUs"),
        ([*SET, "--accelerator", "gpu-8", "--nodes", "0", *IN_POD], "at least 1"),
        ([*SET, "--accelerator", "gpu-8", "--mount", "/other", *IN_POD], "is not on the volume"),
        ([*SET, "--accelerator", "gpu-8", "--node_selector", "a", *IN_POD], "LABEL=VALUE"),
        ([*SET, "--accelerator", "gpu-8"], "needs --config NAME and --workdir DIR"),
        ([*SET, "--accelerator", "gpu-8", *ENCODING, *CODES, "/codes"], "--out /codes is not on"),
        (["--name", "Aim", *SET[2:], "--accelerator", "gpu-8", *IN_POD], "--name 'Aim'"),
    ],
)
def test_jobset_refuses(options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        jobset.parse(options)
    shown = capsys.readouterr()
    assert ended.value.code == 1 and not shown.out
    assert re.match("error: ", shown.err) and message in shown.err
    assert len(shown.err.splitlines()) == 1
