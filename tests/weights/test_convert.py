"""Official weights in and out: exact both ways, whole or not at all, whatever the file holds."""

import argparse
import dataclasses
import hashlib
import json
import os
import pickle
import re
import struct
import sys
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load_file, save, save_file

from aim_jax.models import PRESETS, AiM, VQConfig
from aim_jax.sampling.config import SamplingConfig
from aim_jax.sampling.generate import generate, generate_tokens, prepare_decoder
from aim_jax.weights import convert
from aim_jax.weights.adapt import adapt_aim, rearrange_adaln, resized_positions
from aim_jax.weights.convert import official as conversion_official
from aim_jax.weights.formats import files
from aim_jax.weights.load import load_pretrained
from aim_jax.weights.pretrained import flatten
from benchmarks import conversion
from tests.conftest import TINY_AIM, TINY_VQ
from tests.torch_archives import View, saved

GOLDEN = Path(__file__).parents[1] / "golden"
EMBEDDING = "mamba.backbone.embeddings.word_embeddings.weight"
AIM_CASES = (
    "aim_tiny_adaln",
    "aim_tiny_group",
    "aim_tiny_mlp",
    "aim_tiny_mlp_group",
    "aim_tiny_mamba1",
)


# Rules and configurations


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


HUB = {
    "transformers": {
        "_name_or_path": "someone/model", "architectures": ["AiM"], "model_type": "aim",
        "torch_dtype": "float32", "transformers_version": "4.40.0", "id2label": {"0": "LABEL_0"},
        "tie_word_embeddings": True, "pad_token_id": None, "_attn_implementation_autoset": True,
    },
    "diffusers": {"_class_name": "AiM", "_diffusers_version": "0.30.0"},
    "generation": {"do_sample": False, "num_beams": 1, "temperature": 1.0, "max_length": 20},
    "hub": {"library_name": "aim", "tags": [], "license": "mit", "auto_map": {}, "dtype": "bf16"},
}  # fmt: skip


@pytest.mark.parametrize("library", HUB)
def test_entries_of_hub_libraries_are_accepted(library):
    aim = convert.official_aim_config(TINY_AIM)
    vq = convert.official_vq_config(TINY_VQ)
    found = convert.aim_config_from_official(aim | HUB[library], position_offset=0, chunk_size=4)
    assert found == dataclasses.replace(TINY_AIM, chunk_size=4)
    entries = {k: v for k, v in HUB[library].items() if k != "tie_word_embeddings"}
    assert convert.vq_config_from_official(vq | entries) == TINY_VQ


def test_entries_that_change_a_network_are_refused():
    aim = convert.official_aim_config(TINY_AIM)
    for entry, message in (
        ({"quantization_config": {"bits": 4}}, r"unknown options \['quantization_config'\]"),
        ({"rope_theta": 1e4}, "unknown options"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False is not supported"),
    ):
        with pytest.raises(ValueError, match=message):
            convert.aim_config_from_official(aim | entry)


def infer(tensors):
    """Configuration from nothing but shapes."""
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    aim = any(key.startswith("mamba.") for key in shapes)
    return (convert.infer_aim_config if aim else convert.infer_vq_config)(shapes)


@pytest.mark.parametrize("case", [*AIM_CASES, "vq_tiny"])
def test_shapes_alone_tell_the_configuration(case):
    config, tensors, *_ = official(case)
    found = infer(tensors)
    hidden = {"d_intermediate": 0} if case.startswith("aim_tiny_mlp") else {}  # rounded up to 128
    if case == "vq_tiny":
        assert found == config
        assert convert.vq_config_from_official(convert.official_vq_config(config)) == config
    else:
        assert dataclasses.replace(found, **hidden) == dataclasses.replace(config, **hidden)
        assert found.mlp_hidden == config.mlp_hidden
        assert convert.aim_config_from_official(convert.official_aim_config(config)) == config


@pytest.mark.parametrize("config", [*PRESETS.values(), VQConfig(), VQConfig(ch_mult=(1, 2, 2, 4))])
def test_shapes_of_the_published_models_tell_their_configuration(config):
    shapes = convert.official_shapes(config)
    if isinstance(config, VQConfig):
        assert convert.infer_vq_config(shapes) == config
    else:
        assert convert.infer_aim_config(shapes) == dataclasses.replace(config, position_offset=1)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("embeddings.word_embeddings.weight", None, r"word_embeddings\.weight is missing"),
        ("embeddings.word_embeddings.weight", (0, 64), "expected 2 axes"),
        ("layers.0.mixer.A_log", (8, 2), r"A_log: shape \(8, 2\), expected 1 axes"),
        ("layers.0.mixer.A_log", (7,), "A_log: a size of 128 is not a multiple of 7"),
        ("layers.99.norm.weight", (64,), "found 4 numbers up to 99"),
    ],
)
def test_strange_shapes_are_named(key, shape, message):
    _, tensors, *_ = official("aim_tiny_adaln")
    shapes = {key: tensor.shape for key, tensor in tensors.items()}
    shapes[f"mamba.backbone.{key}"] = shape
    shapes = {key: shape for key, shape in shapes.items() if shape is not None}
    with pytest.raises(ValueError, match=message):
        convert.infer_aim_config(shapes)


