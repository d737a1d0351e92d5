"""The fused decode ops in plain JAX and as CPU kernels; sampling/test_decode.py has them decode."""

import functools
import inspect
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aim_jax import ops
from aim_jax.models.layers import rms_norm
from aim_jax.sampling import engine

native_only = pytest.mark.skipif(
    not engine.native_kernels(), reason="needs a C++ compiler (CXX, c++, g++ or clang++)"
)


@pytest.fixture(params=["xla", pytest.param("native", marks=native_only)])
def who(request):
    """The implementation."""
    return request.param


@pytest.fixture(scope="module")
def native():
    from aim_jax.ops import native

    return native


def op(function, who, static=()):
    """An op in one implementation, jitted."""
    return jax.jit(functools.partial(function, implementation=who), static_argnames=static)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_at_all_sizes(who, dtype):
    """Numbers of rows, outputs and inputs that fill no tile, block or vector; rows are alike."""
    for b, k, m in itertools.product((1, 2, 3, 5, 8, 18, 33), (1, 17, 64, 100), (1, 7, 49, 130)):
        x, weight = normal(0, b, k).astype(dtype), normal(1, m, k).astype(dtype)
        linear = functools.partial(ops.linear, implementation=who)
        y = np.asarray(linear(x, weight))
        exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
        # Summing in float32; products of bfloat16 fit into it.
        assert np.abs(y - exact).max() <= 4e-7 * k**0.5 * (1 + np.abs(exact).max()), (b, k, m)
        alone = np.concatenate([linear(x[i : i + 1], weight) for i in range(min(b, 3))])
        if who == "native":  # to the last bit; XLA chooses by the number of rows
            np.testing.assert_array_equal(alone, y[:3])
        np.testing.assert_allclose(alone, y[:3], rtol=2e-5, atol=2e-5)


def mamba2_arguments(b, h, p, n, g, w, layers=2):
    e, c = h * p, h * p + 2 * g * n
    return dict(
        projected=normal(0, b, e + c + h),
        conv_cache=normal(1, layers, b, w, c),
        conv_weight=normal(2, layers, w, c),
        conv_bias=normal(3, layers, c),
        dt_bias=normal(4, layers, h) - 2,
        A=-jnp.exp(normal(5, layers, h)),
        D=normal(6, layers, h),
        norm_scale=normal(7, layers, e),
    )


def mamba2_expected(a, state, layer, position, g):
    """y before the division, the sum of its squares, ring and state, by the ops of the modules."""
    b, (_, _, w, c) = len(a["projected"]), a["conv_cache"].shape
    _, _, h, p, n = state.shape
    e = h * p
    z, inputs, dt = jnp.split(a["projected"], [e, e + c], axis=-1)
    ring = a["conv_cache"][layer].at[:, position % w].set(inputs)
    window = jnp.roll(ring, -(position + 1) % w, axis=1)[:, :-1]
    xBC, _ = ops.causal_conv1d(
        inputs[:, None], a["conv_weight"][layer], a["conv_bias"][layer], initial_state=window
    )
    x, B, C = jnp.split(xBC[:, 0], [e, e + g * n], axis=-1)
    y, new = ops.ssd_step(
        state[layer], x.reshape(b, h, p), dt, a["A"][layer], B.reshape(b, g, n),
        C.reshape(b, g, n), D=a["D"][layer], z=z.reshape(b, h, p), dt_bias=a["dt_bias"][layer],
    )  # fmt: skip
    return y.reshape(b, e), ring, new


