"""Common forms of checkpoints: averages beside the model, nested names, prefixes of wrappers."""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from aim_jax.utils.names import printable
from aim_jax.weights import convert
from aim_jax.weights.convert.lpips import load_lpips
from aim_jax.weights.formats import files, state_dicts
from aim_jax.weights.formats.errors import WeightsError
from aim_jax.weights.load import load_pretrained
from tests import lpips_weights
from tests.conftest import TINY_AIM, TINY_VQ
from tests.programs import run
from tests.torch_archives import saved

ONE, TWO, THREE = (np.full((2, 2), x, np.float32) for x in (1, 2, 3))


def taken(content, weights_key=""):
    """The number in the weights that are taken from a checkpoint."""
    with tempfile.TemporaryDirectory() as directory:
        opened = files.open_weights(saved(content, Path(directory) / "w.pt"), weights_key)
        return np.asarray(opened.tensors["w"])[0, 0]


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"w": ONE}, "ema": {"w": TWO}, "steps": 3},
        {"ema": {"w": TWO}, "model": {"w": ONE}, "optimizer": {"state": {0: {"m": THREE}}}},
        {"state_dict": {"w": ONE}, "state_dict_ema": {"w": TWO}, "epoch": 3},
        {"model": {"w": ONE}, "model_ema": {"w": TWO}},
        {"params": {"w": ONE}, "params_ema": {"w": TWO}},
        {"g": {"w": ONE}, "d": {"w": THREE}, "g_ema": {"w": TWO}},
        {"model_state_dict": {"w": ONE}, "ema_model_state_dict": {"w": TWO}},
        {"model": {"w": ONE}, "ema": {"state_dict": {"w": TWO}, "decay": 0.999}},
        {"model": {"w": ONE}, "ema": {"shadow": {"w": TWO}, "num_updates": 7}},
        {"state": {"model": {"w": ONE}, "ema": {"module": {"w": TWO}}}},
        {"model": {"w": ONE}, "ema": {"w": TWO, "decay": 0.999, "num_updates": 7}},
    ],
)
def test_average_beside_the_model_is_taken(content, capsys):
    assert taken(content) == 2
    assert capsys.readouterr().err.count("took the weights under") == 1


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"w": ONE}, "ema": None},
        {"model": {"w": ONE}, "ema": {}, "ema_decay": 0.999},
        {"model": {"w": ONE}, "ema": {"decay": 0.999}},
        {"state_dict": {"w": ONE}, "schema": {"w": TWO}},
        {"model": {"w": ONE}, "args": {"ema": True}, "steps": np.zeros((), np.float32)},
        {"state_dict": {"model": {"w": ONE}}},
        {"module": {"w": ONE}, "lr_scheduler": {"last": 3}},
        {"w": ONE},
    ],
)
def test_settings_of_an_average_are_not_one(content):
    assert taken(content) == 1


def test_weights_key_chooses_a_dictionary():
    content = {
        "model": {"w": ONE}, "ema": {"w": TWO}, "steps": 3,
        "nested": {"best": {"w": THREE}},
    }  # fmt: skip
    assert [taken(content, key) for key in ("", "model", "ema", "nested.best")] == [2, 1, 2, 3]
    for key in ("net", "steps", "nested.worst", "ema.w"):
        with pytest.raises(WeightsError, match=rf"w\.pt: holds no dictionary of tensors '{key}'"):
            taken(content, key)
    with pytest.raises(WeightsError, match=r"of tensors: model, ema, nested\.best"):
        taken(content, "net")


def test_ambiguous_averages_are_refused():
    with pytest.raises(WeightsError, match="averages: ema1, ema2; choose one with --weights_key"):
        taken({"model": {"w": ONE}, "ema1": {"w": TWO}, "ema2": {"w": THREE}})
    for average in ([TWO], {"shadow_params": [TWO], "decay": 0.999}):
        content = {"model": {"w": ONE}, "ema": average}
        with pytest.raises(WeightsError, match=r"without the names of its tensors; .*: model"):
            taken(content)
        assert taken(content, "model") == 1


def test_dictionaries_that_hold_themselves_end():
    content = {"steps": 3}
    content |= {"model": content, "ema": [content] * 1000}
    with pytest.raises(WeightsError, match="entries that are not tensors"):
        taken(content)


