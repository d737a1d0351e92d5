"""The Triton kernels, without a GPU: interpreted against the library's own operations and golden
vectors, lowered for CUDA inside the loops of a decoder, compiled ahead of time.
"""

import dataclasses
import functools
import pathlib
import re
import zlib
from typing import NamedTuple

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.mlir import ir

from aim_jax import ops
from aim_jax.ops.triton_availability import triton_unavailable_because

if reason := triton_unavailable_because():
    pytest.skip(f"{reason}; `make test` brings it all", allow_module_level=True)

from aim_jax.models.aim import AiM, param_shapes
from aim_jax.models.config import PRESETS, AiMConfig
from aim_jax.models.layers import gated_rms_norm, modulate, rms_norm
from aim_jax.ops import triton as kernels
from aim_jax.ops.triton import launch, mamba2
from aim_jax.ops.triton.ssd_chunks import Decays, Sizes
from aim_jax.perf.accelerators import topology
from aim_jax.sampling import logits as filters
from aim_jax.sampling.config import SETTINGS, SamplingConfig
from aim_jax.sampling.engine import Engine
from aim_jax.sampling.generate import (
    generate_tokens,
    prepare_decoder,
)
from aim_jax.sampling.token_loop import Request, Series, generate_on_device, make_decoder
from aim_jax.utils.random import random_key
from benchmarks import kernels as kernel_benchmark
from tests import triton_on_cpu  # noqa: F401  (lets the kernels run here)
from tests.ops.test_ops import assert_close
from tests.teacher_forced import teacher_forced_decode

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"


def normal(rng, *shape, dtype=np.float32):
    return rng.normal(size=shape).astype(dtype)


def golden_arrays(name):
    return {key: array.astype(np.float32) for key, array in np.load(GOLDEN / name).items()}


# Mamba-2, both forms of the decode step


def mamba2_layers(b, h, p, n, g, w, layers=2, tokens=1, dtype="float32"):
    """Random parameters of a stack of layers, and what in_proj gives each of them per token."""
    rng = np.random.default_rng(0)
    c = h * p + 2 * g * n
    parameters = {
        "conv_weight": normal(rng, layers, w, c),
        "conv_bias": normal(rng, layers, c),
        "dt_bias": normal(rng, layers, h) - 2,
        "A": -np.exp(normal(rng, layers, h)),
        "D": normal(rng, layers, h),
        "norm_scale": normal(rng, layers, h * p),
    }
    projected = normal(rng, tokens, layers, b, h * p + c + h)
    return parameters, jnp.asarray(projected, dtype)


class Expected(NamedTuple):
    """Of every layer and token (L, b, tokens, ...): the gated norm, and what the caches hold."""

    y: np.ndarray
    xBC: np.ndarray
    state: np.ndarray
    inputs: np.ndarray
    B: np.ndarray
    log_decay: np.ndarray


