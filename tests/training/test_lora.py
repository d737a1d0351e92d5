"""Adapters: initialization, merging, gradients, training, resuming, and loading."""

import dataclasses
import json
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from aim_jax import generate, load_pretrained
from aim_jax.configs.defaults import aim_defaults
from aim_jax.data import CacheWriter
from aim_jax.models import AiM, AiMConfig
from aim_jax.models.lora import WHOLE, LoRA, adapter_shapes, init_adapters, merge
from aim_jax.training import aim
from aim_jax.training.aim import Setup, loss_fn
from aim_jax.weights.adapt import adapt_aim
from aim_jax.weights.directories import save_model
from aim_jax.weights.pretrained import flatten
from aim_jax.weights.publish import publish
from aim_jax.weights.tokenizer import tokenizer_fingerprint
from tests.conftest import TINY_AIM
from tests.models.test_models import random_params
from tests.programs import run

MODELS = {
    "mamba2": TINY_AIM,
    "mamba1": dataclasses.replace(TINY_AIM, mixer="mamba1", d_intermediate=24),
    "text": dataclasses.replace(
        TINY_AIM, condition="text", num_classes=0, max_caption=4, caption_vocab=260
    ),
}
RANK_2 = LoRA(2)


def random_adapters(config, lora=RANK_2, seed=1):
    made = nn.unbox(init_adapters(config, lora, jax.random.key(seed)))
    noise = lambda x: x + 0.1 * jax.random.normal(jax.random.key(seed), x.shape)  # noqa: E731
    return jax.tree.map(noise, made)


@pytest.mark.parametrize("name", MODELS)
def test_adapters_change_the_projections_alone(name):
    config = MODELS[name]
    params = random_params(config)
    fresh = nn.unbox(init_adapters(config, RANK_2, jax.random.key(0)))
    unchanged = merge(params, {k: v for k, v in fresh.items() if k != WHOLE}, RANK_2.scale)
    chex.assert_trees_all_equal(unchanged, params)
    adapters = random_adapters(config)
    merged = flatten(merge(params, adapters, RANK_2.scale))
    pairs = flatten(adapters)
    changed = set()
    for key, before in flatten(params).items():
        pair = key.removesuffix(".kernel")
        if f"{pair}.a" in pairs:
            a, b = (np.asarray(pairs[f"{pair}.{part}"], np.float64) for part in "ab")
            expected = np.asarray(before, np.float64) + 2 * np.einsum("nir,nro->nio", a, b)
            np.testing.assert_allclose(merged[key], expected, rtol=1e-5, atol=1e-6)
            changed.add(key.split(".")[-2])
        elif key.startswith(WHOLE):
            np.testing.assert_array_equal(merged[key], pairs[key])
        else:
            np.testing.assert_array_equal(merged[key], before)
    of_mlp = {"fc1", "fc2", "gate"} if config.d_intermediate else set()
    assert changed == {"x_proj", "z_proj", "B_proj", "C_proj", "out_proj"} | of_mlp
    assert (WHOLE in adapters) == (name != "text")
    assert chex.assert_trees_all_equal_shapes(adapters, adapter_shapes(config, RANK_2)) is None


def test_the_logits_are_those_of_low_rank_products_beside_the_projections():
    """x W + scale (x a) b, computed apart from the kernels, for one projection."""
    config = TINY_AIM
    params, adapters = random_params(config), random_adapters(config)
    x = jax.random.normal(jax.random.key(3), (5, config.d_model))
    pair = jax.tree.map(lambda p: p[0], adapters["layers"]["mixer"]["x_proj"])
    kernel = params["layers"]["mixer"]["x_proj"]["kernel"][0]
    apart = x @ kernel + 0.5 * (x @ pair["a"]) @ pair["b"]
    merged = merge(params, adapters, 0.5)["layers"]["mixer"]["x_proj"]["kernel"][0]
    np.testing.assert_allclose(x @ merged, apart, rtol=2e-5, atol=1e-5)


