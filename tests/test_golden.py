"""The library against vectors of the official implementation, and the conversion they rest on."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from aim_jax import convert, train
from aim_jax.models import PRESETS, VQConfig
from benchmarks import parity

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


# Conversion


def official(case):
    """Configuration, official tensors and the functions that convert them."""
    config = json.loads((GOLDEN / case / "config.json").read_text())
    aim, vq = convert.load_official(GOLDEN / case)
    if vq:
        return convert.vq_config_from_official(config), vq, convert.convert_vq, convert.export_vq
    return convert.aim_config_from_official(config), aim, convert.convert_aim, convert.export_aim


@pytest.mark.parametrize("case", [*AIM_CASES, "vq_tiny"])
def test_conversion_and_back_is_exact(case):
    config, tensors, to_ours, to_official = official(case)
    back = to_official(to_ours(tensors, config), config)
    left_out = tensors.keys() - back.keys()
    assert left_out <= {convert.TIED_HEAD, convert.USAGE_HISTORY}
    assert back.keys() == tensors.keys() - left_out == convert.official_shapes(config).keys()
    for key, array in back.items():
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, tensors[key], err_msg=key)


def test_gradients_convert_like_weights():
    config, *_ = official("aim_tiny_group")
    grads = load_file(GOLDEN / "aim_tiny_group" / "grads.safetensors")
    assert convert.TIED_HEAD not in grads
    ours = convert.convert_aim(grads, config)
    packed = grads["mamba.backbone.layers.3.mixer.in_proj.weight"]
    np.testing.assert_array_equal(ours["layers"]["mixer"]["dt_proj"]["kernel"][3], packed[-8:].T)
    table = grads["mamba.backbone.layers.3.scale_shift_table"]
    np.testing.assert_array_equal(ours["adaln"]["table"][3], table[0])


@pytest.mark.parametrize(
    ("name", "config"), [("AiM-B", PRESETS["B"]), ("AiM-L", PRESETS["L"]), ("VQ-f16", VQConfig())]
)
def test_keys_and_shapes_of_the_published_models(name, config):
    lines = (GOLDEN / "keys" / f"{name}_state_dict_keys.txt").read_text().splitlines()
    pairs = [line.split("  ") for line in lines if not line.startswith("#")]
    expected = {key: tuple(int(n) for n in re.findall(r"\d+", shape)) for key, shape in pairs}
    for key in (convert.TIED_HEAD, convert.USAGE_HISTORY):
        expected.pop(key, None)
    shapes = convert.official_shapes(config)
    ours = {k: v for k, v in shapes.items() if not re.search(r"backbone\.layers\.[1-9]", k)}
    assert ours == expected
    if name == "AiM-L":
        assert len(shapes) + 1 == 490


def test_every_key_that_does_not_fit_is_named():
    config, tensors, *_ = official("aim_tiny_adaln")
    wrong = dict(tensors)
    del wrong["mamba.backbone.norm_f.weight"]
    wrong["mamba.backbone.layers.3.norm.weight"] = np.zeros(64, np.float32)
    wrong["mamba.backbone.layers.0.mixer.D"] = np.zeros(9, np.float32)
    with pytest.raises(ValueError) as error:
        convert.convert_aim(wrong, config)
    assert "(3 keys)" in str(error.value)
    for line in (
        "mamba.backbone.norm_f.weight: missing",
        "mamba.backbone.layers.3.norm.weight: unexpected",
        "mamba.backbone.layers.0.mixer.D: shape (9,), expected (8,)",
    ):
        assert line in str(error.value)


def test_an_untied_head_is_refused():
    config, tensors, *_ = official("aim_tiny_adaln")
    head = tensors[convert.TIED_HEAD]
    with pytest.raises(ValueError, match="differs from"):
        convert.convert_aim(tensors | {convert.TIED_HEAD: head + 1}, config)


def test_files_that_hold_no_official_weights_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors: no such file"):
        convert.load_official(tmp_path)
    save_file({"encoder.weight": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 keys start with neither .*: encoder.weight"):
        convert.load_official(tmp_path)


def test_official_configurations():
    flat = json.loads((GOLDEN / "aim_tiny_group" / "config.json").read_text())
    config = convert.aim_config_from_official(flat, position_offset=0, remat="dots")
    assert (config.adaln, config.num_groups, config.d_state, config.headdim) == ("group", 2, 16, 16)
    assert (config.position_offset, config.remat) == (0, "dots")
    assert convert.aim_config_from_official(flat).position_offset == 1

    mamba2 = {"layer": "Mamba2", "ngroups": 2, "headdim": 8, "d_conv": 3, "expand": 4}
    config = convert.aim_config_from_official(flat | {"ssm_cfg": mamba2})
    assert (config.d_state, config.ngroups, config.d_conv, config.d_inner) == (128, 2, 3, 256)
    config = convert.aim_config_from_official(flat | {"ssm_cfg": {"dt_rank": 4}})
    assert (config.mixer, config.d_state, config.dt_rank) == ("mamba1", 16, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm": False}, "rms_norm=False is not supported; expected True"),
        ({"tie_embeddings": False}, "tie_embeddings=False"),
        ({"attn_layer_idx": [2]}, r"attn_layer_idx=\[2\]"),
        ({"rope": 1}, r"unknown options \['rope'\]"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "layer='Mamba3'"),
        ({"ssm_cfg": {"layer": "Mamba2", "d_stat": 8}}, r"ssm_cfg: unknown options \['d_stat'\]"),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "norm_before_gate=True"),
        ({"ssm_cfg": {"layer": "Mamba2", "dt_limit": [0.0, 1.0]}}, "dt_limit"),
        ({"ssm_cfg": {"layer": "Mamba1", "dt_rank": 7}}, "dt_rank=7 is not supported"),
    ],
)
def test_official_options_without_a_counterpart_are_refused(changes, message):
    flat = json.loads((GOLDEN / "aim_tiny_group" / "config.json").read_text())
    with pytest.raises(ValueError, match=message):
        convert.aim_config_from_official(flat | changes)


def test_incomplete_or_unknown_configurations_are_refused():
    with pytest.raises(ValueError, match=r"\['d_model', 'num_classes'\] are missing"):
        convert.aim_config_from_official({"n_layer": 2, "vocab_size": 8, "num_tokens": 4})
    with pytest.raises(ValueError, match=r"unknown options \['codebook'\]"):
        convert.vq_config_from_official({"ch": 32, "codebook": 8})