@functools.partial(jax.jit, static_argnames=("h", "p", "n", "g"))
@functools.partial(jax.vmap, in_axes=(0, 1, None, None, None, None))
def mamba2_expected(parameters, projected, h, p, n, g):
    """Runs a layer over projected (tokens, b, columns) by the library's operations."""
    x = jnp.swapaxes(projected, 0, 1).astype(jnp.float32)
    b, l, _ = x.shape
    e = h * p
    z, now, dt = jnp.split(x, [e, x.shape[-1] - h], axis=-1)
    xBC, _ = ops.causal_conv1d(now, parameters["conv_weight"], parameters["conv_bias"])
    xs, B, C = jnp.split(xBC, [e, e + g * n], axis=-1)
    xs, B, C = xs.reshape(b, l, h, p), B.reshape(b, l, g, n), C.reshape(b, l, g, n)
    A, D, dt_bias = (parameters[name] for name in ("A", "D", "dt_bias"))

    def step(state, inputs):
        y, state = ops.ssd_step(state, *inputs[:2], A, *inputs[2:], D=D, dt_bias=dt_bias)
        return state, (y, state)

    inputs = [jnp.swapaxes(t, 0, 1) for t in (xs, dt, B, C)]
    _, outputs = jax.lax.scan(step, jnp.zeros((b, h, p, n)), inputs)
    y, state = (jnp.swapaxes(t, 0, 1) for t in outputs)
    y = gated_rms_norm(y.reshape(b, l, e), z, parameters["norm_scale"], group_size=e // g)
    dt = jax.nn.softplus(dt + dt_bias)
    return Expected(y, now, state, dt[..., None] * xs, B, jnp.cumsum(dt * A, axis=1))


def expected_of(parameters, projected, size):
    arrays = mamba2_expected(parameters, projected, *size[1:5])
    return Expected(*map(np.asarray, arrays))


ring_of, conv_step, mamba1_step, sample = map(
    jax.jit, (ops.conv_ring, kernels.conv_step, kernels.mamba1_step, kernels.sample)
)


def tokens_first(y):
    """(L, b, tokens, e) -> (tokens, L, b, e), as the scan over tokens stacks it."""
    return np.moveaxis(y, 2, 0)


def caches_after(prefix, expected, width, capacity=None):
    """Conv ring and state after `prefix` tokens; with a capacity, ring and token caches.

    Rows that no token has written yet are NaN, so that reading one shows.
    """
    padded = np.pad(expected.xBC, [(0, 0), (0, 0), (width - 1, 0), (0, 0)])
    ring = ring_of(padded[:, :, prefix : prefix + width - 1], prefix)
    if capacity is None:
        state = expected.state[:, :, prefix - 1]
        return ring, jnp.asarray(state if prefix else np.zeros_like(state))

    def widen(rows):
        rest = [(0, capacity - prefix if axis == 2 else 0) for axis in range(rows.ndim)]
        return jnp.asarray(np.pad(rows[:, :, :prefix], rest, constant_values=np.nan))

    return ring, widen(expected.inputs), widen(expected.B), widen(to_now(expected, prefix))


def to_now(expected, prefix):
    """The sums of dt A of a dual cache, from each of `prefix` tokens to the newest one."""
    sums = expected.log_decay[:, :, :prefix]
    return sums[:, :, -1:] - sums


def gated_norm(y, sum_squares, g):
    """Finishes the gated norm that a step kernel has begun."""
    b, e = y.shape
    mean_square = sum_squares.reshape(b, g, -1).sum(axis=-1, keepdims=True) / (e // g)
    y = y.astype(jnp.float32).reshape(b, g, -1) * jax.lax.rsqrt(mean_square + 1e-5)
    return y.reshape(b, e)


@functools.partial(jax.jit, static_argnames=("step", "g"))
def decode(step, parameters, projected, caches, first, g):
    """Runs `step` as a model does: a scan over layers inside a scan over tokens."""
    tokens, layers = projected.shape[:2]

    def layer_step(position, caches, inputs):
        layer, projected = inputs
        y, sum_squares, *caches = step(projected, *caches, layer, position, **parameters)
        return tuple(caches), gated_norm(y, sum_squares, g)

    def token_step(caches, inputs):
        position, projected = inputs
        xs = (jnp.arange(layers), projected)
        return jax.lax.scan(functools.partial(layer_step, position), caches, xs)

    return jax.lax.scan(token_step, caches, (first + jnp.arange(tokens), projected))


class Case(NamedTuple):
    """Sizes of a layer, the tokens before the decode starts, and the tokens decoded."""

    size: tuple  # rows, heads, headdim, state, groups, width
    prefix: int
    tokens: int


ODD = (2, 4, 3, 5, 2, 4)
SMALL = (1, 2, 3, 5, 1, 4)
CASES = {
    "odd": Case(ODD, prefix=0, tokens=2),
    "one row, two blocks of channels": Case((1, 2, 12, 3, 1, 2), prefix=2, tokens=2),
    "powers of two": Case((1, 2, 4, 8, 1, 4), prefix=0, tokens=5),
}


@pytest.mark.parametrize("case", CASES)
def test_mamba2_step_walks_along_the_scan(case):
    size, prefix, tokens = CASES[case]
    *_, g, w = size
    parameters, projected = mamba2_layers(*size, tokens=prefix + tokens)
    expected = expected_of(parameters, projected, size)
    caches = caches_after(prefix, expected, w)
    (conv, state), y = decode(
        kernels.mamba2_step, parameters, projected[prefix:], caches, prefix, g
    )
    assert_close(y, tokens_first(expected.y)[prefix:], 1e-5, "y")
    assert_close(state, expected.state[:, :, -1], 1e-5, "state")
    # The rings hold the last w inputs, that of position t in slot t mod w.
    for t in range(max(prefix + tokens - w, 0), prefix + tokens):
        np.testing.assert_array_equal(conv[:, :, t % w], expected.xBC[:, :, t])


def test_mamba2_step_in_bfloat16():
    parameters, projected = mamba2_layers(*SMALL, layers=1, tokens=3, dtype="bfloat16")
    expected = expected_of(parameters, projected, SMALL)
    caches = tuple(cache.astype(jnp.bfloat16) for cache in caches_after(0, expected, SMALL[-1]))
    (conv, state), y = decode(kernels.mamba2_step, parameters, projected, caches, 0, SMALL[4])
    assert (conv.dtype, state.dtype) == (jnp.bfloat16, jnp.bfloat16)
    # Three steps, each rounding the state to 8 bits, and the rounding of y.
    assert_close(state, expected.state[:, :, -1], 3 * 2**-8)
    assert_close(y, tokens_first(expected.y), 4 * 2**-8)
    assert np.any(np.asarray(state, np.float32) != expected.state[:, :, -1])


# The kernel reads the past in tiles of 32 tokens: nothing, one tile, one tile and its neighbour.
DUAL_CASES = {
    "odd": (CASES["odd"], 1),
    "one row, two tiles": (Case((1, 2, 12, 3, 1, 2), prefix=32, tokens=2), 1),
    "heads share a program": (Case((2, 4, 3, 5, 2, 4), prefix=7, tokens=2), 2),
    "all heads share a program": (Case((1, 4, 4, 8, 1, 4), prefix=31, tokens=3), 4),
}


@pytest.mark.parametrize("case", DUAL_CASES)
def test_dual_step_walks_along_the_scan(case):
    (size, prefix, tokens), heads = DUAL_CASES[case]
    parameters, projected = mamba2_layers(*size, tokens=prefix + tokens)
    expected = expected_of(parameters, projected, size)
    caches = caches_after(prefix, expected, size[-1], capacity=prefix + tokens + 1)
    step = functools.partial(kernels.dual_step, heads_per_program=heads)
    (_, *caches), y = decode(step, parameters, projected[prefix:], caches, prefix, size[4])
    assert_close(y, tokens_first(expected.y)[prefix:], 1e-5, "y")
    rows = (expected.inputs, expected.B, to_now(expected, prefix + tokens))
    for cache, expected_rows in zip(caches, rows, strict=True):
        assert_close(cache[:, :, :-1], expected_rows, 1e-5)
        assert np.all(np.isnan(cache[:, :, -1]))


def test_dual_step_in_bfloat16():
    parameters, projected = mamba2_layers(*SMALL, layers=1, tokens=4, dtype="bfloat16")
    expected = expected_of(parameters, projected, SMALL)
    ring, inputs, B, log_decay = caches_after(0, expected, SMALL[-1], capacity=4)
    caches = (*(cache.astype(jnp.bfloat16) for cache in (ring, inputs, B)), log_decay)
    (*narrow, log_decay), y = decode(kernels.dual_step, parameters, projected, caches, 0, SMALL[4])
    assert [cache.dtype for cache in narrow] == [jnp.bfloat16] * 3
    assert log_decay.dtype == jnp.float32
    # Two factors of every product and y are rounded to 8 bits.
    assert_close(y, tokens_first(expected.y), 3 * 2**-8)


def one_step(step, **changed):
    """One call on caches whose other layers are NaN; `changed` replaces arguments by name."""
    b, h, p, n, g, w = SMALL
    parameters, projected = mamba2_layers(*SMALL, layers=3)
    rng = np.random.default_rng(2)
    caches = {"conv_cache": normal(rng, 3, b, w, h * p + 2 * g * n)}
    if getattr(step, "func", step) is kernels.mamba2_step:
        caches["state"] = normal(rng, 3, b, h, p, n)
    else:
        caches |= {"inputs": normal(rng, 3, b, 8, h, p), "B_cache": normal(rng, 3, b, 8, g, n)}
        caches["log_decay"] = -np.exp(normal(rng, 3, b, 8, h))
    for cache in caches.values():
        cache[[0, 2]] = np.nan
    arguments = caches | {"layer": 1, "position": 3, "projected": projected[0, 0]} | parameters
    return arguments, jax.jit(step)(**arguments | changed)


STEPS = (kernels.mamba2_step, kernels.dual_step)


@pytest.mark.parametrize("step", STEPS)
def test_a_step_touches_its_own_layer_only(step):
    arguments, (y, sum_squares, *updated) = one_step(step)
    assert np.all(np.isfinite(y)) and np.all(np.isfinite(sum_squares))
    for name, after in zip(arguments, updated, strict=False):  # the caches come first
        before = arguments[name]
        assert np.all(np.isnan(after[0])) and np.all(np.isnan(after[2])), name
        changed = np.any(after[1] != before[1], axis=(0, *range(2, before.ndim - 1)))
        # Of a ring or a token cache one slot or row is written, that of position 3. To the sums of
        # decays before it a term is added.
        rows = np.arange(changed.size)
        expected = rows <= 3 if name == "log_decay" else rows == 3
        expected = np.ones(1) if name == "state" else expected
        np.testing.assert_array_equal(np.any(changed) if name == "state" else changed, expected)


@pytest.mark.parametrize(
    ("step", "shape"),
    [
        (kernels.mamba2_step, {"channels_per_program": 2, "num_warps": 2}),
        (kernels.dual_step, {"heads_per_program": 2, "tokens_per_block": 2, "num_warps": 8}),
    ],
)
def test_launch_shapes_change_no_result(step, shape):
    _, expected = one_step(step)
    _, actual = one_step(functools.partial(step, **shape))
    for one, other in zip((actual[0], *actual[2:]), (expected[0], *expected[2:]), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)
    assert_close(actual[1].sum(axis=1), expected[1].sum(axis=1), 1e-6)
    for name in shape:
        if name != "num_warps":
            with pytest.raises(ValueError, match=f"{name} = 3, expected a power of two"):
                one_step(functools.partial(step, **{name: 3}))


@pytest.mark.parametrize("step", STEPS)
def test_every_argument_of_a_step_matters(step):
    """A test of the tests: a kernel that ignored one of its arguments would be seen."""
    arguments, outputs = one_step(step)
    for name, array in arguments.items():
        changed = {"layer": 0, "position": 2}.get(name)
        _, others = one_step(step, **{name: array * 1.01 if changed is None else changed})
        assert np.any(others[0] != outputs[0]), name


def inverse_silu(y):
    """The x > -1.27 with silu(x) = y, for y above silu's minimum; by bisection."""
    low, high = np.full_like(y, -1.27), np.abs(y) + 5
    for _ in range(80):
        middle = (low + high) / 2
        below = middle / (1 + np.exp(-middle)) < y
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    return low


def test_mamba2_step_matches_golden():
    """The golden x, B, C come after a convolution. They are scaled into the range of silu, and the
    result, which is linear in each of them, is scaled back.
    """
    golden = dict(np.load(GOLDEN / "ops" / "mamba2_state_update.npz"))
    b, h, p, n = golden["state"].shape
    flat = {name: golden[name].reshape(b, -1) for name in ("z", "x", "B", "C", "dt")}
    s = {name: 0.2 / np.abs(flat[name]).max() for name in "xBC"}
    xBC = [inverse_silu(flat[name] * s[name]) for name in "xBC"]
    c = h * p + 2 * n
    y, _, _, state = kernels.mamba2_step(
        np.concatenate([flat["z"], *xBC, flat["dt"]], axis=1).astype(np.float32),
        np.zeros((1, b, 1, c), np.float32),
        (golden["state"][None] * s["x"] * s["B"]).astype(np.float32),
        0,
        0,
        conv_weight=np.ones((1, 1, c), np.float32),
        conv_bias=np.zeros((1, c), np.float32),
        dt_bias=golden["dt_bias"][None].astype(np.float32),
        A=golden["A"][None].astype(np.float32),
        D=(golden["D"][None] * s["B"] * s["C"]).astype(np.float32),
        norm_scale=np.ones((1, h * p), np.float32),
    )
    assert_close(y / (s["x"] * s["B"] * s["C"]), golden["out"].reshape(b, -1), 1e-5)
    assert_close(state[0] / (s["x"] * s["B"]), golden["new_state"], 1e-5)


def test_a_prefix_becomes_a_ring():
    rng = np.random.default_rng(0)
    x, weight, bias = normal(rng, 2, 7, 5), normal(rng, 1, 4, 5), normal(rng, 1, 5)
    whole, _ = ops.causal_conv1d(x, weight[0], bias[0])
    for prefix in (1, 4, 6):
        _, window = ops.causal_conv1d(x[:, :prefix], weight[0], bias[0])
        ring = ops.conv_ring(window, prefix)[None]
        for t in range(prefix, 7):
            y, ring = conv_step(x[:, t], ring, 0, t, conv_weight=weight, conv_bias=bias)
            assert_close(y, whole[:, t], 1e-6)


# Mamba-1


def test_conv_step_matches_golden():
    golden = golden_arrays("ops/causal_conv1d.npz")
    window = golden["update_state"].swapaxes(1, 2)[:, 1:]
    extra = np.full((2, 3), np.nan, np.float32)  # columns of no concern to the convolution
    y, ring = conv_step(
        np.concatenate([golden["update_x"], extra], axis=1),
        ops.conv_ring(window, 6)[None],
        0,
        6,
        conv_weight=golden["weight"].T[None],
        conv_bias=golden["bias"][None],
    )
    assert_close(y, golden["update_out_silu"], 1e-6)
    order = [(7 + k) % 4 for k in range(4)]
    assert_close(ring[0][:, order], golden["update_new_state"].swapaxes(1, 2), 0)


def mamba1_arguments(b=3, e=5, n=3, layers=2, state_dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return {
        "x": normal(rng, b, e),
        "dt": normal(rng, b, e),
        "BC": normal(rng, b, 4 + 2 * n),
        "projected": normal(rng, b, 2 * e),
        "state": jnp.asarray(normal(rng, layers, b, e, n), state_dtype),
        "layer": 1,
        "dt_bias": normal(rng, layers, e) - 2,
        "A": -np.exp(normal(rng, layers, e, n)),
        "D": normal(rng, layers, e),
    }


@pytest.mark.parametrize("state_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("size", [(3, 5, 3), (1, 70, 16)])
def test_mamba1_step_walks_along_the_steps(size, state_dtype):
    b, e, n = size
    arguments = mamba1_arguments(b, e, n, state_dtype=state_dtype)
    state = arguments.pop("state")
    expected = state[1].astype(jnp.float32)
    own = {name: arguments[name][1] for name in ("A", "D", "dt_bias")}
    B, C, z = arguments["BC"][:, 4 : 4 + n], arguments["BC"][:, 4 + n :], arguments["projected"]
    untouched = np.asarray(state[0])
    for _ in range(3):
        y, state = mamba1_step(state=state, **arguments)
        y_expected, expected = ops.selective_scan_step(
            expected, arguments["x"], arguments["dt"], own["A"], B, C,
            D=own["D"], z=z[:, e:], dt_bias=own["dt_bias"],
        )  # fmt: skip
        tolerance = 1e-5 if state_dtype == "float32" else 2**-6
        assert_close(y, y_expected, tolerance)
        assert_close(state[1], expected, tolerance)
        arguments["x"] = arguments["x"] * 0.5
    np.testing.assert_array_equal(state[0], untouched)
    assert state.dtype == state_dtype


def test_step_sizes_are_exact_where_they_are_small():
    """From a zero state with x = B = 1 the state becomes dt: log(1 + exp(dt)) would lose digits."""
    dt = np.linspace(-30, 30, 121, dtype=np.float32)[None]
    e, ones = dt.size, np.ones_like(dt)
    _, state = mamba1_step(
        ones, dt, np.ones((1, 2), np.float32), ones, np.zeros((1, 1, e, 1), np.float32), 0,
        dt_bias=0 * ones, A=-ones[..., None], D=ones,
    )  # fmt: skip
    expected = np.logaddexp(0, dt.astype(np.float64))
    np.testing.assert_allclose(state[0, :, :, 0], expected, rtol=3e-7)


def test_every_argument_of_mamba1_step_matters():
    arguments = mamba1_arguments()
    y, _ = mamba1_step(**arguments)
    for name in arguments:
        changed = 0 if name == "layer" else arguments[name] * 1.01
        assert np.any(mamba1_step(**arguments | {name: changed})[0] != y), name


def test_mamba1_step_matches_golden():
    golden = golden_arrays("ops/mamba1_state_update.npz")
    stacked = {name: golden[name][None] for name in ("state", "dt_bias", "A", "D")}
    BC = np.concatenate([golden["B"], golden["C"]], axis=1)
    y, state = kernels.mamba1_step(golden["x"], golden["dt"], BC, golden["z"], layer=0, **stacked)
    assert_close(y, golden["out"], 1e-5)
    assert_close(state[0], golden["new_state"], 1e-5)


# Prefixes


@pytest.mark.parametrize("case", ["mamba2_ssd_plain", "mamba2_ssd_z_init", "mamba2_ssd_ngroups"])
def test_ssd_prefill_matches_golden(case):
    golden = golden_arrays(f"ops/{case}.npz")
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    inputs = {name: golden[name] for name in names if name in golden}
    y, state = kernels.ssd_prefill(**inputs, initial_state=golden.get("initial_states"))
    assert_close(y, golden["out"], 1e-5)
    assert_close(state, golden["final_state"], 1e-5)


def test_selective_scan_prefill_matches_golden():
    golden = golden_arrays("ops/mamba1_selective_scan.npz")
    x, dt, B, C, z = (golden[name].swapaxes(1, 2) for name in ("u", "delta", "B", "C", "z"))
    A, D, bias = golden["A"], golden["D"], golden["delta_bias"]
    y, state = kernels.selective_scan_prefill(x, dt, A, B, C, D=D, z=z, dt_bias=bias)
    assert_close(y, golden["out"].swapaxes(1, 2), 1e-5)
    assert_close(state, golden["last_state"], 1e-5)


def scan_inputs(op, dtype=np.float32, h=4):
    """Odd sizes, two groups, and for the chunked scan a second chunk of 16 that is not full."""
    rng = np.random.default_rng(0)
    b, l, p, n, g = 1, 21 if op is ops.ssd_scan else 9, 3, 5, 2
    channels, groups = ((h, p), (g,)) if op is ops.ssd_scan else ((h,), ())
    inputs = {
        "x": normal(rng, b, l, *channels),
        "dt": normal(rng, b, l, h) - 1,
        "B": normal(rng, b, l, *groups, n),
        "C": normal(rng, b, l, *groups, n),
        "z": normal(rng, b, l, *channels),
    }
    inputs = {name: array.astype(dtype) for name, array in inputs.items()}
    return inputs | {
        "A": -np.exp(normal(rng, *((h,) if op is ops.ssd_scan else (h, n)))),
        "D": normal(rng, h),
        "dt_bias": normal(rng, h),
        "initial_state": normal(rng, b, *channels, n),
    }


jit = functools.partial(jax.jit, static_argnames="dt_softplus")
SCANS = {
    ops.ssd_scan: jit(functools.partial(kernels.ssd_prefill, chunk_size=16)),
    ops.selective_scan: jit(kernels.selective_scan_prefill),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("op", SCANS)
def test_prefill_is_the_scan(op, dtype):
    inputs = scan_inputs(op, dtype)
    y, state = SCANS[op](**inputs)
    exact = {name: jnp.asarray(value, jnp.float32) for name, value in inputs.items()}
    expected = jit(op)(**exact)  # in bfloat16, XLA rounds operands that the kernels keep
    assert (y.dtype, state.dtype) == (dtype, jnp.float32)
    assert_close(y, expected[0], 1e-5 if dtype == "float32" else 2**-8)
    assert_close(state, expected[1], 1e-5)


def test_ssd_prefill_keeps_its_digits_beside_strong_decays():
    """Small steps after large ones in one chunk, beside the recurrence."""
    inputs = scan_inputs(ops.ssd_scan)
    inputs["dt"] = np.where(np.arange(21)[:, None] % 16 < 8, 100.0, inputs["dt"] - 4)
    inputs["dt"] = inputs["dt"].astype(np.float32)
    actual = SCANS[ops.ssd_scan](**inputs)
    expected = ops.recurrence(**inputs | {"A": inputs["A"][:, None, None]})
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, 1e-6)


@pytest.mark.parametrize("op", SCANS)
def test_every_argument_of_prefill_matters(op):
    inputs = scan_inputs(op, h=2)
    y, _ = SCANS[op](**inputs)
    for name in inputs:
        changed, _ = SCANS[op](**inputs | {name: inputs[name] * 1.1})
        assert np.any(changed != y), name


@pytest.mark.parametrize("op", SCANS)
def test_options_of_prefill_are_optional(op):
    inputs = {name: t for name, t in scan_inputs(op).items() if name in ("x", "dt", "A", "B", "C")}
    inputs["dt"] = np.abs(inputs["dt"])
    actual = SCANS[op](**inputs, dt_softplus=False)
    expected = jit(op)(**inputs, dt_softplus=False)
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other, 1e-5)


# Between the mixers


def seam(d=5, b=3, layers=2, parts=3):
    rng = np.random.default_rng(0)
    return {
        "hidden": normal(rng, b, d),
        "residual": normal(rng, b, d),
        "norm_scale": normal(rng, layers, d),
        "modulation": normal(rng, layers, b, parts, d),
        "sum_squares": np.exp(normal(rng, b, 6)),
    }


def test_add_norm_modulate_between_layers():
    a = seam()
    inputs = dict(layer=1, inner=7, eps=1e-3, mixer_eps=0.1)
    x, residual = kernels.add_norm_modulate(**a, **inputs)
    rstd = 1 / np.sqrt(a["sum_squares"].sum(axis=1, keepdims=True) / 7 + 0.1)
    expected = a["residual"] + a["modulation"][0, :, 2] * rstd * a["hidden"]
    assert_close(residual, expected, 1e-6)
    normed = rms_norm(expected, a["norm_scale"][1], 1e-3)[:, None]
    shift, scale = a["modulation"][1, :, 0], a["modulation"][1, :, 1]
    assert_close(x, modulate(normed, shift, scale)[:, 0], 1e-6)
    for name in a:
        changed = kernels.add_norm_modulate(**a | {name: a[name] * 1.01}, **inputs)
        assert np.any(changed[0] != x), name


def test_add_norm_modulate_starts_the_stream_and_serves_an_mlp():
    nothing = {"residual": np.full((3, 5), np.nan), "sum_squares": np.full((3, 6), np.nan)}
    a = seam(parts=6) | {name: array.astype(np.float32) for name, array in nothing.items()}
    parts = {"gate": 4, "scale": 2}
    x, residual = kernels.add_norm_modulate(**a, layer=0, inner=7, **parts, dtype="bfloat16")
    np.testing.assert_array_equal(residual, a["hidden"])
    normed = rms_norm(a["hidden"], a["norm_scale"][0])[:, None]
    expected = modulate(normed, a["modulation"][0, :, 0], a["modulation"][0, :, 2])[:, 0]
    assert x.dtype == jnp.bfloat16
    assert_close(x, expected, 2**-8)

    a = seam(parts=6) | {"sum_squares": None}
    _, residual = kernels.add_norm_modulate(**a, layer=0, gate=4, gate_offset=0)
    assert_close(residual, a["residual"] + a["modulation"][0, :, 4] * a["hidden"], 1e-6)


def test_add_norm_matches_golden():
    golden = golden_arrays("ops/norms.npz")
    rows = {name: golden[name].reshape(-1, 24) for name in golden if golden[name].ndim == 3}
    x, residual = kernels.add_norm_modulate(
        rows["x"], rows["residual"], golden["weight"][None],
        np.zeros((1, len(rows["x"]), 2, 24), np.float32), 0, gate=None,
    )  # fmt: skip
    assert_close(residual, rows["add_rmsnorm_residual"], 1e-6)
    assert_close(x, rows["add_rmsnorm_out"], 1e-6)


# The sampler


BELOW_1 = np.nextafter(np.float32(1), np.float32(0))


def kept(logits, temperature, top_k, top_p, min_p=0.0):
    """The mask: in rows that grow, uniform = 0 draws the smallest logit that the filters leave."""
    rows = np.sort(logits)
    token = sample(rows, np.zeros(len(rows), np.float32), 1.0, temperature, top_k, top_p, min_p)
    return logits >= np.take_along_axis(rows, np.asarray(token)[:, None], axis=1)


def test_sample_keeps_the_golden_tokens():
    golden = dict(np.load(GOLDEN / "sampling_filter.npz"))
    expected = golden["keep_temperature_first"][:, ::4]  # interpreting all rows takes long
    settings, rows, v = expected.shape
    k, p, temperature = (np.repeat(golden[s], rows) for s in ("top_k", "top_p", "temperature"))
    logits = np.tile(golden["logits"][::4], (settings, 1))
    mask = kept(logits, temperature.astype(np.float32), k, p)
    np.testing.assert_array_equal(mask, expected.reshape(-1, v))

    settings, rows, v = golden["ties_keep"].shape
    k = np.repeat(golden["ties_top_k"], rows)
    mask = kept(np.tile(golden["ties_logits"], (settings, 1)), 1.0, k, 1.0)
    np.testing.assert_array_equal(mask, golden["ties_keep"].reshape(-1, v))


def sampler_inputs(b=12, v=37):
    rng = np.random.default_rng(0)
    return {
        "logits": np.round(normal(rng, 2 * b, v) * 4) / 2,  # ties are frequent
        "uniform": rng.uniform(size=b).astype(np.float32),
        "cfg_scale": rng.uniform(0, 3, b).astype(np.float32),
        "temperature": rng.uniform(0.5, 2, b).astype(np.float32),
        "top_k": np.resize([0, 1, 5, 37, 99], b).astype(np.int32),
        "top_p": np.resize([1.0, 0.3, 0.999999, 1e-9], b).astype(np.float32),
        "min_p": np.resize([0.0, 0.0, 0.2, 0.9, 1.0], b).astype(np.float32),
    }


def test_sample_draws_what_the_jax_sampler_draws():
    a = sampler_inputs()
    b = len(a["uniform"])
    tokens = sample(**a)
    assert tokens.dtype == jnp.int32
    np.testing.assert_array_equal(tokens, filters.sample(**a))

    for row in (0, 7):  # alone, and with one setting for all
        rows = {name: array[row : row + 1] for name, array in a.items() if array.ndim == 1}
        rows |= {"logits": a["logits"][[row, b + row]]}
        assert sample(**rows)[0] == tokens[row]
        rows |= {name: rows[name][0] for name in rows if name not in ("logits", "uniform")}
        assert sample(**rows)[0] == tokens[row]


def test_sample_at_the_ends_of_uniform():
    """The first token that the filters leave, and the last, up to rounding of the sum."""
    a = sampler_inputs()
    x = filters.apply_cfg(a["logits"][:12], a["logits"][12:], a["cfg_scale"])
    x = filters.filter_logits(x / a["temperature"][:, None], a["top_k"], a["top_p"], a["min_p"])
    weights = np.asarray(jax.nn.softmax(x))
    first = sample(**a | {"uniform": np.zeros(12, np.float32)})
    np.testing.assert_array_equal(first, np.argmax(weights > 0, axis=1))
    last = np.asarray(sample(**a | {"uniform": np.full(12, BELOW_1)}))
    assert np.all(weights[range(12), last] > 0)
    assert np.all(np.sum(weights * (np.arange(37) > last[:, None]), axis=1) < 2**-20)


def test_sample_draws_no_token_without_weight():
    """One token has all the weight, because the others are filtered or far below it."""
    logits = normal(np.random.default_rng(0), 5, 37)
    logits[1:, ::2] = -np.inf
    one = [0, 1, 17, 35, 11]
    logits[range(5), one] = [9.0, 200.0, 200.0, 200.0, 9.0]
    top_k = np.array([1, 0, 0, 0, 1])
    for uniform in (0.0, 0.5, BELOW_1, 1.0):  # 1 is out of range, and harmless
        tokens = sample(logits, np.full(5, uniform, np.float32), 1.0, 1.0, top_k, 1.0, 0.0)
        np.testing.assert_array_equal(tokens, one)


def test_sampled_tokens_follow_the_filtered_softmax():
    """Evenly spaced numbers draw every token as often as its probability says, to one."""
    n, v = 64, 12
    logits = 1.5 * normal(np.random.default_rng(1), 1, v)
    uniform = (np.arange(n, dtype=np.float32) + 0.5) / n
    tokens = sample(np.repeat(logits, n, axis=0), uniform, 1.0, 0.8, 8, 0.95, 0.0)
    p = jax.nn.softmax(filters.filter_logits(logits / 0.8, 8, 0.95)[0])
    p = np.asarray(p, np.float64)
    counts = np.bincount(tokens, minlength=v)
    assert 4 <= np.sum(p > 0) <= 8 and counts[p == 0].sum() == 0
    assert np.max(np.abs(counts - n * p)) < 1


def test_sample_without_guidance():
    logits = normal(np.random.default_rng(0), 3, 50)
    uniform = np.array([0.1, 0.5, 0.9], np.float32)
    tokens = sample(logits, uniform, 7.0, 1.0, 20, 0.9, 0.0)
    np.testing.assert_array_equal(
        tokens, filters.draw(filters.filter_logits(logits, 20, 0.9), uniform)
    )
    assert np.any(tokens != sample(logits, uniform, 7.0, 1.0, 1, 1.0, 0.0))


# Whole models


@functools.cache
def small_model(**changes):
    """Two layers, so narrow that a step is few programs: the interpreter takes 0.02 s for each.

    With many codes a token tells small errors of its logits.
    """
    sizes = dict(vocab_size=199, num_classes=3, num_tokens=4, d_model=8, n_layer=2, d_state=5)
    config = AiMConfig(**sizes | dict(headdim=8, chunk_size=4) | changes)
    params = param_shapes(config)
    rng = np.random.default_rng(0)
    return config, jax.tree.map(lambda x: jnp.asarray(0.5 * normal(rng, *x.shape)), params)


TEXT = {"condition": "text", "num_classes": 0, "max_caption": 3, "caption_vocab": 11}


@pytest.mark.parametrize(
    ("form", "changes", "guided", "prefix"),
    [
        ("recurrent", {}, True, 0),
        ("recurrent", {"ngroups": 2}, False, 2),
        ("dual", {"d_intermediate": 8}, True, 2),
        ("recurrent", {"mixer": "mamba1", "d_intermediate": 8}, True, 2),
        ("recurrent", TEXT, True, 0),
        ("dual", TEXT, True, 2),
    ],
)
def test_kernels_draw_the_tokens_that_the_modules_draw(form, changes, guided, prefix, monkeypatch):
    monkeypatch.setattr("aim_jax.sampling.engine.TRITON_PLATFORMS", ("cpu",))
    config, params = small_model(**changes)
    condition = np.array([[-1, 2, 5]]) if config.is_text else np.array([1])

    def generate(engine, prefix=None):
        settings = dict(guided=guided, prefix=prefix)
        return np.asarray(
            generate_tokens(
                prepare_decoder(params, config, engine),
                condition,
                3,
                jnp.arange(1),
                SamplingConfig(1.5, 1.5, 150, 0.99),
                **settings,
            )
        )

    expected = generate(Engine("recurrent", "xla"))
    given = jnp.asarray(expected[:, :prefix]) if prefix else None
    np.testing.assert_array_equal(generate(Engine(form, "triton"), given), expected)


MAMBA1 = {"mixer": "mamba1"}
CODES, LABELS = jnp.array([[5, 11, 3, 20]]), jnp.array([1])
teacher_forced = jax.jit(teacher_forced_decode, static_argnames=("config", "engine"))


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("recurrent", {}),
        ("dual", {"ngroups": 2, "d_intermediate": 8}),
        ("recurrent", MAMBA1),
    ],
)
def test_logits_and_states_of_the_kernels(form, changes):
    """Those of the modules; near them with matrices and caches in bfloat16."""
    config, params = small_model(**changes)
    run = functools.partial(teacher_forced, params, CODES, LABELS, 2.0, 0)
    exact = run(config=config, engine=Engine("recurrent", "xla"))
    actual = run(config=config, engine=Engine(form, "triton"))
    for name in ("guided", "conv", "ssm"):
        assert_close(actual[name], exact[name], 1e-5, name)
    half = dataclasses.replace(config, compute_dtype="bfloat16")
    near = run(config=half, engine=Engine(form, "triton", cache_dtype="bfloat16"))
    error = np.max(np.abs(near["cond"] - exact["cond"])) / np.max(np.abs(exact["cond"]))
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize(
    ("form", "changes"), [("recurrent", {"ngroups": 2}), ("dual", {}), ("recurrent", MAMBA1)]
)
def test_a_prefix_leaves_what_its_steps_leave(form, changes):
    config, params = small_model(**changes)
    inputs = jnp.asarray(normal(np.random.default_rng(1), 1, 3, 8))

    @jax.jit
    def both():
        _, modulation = AiM(config).apply({"params": params}, LABELS, method="condition")
        decoder = make_decoder(params, config, Engine(form, "triton"))

        def step(caches, position):
            x = jax.lax.dynamic_slice_in_dim(inputs, position, 1, axis=1)
            return decoder.step(x, modulation, caches, position)[1], None

        stepped, _ = jax.lax.scan(step, decoder.start(inputs[:, :0], modulation, 4), jnp.arange(3))
        return stepped, decoder.start(inputs, modulation, 4)

    for actual, expected in zip(*both(), strict=True):
        assert_close(actual, expected, 1e-5)


def kernel_calls(jaxpr):
    """Name of every kernel in a program, in order, and the dtypes of its arrays by name."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "triton_kernel_call":
            names, arrays = eqn.params["fn"].arg_names, (*eqn.invars, *eqn.outvars)
            dtypes = [x.aval.dtype.name for x in arrays]
            yield eqn.params["name"], dict(zip(names, dtypes, strict=False))
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from kernel_calls(inner)


@pytest.mark.parametrize("mixer", ["mamba2", "mamba1"])
def test_a_bfloat16_model_keeps_its_stream_and_decays_in_float32(mixer):
    """Every array of every kernel, in a prefix and a step; of the state the engine decides."""
    config, params = small_model(mixer=mixer)
    config = dataclasses.replace(config, compute_dtype="bfloat16")

    def decode(prefix):
        x, modulation = AiM(config).apply({"params": params}, LABELS, method="condition")
        decoder = make_decoder(params, config, Engine("recurrent", "triton"))
        return decoder.step(x, modulation, decoder.start(prefix, modulation, 4), 3)

    jaxpr, (logits, caches) = jax.make_jaxpr(decode, return_shape=True)(jnp.zeros((1, 3, 8)))
    calls = list(kernel_calls(jaxpr.jaxpr))
    read, *step = {
        "mamba2": ["ssd_prefill_kernel", "mamba2_step_kernel"],
        "mamba1": ["selective_scan_prefill_kernel", "conv_step_kernel", "mamba1_step_kernel"],
    }[mixer]
    assert [name for name, _ in calls] == 2 * [read] + 2 * ["add_norm_modulate_kernel", *step]
    halved = {name for _, of in calls for name, dtype in of.items() if dtype == "bfloat16"}
    activations = {"hidden", "x", "B", "C", "z", "y", "projected", "conv_in", "conv"}
    # Of Mamba-1 dt is a projection too; and it has no sums, in whose place `hidden` is passed.
    assert halved - activations == ({"dt", "BC", "sum_squares"} if mixer == "mamba1" else set())
    assert {of["residual"] for _, of in calls if "residual" in of} == {"float32"}
    assert [x.dtype for x in (logits, *caches)] == [jnp.float32, jnp.bfloat16, jnp.float32]


# Wrong arguments


def test_wrong_arguments_are_named():
    for step in STEPS:
        arguments, _ = one_step(step)
        for name in ("conv_weight", "dt_bias", "norm_scale", "projected", "conv_cache"):
            array = np.asarray(arguments[name])
            with pytest.raises(ValueError, match=f"{step.__name__}: .* has .* expected"):
                step(**arguments | {name: np.concatenate([array, array], axis=-1)})
    with pytest.raises(ValueError, match="mamba2_step: state has shape"):
        one_step(kernels.mamba2_step, state=np.zeros((3, 2, 4, 3), np.float32))
    with pytest.raises(ValueError, match="heads_per_program = 4, expected a power of two"):
        kernels.dual_step(**arguments, heads_per_program=4)
    with pytest.raises(ValueError, match="mamba1_step: BC has 5 columns"):
        kernels.mamba1_step(**mamba1_arguments() | {"BC": np.zeros((3, 5), np.float32)})
    with pytest.raises(ValueError, match="conv_bias has shape"):
        kernels.conv_step(
            np.zeros((1, 3)), np.zeros((1, 1, 4, 3)), 0, 0,
            conv_weight=np.zeros((1, 4, 3)), conv_bias=np.zeros((1, 4)),
        )  # fmt: skip
    for op, prefill in SCANS.items():
        with pytest.raises(ValueError, match="prefill: initial_state has shape"):
            prefill(**scan_inputs(op) | {"initial_state": np.zeros((2, 4, 7), np.float32)})
    with pytest.raises(ValueError, match="`inner`, the number of channels"):
        kernels.add_norm_modulate(**seam(), layer=0)
    with pytest.raises(ValueError, match="gate=3, but modulation has 3 parts"):
        kernels.add_norm_modulate(**seam(), layer=0, inner=7, gate=3)
    with pytest.raises(ValueError, match="expected float32"):
        residual = np.zeros((3, 5), jnp.bfloat16)
        kernels.add_norm_modulate(**seam() | {"residual": residual}, layer=0, inner=7)
    with pytest.raises(ValueError, match="23 rows of logits for 12 images"):
        a = sampler_inputs()
        kernels.sample(**a | {"logits": a["logits"][:-1]})
    with pytest.raises(ValueError, match="top_k has shape"):
        kernels.sample(**sampler_inputs() | {"top_k": np.zeros(3, np.int32)})


# Lowering and compiling for CUDA


def lowering_cases():
    """Every operation: its arguments, and the names of those that it updates in place."""
    parameters, projected = mamba2_layers(*ODD)
    step = parameters | {"projected": projected[0, 0], "layer": 0, "position": 0}
    ring, state = caches_after(0, expected_of(parameters, projected, ODD), ODD[-1])
    b, h, p, n, g, _ = ODD
    tokens = {
        "inputs": np.zeros((2, b, 8, h, p), np.float32),
        "B_cache": np.zeros((2, b, 8, g, n), np.float32),
        "log_decay": np.zeros((2, b, 8, h), np.float32),
    }
    conv = {name: step[name] for name in ("projected", "layer", "position")}
    conv |= {"conv_weight": step["conv_weight"], "conv_bias": step["conv_bias"]}
    seam_arguments = seam() | {"layer": 0}
    zeros = functools.partial(np.zeros, dtype=np.float32)
    x = zeros((1, 21, 4, 3))
    decays = Decays(*[zeros((1, 4, 1, 2, 16))] * 4, zeros((1, 4, 1, 2, 2)))
    chunk = {"scores": zeros((1, 1, 2, 32, 32)), "decays": decays}
    window = {"x": zeros((2, 9, 5)), "weight": zeros((4, 5)), "bias": zeros(5)}
    return {
        "mamba2_step": (step | {"conv_cache": ring, "state": state}, ("conv_cache", "state")),
        "dual_step": (step | {"conv_cache": ring} | tokens, ("conv_cache", *tokens)),
        "conv_step": (conv | {"conv_cache": ring}, ("conv_cache",)),
        "mamba1_step": (mamba1_arguments(), ("state",)),
        "add_norm_modulate": (seam_arguments, ("residual",)),
        "sample": (sampler_inputs(), ()),
        "ssd_prefill": (scan_inputs(ops.ssd_scan), ("initial_state",)),
        "selective_scan_prefill": (scan_inputs(ops.selective_scan), ()),
        "ssd_outputs": (chunk | {"x": x, "D": zeros(4)}, ()),
        "ssd_inputs_gradient": (chunk | {"dy": x, "D": zeros(4)}, ()),
        "ssd_weights_gradient": (chunk | {"x": x, "dy": x}, ()),
        "conv_outputs": (window, ()),
        "conv_gradients": (window | {"dy": zeros((2, 9, 5))}, ()),
    }


CHUNKS = {"sizes": Sizes(l=21, h=4, p=3, g=2, c=1, u=2, T=16), "dtype": np.float32}
STATIC = {
    "add_norm_modulate": {"inner": 7},
    "ssd_outputs": CHUNKS,
    "ssd_inputs_gradient": CHUNKS,
    "ssd_weights_gradient": CHUNKS,
    "conv_outputs": {"silu": True},
    "conv_gradients": {"silu": False},
}
TARGETS = {80: "sm_80", 90: "sm_90a"}


def cuda_calls(lowered):
    """Every kernel call of a CUDA program: name, PTX target, and which operands it updates."""
    calls = []

    def look(op):
        name = op.name == "stablehlo.custom_call" and op.attributes["call_target_name"].value
        if name == launch.TARGET:
            # Of the interface whose calls XLA records into CUDA graphs.
            assert op.attributes["api_version"].value == 4
            opaque = ir.DictAttr(op.attributes["backend_config"])["opaque"]
            proto = zlib.decompress(opaque.value_bytes)
            aliases = str(op.attributes["output_operand_aliases"])
            calls.append(
                (
                    re.search(rb"\w+_kernel", proto)[0].decode(),
                    re.search(rb"\.target (\w+)", proto)[1].decode(),
                    {int(i) for i in re.findall(r"operand_index = (\d+)", aliases)},
                )
            )
        assert name != "triton_kernel_call"
        return ir.WalkResult.ADVANCE

    lowered.compiler_ir("stablehlo").operation.walk(look)
    return calls


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", kernels.__all__)
def test_kernels_lower_for_cuda_with_their_caches_aliased(name, capability):
    arguments, carried = lowering_cases()[name]
    op = functools.partial(
        getattr(kernels, name), **STATIC.get(name, {}), compute_capability=capability
    )

    def loop(arguments):
        def body(caches, _):
            outputs = op(**arguments | caches)
            if not carried:
                return caches, outputs
            split = len(outputs) - len(carried)
            return dict(zip(carried, outputs[split:], strict=True)), outputs[:split]

        return jax.lax.scan(body, {k: arguments[k] for k in carried}, length=3)

    lowered = jax.jit(loop).trace(arguments).lower(lowering_platforms=("cuda",))
    ((_, target, aliased),) = cuda_calls(lowered)
    assert target == TARGETS[capability] and len(aliased) == len(carried)
    assert "stablehlo.while" in lowered.as_text()


@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_compile_without_spills(arch, tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_benchmark.knobs.cache, "dir", str(tmp_path))
    found = {
        case.name: kernel_benchmark.compile_case(case, arch)
        for case in kernel_benchmark.cases(PRESETS["XL"], images=64)
    }
    assert {name.split()[0] for name in found} == set(kernels.__all__)
    assert {name: kernel.spill for name, kernel in found.items()} == dict.fromkeys(found, 0)
    # The steps live on bandwidth: several programs must share an SM to keep it busy.
    for name in ("mamba2_step float32", "mamba2_step bfloat16", "dual_step bfloat16"):
        assert found[name].registers <= 104, name


def trace_generation(config, engine, images=1, prefix=0, sharding=None):
    """What `sampling.generate_tokens` compiles, with guidance, for arrays that need not exist."""

    def array(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    params = param_shapes(config)
    params = jax.tree.map(lambda x: array(*x.shape), params)
    ints = array(images, dtype=jnp.int32)
    given = array(images, prefix, dtype=jnp.int32)
    settings = {name: array(images, dtype=setting.dtype) for name, setting in SETTINGS.items()}
    request = Request(ints, ints, settings, given)
    jax.clear_caches()  # no trace for another architecture is found

    def generate(params, request):
        decoder = make_decoder(params, config, engine)
        series = Series.of(random_key(0), "constant", (0.0, 1.0))
        return generate_on_device(decoder, request, series, guided=True)

    return jax.jit(generate).trace(params, request)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("form", ["recurrent", "dual"])
def test_generation_lowers_for_cuda(form, capability, monkeypatch):
    """The jitted function behind `generate`, with a prefix: its kernels, in place, for a GPU."""
    monkeypatch.setattr(launch, "default_compute_capability", capability)
    config, _ = small_model()
    traced = trace_generation(config, Engine(form, "triton"), prefix=2)
    calls = cuda_calls(traced.lower(lowering_platforms=("cuda",)))
    step = {"recurrent": ("mamba2_step_kernel", 2), "dual": ("dual_step_kernel", 4)}[form]
    layer = [("add_norm_modulate_kernel", 1), step]
    # The layers may share the function that reads the prefix.
    reads = sum(name == "ssd_prefill_kernel" for name, _, _ in calls)
    expected = [*reads * [("ssd_prefill_kernel", 1)], *layer, *layer, ("sample_kernel", 0)]
    assert reads in (1, 2)
    assert [(name, len(aliased)) for name, _, aliased in calls] == expected
    assert {target for _, target, _ in calls} == {TARGETS[capability]}


def reads_what_it_updated(projected, conv_cache, state, *args, **options):
    """`mamba2_step`, then a use of the state before it: that state has to be copied."""
    y, *rest = mamba2.mamba2_step(projected, conv_cache, state, *args, **options)
    return y + jnp.sum(jnp.sin(state + y[0, 0])), *rest


@pytest.mark.parametrize(
    ("form", "step"), [("recurrent", None), ("dual", None), ("recurrent", reads_what_it_updated)]
)
def test_the_compiled_loop_copies_no_cache(form, step, monkeypatch):
    """What XLA makes of generation for an A100, compiled here without one."""
    pytest.importorskip("jax_plugins.xla_cuda13", reason="`make test` brings XLA's GPU compiler")
    monkeypatch.setattr(launch, "default_compute_capability", 80)
    (gpu,) = topology("1xA100-80G")
    sharding = jax.sharding.SingleDeviceSharding(gpu)
    config = AiMConfig(
        vocab_size=24, num_classes=3, num_tokens=8, d_model=64, n_layer=2, d_state=32, headdim=16
    )
    if step:
        # The op finds the kernel in the package of all of them.
        monkeypatch.setattr(kernels, "mamba2_step", step)
    traced = trace_generation(config, Engine(form, "triton"), images=3, sharding=sharding)
    text = traced.lower(lowering_platforms=("cuda",)).compile().as_text()

    computations = dict(re.findall(r"^%?([\w.\-]+) \(.*?\{\n(.*?)^\}", text, re.M | re.S))
    (body,) = re.findall(r" while\(.*body=%?([\w.\-]+)", text)
    inside = computations[body]
    inside += "".join(computations[name] for name in re.findall(r"calls=%?([\w.\-]+)", inside))
    assert len(re.findall(f'custom_call_target="{launch.TARGET}"', inside)) == 5
    ring = (2, 6, 4, 192)
    caches = {
        "recurrent": [ring, (2, 6, 8, 16, 32)],
        "dual": [ring, (2, 6, 8, 8, 16), (2, 6, 8, 1, 32), (2, 6, 8, 8)],
    }[form]
    shapes = ["f32[" + ",".join(map(str, cache)) + "]" for cache in caches]
    made = re.findall(r"= (\w+\[[\d,]*\])\S* ([\w-]+)\(", inside)
    passed_on = {"parameter", "get-tuple-element", "bitcast"}
    found = {op for shape, op in made if shape in shapes and op not in passed_on}
    assert "copy" in found if step else not found