# Files


def random_official(path, dtype=np.float32, aim=TINY_AIM, vq=TINY_VQ):
    """A small official checkpoint with random weights."""
    conversion.write_random_official(path, aim, vq, dtype)
    return path


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A hub-like directory: random AiM and tokenizer in one file, no config.json."""
    folder = tmp_path_factory.mktemp("official")
    random_official(folder / "model.safetensors")
    return folder


def same(one, other):
    """Whether two safetensors files hold the same bits under the same keys."""
    a, b = load_file(one), load_file(other)
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and a[key].shape == b[key].shape, key
        assert a[key].tobytes() == b[key].tobytes(), key


@pytest.mark.parametrize(
    "case", ["aim_tiny_group", "aim_tiny_mlp_group", "aim_tiny_mamba1", "vq_tiny"]
)
def test_official_file_and_back_is_the_same_file(case, tmp_path):
    model = convert.to_jax(GOLDEN / case, tmp_path / "model")
    convert.to_torch(model, tmp_path / "back")
    # The hub form leaves out the tied output matrix and says so.
    original = load_file(GOLDEN / case / "model.safetensors")
    original.pop(convert.TIED_HEAD, None)
    save_file(original, tmp_path / "original.safetensors")
    same(tmp_path / "back" / "model.safetensors", tmp_path / "original.safetensors")
    with files.safe_open(tmp_path / "back" / "model.safetensors", "numpy") as file:
        tied = file.metadata().get(convert.TIED_HEAD)
    assert tied == (
        None if case == "vq_tiny" else "mamba.backbone.embeddings.word_embeddings.weight"
    )
    convert.to_jax(tmp_path / "back", tmp_path / "again")
    described = [json.loads((tmp_path / x / "model.json").read_text()) for x in ("model", "again")]
    assert described[0]["aim"] == described[1]["aim"] and described[0]["vq"] == described[1]["vq"]
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "again",
        "back",
        "model",
        "original.safetensors",
    ]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_kept_bit_by_bit(dtype, tmp_path):
    source = random_official(tmp_path / "model.safetensors", dtype)
    model = convert.to_jax(source, tmp_path / "model")
    stored = load_pretrained(model, as_stored=True)
    assert {x.dtype for x in jax.tree.leaves(stored.aim_params)} == {np.dtype(dtype)}
    loaded = load_pretrained(model)
    assert {x.dtype for x in jax.tree.leaves(loaded.vq_params)} == {jnp.dtype("float32")}
    convert.to_torch(model, tmp_path / "back.safetensors")
    tensors = load_file(tmp_path / "back.safetensors")
    assert not tensors.pop(convert.USAGE_HISTORY).any()
    save_file(tensors, tmp_path / "weights.safetensors")
    same(tmp_path / "weights.safetensors", source)


def test_casts_on_the_way(weights, tmp_path):
    half = load_pretrained(
        convert.to_jax(weights, tmp_path / "half", dtype="float16"), as_stored=True
    )
    full = load_pretrained(convert.to_jax(weights, tmp_path / "full"), as_stored=True)
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, y.astype(np.float16)),
        (half.aim_params, half.vq_params),
        (full.aim_params, full.vq_params),
    )
    convert.to_torch(tmp_path / "full", tmp_path / "bf16.safetensors", "bfloat16")
    cast, exact = load_file(tmp_path / "bf16.safetensors"), load_file(weights / "model.safetensors")
    for key, tensor in exact.items():
        np.testing.assert_array_equal(cast[key], tensor.astype(ml_dtypes.bfloat16))


def test_numbers_too_large_for_a_cast_are_refused(weights, tmp_path):
    tensors = load_file(weights / "model.safetensors")
    tensors["mamba.backbone.layers.1.mixer.D"][0] = 1e6
    save_file(tensors, tmp_path / "large.safetensors")
    with pytest.raises(ValueError, match=r"layers.1.mixer.D: too large for float16"):
        convert.to_jax(tmp_path / "large.safetensors", tmp_path / "model", dtype="float16")
    convert.to_jax(tmp_path / "large.safetensors", tmp_path / "model")
    with pytest.raises(ValueError, match=r"layers.1.mixer.D: holds values that float16 cannot"):
        convert.to_torch(tmp_path / "model", tmp_path / "back.safetensors", "float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large.safetensors", "model"]


def test_a_model_directory_says_what_it_is(weights, tmp_path):
    names = tuple("abc")
    model = load_pretrained(convert.to_jax(weights, tmp_path / "model", class_names=names))
    assert model.class_names == names
    assert model.aim_config == dataclasses.replace(
        TINY_AIM, position_offset=1, chunk_size=64, compute_dtype="float32"
    )
    assert model.vq_config == TINY_VQ
    assert model.sampling == {"cfg_scale": 5.0, "temperature": 1.0, "top_k": 600, "top_p": 0.98}
    assert model.info["data"]["image_size"] == 4 and model.info["data"]["channels"] == 1
    (source,) = model.info["provenance"]["sources"]
    content = (weights / "model.safetensors").read_bytes()
    assert source == {
        "file": "model.safetensors",
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    assert generate(model, [0, 2]).images.shape == (2, 4, 4, 1)
    with pytest.raises(ValueError, match="2 class names for 3 classes"):
        convert.to_jax(weights, tmp_path / "other", class_names=("a", "b"))
    with pytest.raises(ValueError, match="exists already"):
        convert.to_jax(weights, tmp_path / "model")
    names = conversion_official.imagenet_classes()
    assert len(set(names)) == 1000 and names[207] == "golden retriever"


def test_converted_weights_sample_at_the_official_positions(tmp_path):
    """Greedy tokens of the official decode, and with the other offset those of its training."""
    case = GOLDEN / "aim_tiny_group"
    model = load_pretrained(convert.to_jax(case, tmp_path / "model"))
    expected = np.load(case / "expected.npz")

    def greedy(model):
        return generate_tokens(
            prepare_decoder(model.aim_params, model.aim_config),
            jnp.asarray(expected["decode_labels"]), 0, jnp.arange(2),
            SamplingConfig(float(expected["cfg_scale"]), top_k=1),
        )  # fmt: skip

    np.testing.assert_array_equal(greedy(model), expected["greedy_tokens_official"])
    other = model.with_position_offset(0)
    np.testing.assert_array_equal(greedy(other), expected["greedy_tokens_trainpos"])


def test_a_tokenizer_of_its_own_file(weights, tmp_path, capsys):
    tensors = load_file(weights / "model.safetensors")
    aim = {k: v for k, v in tensors.items() if k.startswith("mamba.")}
    save_file(aim, tmp_path / "aim.safetensors")
    alone = random_official(tmp_path / "vq.safetensors", np.float16, aim=None)
    both = load_pretrained(
        convert.to_jax(tmp_path / "aim.safetensors", tmp_path / "both", vq=alone)
    )
    assert both.aim_config and both.vq_config == TINY_VQ
    assert [s["file"] for s in both.info["provenance"]["sources"]] == [
        "aim.safetensors",
        "vq.safetensors",
    ]
    convert.to_jax(weights, tmp_path / "other", vq=alone)
    assert "ignoring the tokenizer in" in capsys.readouterr().err
    tokenizer = load_pretrained(convert.to_jax(alone, tmp_path / "tokenizer"))
    assert tokenizer.aim_config is None and tokenizer.info["data"]["image_size"] == 256
    with pytest.raises(ValueError, match="holds no tokenizer"):
        convert.to_jax(weights, tmp_path / "x", vq=tmp_path / "aim.safetensors")
    wide = dataclasses.replace(TINY_VQ, n_embed=32)
    random_official(tmp_path / "wide.safetensors", aim=None, vq=wide)
    with pytest.raises(ValueError, match="vocabulary of 16, but the tokenizer has 32"):
        convert.to_jax(weights, tmp_path / "x", vq=tmp_path / "wide.safetensors")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("prefix", ["module.", "module._orig_mod.", "bare"])
def test_prefixes_of_training_programs(prefix, weights, tmp_path):
    tensors = load_file(weights / "model.safetensors")
    if prefix == "bare":
        renamed = {key.split(".", 1)[1]: tensor for key, tensor in tensors.items()}
    else:
        renamed = {prefix + key: tensor for key, tensor in tensors.items()}
    save_file(renamed, tmp_path / "renamed.safetensors")
    convert.to_jax(tmp_path / "renamed.safetensors", tmp_path / "model")
    convert.to_torch(tmp_path / "model", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() - tensors.keys() == {convert.USAGE_HISTORY}
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(back[key], tensor)


def sharded(folder, tensors, parts=3):
    """Writes tensors as several files with an index."""
    folder.mkdir()
    names = [f"model-{i + 1:05d}-of-{parts:05d}.safetensors" for i in range(parts)]
    places = {key: names[i % parts] for i, key in enumerate(tensors)}
    for name in names:
        save_file({k: v for k, v in tensors.items() if places[k] == name}, folder / name)
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_several_files_with_an_index(weights, tmp_path):
    tensors = load_file(weights / "model.safetensors")
    index = sharded(tmp_path / "parts", tensors)
    model = load_pretrained(convert.to_jax(tmp_path / "parts", tmp_path / "model"))
    assert len(model.info["provenance"]["sources"]) == 3
    convert.to_torch(tmp_path / "model", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert all(np.array_equal(back[key], tensors[key]) for key in tensors)

    file = tmp_path / "parts" / "model.safetensors.index.json"

    def refused(places, error, message):
        file.write_text(json.dumps(index | {"weight_map": places}))
        with pytest.raises(error, match=message):
            convert.open_weights(tmp_path / "parts")

    places = index["weight_map"]
    first = next(iter(places))
    refused(places | {first: "../model.safetensors"}, ValueError, "outside its directory")
    refused(places | {first: "gone.safetensors"}, FileNotFoundError, r"1 of 4 files are missing")
    refused(places | {"mamba.more": places[first]}, ValueError, "mamba.more: not in model-00001")
    refused({k: v for k, v in places.items() if k != first}, ValueError, "expected in no file")
    refused({}, ValueError, "has no weight_map")


def test_nothing_is_read_before_all_shapes_fit():
    """A file that does not fit costs no more than its header."""
    config, tensors, *_ = official("aim_tiny_adaln")

    def never():
        raise AssertionError("was read")

    lazy = {k: files.LazyTensor(t.shape, t.dtype, never) for k, t in tensors.items()}
    with pytest.raises(AssertionError, match="was read"):
        convert.convert_aim(lazy, config)
    lazy["mamba.backbone.layers.0.mixer.D"] = lazy["mamba.backbone.layers.0.mixer.A_log"]._replace(
        shape=(9,)
    )
    with pytest.raises(ValueError, match=r"shape \(9,\), expected \(8,\)"):
        convert.convert_aim(lazy, config)


def test_non_finite_and_integer_tensors_are_named():
    config, tensors, *_ = official("aim_tiny_adaln")
    wrong = {key: tensor.copy() for key, tensor in tensors.items()}
    wrong["mamba.backbone.layers.1.mixer.in_proj.weight"][-1, 3] = np.nan
    wrong["mamba.backbone.norm_f.weight"][5] = np.inf
    with pytest.raises(ValueError) as error:
        convert.convert_aim(wrong, config)
    assert "(2 keys)" in str(error.value)
    assert "layers.1.mixer.in_proj.weight: not finite, expected (296, 64)" in str(error.value)
    assert "norm_f.weight: not finite" in str(error.value)
    wrong["mamba.backbone.norm_f.weight"] = np.ones(64, np.int32)
    with pytest.raises(ValueError, match=r"norm_f\.weight: int32, expected a floating type"):
        convert.convert_aim(wrong, config)


# adaLN arrangements and starts for training


def logits(params, config):
    codes = np.arange(2 * config.num_tokens).reshape(2, -1) % config.vocab_size
    labels = np.array([1, config.num_classes])
    return AiM(config).apply({"params": params}, codes, labels)


@pytest.fixture(scope="module")
def grouped():
    """A random AiM of four layers in two adaLN groups, as NumPy arrays."""
    config = dataclasses.replace(TINY_AIM, n_layer=4, num_groups=2)
    rng = np.random.default_rng(1)
    shapes = convert.official_shapes(config)
    tensors = {key: conversion.random_tensor(key, shape, rng) for key, shape in shapes.items()}
    return convert.convert_aim(tensors, config), config


def test_adaln_arrangements(grouped):
    params, config = grouped
    expected = logits(params, config)

    def check(params, config, adaln, groups):
        new, target, error = rearrange_adaln(params, config, adaln, groups)
        assert (target.adaln, target.num_groups) == (adaln, groups)
        wanted = jax.eval_shape(
            lambda: AiM(target).init(jax.random.key(0), np.zeros((1, 2), int), np.zeros(1, int))
        )
        assert new["adaln"]["kernel"].shape == wanted["params"]["adaln"]["kernel"].unbox().shape
        return new, target, error

    layer, layer_config, error = check(params, config, "layer", 1)
    assert error == 0
    np.testing.assert_allclose(logits(layer, layer_config), expected, atol=2e-5)
    back, back_config, error = check(layer, layer_config, "group", 2)
    assert error == 0
    np.testing.assert_allclose(logits(back, back_config), expected, atol=2e-5)
    more, more_config, error = check(params, config, "group", 4)
    assert error == 0
    np.testing.assert_allclose(logits(more, more_config), expected, atol=2e-5)

    single, single_config, error = check(params, config, "group", 1)
    kernel = params["adaln"]["kernel"]
    mean = kernel.mean(axis=0)
    np.testing.assert_allclose(single["adaln"]["kernel"][0], mean, atol=1e-6)
    assert error == pytest.approx(np.linalg.norm(kernel - mean) / np.linalg.norm(kernel), rel=1e-5)
    assert np.abs(logits(single, single_config) - expected).max() > 1e-3
    with pytest.raises(ValueError, match="5 adaLN groups for 4 layers"):
        rearrange_adaln(params, config, "group", 5)


def test_the_converter_rewrites_adaln_only_exactly_unless_told(grouped, tmp_path):
    params, config = grouped
    exported = convert.export_aim(params, config)
    save_file(exported, tmp_path / "aim.safetensors")
    layer = load_pretrained(
        convert.to_jax(tmp_path / "aim.safetensors", tmp_path / "layer", adaln="layer")
    )
    assert layer.aim_config.adaln == "layer"
    expected = logits(params, dataclasses.replace(config, position_offset=1))
    np.testing.assert_allclose(logits(layer.aim_params, layer.aim_config), expected, atol=2e-5)
    options = {"adaln": "group", "num_groups": 1}
    with pytest.raises(ValueError, match=r"cannot express this model.*would change by \d"):
        convert.to_jax(tmp_path / "aim.safetensors", tmp_path / "single", **options)
    assert not (tmp_path / "single").exists()
    convert.to_jax(tmp_path / "aim.safetensors", tmp_path / "single", approximate=True, **options)
    assert load_pretrained(tmp_path / "single").aim_config.num_groups == 1


def test_weights_as_a_start_for_another_model(grouped):
    params, config = grouped
    target = dataclasses.replace(config, num_classes=5, adaln="layer", num_groups=1, remat="full")
    adapted, notes = adapt_aim(params, config, target)
    assert len(notes) == 2 and "each starts as the null class" in notes[1]
    expected = logits(params, config)[1]  # of the null class
    both = AiM(target).apply(
        {"params": adapted}, (np.arange(2 * 4).reshape(2, -1) % 16)[[1, 1]], np.array([0, 5])
    )
    np.testing.assert_allclose(both[0], expected, atol=2e-5)
    np.testing.assert_allclose(both[1], expected, atol=2e-5)
    assert adapt_aim(params, config, config) == (params, [])
    other = dataclasses.replace(config, d_model=32, mixer="mamba1")
    with pytest.raises(ValueError, match=r"d_model: 16 in the weights, 32 in the model; mixer: "):
        adapt_aim(params, config, other)


@pytest.mark.parametrize("offset", [0, 1])
def test_positions_are_interpolated_for_a_larger_grid(offset):
    rows, columns = np.mgrid[:6, :6]
    grid = np.stack([rows, columns, np.ones((6, 6)), rows - 2 * columns], axis=-1)
    other = np.full((1, 4), 9.0)
    parts = [grid.reshape(36, 4), other]
    table = np.concatenate(parts if offset == 0 else parts[::-1]).astype(np.float32)
    for side in (12, 9, 4):
        large = resized_positions(table, side * side, offset)
        assert large.shape == (side * side + 1, 4) and large.dtype == table.dtype
        np.testing.assert_array_equal(large[-1 if offset == 0 else 0], other[0])
        found = large[offset : offset + side * side].reshape(side, side, 4)
        # Of pixel centres: token i of the large grid is at (i + 1/2) 6 / side - 1/2 of the small.
        places = (np.arange(side) + 0.5) * 6 / side - 0.5
        inside = np.flatnonzero((places >= 1) & (places <= 4))  # cubic: two neighbours each way
        at_rows, at_columns = np.meshgrid(places[inside], places[inside], indexing="ij")
        expected = np.stack(
            [at_rows, at_columns, np.ones_like(at_rows), at_rows - 2 * at_columns], axis=-1
        )
        np.testing.assert_allclose(found[np.ix_(inside, inside)], expected, atol=1e-5)
    with pytest.raises(ValueError, match="20 tokens are no square grid"):
        resized_positions(table, 20, offset)


def test_weights_as_a_start_for_larger_images(grouped):
    params, config = grouped
    target = dataclasses.replace(config, num_tokens=9)
    adapted, notes = adapt_aim(params, config, target)
    assert notes == ["positions 2 x 2 -> 3 x 3: interpolated"]
    codes = np.arange(18).reshape(2, 9) % 16
    assert np.isfinite(AiM(target).apply({"params": adapted}, codes, np.array([0, 1]))).all()
    changed = {k for k, x in flatten(adapted).items() if x is not flatten(params)[k]}
    assert changed == {"position_embedding.embedding"}


# Hostile and damaged files. Whatever it is: one clear error, and nothing left behind.


def refused(path, tmp_path, message, error=ValueError):
    before = sorted(p.name for p in tmp_path.iterdir())
    with pytest.raises(error, match=message) as caught:
        convert.to_jax(path, tmp_path / "model")
    assert sorted(p.name for p in tmp_path.iterdir()) == before
    return str(caught.value)


def header(entries, data=b"", length=None):
    """A safetensors file with the given header, true or not."""
    text = json.dumps(entries).encode() if isinstance(entries, dict) else entries
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape, offsets, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


KEY = "mamba.backbone.norm_f.weight"
SAFETENSORS = {
    "empty": (b"", "neither a safetensors file nor one of torch"),
    "short": (b"\x08\0\0", "neither a safetensors file nor one of torch"),
    "web page": (b"<!DOCTYPE html><html>", r"it starts with 3c 21 44 4f.*download the file again"),
    "header beyond the end": (header({KEY: entry([1], [0, 4])}, b"1234", 10**6), "1,000,000 bytes"),
    "header of exabytes": (header({}, length=2**62), "claims to have"),
    "not JSON": (header(b"{nonsense"), "not readable JSON"),
    "deep JSON": (header(b'{"a":' * 100_000), "not readable JSON"),
    "not UTF-8": (header(b'{"\xff\xfe":1}'), "not readable JSON"),
    "duplicate key": (
        header('{{"{0}":{1},"{0}":{1}}}'.format(KEY, json.dumps(entry([1], [0, 4]))).encode()),
        f"{KEY}' occurs twice",
    ),
    "cut": (header({KEY: entry([4], [0, 16])}, b"12345678"), "not a complete safetensors"),
    "trailing": (header({KEY: entry([1], [0, 4])}, b"12345678"), "not a complete safetensors"),
    "offsets beyond": (header({KEY: entry([1], [0, 400])}, b"1234"), "not a complete safetensors"),
    "offsets backwards": (header({KEY: entry([1], [4, 0])}, b"1234"), "not a complete safetensors"),
    "overlap": (
        header({KEY: entry([1], [0, 4]), "b": entry([1], [0, 4])}, b"1234"),
        "not a complete safetensors",
    ),
    "shape lies": (header({KEY: entry([1000], [0, 4])}, b"1234"), "not a complete safetensors"),
    "shape overflows": (
        header({KEY: entry([2**40, 2**40], [0, 4])}, b"1234"),
        "not a complete safetensors",
    ),
    "negative shape": (header({KEY: entry([-1], [0, 4])}, b"1234"), "not a complete safetensors"),
    "unknown type": (header({KEY: entry([1], [0, 4], "F33")}, b"1234"), "complete safetensors"),
    "no weights": (header({"w": entry([1], [0, 4])}, b"1234"), "belong neither to AiM"),
    "nothing": (header({}), "holds neither an AiM nor a tokenizer"),
    "complex type": (header({KEY: entry([1], [0, 8], "C64")}, b"12345678"), "dtypes: .*C64"),
}


@pytest.mark.parametrize("case", SAFETENSORS)
def test_hostile_safetensors(case, tmp_path):
    content, message = SAFETENSORS[case]
    (tmp_path / "model.safetensors").write_bytes(content)
    text = refused(tmp_path / "model.safetensors", tmp_path, message)
    assert len(text) < 2000 and "Traceback" not in text


def test_hostile_directories(tmp_path):
    refused(tmp_path / "nowhere", tmp_path, "no such file or directory", FileNotFoundError)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, "holds no weights; expected one of", FileNotFoundError)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(tmp_path / "loop", tmp_path, "is a symbolic link in a loop")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "model.safetensors").symlink_to("model.safetensors")
    refused(tmp_path / "inner", tmp_path, "is a symbolic link in a loop")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", tmp_path, "is neither a file nor a directory")
    (tmp_path / "nested" / "model.safetensors").mkdir(parents=True)
    refused(tmp_path / "nested", tmp_path, "is a directory, expected a file")


def test_hostile_configurations(weights, tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(weights / "model.safetensors")
    fits = convert.official_aim_config(dataclasses.replace(TINY_AIM, chunk_size=64))

    def check(config, message):
        text = config if isinstance(config, str) else json.dumps(config)
        (folder / "config.json").write_text(text)
        refused(folder, tmp_path, message)

    check("[1]", "expected a JSON object, got a list")
    check("{", "is not readable JSON")
    check('{"d_model": 1, "d_model": 2}', "'d_model' occurs twice")
    check(fits | {"d_model": "16"}, r"config.json: .*d_model: expected an integer, got '16'")
    check(fits | {"n_layer": 10**9}, "n_layer=1000000000 exceeds the total number of weights")
    check(fits | {"d_model": 10**9}, "exceeds the total number of weights")
    check(fits | {"d_model": 10**30}, "expected an integer from 1 to")
    check(fits | {"n_layer": 200}, "n_layer=200 exceeds the total number of tensors")
    check(fits | {"n_layer": -1}, "n_layer=-1; expected an integer")
    check(fits | {"n_layer": 3}, r"layers.2.norm.weight: missing, expected \(16,\)")
    check(fits | {"num_classes": 4}, r"embedding_table.*shape \(4, 16\), expected \(5, 16\)")
    check(fits | {"vocab_size": 17}, "vocabulary of 17, but the tokenizer has 16")
    check(fits | {"d_intermediate": []}, "d_intermediate: expected an integer, got a list")
    check(fits | {"ssm_cfg": []}, "layer='Mamba1'|config.json|in_proj")
    (folder / "config.json").write_text(json.dumps(fits))
    convert.to_jax(folder, tmp_path / "model")


def test_nan_weights_leave_nothing(weights, tmp_path):
    tensors = load_file(weights / "model.safetensors")
    tensors["vqvae.encoder.conv_in.weight"][0, 0, 0, 0] = np.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    refused(
        tmp_path / "nan.safetensors",
        tmp_path,
        r"conv_in.weight: not finite, expected \(32, 1, 3, 3\)",
    )


def test_a_failure_while_writing_leaves_nothing(weights, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    convert.to_jax(weights, tmp_path / "model")
    monkeypatch.setattr(files, "write_safetensors", fail)
    for out in ("back", "back.safetensors"):
        with pytest.raises(OSError, match="No space left"):
            convert.to_torch(tmp_path / "model", tmp_path / out)
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    monkeypatch.setattr("aim_jax.weights.orbax_files.save_params", fail)
    with pytest.raises(OSError, match="No space left"):
        convert.to_jax(weights, tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_outputs_that_cannot_be_are_refused_first(weights, tmp_path):
    convert.to_jax(weights, tmp_path / "model")
    for out, message in (("x.onnx", r"expected \*.safetensors"), ("model", "exists already")):
        with pytest.raises(ValueError, match=message):
            convert.to_torch(tmp_path / "model", tmp_path / out)
    with pytest.raises(FileNotFoundError, match="no model"):
        convert.to_torch(tmp_path / "nothing", tmp_path / "x.safetensors")


# Pickles


def refuse_a_pickle(tmp_path, content, message):
    refused(saved(content, tmp_path / "w.bin"), tmp_path, message)


def test_zip_files_that_torch_does_not_write(tmp_path):
    def archive(name, compression=zipfile.ZIP_STORED, twice=False):
        with zipfile.ZipFile(tmp_path / name, "w", compression) as file:
            file.writestr("archive/data.pkl", pickle.dumps({}, 2) + bytes(1000))
            if twice:
                with pytest.warns(UserWarning, match="Duplicate name"):
                    file.writestr("archive/data.pkl", b"")
        return tmp_path / name

    refused(archive("packed.bin", zipfile.ZIP_DEFLATED), tmp_path, "holds compressed entries")
    refused(archive("twice.bin", twice=True), tmp_path, "entries of the same name")
    whole = archive("whole.bin").read_bytes()
    for size in (10, len(whole) // 2, len(whole) - 3):
        (tmp_path / "cut.bin").write_bytes(whole[:size])
        refused(tmp_path / "cut.bin", tmp_path, "is not a complete zip file")
    (tmp_path / "pickle.bin").write_bytes(pickle.dumps({"a": 1}, 2))
    refused(tmp_path / "pickle.bin", tmp_path, "or not a file of torch.save")


@pytest.mark.parametrize("form", ["plain", "model", "state_dict", "training", "module", "bfloat16"])
def test_pickles_in_every_form(form, weights, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    dtype = ml_dtypes.bfloat16 if form == "bfloat16" else np.float32
    state = {k: v.astype(dtype) for k, v in load_file(weights / "model.safetensors").items()}
    if form == "module":
        state = {f"module.{k}": v for k, v in state.items()}
    content = state if form in ("plain", "module", "bfloat16") else {form: state}
    if form == "training":
        content = {"model": state, "steps": 7, "args": argparse.Namespace(lr=1e-4)}
    saved(content, tmp_path / "w.pt")
    model = load_pretrained(convert.to_jax(tmp_path / "w.pt", tmp_path / "model"), as_stored=True)
    direct = load_pretrained(convert.to_jax(weights, tmp_path / "direct"), as_stored=True)
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, y.astype(dtype)),
        (model.aim_params, model.vq_params),
        (direct.aim_params, direct.vq_params),
    )


def test_pickles_come_back_as_the_official_programs_read_them(weights, tmp_path):
    convert.to_jax(weights, tmp_path / "model")
    convert.to_torch(tmp_path / "model", tmp_path / "all.bin")
    tensors = load_file(weights / "model.safetensors")
    state = files.open_weights(tmp_path / "all.bin").tensors
    assert state.keys() - tensors.keys() == {convert.TIED_HEAD, convert.USAGE_HISTORY}
    np.testing.assert_array_equal(state[convert.TIED_HEAD], tensors[EMBEDDING])
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(state[key], tensor)
    convert.to_torch(tmp_path / "model", tmp_path / "vq.pt")
    opened = files.open_weights(tmp_path / "vq.pt")
    assert opened.weights_key == "model"
    assert {f"vqvae.{k}" for k in opened.tensors} - {convert.USAGE_HISTORY} == {
        k for k in tensors if k.startswith("vqvae.")
    }
    convert.to_jax(tmp_path / "all.bin", tmp_path / "again")
    convert.to_jax(tmp_path / "vq.pt", tmp_path / "tokenizer")


def test_a_tied_matrix_is_stored_once(weights, tmp_path):
    t = pytest.importorskip("torch", reason="compares with PyTorch: pip install torch")
    convert.to_jax(weights, tmp_path / "model")
    convert.to_torch(tmp_path / "model", tmp_path / "all.bin")
    state = t.load(tmp_path / "all.bin", weights_only=True)
    assert state[convert.TIED_HEAD].data_ptr() == state[EMBEDDING].data_ptr()
    for key, tensor in load_file(weights / "model.safetensors").items():
        np.testing.assert_array_equal(state[key].numpy(), tensor)


def test_hostile_pickles(weights, tmp_path):
    good = load_file(weights / "model.safetensors")
    zeros = np.zeros(10**5, np.float32)
    once = View(zeros, 0, zeros.shape, (1,))
    for content, message in (
        (7, "expected tensors by name.*got int"),
        ({}, "expected tensors by name.*got dict"),
        ({"model": [1, 2]}, "entries that are not tensors: model"),
        (good | {"epoch": 3}, "entries that are not tensors: epoch"),
        ({3: zeros}, "entries that are not tensors: 3"),
        (good | {KEY: View(zeros, 0, (10**13,), (0,))}, r"kinds of tensors: .*\(repeated numbers"),
        ({f"mamba.{i}": once for i in range(9)}, "many views of the same"),
        (good | {f"module.{KEY}": good[KEY]}, "occurs under two names"),
        (good | {"x": tmp_path / "x"}, r"holds pathlib\.\w+Path beside tensors"),
    ):  # fmt: skip
        refuse_a_pickle(tmp_path, content, message)


# Fuzzing


VALID = save({KEY: np.arange(4, dtype=np.float32), "vqvae.b": np.ones((2, 3), np.float16)})


def fuzz_safetensors(path, content):
    """Opens hostile bytes: an error of ours, or what the safetensors library reads, bit by bit."""
    path.write_bytes(content)
    try:
        opened = files.open_weights(path)
        arrays = {key: np.asarray(tensor) for key, tensor in opened.tensors.items()}
    except (files.WeightsError, FileNotFoundError) as error:
        assert len(str(error)) < 5000
        return
    try:
        expected = load_file(path)
    except SafetensorError:
        raise AssertionError("the library refuses what we accept") from None
    assert arrays.keys() == expected.keys()
    for key, array in arrays.items():
        assert array.dtype == expected[key].dtype and array.tobytes() == expected[key].tobytes()


mutations = st.lists(
    st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), min_size=1, max_size=6
)
numbers = st.one_of(st.integers(-3, 40), st.integers(2**31, 2**70))
headers = st.dictionaries(
    st.sampled_from([KEY, "vqvae.b", "__metadata__", "x"]),
    st.one_of(
        st.none(),
        st.text(max_size=5),
        st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "F16", "BF16", "I8", "F8_E4M3", "X"]),
                "shape": st.lists(numbers, max_size=3),
                "data_offsets": st.lists(numbers, min_size=1, max_size=3),
            }
        ),
    ),
    max_size=3,
)
quiet = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def check_fuzzed(changes, cut, entries, data, length, path):
    mutated = bytearray(VALID)
    for position, value in changes:
        mutated[position] = value
    fuzz_safetensors(path, bytes(mutated[: len(mutated) - cut]))
    fuzz_safetensors(path, header(entries, data, length))


cases = {
    "changes": mutations,
    "cut": st.integers(0, len(VALID)),
    "entries": headers,
    "data": st.binary(max_size=64),
    "length": st.one_of(st.none(), st.integers(0, 2**64 - 1)),
}


@settings(max_examples=200, **quiet)
@given(**cases)
def test_fuzzed_safetensors(tmp_path, **case):
    check_fuzzed(**case, path=tmp_path / "x.safetensors")


@pytest.mark.slow
@settings(max_examples=3000, **quiet)
@given(**cases)
def test_fuzzed_safetensors_at_length(tmp_path, **case):
    check_fuzzed(**case, path=tmp_path / "x.safetensors")


def fuzz_pickle(path, changes, cut, valid):
    content = bytearray(valid)
    for position, value in changes:
        content[position % len(content)] = value
    path.write_bytes(bytes(content[: len(content) - cut % len(content)]))
    try:
        opened = files.open_weights(path, "weights")
        for tensor in opened.tensors.values():
            assert np.asarray(tensor).shape == tensor.shape
    except files.WeightsError as error:
        assert len(str(error)) < 5000


PICKLES = [(GOLDEN / "torch_files" / f"{form}.pt").read_bytes() for form in ("zip", "legacy")]


places = st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=6)


@settings(max_examples=150, **quiet)
@given(changes=places, cut=st.one_of(st.just(0), st.integers(0, 10**6)))
def test_fuzzed_pickles(tmp_path, changes, cut):
    for valid in PICKLES:
        fuzz_pickle(tmp_path / "x.bin", changes, cut, valid)


@pytest.mark.slow
@settings(max_examples=2000, **quiet)
@given(changes=places, cut=st.one_of(st.just(0), st.integers(0, 10**6)))
def test_fuzzed_pickles_at_length(tmp_path, changes, cut):
    for valid in PICKLES:
        fuzz_pickle(tmp_path / "x.bin", changes, cut, valid)


OPTIONS = list(convert.official_aim_config(TINY_AIM))
junk = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=200, **quiet)
@given(
    st.dictionaries(st.sampled_from(list(convert.official_aim_config(TINY_AIM))), junk, max_size=4)
)
def test_fuzzed_configurations(changes):
    """Any config.json is a configuration of ours or a ValueError."""
    flat = convert.official_aim_config(TINY_AIM) | changes
    tensors = {
        k: np.broadcast_to(np.float32(0), s) for k, s in convert.official_shapes(TINY_AIM).items()
    }
    try:
        config = conversion_official.aim_config(tensors, flat)
        convert.convert_aim(tensors, config)
    except ValueError as error:
        assert str(error)
