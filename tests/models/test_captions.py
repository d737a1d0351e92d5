"""Captions as the condition of AiM: padding, causality, caches, the null caption, the text loss."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aim_jax.models import AiM, AiMConfig, init_cache
from aim_jax.models.captions import CaptionFeatures, null_condition
from tests.models.test_models import random_params

BASE = AiMConfig(
    vocab_size=24, condition="text", num_classes=0, max_caption=8, caption_vocab=11, num_tokens=6,
    d_model=16, n_layer=2, d_state=8, headdim=8, chunk_size=4, class_dropout=0.5,
    text_loss_weight=0.5,
)  # fmt: skip
VARIANTS = {
    "mamba2": BASE,
    "mamba1": dataclasses.replace(BASE, mixer="mamba1"),
    "two_groups_mlp": dataclasses.replace(
        BASE, ngroups=2, adaln="group", num_groups=2, d_intermediate=20
    ),
}
CODES = np.random.default_rng(0).integers(0, 24, (3, 6))
WORDS = [[3, 1, 4, 1], [2, 7], []]


def captions(length: int, words=WORDS) -> np.ndarray:
    rows = np.full((len(words), length), -1, np.int32)
    for row, tokens in zip(rows, words, strict=True):
        row[length - len(tokens) :] = tokens
    return rows


def features(length: int) -> CaptionFeatures:
    """Features of three captions of the lengths of `WORDS`, with NaN in the padding."""
    values = np.random.default_rng(1).normal(size=(3, 8, 5)).astype(np.float32)
    lengths = np.array([4, 2, 0], np.int32)
    values[np.arange(8)[None] < 8 - lengths[:, None]] = np.nan
    padded = np.pad(values, [(0, 0), (8, 0), (0, 0)], constant_values=np.nan)
    return CaptionFeatures(padded[:, -length:], lengths)


@functools.cache
def forward(config):
    return jax.jit(lambda params, codes, c: AiM(config).apply({"params": params}, codes, c))


@functools.cache
def gradient(config):
    """Return value and gradient of both losses together."""

    def loss(params, codes, c):
        method = "cross_entropies" if config.text_loss_weight else "cross_entropy"
        nats = AiM(config).apply({"params": params}, codes, c, method=method)
        return sum(x.mean() for x in jax.tree.leaves(nats))

    return jax.jit(jax.value_and_grad(loss))


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    config = VARIANTS[request.param]
    return config, random_params(config)


def assert_close(actual, expected, atol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), actual, expected)


def test_padding_changes_neither_logits_nor_gradients(variant):
    config, params = variant
    expected = forward(config)(params, CODES, captions(8))
    for length in (4, 16):
        assert_close(forward(config)(params, CODES, captions(length)), expected)
    for row in (0, 1):  # without padding
        alone = forward(config)(params, CODES[row : row + 1], np.array([WORDS[row]], np.int32))
        assert_close(alone[0], expected[row])
    loss, grads = gradient(config)(params, CODES, captions(8))
    assert_close(gradient(config)(params, CODES, captions(4)), (loss, grads))
    # Every parameter learns from the two losses; of the table, the tokens that occur.
    flows = jax.tree.map(lambda g: float(jnp.abs(g).max()), grads)
    assert min(jax.tree.leaves(flows)) > 1e-6
    assert np.isfinite(loss)


def test_features_of_an_encoder_replace_the_tokens():
    config = dataclasses.replace(BASE, caption_vocab=0, caption_features=5, text_loss_weight=0.0)
    params = random_params(config)
    expected = forward(config)(params, CODES, features(8))
    assert np.isfinite(expected).all()
    assert_close(forward(config)(params, CODES, features(16)), expected)
    _, grads = gradient(config)(params, CODES, features(8))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert float(jnp.abs(grads["caption_embedding"]["projection"]["kernel"]).min()) > 0
    null = forward(config)(params, CODES, null_condition(config, features(8)))
    assert_close(null[2], expected[2])
    assert np.abs(null[:2] - expected[:2]).max() > 1e-3


def test_logits_depend_on_the_caption_and_on_the_codes_before(variant):
    config, params = variant
    logits = forward(config)(params, CODES, captions(8))
    changed = CODES.copy()
    changed[:, 3] = (changed[:, 3] + 1) % 24
    difference = np.abs(forward(config)(params, changed, captions(8)) - logits).max(axis=(0, 2))
    assert (difference[:4] == 0).all() and (difference[4:] > 1e-4).all()
    # Also on the order of the words, which the pooled vector does not have.
    other = captions(8, [WORDS[0][::-1], [2, 8], []])
    difference = np.abs(forward(config)(params, CODES, other) - logits).max(axis=2)
    assert (difference[:2] > 1e-5).all() and (difference[2] == 0).all()


@pytest.mark.parametrize(
    ("variant", "form"),
    [(name, "recurrent") for name in VARIANTS]
    + [(name, "dual") for name, config in VARIANTS.items() if config.mixer == "mamba2"],
    indirect=["variant"],
)
def test_cached_steps_equal_the_full_forward_at_every_position(variant, form):
    config, params = variant
    model = AiM(config)

    @jax.jit
    def decode(params, codes, c):
        apply = lambda *args, method: model.apply({"params": params}, *args, method=method)  # noqa: E731
        x, modulation = apply(c, method="condition")
        cache = init_cache(config, 3, dual=8 + 6 if form == "dual" else None)
        logits, cache = apply(x, modulation, cache, method="forward")

        def step(cache, inputs):
            code, position = inputs
            x = apply(code[:, None], position[None], method="embed_codes")
            logits, cache = apply(x, modulation.after_caption(), cache, method="forward")
            return cache, logits[:, 0]

        _, rest = jax.lax.scan(step, cache, (codes.T[:-1], jnp.arange(5)))
        return jnp.concatenate([logits[:, -1:], rest.swapaxes(0, 1)], axis=1)

    expected = forward(config)(params, CODES, captions(8))
    assert_close(decode(params, CODES, captions(8)), expected)


def test_dropout_replaces_whole_captions_by_the_null_caption():
    params = random_params(BASE)
    conditional = forward(BASE)(params, CODES, captions(8))
    null = forward(BASE)(params, CODES, null_condition(BASE, captions(8)))
    assert_close(null[2], conditional[2])
    assert np.abs(null[:2] - conditional[:2]).max(axis=(1, 2)).min() > 1e-3

    @jax.jit
    def train(key):
        return AiM(BASE).apply(
            {"params": params}, CODES, captions(8), train=True, rngs={"dropout": key}
        )

    dropped = []
    for seed in range(8):
        logits = train(jax.random.key(seed))
        is_null = np.abs(logits - null).max(axis=(1, 2)) < 1e-5
        kept = np.abs(logits - conditional).max(axis=(1, 2)) < 1e-5
        assert (is_null | kept).all()
        dropped.append(is_null[:2])
    assert 4 <= np.sum(dropped) <= 12


def test_the_text_loss_is_a_distribution_over_the_next_word(variant):
    """The nats of the last of three tokens, over all of its values, are those of one softmax.

    They would not be if the words of a caption could be predicted from later ones, such as through
    the pooled vector.
    """
    config, params = variant

    @jax.jit
    def nats(c):
        codes = jnp.zeros((c.shape[0], 1), jnp.int32)
        return AiM(config).apply({"params": params}, codes, c, method="cross_entropies")[1]

    values = range(config.caption_vocab)
    of_two = 2 * nats(captions(5, [[3, 9, last] for last in values]))
    of_one = nats(captions(5, [[3, 9] for _ in values]))
    np.testing.assert_allclose(np.exp(of_one - of_two).sum(), 1, rtol=1e-4)
    np.testing.assert_array_equal(nats(captions(5, [[4], [], *[[1, 1]] * 9]))[:2], 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"condition": "image"}, "condition='image'; expected one of class, text"),
        (
            {"condition": "class", "num_classes": 5},
            "max_caption=8, caption_vocab=11, text_loss_weight=0.5; expected",
        ),
        ({"num_classes": 5}, "num_classes=5; expected 0 with condition='text'"),
        ({"max_caption": 1}, "max_caption=1; expected 2"),
        ({"max_caption": 0, "text_loss_weight": 0.0}, "max_caption=0; expected 1"),
        ({"max_caption": 5000}, "max_caption=5000; expected 2 to 4096"),
        ({"caption_vocab": 0}, "caption_vocab=0 and caption_features=0; expected one of them"),
        ({"caption_features": 4}, "caption_vocab=11 and caption_features=4; expected one"),
        ({"caption_features": 4, "caption_vocab": 0}, "text_loss_weight=0.5; expected 0"),
        ({"text_loss_weight": -1.0}, "text_loss_weight=-1.0; expected a finite number"),
    ],
)
def test_wrong_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **changes)


def test_files_of_class_models_have_no_fields_of_text():
    fields = AiMConfig().fields()
    assert not [
        name for name in fields if "caption" in name or "text" in name or name == "condition"
    ]
    assert AiMConfig(**fields) == AiMConfig()
    assert AiMConfig(**BASE.fields()) == BASE