def plain(names, prefix=""):
    tensors = {name: np.float32(i) for i, name in enumerate(names)}
    found = state_dicts.plain_names(tensors, "w.pt", prefix)
    return {name: original for name, (original, _) in found.items()}


@pytest.mark.parametrize(
    "name",
    [
        "module.a.b",
        "_orig_mod.a.b",
        "a._orig_mod.b",
        "model.a.b",
        "net.a.b",
        "model.net.a.b",
        "model._orig_mod.a.b",
        "_orig_mod.model.a.b",
        "_fsdp_wrapped_module.a._fsdp_wrapped_module.b",
        "module._orig_mod.a.b",
        "_forward_module.model.module.a.b",
        "a._checkpoint_wrapped_module.b",
        "_fsdp_wrapped_module._orig_mod.model.a._checkpoint_wrapped_module.b",
        "state_dict.module.a.b",
    ],
)
def test_prefixes_of_wrappers_are_removed(name):
    assert plain([name, "n_averaged"]) == {"a.b": name}


def test_average_among_the_names_is_taken(capsys):
    found = plain(["ema_model.a.b", "online_model.a.b", "initted", "step"])
    assert found == {"a.b": "ema_model.a.b"}
    assert "took the moving average ema_model.*; the file also holds" in capsys.readouterr().err
    names = ["module.ema.model.a.b", "module.ema.n_averaged", "module.model.a.b"]
    assert plain(names) == {"a.b": "module.ema.model.a.b"}
    names = ["model.a.b", "model.c.d", "model_ema.ab", "model_ema.decay", "model_ema.num_updates"]
    assert plain(names) == {"a.b": "model_ema.ab", "c.d": "model.c.d"}  # LitEma drops the dots
    assert plain(names, "model.") == {"a.b": "model.a.b", "c.d": "model.c.d"}
    with pytest.raises(WeightsError, match=r"averages: ema1\., ema2\.; choose one with --prefix"):
        plain(["ema1.a", "ema2.a"])


def test_prefix_chooses_names(capsys):
    names = ["policy.student.a.b", "policy.teacher.a.b", "loss.w"]
    assert plain(names, "policy.teacher.") == plain(names, "policy.teacher")
    assert plain(names, "policy.teacher.") == {"a.b": "policy.teacher.a.b"}
    assert "took the 1 tensors policy.teacher.*, not the other 2" in capsys.readouterr().err
    with pytest.raises(WeightsError, match=r"prefix 'x\.'; names start with policy\.\*, loss\.\*"):
        plain(names, "x.")
    with pytest.raises(WeightsError, match=r"module\.a occurs under two names"):
        plain(["a", "module.a"])
    with pytest.raises(WeightsError, match=r"FSDP has joined; save .* full state dict"):
        plain(["layers.0._flat_param"])


