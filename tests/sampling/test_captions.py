"""Sampling from captions: all engines, guidance, completion, files of models, exports, errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aim_jax import generate, load_pretrained
from aim_jax.cli.sample import chosen
from aim_jax.data.text import TEXT_TOKENIZER_FILE, TextTokenizer
from aim_jax.models import AiM
from aim_jax.models.captions import CaptionFeatures
from aim_jax.parallel import sharding
from aim_jax.sampling.config import SamplingConfig
from aim_jax.sampling.engine import Engine, native_kernels
from aim_jax.sampling.export import export_decode_step, export_sampler, flat_weights
from aim_jax.sampling.generate import generate_tokens, prepare_decoder
from aim_jax.sampling.grids import interpolate, sample_to_directory
from aim_jax.sampling.token_loop import make_decoder
from aim_jax.weights.directories import save_model
from tests.conftest import WORDS
from tests.models.test_models import random_params

native_only = pytest.mark.skipif(not native_kernels(), reason="needs a C++ compiler")
ENGINES = [
    pytest.param(Engine("dual", "xla"), id="dual-xla"),
    pytest.param(Engine("recurrent", "native"), id="recurrent-native", marks=native_only),
    pytest.param(Engine("dual", "native"), id="dual-native", marks=native_only),
]


@pytest.fixture
def model(text_model):
    return text_model


def greedy(model, condition, engine=Engine("recurrent", "xla"), **options):  # noqa: B008
    """Most likely tokens with guidance."""
    return np.asarray(
        generate_tokens(
            prepare_decoder(model.aim_params, model.aim_config, engine), condition, 0,
            np.arange(len(condition)), SamplingConfig(cfg_scale=2.0, top_k=1), **options,
        )
    )  # fmt: skip


def expected_tokens(model, condition):
    """Greedy tokens from whole forward passes without caches, guided by the null caption."""
    config = model.aim_config
    forward = jax.jit(functools.partial(AiM(config).apply, {"params": model.aim_params}))
    tokens = np.zeros((len(condition), config.num_tokens), np.int32)
    for i in range(config.num_tokens):
        conditional, null = (
            forward(tokens, c)[:, i] for c in (condition, np.full_like(condition, -1))
        )
        tokens[:, i] = np.argmax(null + 2 * (conditional - null), axis=-1)
    return tokens


def test_every_engine_samples_what_the_whole_model_predicts(model):
    condition = model.text.encode(WORDS, 7)
    expected = expected_tokens(model, condition)
    np.testing.assert_array_equal(greedy(model, condition), expected)
    assert (expected[0] != expected[1]).any()
    # Less padding, as in a batch of short captions.
    np.testing.assert_array_equal(greedy(model, condition[:2, 1:]), expected[:2])


@pytest.mark.parametrize("engine", ENGINES)
def test_engines_agree(model, engine):
    condition = model.text.encode(WORDS, 7)
    expected = greedy(model, condition)
    np.testing.assert_array_equal(greedy(model, condition, engine), expected)
    # Completion: the prefix of the image follows the caption through the prefill.
    prefix = jnp.asarray(expected[:, :3])
    np.testing.assert_array_equal(greedy(model, condition, engine, prefix=prefix), expected)


def test_captions_on_several_devices(model):
    condition = model.text.encode(WORDS, 7)
    expected = greedy(model, condition)
    mesh = sharding.make_mesh(devices=jax.devices()[:4])
    replicated = dataclasses.replace(model, aim_params=sharding.replicate(model.aim_params, mesh))
    np.testing.assert_array_equal(greedy(replicated, condition), expected)
    prefix = jnp.asarray(expected[:, :2])
    np.testing.assert_array_equal(greedy(replicated, condition, prefix=prefix), expected)


@pytest.mark.parametrize("engine", [ENGINES[0], ENGINES[-1]])
def test_a_caption_is_read_in_bfloat16(model, engine):
    """The first logits are near those in float32, with every engine."""
    config = dataclasses.replace(model.aim_config, compute_dtype="bfloat16")
    condition = model.text.encode(WORDS, 7)
    tokens = np.zeros((3, 4), np.int32)
    exact = AiM(model.aim_config).apply({"params": model.aim_params}, tokens, condition)[:, 0]
    apply = functools.partial(AiM(config).apply, {"params": model.aim_params})
    x, modulation = apply(condition, method="condition")
    decoder = make_decoder(model.aim_params, config, engine)
    caches = decoder.start(x[:, :-1], modulation, 4)
    logits, _ = decoder.step(x[:, -1:], modulation.after_caption(), caches, jnp.int32(0))
    error = np.max(np.abs(logits - exact)) / np.max(np.abs(exact))
    assert 1e-4 < error < 0.03


def test_generate_takes_text_and_reports_progress(model, capsys):
    seen = []
    samples = generate(model, WORDS, seed=1, callback=lambda s: seen.append(s.tokens.shape[1]))
    assert seen == [2, 4]
    assert "1 of 3 captions are empty: the null caption" in capsys.readouterr().err
    tokens = model.text.encode(WORDS, 7)
    np.testing.assert_array_equal(generate(model, tokens, seed=1).tokens, samples.tokens)
    generate(model, ["a red boat " * 9], seed=1)
    assert "1 of 1 captions have more than 7 tokens" in capsys.readouterr().err


def test_a_model_directory_keeps_the_text_tokenizer(model, tmp_path):
    path = save_model(tmp_path / "model", model)
    loaded = load_pretrained(path)
    assert loaded.text == model.text and loaded.aim_config == model.aim_config
    np.testing.assert_array_equal(
        generate(loaded, WORDS, seed=1).tokens, generate(model, WORDS, seed=1).tokens
    )
    file = path / TEXT_TOKENIZER_FILE
    TextTokenizer(model.text.merges[::-1][:0]).save(file)
    with pytest.raises(ValueError, match=f"damaged: {TEXT_TOKENIZER_FILE}"):
        load_pretrained(path)
    with pytest.raises(ValueError, match="is not the text tokenizer of the model's training"):
        load_pretrained(path, verify=False)
    file.unlink()
    with pytest.raises(ValueError, match=f"{TEXT_TOKENIZER_FILE} is missing"):
        load_pretrained(path, verify=False)
    with pytest.raises(
        ValueError, match=r"vocabulary of captions of 2.*but the text tokenizer has 0"
    ):
        dataclasses.replace(model, text=None)


def test_grids_are_labelled_with_captions(model, tmp_path):
    paths = sample_to_directory(model, WORDS[:2], 3, tmp_path, batch_size=4, pngs=True, npz=True)
    assert [path.name for path in paths[1:3]] == ["00000_a_red_boat.png", "00001_a_red_boat.png"]
    stored = np.load(tmp_path / "samples.npz")
    assert stored["captions"].tolist() == ["a red boat"] * 3 + ["a blue house"] * 3
    assert len(stored["arr_0"]) == 6


def test_exported_programs_sample_the_same_tokens(model):
    weights = flat_weights(model)
    condition = model.text.encode(WORDS[:2], 7)
    settings = SamplingConfig(cfg_scale=2.0, top_k=1)
    expected = greedy(model, condition)
    per_image = {name: np.asarray(x) for name, x in settings.arrays(2).items()}
    tokens, _, finite = export_sampler(model).call(
        weights, condition, np.uint32(0), np.arange(2, dtype=np.int32), per_image,
        np.array([0, 1], np.float32),
    )  # fmt: skip
    np.testing.assert_array_equal(tokens, expected)
    assert np.asarray(finite).tolist() == [True, True]
    programs = export_decode_step(model, 4)
    weights = {name: x for name, x in weights.items() if name.startswith("aim.")}
    rows = np.concatenate([condition, np.full_like(condition, -1)])
    laid_out = programs["prepare"].call(weights)
    x, modulation, caches = programs["begin"].call(laid_out, rows)
    for position in range(3):
        logits, caches = programs["step"].call(laid_out, x, modulation, caches)
        guided = logits[2:] + 2 * (logits[:2] - logits[2:])
        token = np.argmax(guided, axis=-1).astype(np.int32)
        np.testing.assert_array_equal(token, expected[:, position])
        x = programs["embed"].call(laid_out, np.tile(token, 2), np.int32(position))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1], "words takes captions; expected a list of texts"),
        ("a red boat", "words takes captions"),
        ([], "words takes captions"),
        (np.zeros((2, 8), np.int32), "l of at most 7, got int32 of shape"),
        (np.array([[3, -1]]), "with -1 before the first"),
        (np.array([[3, 999]]), "expected tokens of captions in 0"),
        (CaptionFeatures(np.zeros((1, 2, 3)), np.ones(1, int)), "words takes no features"),
    ],
)
def test_wrong_captions_are_refused(model, labels, message):
    with pytest.raises(ValueError, match=message):
        generate(model, labels)


def test_programs_refuse_the_other_condition(model, tiny_model, tmp_path):
    assert chosen(tiny_model, ["boat"], [], "") == [0]
    (tmp_path / "more.txt").write_text("a dog\n")
    assert chosen(model, [], ["a cat"], str(tmp_path / "more.txt")) == ["a cat", "a dog"]
    for arguments, message in (
        ((tiny_model, [], ["a cat"], ""), "tiny takes no captions; choose its --classes"),
        ((model, ["boat"], [], ""), "words has no classes; write --captions"),
        ((model, [], [], ""), "write --captions or --captions_file"),
        ((model, [], ["a red boat " * 9], "", True), "1 of 1 captions have more than 7 tokens"),
    ):
        with pytest.raises(ValueError, match=message):
            chosen(*arguments)
    with pytest.raises(ValueError, match="has no classes to mix"):
        interpolate(model, 0, 1, 3, 2)


def test_features_of_an_encoder_condition_samples(model):
    config = dataclasses.replace(model.aim_config, caption_vocab=0, caption_features=3)
    encoded = dataclasses.replace(
        model, aim_config=config, aim_params=random_params(config), text=None
    )
    values = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
    images = generate(encoded, CaptionFeatures(values, np.array([5, 2])), cfg_scale=2.0).images
    assert len(images) == 2
    with pytest.raises(ValueError, match=r"expected CaptionFeatures with values \(b, l, 3\)"):
        generate(encoded, CaptionFeatures(values[..., :2], np.array([5, 2])))
    with pytest.raises(ValueError, match="takes features of captions, from another encoder"):
        chosen(encoded, [], ["a cat"], "")