@pytest.mark.parametrize("size", [(1, 2, 5, 3, 1, 4), (3, 4, 16, 20, 2, 4), (2, 6, 17, 33, 3, 2)])
def test_mamba2_step_is_the_step_of_the_modules(who, size):
    """One row, SSM groups, odd sizes; the other layer's caches stay as they are."""
    b, h, p, n, g, _ = size
    a, state, layer, position = mamba2_arguments(*size), normal(8, 2, b, h, p, n), 1, 5
    y, sum_squares, ring, new = op(ops.mamba2_step, who)(
        state=state, layer=layer, position=position, **a
    )
    u, expected_ring, expected = mamba2_expected(a, state, layer, position, g)
    np.testing.assert_allclose(y, u * a["norm_scale"][layer], rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(jnp.sum(sum_squares, 1), jnp.sum(u * u, 1), rtol=1e-4)
    np.testing.assert_array_equal(ring[1], expected_ring)
    np.testing.assert_allclose(new[1], expected, rtol=2e-5, atol=2e-5)
    np.testing.assert_array_equal(ring[0], a["conv_cache"][0])
    np.testing.assert_array_equal(new[0], state[0])


@pytest.mark.parametrize("size", [(1, 2, 5, 3, 1, 4), (3, 4, 16, 20, 2, 4)])
def test_dual_step_is_the_recurrent_step(who, size):
    """Over seven tokens, from caches that hold other numbers where no token has been yet."""
    b, h, p, n, g, _ = size
    a = mamba2_arguments(*size)
    unused = 1e3 if who == "xla" else np.nan
    state, other = jnp.zeros((2, b, h, p, n)), lambda *s: jnp.full((2, b, 9, *s), unused)
    caches = [a["conv_cache"], other(h, p), other(g, n), other(h)]
    ring, dual, recurrent = a["conv_cache"], op(ops.dual_step, who), op(ops.mamba2_step, who)
    names = ("conv_weight", "conv_bias", "dt_bias", "A", "D", "norm_scale")
    parameters = {name: a[name] for name in names}
    for position in range(7):
        projected = normal(20 + position, *a["projected"].shape)
        y, squares, *caches = dual(projected, *caches, 0, position, **parameters)
        expected, sums, ring, state = recurrent(projected, ring, state, 0, position, **parameters)
        np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(jnp.sum(squares, 1), jnp.sum(sums, 1), rtol=1e-3)
    np.testing.assert_array_equal(caches[0][0], ring[0])
    for rows in (caches[1][1], caches[1][0][:, 7:]):
        np.testing.assert_array_equal(rows, np.float32(unused))


def test_dual_step_keeps_its_digits_after_strong_decays(who):
    """Small steps after large ones; the large ones must not round the decays of the small ones."""
    b, h, p, n, g, w = 1, 2, 5, 3, 1, 4
    a = mamba2_arguments(b, h, p, n, g, w)
    unused = 1e3 if who == "xla" else np.nan
    state, other = jnp.zeros((2, b, h, p, n)), lambda *s: jnp.full((2, b, 50, *s), unused)
    caches = [a["conv_cache"], other(h, p), other(g, n), other(h)]
    ring, dual, recurrent = a["conv_cache"], op(ops.dual_step, who), op(ops.mamba2_step, who)
    names = ("conv_weight", "conv_bias", "dt_bias", "A", "D", "norm_scale")
    parameters = {name: a[name] for name in names}
    for position in range(50):
        projected = normal(20 + position, *a["projected"].shape)
        projected = projected.at[:, -h:].set(100.0 if position < 40 else -4.0)
        y, _, *caches = dual(projected, *caches, 0, position, **parameters)
        expected, _, ring, state = recurrent(projected, ring, state, 0, position, **parameters)
        assert np.abs(y - expected).max() <= 2e-6 * np.abs(expected).max(), position


def test_add_norm_modulate_divides_gates_and_adds(who):
    b, d, layers, inner = 3, 21, 2, 40
    hidden, residual = normal(0, b, d), normal(1, b, d)
    scale, parts = normal(2, layers, d), normal(3, layers, b, 6, d)
    squares = jnp.abs(normal(4, b, 7))
    call = op(ops.add_norm_modulate, who, ("inner", "shift", "scale", "gate", "gate_offset"))
    x, new = call(hidden, residual, scale, parts, 1, sum_squares=squares, inner=inner, gate=5)
    rstd = jax.lax.rsqrt(jnp.sum(squares, 1, keepdims=True) / inner + 1e-5)
    expected = residual + parts[0, :, 5] * hidden * rstd
    np.testing.assert_allclose(new, expected, rtol=1e-5, atol=1e-5)
    normed = rms_norm(expected, scale[1]) * (1 + parts[1, :, 1]) + parts[1, :, 0]
    np.testing.assert_allclose(x, normed, rtol=1e-4, atol=1e-4)
    # The first layer starts the stream, whatever the residual holds.
    _, new = call(hidden, jnp.full((b, d), jnp.nan), scale, parts, 0)
    np.testing.assert_array_equal(new, hidden)
    x, new = call(hidden, residual, scale, parts, 0, shift=2, scale=3, gate=4, gate_offset=0)
    np.testing.assert_allclose(new, residual + parts[0, :, 4] * hidden, rtol=1e-5, atol=1e-5)


@native_only
def test_wrong_arguments_are_named(native):
    with pytest.raises(ValueError, match=r"linear: weight has shape \(3, 5\), expected"):
        native.linear(normal(0, 2, 4), normal(1, 3, 5))
    with pytest.raises(ValueError, match="rows are float32 and weights bfloat16"):
        native.linear(normal(0, 2, 4), normal(1, 3, 4).astype(jnp.bfloat16))
    a = mamba2_arguments(1, 2, 5, 3, 1, 4)
    with pytest.raises(ValueError, match="mamba2_step: dt_bias has shape"):
        native.mamba2_step(
            **a | {"dt_bias": normal(0, 2, 3)}, state=normal(1, 2, 1, 2, 5, 3), layer=0, position=0
        )
    state, ring = normal(1, 2, 1, 2, 5, 3), a["conv_cache"]
    with pytest.raises(ValueError, match="conv_cache is bfloat16, expected float32"):
        native.mamba2_step(
            **a | {"conv_cache": ring.astype(jnp.bfloat16)}, state=state, layer=0, position=0
        )
    layers = ring.shape[0]
    for layer, position in ((layers, 0), (-1, 0), (0, -1)):
        with pytest.raises(jax.errors.JaxRuntimeError, match=r"(layer|position) is out of range"):
            jax.block_until_ready(
                native.mamba2_step(**a, state=state, layer=layer, position=position)
            )
    hidden, parts = normal(0, 2, 8), normal(1, 3, 2, 6, 8)
    with pytest.raises(ValueError, match="shift=6, but modulation has 6 parts"):
        native.add_norm_modulate(hidden, hidden, normal(2, 3, 8), parts, 0, shift=6)
    with pytest.raises(ValueError, match="5 rows of logits for 2 images"):
        native.sample(normal(0, 5, 7), *(jnp.ones(2) for _ in range(6)))


def test_mamba1_and_convolution_steps_are_those_of_the_modules():
    """Their plain forms; test_triton.py compares the kernels."""
    b, e, n, w, r = 3, 10, 4, 4, 2
    projected, ring = normal(0, b, 2 * e), normal(1, 2, b, w, e)
    weight, bias = normal(2, 2, w, e), normal(3, 2, e)
    x, new_ring = ops.conv_step(projected, ring, 1, 6, conv_weight=weight, conv_bias=bias)
    window = jnp.roll(ring[1].at[:, 6 % w].set(projected[:, :e]), -7 % w, axis=1)[:, :-1]
    expected, _ = ops.causal_conv1d(
        projected[:, None, :e], weight[1], bias[1], initial_state=window
    )
    np.testing.assert_allclose(x, expected[:, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(new_ring[0], ring[0])
    state, dt, BC = normal(4, 2, b, e, n), normal(5, b, e), normal(6, b, r + 2 * n)
    parameters = {
        "dt_bias": normal(7, 2, e),
        "A": -jnp.exp(normal(8, 2, e, n)),
        "D": normal(9, 2, e),
    }
    y, new = ops.mamba1_step(x, dt, BC, projected, state, 1, **parameters)
    dt_bias, A, D = (parameters[name][1] for name in ("dt_bias", "A", "D"))
    u, after = ops.selective_scan_step(
        state[1], x, dt, A, BC[:, r : r + n], BC[:, r + n :], D=D, z=projected[:, e:],
        dt_bias=dt_bias,
    )  # fmt: skip
    np.testing.assert_allclose(y, u, rtol=1e-6)
    np.testing.assert_allclose(new[1], after, rtol=1e-6)
    np.testing.assert_array_equal(new[0], state[0])


def test_every_op_says_which_implementations_it_has():
    x, labels = normal(0, 2, 5), jnp.array([1, 2])
    with pytest.raises(ValueError, match="cross_entropy: implementation='triton'"):
        ops.cross_entropy(x, labels, implementation="triton")
    with pytest.raises(ValueError, match=r"linear: implementation='pallas'.*one of xla, native"):
        ops.linear(x, x, implementation="pallas")
    for name in ops.__all__:
        function = getattr(ops, name)
        if inspect.isfunction(function) and name not in HELPERS:
            parameter = inspect.signature(function).parameters["implementation"]
            assert parameter.default is None, name


# Makers of caches, and the reference itself.
HELPERS = ("conv_ring", "grow_dual_cache", "init_dual_cache", "recurrence")