def batch_of(config):
    rng = np.random.default_rng(0)
    codes = jnp.asarray(rng.integers(0, config.vocab_size, (2, config.num_tokens)), jnp.int32)
    if config.is_text:
        return {"codes": codes, "captions": jnp.asarray([[3, 4, -1, -1], [5, 6, 7, -1]])}
    return {"codes": codes, "labels": jnp.asarray([0, 2])}


def gradients_of(config):
    """Gradients of the adapters, and of the whole parameters that they give."""
    params, adapters, batch = random_params(config), random_adapters(config), batch_of(config)

    def loss(whole):
        return loss_fn(whole, batch, jax.random.key(0), config)[0]

    of_adapters = jax.jit(jax.grad(lambda x: loss(merge(params, x, 2.0))))(adapters)
    return of_adapters, jax.jit(jax.grad(loss))(merge(params, adapters, 2.0)), adapters


WAYS = {
    "scan in layers": {"scan_unroll": TINY_AIM.n_layer},
    "remat": {"remat": "dots"},
    "chunks": {"chunk_size": 2},
    "logits in chunks": {"logits_chunk": 2},
    "mamba1": {"mixer": "mamba1"},
}


@pytest.mark.parametrize("way", WAYS)
def test_gradients_flow_through_every_way_to_compute(way):
    """da = scale dW b^T and db = scale a^T dW, with dW of the model without adapters."""
    config = dataclasses.replace(TINY_AIM, class_dropout=0.0, **WAYS[way])
    gradients, whole, adapters = gradients_of(config)
    found, whole, pairs = flatten(gradients), flatten(whole), flatten(adapters)
    assert all(np.abs(x).max() > 0 for x in found.values())
    for key, value in found.items():
        path, _, part = key.rpartition(".")
        if key.startswith(WHOLE):
            expected = whole[key]
        elif part == "a":
            expected = 2 * jnp.einsum("nio,nro->nir", whole[f"{path}.kernel"], pairs[f"{path}.b"])
        else:
            expected = 2 * jnp.einsum("nir,nio->nro", pairs[f"{path}.a"], whole[f"{path}.kernel"])
        scale = np.abs(expected).max()
        np.testing.assert_allclose(value, expected, rtol=1e-4, atol=1e-4 * scale, err_msg=key)


@pytest.mark.slow
def test_gradients_flow_through_the_kernels(monkeypatch):
    from tests import triton_on_cpu  # noqa: F401  (lets the kernels run here)

    config = dataclasses.replace(
        TINY_AIM, d_model=32, headdim=32, d_state=16, class_dropout=0.0, scan_implementation="xla"
    )
    expected, *_ = gradients_of(config)
    found, *_ = gradients_of(dataclasses.replace(config, scan_implementation="triton"))
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def base(tiny_model, tmp_path_factory):
    """A model of other classes than those of the data, with its tokenizer."""
    config = dataclasses.replace(TINY_AIM, num_classes=5)
    model = dataclasses.replace(
        tiny_model, aim_config=config, aim_params=random_params(config), class_names=()
    )
    return save_model(tmp_path_factory.mktemp("base") / "model", model)


@pytest.fixture(scope="module")
def config(base, tiny_model, tiny_model_dir, tmp_path_factory):
    """A short run on three classes, whose tokens are four times the class."""
    root = tmp_path_factory.mktemp("codes")
    for split, count in (("train", 24), ("validation", 6)):
        writer = CacheWriter(
            root / split, tokenizer=tokenizer_fingerprint(tiny_model), vocab_size=16, grid=(2, 2),
            class_names=["one", "two", "three"], views=["centre"], num_examples=count,
        )  # fmt: skip
        labels = np.arange(count) % 3
        writer.write(0, np.repeat(4 * labels[:, None, None], 4, axis=2), labels)
        writer.finish()
    config = aim_defaults()
    config.steps, config.batch_size, config.log_every = 20, 8, 5
    config.eval_every = config.save_every = config.sample_every = config.export_every = 10
    config.optimizer.update(lr=3e-2, schedule="constant", weight_decay=0.0)
    config.data.update(image_size=4, channels=1)
    config.tokenizer, config.codes, config.init = str(tiny_model_dir), str(root), str(base)
    config.model.update(dict(vars(TINY_AIM)))
    config.model.class_dropout = 0.0
    config.lora.rank = 4
    config.ema_decay = 0.5
    config.sample.update(per_class=1, classes=3)
    return config