# Whole conversions


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A safetensors file of official tensors of both parts."""
    rng = np.random.default_rng(0)
    shapes = convert.official_shapes(TINY_AIM) | convert.official_shapes(TINY_VQ)
    tensors = {k: rng.normal(size=s).astype(np.float32) for k, s in shapes.items()}
    path = tmp_path_factory.mktemp("official") / "model.safetensors"
    save_file(tensors, path)
    return path


def same_model(path, weights, tmp_path, **options):
    """Returns the model directory of a file, which must equal that of the official weights."""
    convert.to_jax(path, tmp_path / "model", **options)
    convert.to_torch(tmp_path / "model", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    for key, tensor in load_file(weights).items():
        np.testing.assert_array_equal(back[key], tensor, err_msg=key)
    return load_pretrained(tmp_path / "model")


def test_prefixes_in_a_whole_conversion(weights, tmp_path):
    """FSDP around every layer, compiled, inside Lightning; an average and the raw weights."""
    tensors = load_file(weights)
    wrapped = {
        "model._orig_mod." + k.replace("layers.", "layers._fsdp_wrapped_module."): x
        for k, x in tensors.items()
    }
    save_file(wrapped, tmp_path / "wrapped.safetensors")
    same_model(tmp_path / "wrapped.safetensors", weights, tmp_path)


def test_averages_in_a_whole_conversion(weights, tmp_path):
    tensors = load_file(weights)
    both = {f"ema_model.{k}": x for k, x in tensors.items()}
    both |= {f"online_model.{k}": x + 1 for k, x in tensors.items()}
    save_file(both | {"initted": np.array(True), "step": np.array(3)}, tmp_path / "w.safetensors")
    same_model(tmp_path / "w.safetensors", weights, tmp_path)
    other = tmp_path / "other"
    convert.to_jax(tmp_path / "w.safetensors", other, prefix="online_model.")
    assert load_pretrained(other).aim_params is not None
    with pytest.raises(WeightsError, match=r"holds no dictionaries to choose from .* --prefix"):
        convert.to_jax(tmp_path / "w.safetensors", tmp_path / "x", weights_key="ema")
    with pytest.raises(WeightsError, match="which is not given"):
        convert.to_jax(tmp_path / "w.safetensors", tmp_path / "x", vq_weights_key="ema")
    assert not (tmp_path / "x").exists()


def test_unknown_prefixes_are_chosen(weights, tmp_path):
    tensors = {f"policy.actor.{k}": x for k, x in load_file(weights).items()}
    tensors["loss.discriminator.weight"] = ONE
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"belong neither to AiM .* pass it as --prefix"):
        convert.to_jax(tmp_path / "w.safetensors", tmp_path / "x")
    same_model(tmp_path / "w.safetensors", weights, tmp_path, prefix="policy.actor.")
    given = ("--weights", tmp_path / "w.safetensors", "--out", tmp_path / "by_program")
    done = run("convert", "to-jax", *given, "--prefix", "policy.actor.")
    assert done.returncode == 0 and (tmp_path / "by_program" / "model.json").is_file()
    assert f"took the {len(tensors) - 1} tensors policy.actor.*, not the other 1" in done.stderr


def test_lpips_of_a_wrapped_module(tmp_path):
    tensors = lpips_weights.seeded_weights()
    save_file(tensors, tmp_path / "plain.safetensors")
    expected = load_lpips(tmp_path / "plain.safetensors")
    save_file({f"module.{k}": x for k, x in tensors.items()}, tmp_path / "module.safetensors")
    save_file({f"loss.lpips.{k}": x for k, x in tensors.items()}, tmp_path / "loss.safetensors")
    for found in (
        load_lpips(tmp_path / "module.safetensors"),
        load_lpips(tmp_path / "loss.safetensors", prefix="loss.lpips."),
    ):
        np.testing.assert_array_equal(found["head_0"], expected["head_0"])
        np.testing.assert_array_equal(found["conv_3"]["kernel"], expected["conv_3"]["kernel"])


def test_directories_of_diffusers_are_opened(weights, tmp_path):
    (tmp_path / "hub").mkdir()
    file = tmp_path / "hub" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(weights.read_bytes())
    same_model(tmp_path / "hub", weights, tmp_path)


# Pickles


def test_messages_about_weights_have_no_escape_codes(tmp_path):
    assert printable("\x1b[31mred\x1b[0m \x1b]0;title\x07 a\tb\nc\x07") == "red  a\tb\nc\\x07"
    save_file({"\x1b[2Jevil": ONE}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=r"holds the character U\+001B") as caught:
        convert.to_jax(tmp_path / "w.safetensors", tmp_path / "x")
    assert "\x1b" not in str(caught.value) and "evil" in str(caught.value)


def test_the_dictionary_that_is_taken_is_named(tmp_path):
    file = saved({"model": {"w": ONE}, "ema": {"w": TWO}, "steps": 3}, tmp_path / "w.pt")
    for key in ("", "model", "ema"):
        assert files.open_weights(file, key).weights_key == (key or "ema")
    average = {"n_averaged": np.zeros((), np.int64), "module.w": ONE, "module.b": TWO}
    saved({"ema": average}, file)  # as torch.optim.swa_utils.AveragedModel
    tensors = files.open_weights(file).tensors
    assert set(state_dicts.plain_names(tensors, file)) == {"w", "b"}


def test_pickles_of_programs_are_refused_by_the_name_of_the_type(tmp_path):
    extras = {"pathlib": argparse.Namespace(path=Path("x")), "scalar": np.float64(1)}
    for name, extra in extras.items():
        file = saved({"model": {"w": ONE}, "extra": extra}, tmp_path / "w.pt")
        with pytest.raises(WeightsError, match=rf"holds [\w.]*{name}[\w.]* beside tensors"):
            files.open_weights(file)
