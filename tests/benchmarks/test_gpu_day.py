"""The program for a GPU that is lent for minutes, rehearsed; its records, tables and trainings."""

import dataclasses
import functools
import json
import math
import re
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest

from aim_jax import ops
from aim_jax.data.token_cache import TokenCache
from aim_jax.ops.triton_availability import triton_unavailable_because
from aim_jax.weights.load import load_pretrained
from benchmarks import decode_gpu, gpu_day, gpu_training, traces
from tests.conftest import ROOT

TRAINING = {
    "vq": {
        "steps": 1, "batch_size": 8, "model.ch": 32, "model.ch_mult": [1, 2], "model.n_embed": 16,
        "model.z_channels": 8, "model.embed_dim": 4, "optimizer.warmup_steps": 0,
    },
    "aim": {
        "steps": 4, "batch_size": 2, "log_every": 1, "model.d_model": 16, "model.n_layer": 1,
        "model.headdim": 8, "model.d_state": 8, "model.vocab_size": 16, "model.num_tokens": 256,
        "model.num_groups": 1, "optimizer.warmup_steps": 0,
    },
}  # fmt: skip


def overrides(name, **changes):
    settings = TRAINING[name] | changes
    return [f"{name}.{field}={json.dumps(value)}" for field, value in settings.items()]


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Parts made of a few images in CIFAR-10's format."""
    data, out = (tmp_path_factory.mktemp(name) for name in ("cifar10", "parts"))
    rng = np.random.default_rng(0)
    for i in range(1, 6):
        records = rng.integers(0, 256, (4, 3073), np.uint8)
        records[:, 0] %= 10
        records.tofile(data / f"data_batch_{i}.bin")
    assert gpu_training.main(["prepare", "--data", str(data), "--out", str(out)]) == 0
    return out


def test_the_rehearsal_runs_every_stage(tmp_path, parts):
    if reason := triton_unavailable_because():
        pytest.skip(reason)
    stages = [f"--stage={i}" for i in range(1, 7)]
    settings = [f"--config={x}" for x in overrides("vq") + overrides("aim")]
    arguments = ["--rehearse", "--out", str(tmp_path), "--parts", str(parts), *stages, *settings]
    status = gpu_day.main(arguments)
    content = json.loads((tmp_path / "results.json").read_text())
    cases = content["cases"]
    assert status == 0, [name for name, result in cases.items() if "failed" in result]
    assert {name[0] for name in cases} == set("123456") and content["machine"]["device"]
    unsupported = {name for name, result in cases.items() if "unsupported" in result}
    assert unsupported == {"6 CIFAR-10 vq_full: training"}  # the parts hold no weights of LPIPS
    step = cases["5 tiny xla: step"]
    assert step["images/s"] == pytest.approx(2e3 / step["ms"]) and len(step["losses"]) == 2
    assert cases["2 B: 1 dual kernels"]["kernels"]
    assert cases["6 CIFAR-10 aim: training"]["val_loss"] < 2 * math.log(16)
    assert len(list(tmp_path.iterdir())) <= 8
    out = tmp_path / "model"
    assert gpu_training.main(["assemble", "--results", str(tmp_path), "--out", str(out)]) == 0
    model = load_pretrained(out)
    assert (model.aim_config.d_model, model.vq_config.n_embed) == (16, 16)


# Records and processes


def test_a_failing_case_is_recorded_and_the_next_one_runs(tmp_path):
    def fails():
        raise ValueError("no such shape\nand more")

    def unsupported():
        raise gpu_training.Unsupported("no weights of LPIPS")

    def breaks():
        raise jax.errors.JaxRuntimeError("INTERNAL: CUDA_ERROR_ILLEGAL_ADDRESS")

    record = gpu_day.Record(tmp_path / "results.json", math.inf)
    cases = {
        "fails": fails,
        "unsupported": unsupported,
        "differs": lambda: {"passed": False, "error": 1.0},
        "passes": lambda: {"passed": True, "ms": 2.0},
    }
    assert all([record.run(name, case) for name, case in cases.items()])
    assert not record.run("breaks", breaks)
    results = json.loads(record.file.read_text())["cases"]
    assert results["fails"]["failed"] == "ValueError: no such shape"
    assert results["unsupported"]["unsupported"] == "Unsupported: no weights of LPIPS"
    assert "differ" in results["differs"]["failed"] and results["differs"]["error"] == 1
    assert results["passes"].items() >= {"ms": 2.0}.items() and "failed" not in results["passes"]
    assert [name for name, result in results.items() if gpu_day.again(result)] == [
        "fails", "differs", "breaks"
    ]  # fmt: skip
    late = gpu_day.Record(record.file, deadline=0)
    late.run("passes", fails)  # recorded already
    late.run("late", fails)
    assert late.cases["late"] == {"left out": "no time was left"}
    assert late.cases["passes"] == results["passes"] and gpu_day.again(late.cases["late"])