@pytest.fixture(scope="module")
def trained(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "whole"
    state = aim.train(config, workdir)
    return workdir, jax.tree.map(np.asarray, state)


def val_losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [line["val_loss"] for line in lines if "val_loss" in line]


def test_adapters_train_and_are_merged_on_load(config, trained, base, tmp_path):
    workdir, state = trained
    losses = val_losses(workdir)
    assert losses[-1] < losses[0] and losses[-1] < 0.4 * np.log(16)  # of 16 tokens
    # Only the adapters are trained, saved and exported.
    chex.assert_trees_all_equal_shapes(
        state.params, adapter_shapes(AiMConfig(**config.model), LoRA(4))
    )
    assert {p.name for p in (workdir / "model").iterdir()} == {
        "adapter.json",
        "adapter.safetensors",
    }
    model = load_pretrained(workdir)
    assert model.class_names == ("one", "two", "three") and model.aim_config.num_classes == 3
    expected = load_pretrained(base)
    whole = merge(jax.tree.map(np.asarray, expected.aim_params), state.eval_params, LoRA(4).scale)
    chex.assert_trees_all_close(model.aim_params, whole, rtol=1e-6)
    setup = Setup(config)
    codes = jnp.asarray([[0, 0, 0, 0], [8, 8, 8, 8]])
    logits = AiM(setup.model).apply({"params": model.aim_params}, codes, jnp.asarray([0, 2]))
    assert np.isfinite(logits).all()
    assert generate(model, ["two"], seed=0).images.shape == (1, 4, 4, 1)
    # In storage dtypes, as a program that rewrites models loads it; and as one model.
    stored = load_pretrained(workdir, as_stored=True)
    chex.assert_trees_all_equal(stored.aim_params, jax.tree.map(np.asarray, model.aim_params))
    out = publish(workdir, tmp_path / "out")
    chex.assert_trees_all_equal(load_pretrained(out).aim_params, model.aim_params)
    done = run("sample", "--checkpoint", workdir, "--per_class", "1", "--out", tmp_path / "samples")
    assert done.returncode == 0, done.stderr


def test_training_of_adapters_resumes_exactly(config, trained, tmp_path):
    _, whole = trained
    config = config.copy_and_resolve_references()
    config.steps = 10
    aim.train(config, tmp_path / "run")
    config.steps = 20
    resumed = aim.train(config, tmp_path / "run")
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, resumed), whole)


def test_a_model_of_other_images_starts_a_run(config, tiny_model, tmp_path):
    """The start has 3 x 3 tokens, the run 2 x 2; the exported model has the size of its images."""
    larger = dataclasses.replace(TINY_AIM, num_tokens=9)
    data = {"name": "", "image_size": 6, "channels": 1, "fit": "resize", "resize_size": 0}
    start = dataclasses.replace(
        tiny_model, aim_config=larger, aim_params=random_params(larger), info={"data": data}
    )
    config = config.copy_and_resolve_references()
    config.init = config.tokenizer = str(save_model(tmp_path / "start", start))
    config.steps, config.lora.rank = 2, 0
    aim.train(config, tmp_path / "run")
    model = load_pretrained(tmp_path / "run")
    assert model.aim_config.num_tokens == 4 and model.info["data"]["image_size"] == 4
    assert generate(model, ["two"], seed=0).images.shape == (1, 4, 4, 1)


