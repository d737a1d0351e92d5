"""The library against vectors of the official implementation."""

import dataclasses
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from aim_jax.training import aim as train
from tests import parity

GOLDEN = Path(__file__).parent / "golden"
AIM_CASES = (
    "aim_tiny_adaln",
    "aim_tiny_group",
    "aim_tiny_mlp",
    "aim_tiny_mlp_group",
    "aim_tiny_mamba1",
)
# The number of comparisons too, so that none gets lost.
CASES = dict.fromkeys(AIM_CASES, 27) | {"vq_tiny": 23, "aim_e2e": 7, "sampling_filter.npz": 5}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Everything here runs once or twice, so compiling well costs more than it saves."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def compare(path):
    """The report and what it printed."""
    lines = []
    return parity.run(path, lines.append), "\n".join(lines)


# The variants of aim_tiny_mlp occur in other folders as well.
SLOW = {"aim_tiny_mlp"}


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=[pytest.mark.slow] if c in SLOW else []) for c in CASES]
)
def test_golden(case):
    report, lines = compare(GOLDEN / case)
    assert not report.misses, lines
    assert report.checks == CASES[case], lines


def test_training_loss_is_the_golden_loss():
    config, params = parity.load_aim(GOLDEN / "aim_tiny_adaln")
    config = dataclasses.replace(config, position_offset=0, class_dropout=0.0)
    golden = parity.Golden(GOLDEN / "aim_tiny_adaln" / "expected.npz")
    batch = {name: golden[name] for name in ("codes", "labels")}
    loss, _ = jax.jit(train.loss_fn, static_argnames="config")(
        params, batch, jax.random.key(0), config=config
    )
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-6)


def test_a_perturbed_weight_is_a_miss(tmp_path):
    folder = shutil.copytree(GOLDEN / "aim_tiny_adaln", tmp_path / "aim")
    tensors = load_file(folder / "model.safetensors")
    tensors["mamba.backbone.layers.1.mixer.dt_bias"] += np.float32(1e-3)
    save_file(tensors, folder / "model.safetensors")
    report, _ = compare(folder)
    for name in ("train_logits", "loss", "grads.safetensors", "decode_official_guided"):
        assert f"aim {name}" in report.misses
    assert "aim embed_out" not in report.misses
    assert parity.main([str(folder)]) == 1


def test_nothing_is_passed_over_in_silence(tmp_path, capsys):
    assert parity.main([str(tmp_path)]) == 1
    assert "nothing was compared" in capsys.readouterr().out

    arrays = dict(np.load(GOLDEN / "sampling_filter.npz"))
    np.savez(tmp_path / "more.npz", **arrays, entropy=np.ones(3))
    report, lines = compare(tmp_path)
    assert report.checks == 5 and report.misses == ["more.npz entropy"]
    assert "not recognised" in lines

    np.savez(tmp_path / "other.npz", values=np.ones(3))
    shutil.copytree(GOLDEN / "aim_e2e", tmp_path / "chain")
    report, lines = compare(tmp_path)
    assert len(report.misses) == 3
    assert "needs the weights of aim_tiny_adaln, but there is no such folder" in lines


def test_shape_and_nan_are_misses():
    report = parity.Report(write=lambda line: None, case="x")
    report.array("shape", np.zeros(3), np.zeros((3, 1)), 1.0)
    report.array("nan", np.full(3, np.nan), np.ones(3), 1.0)
    report.exact("exact shape", np.zeros(3), np.zeros(4))
    report.group("group", {"a": np.ones(2), "b": np.full(2, np.nan)}, {"b": np.ones(2)}, 1.0)
    report.group("absent", {}, {"a": np.ones(2)}, 1.0)
    assert report.misses == ["x shape", "x nan", "x exact shape", "x group", "x absent a"]
