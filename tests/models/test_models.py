"""The AiM stack: sizes, causality, caches, the adaLN family, dropout, variants of execution."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from aim_jax.models import PRESETS, AiM, AiMConfig, init_cache
from aim_jax.models.aim import init_params, param_shapes
from aim_jax.models.layers import AdaLN, LabelEmbedder, group_to_layer

BASE = AiMConfig(
    vocab_size=24, num_classes=5, num_tokens=9, d_model=16, n_layer=3, d_state=8, headdim=8,
    chunk_size=4,
)  # fmt: skip
VARIANTS = {
    "mamba2": BASE,
    "mamba1": dataclasses.replace(BASE, mixer="mamba1"),
    "two_groups_mlp": dataclasses.replace(
        BASE, ngroups=2, adaln="group", num_groups=2, d_intermediate=20, position_offset=1
    ),
}
CODES = np.random.default_rng(0).integers(0, 24, (2, 9))
LABELS = np.array([1, 5])


def random_params(config, key=0):
    """Parameters like initial ones with noise, so that no gate or bias is zero."""
    rng = np.random.default_rng(key)
    centers = {
        "scale": lambda shape: np.ones(shape),
        "A_log": lambda shape: np.log(rng.uniform(1, 16, shape)),
        "dt_bias": lambda shape: np.log(np.expm1(np.exp(rng.uniform(*np.log([1e-3, 0.1]), shape)))),
        "D": lambda shape: np.ones(shape),
    }

    def random(path, leaf):
        center = centers.get(path[-1].key, np.zeros)(leaf.shape)
        return jnp.asarray(center + 0.2 * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree.map_with_path(random, param_shapes(config))


@functools.cache
def forward(config):
    return jax.jit(
        lambda params, codes, labels: AiM(config).apply({"params": params}, codes, labels)
    )


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request):
    config = VARIANTS[request.param]
    params = random_params(config)
    return config, params, forward(config)(params, CODES, LABELS)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("B", 147_622_080), ("L", 349_760_000), ("XL", 763_291_392), ("1B", 1_335_944_192)],
)
def test_presets_have_the_exact_parameter_counts(name, expected):
    params = param_shapes(PRESETS[name])
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected


def test_logits_depend_on_the_codes_before_and_on_nothing_after(variant):
    config, params, logits = variant
    changed = CODES.copy()
    changed[:, 4] = (changed[:, 4] + 1) % 24
    difference = np.abs(forward(config)(params, changed, LABELS) - logits).max(axis=(0, 2))
    assert (difference[:5] == 0).all() and (difference[5:] > 1e-4).all()


def test_cached_steps_equal_the_full_forward_at_every_position(variant):
    config, params, logits = variant
    model = AiM(config)

    @jax.jit
    def decode(params, codes, labels):
        apply = lambda *args, method: model.apply({"params": params}, *args, method=method)  # noqa: E731
        x, modulation = apply(labels, method="condition")

        def step(carry, inputs):
            x, cache = carry
            code, position = inputs
            logits, cache = apply(x, modulation, cache, method="forward")
            return (apply(code[:, None], position[None], method="embed_codes"), cache), logits[:, 0]

        carry = (x, init_cache(config, 2))
        return jax.lax.scan(step, carry, (codes.T, jnp.arange(9)))[1].swapaxes(0, 1)

    np.testing.assert_allclose(decode(params, CODES, LABELS), logits, atol=2e-5)


def test_a_prefix_in_one_call_then_the_rest_equals_the_whole(variant):
    config, params, logits = variant
    model = AiM(config)

    @jax.jit
    def in_parts(params):
        apply = lambda *args, method: model.apply({"params": params}, *args, method=method)  # noqa: E731
        start, modulation = apply(LABELS, method="condition")
        x = jnp.concatenate([start, apply(CODES[:, :-1], jnp.arange(8), method="embed_codes")], 1)
        first, cache = apply(x[:, :6], modulation, init_cache(config, 2), method="forward")
        rest, _ = apply(x[:, 6:], modulation, cache, method="forward")
        return jnp.concatenate([first, rest], axis=1)

    np.testing.assert_allclose(in_parts(params), logits, atol=2e-5)


def test_ways_to_execute_give_the_same_values_and_gradients():
    params = random_params(BASE)

    def value_and_grad(config):
        loss = lambda p: jnp.mean(AiM(config).apply({"params": p}, CODES, LABELS) ** 2)  # noqa: E731
        return jax.jit(jax.value_and_grad(loss))(params)

    expected = value_and_grad(BASE)
    for changes in ({"scan_unroll": 3}, {"remat": "full"}, {"remat": "dots", "chunk_size": 9}):
        actual = value_and_grad(dataclasses.replace(BASE, **changes))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), actual, expected
        )


@pytest.mark.parametrize("groups", [1, 2])
def test_grouped_adaln_rewritten_per_layer_is_the_same_model(groups):
    grouped = dataclasses.replace(BASE, adaln="group", num_groups=groups)
    params = random_params(grouped)
    rewritten = params | {"adaln": group_to_layer(params["adaln"])}
    np.testing.assert_array_equal(
        forward(grouped)(params, CODES, LABELS), forward(BASE)(rewritten, CODES, LABELS)
    )


def test_groups_are_dealt_to_layers_in_turn():
    c = jax.random.normal(jax.random.key(0), (2, 4))
    adaln = AdaLN(n_layer=5, num_groups=2, parts=3, table=True)
    params = adaln.init(jax.random.key(1), c)
    kernel, bias, table = (nn.unbox(params)["params"][k] for k in ("kernel", "bias", "table"))
    out = adaln.apply(params, c)
    for layer in range(5):
        linear = jnp.einsum("bd,dpe->bpe", nn.silu(c), kernel[layer % 2])
        np.testing.assert_allclose(out[layer], linear + bias[layer % 2] + table[layer], atol=1e-6)


def test_initial_blocks_are_the_identity_with_per_layer_adaln():
    params = jax.jit(lambda: nn.unbox(init_params(BASE, jax.random.key(0))))()
    _, state = AiM(BASE).apply({"params": params}, CODES, LABELS, mutable="intermediates")
    (hidden,) = state["intermediates"]["layers"]["hidden"]
    assert hidden.shape == (3, 2, 9, 16) and (hidden == 0).all()


def test_class_dropout_acts_in_training_at_its_rate():
    embedder = LabelEmbedder(num_classes=3, features=4, dropout=0.25)
    labels = jnp.arange(4000) % 3
    params = embedder.init(jax.random.key(0), labels[:1])
    null = embedder.apply(params, jnp.array([3]))
    kept = embedder.apply(params, labels)
    assert not (kept == null).all(axis=-1).any()
    rngs = {"dropout": jax.random.key(1)}
    dropped = (embedder.apply(params, labels, True, rngs=rngs) == null).all(axis=-1)
    assert abs(dropped.mean() - 0.25) < 0.03


def test_token_dropout_acts_in_training_only():
    config = dataclasses.replace(BASE, token_dropout=0.5, class_dropout=0.0)
    params = random_params(config)
    rngs = {"dropout": jax.random.key(1)}
    run = lambda **kw: AiM(config).apply({"params": params}, CODES, LABELS, **kw)  # noqa: E731
    np.testing.assert_allclose(run(), forward(BASE)(params, CODES, LABELS), atol=1e-5)
    assert jnp.abs(run(train=True, rngs=rngs) - run()).max() > 1e-2


def test_bfloat16_compute_is_close_and_keeps_float32_where_it_matters():
    config = dataclasses.replace(BASE, compute_dtype="bfloat16")
    params = random_params(BASE)
    expected = forward(BASE)(params, CODES, LABELS)
    logits = forward(config)(params, CODES, LABELS)
    assert logits.dtype == jnp.float32
    assert 0 < jnp.abs(logits - expected).max() < 0.1 * jnp.abs(expected).max()
    cache = init_cache(config, 2)
    assert cache.ssm_state.dtype == jnp.float32 and cache.conv_x.dtype == jnp.bfloat16
    x, modulation = AiM(config).apply({"params": params}, LABELS, method="condition")
    _, after = AiM(config).apply({"params": params}, x, modulation, cache, method="forward")
    assert jax.tree.map(lambda x: (x.shape, x.dtype), after) == jax.tree.map(
        lambda x: (x.shape, x.dtype), cache
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixer": "rwkv"}, r"mixer='rwkv'; expected one of mamba1, mamba2"),
        ({"adaln": "none"}, "adaln='none'"),
        ({"headdim": 12}, "expand \\* d_model = 32 is not a multiple of headdim=12"),
        ({"ngroups": 3}, "4 heads cannot be shared among ngroups=3"),
        ({"n_layer": 0}, "n_layer=0; expected an integer"),
        ({"position_offset": 2}, "position_offset must be 0 or 1"),
        ({"remat": "some"}, "remat='some'"),
    ],
)
def test_impossible_configurations_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(BASE, **changes)
