"""Training of a text model: the loss, metrics, resuming, samples and the model directory."""

import dataclasses
import json

import chex
import jax
import numpy as np
import pytest
from flax import linen as nn

from aim_jax import generate, load_pretrained
from aim_jax.configs.defaults import aim_defaults
from aim_jax.data import CacheWriter
from aim_jax.data.text import TextTokenizer
from aim_jax.models import AiM, AiMConfig
from aim_jax.models.aim import init_params
from aim_jax.parallel.sharding import check_batch, create_sharded, shard_batch
from aim_jax.perf.flops import forward_flops
from aim_jax.training import aim
from aim_jax.training.rate import images_per_second
from aim_jax.weights.tokenizer import tokenizer_fingerprint
from tests.conftest import TINY_AIM
from tests.models.test_models import random_params

WORDS = ["a red boat", "a blue house", "an old tree", ""]


def write_captioned_codes(root, model, captions):
    """Token caches of 32 and 8 images of four tokens, which are 4 times the caption's number."""
    for split, count in (("train", 32), ("validation", 8)):
        writer = CacheWriter(
            root / split, tokenizer=tokenizer_fingerprint(model), vocab_size=16, grid=(2, 2),
            class_names=["image"], views=["centre"], num_examples=count, captioned=True,
        )  # fmt: skip
        number = np.arange(count) % len(captions)
        codes = np.repeat(4 * number[:, None, None], 4, axis=2)
        writer.write(0, codes, np.zeros(count, int), [captions[i] for i in number])
        writer.finish()


@pytest.fixture(scope="module")
def config(tiny_model, tiny_model_dir, tmp_path_factory):
    """A short run on token caches with captions."""
    root = tmp_path_factory.mktemp("captions")
    write_captioned_codes(root, tiny_model, WORDS)
    text = TextTokenizer.train(WORDS * 2, 270)
    text.save(root / "text_tokenizer.json")
    config = aim_defaults()
    config.steps, config.batch_size, config.log_every = 6, 8, 1
    config.eval_every = config.save_every = config.sample_every = 3
    config.optimizer.lr = 1e-2
    config.optimizer.schedule = "constant"
    config.data.update(image_size=4, channels=1)
    config.tokenizer = str(tiny_model_dir)
    config.codes = str(root)
    config.text_tokenizer = str(root / "text_tokenizer.json")
    config.model.update(dict(vars(TINY_AIM)))
    config.model.update(
        condition="text", num_classes=0, max_caption=6, caption_vocab=text.vocab_size,
        text_loss_weight=0.5, class_dropout=0.0,
    )  # fmt: skip
    config.sample.update(per_class=2, classes=3)
    return config


def test_a_text_model_trains_resumes_and_is_exported(config, tmp_path):
    config = config.copy_and_resolve_references()
    workdir = tmp_path / "run"
    config.steps = 3
    aim.train(config, workdir)
    config.steps = 40
    config.eval_every = config.save_every = config.sample_every = 40
    aim.train(config, workdir)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    by_step = {line["step"]: line for line in lines if "loss" in line}
    assert sorted(by_step) == list(range(1, 41))
    # Both parts are learned: the tokens from the caption, and the caption's words.
    assert by_step[40]["loss"] < 0.5 * by_step[1]["loss"]
    assert by_step[40]["caption_loss"] < 0.7 * by_step[1]["caption_loss"]
    val = [line["val_loss"] for line in lines if "val_loss" in line]
    assert val[-1] < 0.5 * val[0]
    assert list((workdir / "samples").glob("*.png"))
    model = load_pretrained(workdir)
    assert model.text == TextTokenizer.load(config.text_tokenizer) and model.class_names == ()
    tokens = generate(model, WORDS[:3], top_k=1, cfg_scale=1.0).tokens
    np.testing.assert_array_equal(tokens, 4 * np.arange(3)[:, None] * np.ones((1, 4), int))
    # Another text tokenizer gives the tokens of captions another meaning.
    other = TextTokenizer.train(WORDS[:2] * 2, 266)
    trained = load_pretrained(workdir, as_stored=True)
    with pytest.raises(ValueError, match="has another text tokenizer"):
        aim.adapted_start(trained, model.aim_config, other)
    params = aim.adapted_start(trained, model.aim_config, model.text)
    assert "caption_embedding" in params


def test_the_loss_is_that_of_the_tokens_plus_the_weighted_captions(config):
    setup = aim.Setup(config)
    params = nn.unbox(init_params(setup.model, jax.random.key(0)))
    batch = {
        "codes": np.arange(8).reshape(2, 4),
        "captions": np.array([[-1, 3, 4, 5], [-1, -1, -1, -1]], np.int32),
    }
    loss, (metrics, _) = aim.loss_fn(params, batch, jax.random.key(0), setup.model)

    def apply(method):
        return AiM(setup.model).apply({"params": params}, *batch.values(), method=method)

    np.testing.assert_allclose(metrics["loss"], apply("cross_entropy").mean(), rtol=1e-6)
    expected = metrics["loss"] + 0.5 * metrics["caption_loss"]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert metrics["caption_loss"] > 1


def test_setup_describes_the_batches_of_a_text_model(config):
    setup = aim.Setup(config)
    check_batch(config.batch_size, 1, setup.mesh)
    _, batch = setup.abstract_arguments()
    shapes = {name: (x.shape, str(x.dtype)) for name, x in batch.items()}
    assert shapes == {"codes": ((8, 4), "int32"), "captions": ((8, 6), "int32")}
    assert images_per_second(config) > 0


def test_flops_count_the_caption():
    base = dataclasses.replace(
        TINY_AIM, condition="text", num_classes=0, max_caption=4, caption_vocab=9
    )
    longer = dataclasses.replace(base, max_caption=8, text_loss_weight=0.0)
    more = forward_flops(longer) - forward_flops(base)
    plain = forward_flops(dataclasses.replace(TINY_AIM, num_tokens=4 + TINY_AIM.num_tokens))
    per_token = plain - forward_flops(TINY_AIM)
    head = 2 * 4 * TINY_AIM.d_model * TINY_AIM.vocab_size  # of image tokens only
    assert more == pytest.approx(per_token - head, rel=0.2)
    with_text_loss = forward_flops(dataclasses.replace(base, text_loss_weight=1.0))
    assert with_text_loss - forward_flops(base) == 2 * 4 * TINY_AIM.d_model * 9


def test_a_step_of_captions_does_not_depend_on_the_mesh(config):
    """Parameters, moments, averages and reports after a step: to 1e-4 relative."""
    rng = np.random.default_rng(0)
    text = TextTokenizer.load(config.text_tokenizer)
    batch = {
        "codes": rng.integers(0, 16, (8, 4)).astype(np.int32),
        "captions": text.encode([WORDS[i % 4] for i in range(8)], 6),
    }

    def step(devices, **mesh):
        changed = config.copy_and_resolve_references()
        changed.mesh.update(mesh)
        changed.model.class_dropout = 0.5
        setup = aim.Setup(changed, jax.devices()[:devices])
        state = create_sharded(setup.new_state, setup.mesh, setup.rules)
        state = state.with_params(random_params(AiMConfig(**changed.model)))
        return setup.train_step(state, shard_batch(batch, setup.mesh))

    found = step(8, data=2, model=2, slices=2, fsdp=True)
    chex.assert_trees_all_close(found, step(1), rtol=1e-4, atol=1e-7)