def test_a_base_of_another_dtype_and_arrangement(config, trained, base, tmp_path):
    """The merged parameters are those of training, in float32, and in the dtypes of the base."""
    half = load_pretrained(base, as_stored=True)
    half_dir = save_model(tmp_path / "half", half, "float16")
    config = config.copy_and_resolve_references()
    config.init, config.steps = str(half_dir), 2
    config.model.update(adaln="group", num_groups=2)
    state = aim.train(config, tmp_path / "run")
    start = load_pretrained(half_dir, as_stored=True)
    whole, _ = adapt_aim(start.aim_params, start.aim_config, AiMConfig(**config.model))
    adapters = jax.tree.map(np.asarray, state.eval_params)
    whole = jax.tree.map(lambda x: x.astype(np.float32), whole)
    expected = merge(whole, adapters, LoRA(4).scale)
    loaded = load_pretrained(tmp_path / "run")
    chex.assert_trees_all_close(loaded.aim_params, expected, rtol=1e-6)
    stored = load_pretrained(tmp_path / "run", as_stored=True)
    assert stored.aim_params["layers"]["mixer"]["x_proj"]["kernel"].dtype == np.float16
    # Adapters of adapters are refused before training, and so are those of themselves.
    config.init = str(tmp_path / "run")
    with pytest.raises(ValueError, match="holds adapters; adapt one model made of them"):
        aim.train(config, tmp_path / "again")
    file = tmp_path / "run" / "model" / "adapter.json"
    content = json.loads(file.read_text())
    own = {"base": content["base"] | {"name": str(tmp_path / "run")}}
    for changed, message in (
        (own, "holds adapters; adapt one model"),
        ({"aim": content["aim"] | {"num_tokens": 2**24}}, r"num_tokens is over 1,048,576"),
    ):
        file.write_text(json.dumps(content | changed))
        with pytest.raises(ValueError, match=message):
            load_pretrained(tmp_path / "run")


def test_what_adapters_need_is_said(config, trained, base, tmp_path, tiny_model):
    workdir, _ = trained
    config = config.copy_and_resolve_references()
    config.init = ""
    with pytest.raises(ValueError, match=r"config\.lora\.rank=4, but config.init names no model"):
        aim.train(config, tmp_path / "run")
    config.init, config.lora.rank = str(base), -1
    with pytest.raises(ValueError, match=r"lora\.rank"):
        aim.train(config, tmp_path / "run")
    copy = shutil.copytree(workdir / "model", tmp_path / "adapters")
    file = copy / "adapter.json"
    content = json.loads(file.read_text())
    for changed, message in (
        ({"base": content["base"] | {"name": "nowhere"}}, "adapts nowhere, which is needed"),
        ({"base": content["base"] | {"fingerprint": "0"}}, "the AiM of .* is another one than in"),
        (
            {"tokenizer": content["tokenizer"] | {"fingerprint": "0"}},
            "the tokenizer of .* is another one than in training",
        ),
        (
            {"tokenizer": {"name": content["base"]["name"], "fingerprint": "0"}},
            "the tokenizer of .* is another one than in training",
        ),
        ({"lora": {"rank": 3, "alpha": 0.0}}, "does not hold the arrays"),
        ({"lora": {"rank": "3"}}, r"adapter\.json.*lora"),
        ({"version": 2}, r"adapter\.json.*version"),
    ):
        file.write_text(json.dumps(content | changed))
        with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
            load_pretrained(copy)
        assert "\n" not in str(caught.value)
    file.write_text(json.dumps(content))
    arrays = copy / "adapter.safetensors"
    arrays.write_bytes(arrays.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(ValueError, match=r"adapter\.safetensors is damaged"):
        load_pretrained(copy)
    done = run("describe", "--checkpoint", workdir, "--seal")
    assert done.returncode == 1 and "aim-jax publish" in done.stderr


def test_a_run_resumes_only_on_the_model_that_it_adapts(config, trained, tiny_model, tmp_path):
    workdir, _ = trained
    copy = shutil.copytree(workdir, tmp_path / "run")
    other = dataclasses.replace(tiny_model, aim_params=random_params(TINY_AIM, 7))
    config = config.copy_and_resolve_references()
    config.init = str(save_model(tmp_path / "other", other))
    config.steps = 30
    with pytest.raises(ValueError, match=r"base: .* Use another --workdir"):
        aim.train(config, copy)