def test_a_process_that_a_case_ends_is_started_again(tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    args = gpu_day.parse(["--out", str(tmp_path)])
    begun = []

    def run_child(name, args):
        record = gpu_day.Record(file, math.inf)
        waiting = [case for case in ("a", "b") if case not in record.cases]
        if name == "empty" or not waiting:
            return -11 if name == "empty" else 0
        begun.append(waiting[0])
        record.cases[waiting[0]] = {"failed": "the process ended during this case"}
        record.write()
        return -11

    monkeypatch.setattr(gpu_day, "run_child", run_child)
    gpu_day.run_children(["crashes", "empty"], args, file)
    assert begun == ["a", "b"]
    args.deadline = 0
    gpu_day.run_children(["late"], args, file)
    cases = gpu_day.Record(file, 0).cases
    assert cases["empty: process"]["failed"] and cases["late: process"]["left out"]
    assert set(cases) == {"a", "b", "empty: process", "late: process"}


def test_a_machine_without_a_gpu_is_told(tmp_path, capsys):
    """In a process of its own, as all parts run."""
    assert gpu_day.main(["--out", str(tmp_path), "--stage", "4"]) == 1
    content = json.loads((tmp_path / "results.json").read_text())
    assert "is cpu, expected" in content["cases"]["4 launch shapes: device"]["failed"]
    assert content["machine"]["versions"]["jax"] == jax.__version__
    assert "1 cases, 1 failed, 0 left out" in capsys.readouterr().out


def test_a_process_ends_at_the_deadline(tmp_path, monkeypatch):
    script = tmp_path / "sleep.py"
    script.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(gpu_day, "__file__", str(script))
    monkeypatch.setattr(gpu_training, "MARGIN", 0)
    args = gpu_day.parse(["--out", str(tmp_path), "--budget_s", "0.2"])
    start = time.time()
    assert gpu_day.run_child("B without graphs", args) < 0 and time.time() < start + 30


def test_wrong_stages_are_named(tmp_path, capsys):
    for arguments, expected in (
        (["--stage", "7"], "7: expected 1 to 6"),
        (["--stage=6"], "--parts"),
        (["--train", "vae"], "vae: expected some of vq, vq_full, aim"),
    ):
        with pytest.raises(SystemExit):
            gpu_day.main(["--out", str(tmp_path), *arguments])
        assert expected in capsys.readouterr().err


def test_it_needs_only_the_listed_packages():
    """In a fresh process: neither the loader nor the conversion, and what the docstring lists."""
    script = """
import json, sys
from importlib.metadata import packages_distributions
import benchmarks.gpu_day
from aim_jax.ops.triton_availability import triton_unavailable_because
if not triton_unavailable_because():
    import benchmarks.kernel_checks
modules = set(sys.modules)
owners = packages_distributions()
print(json.dumps([sorted(modules), sorted({d for m in modules for d in owners.get(m, [])})]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    modules, distributions = json.loads(done.stdout)
    unwanted = r"grain|array_record|tensor(flow|board)|safetensors|torch\b|aim_jax.weights.convert"
    assert not [name for name in modules if re.match(unwanted, name)]

    def plain(name):
        return re.sub("[-_.]+", "-", name).lower()

    listed = {plain(name) for name in gpu_day.WHEELS.split()}
    # What comes with jax and triton; what these import where it is installed; google's namespace.
    present = {"jax", "jaxlib", "numpy", "scipy", "ml-dtypes", "opt-einsum", "triton", "aim-jax"}
    present |= {"setuptools", "pip", "jax-cuda13-plugin", "jax-cuda13-pjrt"}
    optional = {"cloudpickle", "filelock", "flatbuffers", "googleapis-common-protos"}
    assert {plain(name) for name in distributions} <= listed | present | optional


def test_cases_of_real_sizes_can_be_traced():
    """Kernels and references agree in shapes and dtypes, and every launch shape is accepted."""
    if reason := triton_unavailable_because():
        pytest.skip(reason)
    from benchmarks import kernel_checks, kernels

    def shapes(op, case):
        arguments = jax.eval_shape(lambda: kernel_checks.random_arguments(case))
        return jax.eval_shape(functools.partial(kernel_checks.results, op, case), arguments)

    parts = set()
    for config in gpu_day.REAL.checked.values():
        for case in kernels.cases(config, images=2):
            if kernel_checks.reference(case) is None:
                parts.add(case.name)
                continue
            arrays = shapes(case.op, case)
            expected = shapes(kernel_checks.reference(case), case)
            for one, other in zip(arrays, expected, strict=True):
                assert (one.shape, one.dtype) == (other.shape, other.dtype), case.name
    assert parts == {  # of the differentiable scan and convolution
        "ssd_outputs", "ssd_inputs_gradient", "ssd_weights_gradient", "conv_outputs",
        "conv_gradients",
    }  # fmt: skip
    for config, images in gpu_day.REAL.swept:
        for case in kernels.cases(config, images):
            if kernel_checks.name_of(case.op) in kernel_checks.CACHES:
                tried = list(kernel_checks.shapes_of(case))
                assert len(tried) == (12 if "mamba2" in case.name else 24)
                shapes(functools.partial(case.op, **tried[-1]), case)
    args = decode_gpu.parse(list(gpu_day.REAL.options))
    for runs in (gpu_day.REAL.b_runs, gpu_day.REAL.xl_runs, gpu_day.REAL.without_graphs):
        assert all(set(engines) <= set(args.known_engines) for engines, _, _ in runs)


def test_wrong_values_and_gradients_are_seen(monkeypatch):
    """With plain JAX in place of kernels, exact and with errors."""
    if reason := triton_unavailable_because():
        pytest.skip(reason)
    from benchmarks import kernel_checks, kernels

    cases = {case.name: case for case in kernels.cases(gpu_day.TINY, images=2)}
    case = cases["conv_step"]

    def conv_step(error):
        def op(**arguments):
            y, cache = ops.conv_step(**arguments)
            return y, cache.at[0, 0, 0, 0].add(error)

        op.__name__ = "conv_step"
        return dataclasses.replace(case, op=op)

    assert kernel_checks.compare_values(conv_step(0.0))["passed"]
    assert not kernel_checks.compare_values(conv_step(1.0))["passed"]

    def ssd_scan(error):
        def op(A, implementation, **arguments):
            return ops.ssd_scan(A=A * (1 + error * (implementation == "triton")), **arguments)

        return op

    for error in (0.0, 1e-2):
        monkeypatch.setitem(kernel_checks.DIFFERENTIABLE, "ssd_prefill", ssd_scan(error))
        result = kernel_checks.compare_gradients(cases["ssd_prefill"], "float32")
        assert result["passed"] == (error == 0)
        assert set(result["differences"]) == {
            "x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state", "y", "state"
        }  # fmt: skip


# Traces


def test_kernels_of_a_trace_are_summed_by_name():
    def name(kind, text, pid, tid=None):
        where = {"pid": pid} if tid is None else {"pid": pid, "tid": tid}
        return {"ph": "M", "name": kind, "args": {"name": text}, **where}

    def event(name, ts, dur, pid=1, tid=7):
        return {"ph": "X", "name": name, "ts": ts, "dur": dur, "pid": pid, "tid": tid}

    events = [
        name("process_name", "/device:GPU:0", 1),
        name("thread_name", "Stream #7(Compute)", 1, 7),
        name("thread_name", "XLA Ops", 1, 8),
        name("process_name", "/host:CPU", 2),
        name("thread_name", "tf_XLAEigen/1", 2, 7),
        event("fusion_12", 100, 30),
        event("fusion_3", 140, 20),
        event("mamba2_step_kernel", 200, 40),
        event("copy.1", 300, 1),
        event("fusion_12", 100, 30, tid=8),
        event("python", 0, 1000, pid=2),
    ]
    table = traces.kernel_table(events, rows=2)
    assert table["device"] and table["busy_ms"] == pytest.approx(0.091)
    assert table["span_ms"] == pytest.approx(0.201)
    rows = [(row["name"], row["calls"], pytest.approx(row["ms"])) for row in table["kernels"]]
    assert rows == [("fusion", 2, 0.05), ("mamba2_step_kernel", 1, 0.04), ("1 others", 1, 0.001)]
    assert not traces.kernel_table(events[3:5] + events[-1:])["device"]


# Trainings


def test_parts_hold_the_images(parts, tmp_path, monkeypatch):
    train = gpu_training.read_parts(parts, "train")
    assert train["images"].shape == (19, 32, 32, 3) and train["labels"].dtype == np.int32
    monkeypatch.setattr(gpu_training, "MOST_PART", 10_000)
    gpu_training.write_parts(tmp_path, "train", "images", train["images"], train["labels"])
    assert len(list(tmp_path.iterdir())) == 6
    again = gpu_training.read_parts(tmp_path, "train")
    for name, array in train.items():
        np.testing.assert_array_equal(again[name], array)
    next(tmp_path.iterdir()).unlink()
    with pytest.raises(FileNotFoundError, match="5 parts of train"):
        gpu_training.read_parts(tmp_path, "train")


def test_parts_hold_the_tokens_of_a_cache(tmp_path, monkeypatch):
    codes = np.arange(24, dtype=np.uint16).reshape(3, 2, 4)

    class Cache:
        def __len__(self):
            return len(codes)

        def take(self, indices):
            return codes[indices], np.zeros(len(indices), np.int32)

    monkeypatch.setattr(TokenCache, "open", lambda path: Cache())
    assert gpu_training.main(["prepare", "--codes", "codes", "--out", str(tmp_path)]) == 0
    arrays = gpu_training.with_codes(gpu_training.read_parts(tmp_path, "train"), None)
    np.testing.assert_array_equal(arrays["codes"], codes)
    order = gpu_training.EpochOrder(0, 3, (0, 0))
    batch = gpu_training.training_batch(arrays, order, 0, 3, 0)
    first = {int(row[0]) // 8: row for row in batch["codes"]}
    assert sorted(first) == [0, 1, 2] and batch["codes"].dtype == np.int32


def test_a_training_resumes_exactly(parts, tmp_path, monkeypatch):
    """Two steps, an end, and two more; the state in several files, parts of another one beside."""
    vq = load_pretrained("cifar10")
    monkeypatch.setattr(gpu_training, "trained_tokenizer", lambda out: vq)
    monkeypatch.setattr(gpu_training, "MOST_STATE", 20_000)
    settings = {"model.vocab_size": 1024, "model.num_tokens": 64}
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    for folder in (whole, halves):
        folder.mkdir()
    late = time.time() + 3600
    settings = overrides("aim", **settings)
    expected = gpu_training.train("aim", parts, whole, late, settings)

    save = gpu_training.save_state
    stopped = []

    def save_at_2(out, name, step, state):
        save(out, name, step, state)
        stopped.append(step)

    monkeypatch.setattr(gpu_training, "save_state", save_at_2)
    monkeypatch.setattr(gpu_training, "SAVE_EVERY", -1)
    clock = types.SimpleNamespace(time=lambda: late if 2 in stopped else time.time())
    monkeypatch.setattr(gpu_training, "time", clock)
    first = gpu_training.train("aim", parts, halves, late, settings)
    monkeypatch.undo()
    assert not first["complete"] and first["step"] == stopped[-1] == 2
    assert len(list(halves.glob("aim-step2-*.npz"))) > 1
    np.savez(halves / "aim-step3-0of2.npz")  # without its second file
    monkeypatch.setattr(gpu_training, "trained_tokenizer", lambda out: vq)
    second = gpu_training.train("aim", parts, halves, late, settings)
    assert second["complete"] and not list(halves.glob("*step*"))
    assert first["losses"] | second["losses"] == expected["losses"]
    assert second["val_loss"] == expected["val_loss"]
    assert (halves / "aim.npz").read_bytes() == (whole / "aim.npz").read_bytes()
    assert (halves / "samples.png").is_file()
