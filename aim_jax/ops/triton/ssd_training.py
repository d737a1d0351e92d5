"""The Mamba-2 scan with gradients: fused kernels within chunks, a scan of states between them."""

import functools
import math

import jax
import jax.numpy as jnp
import triton
from jax.custom_derivatives import SymbolicZero

from aim_jax.ops.reference import (
    bind_ssd,
    compose,
    pad_length,
    skip_and_gate,
    split_length,
    step_sizes,
)
from aim_jax.ops.ssd import segment_sums
from aim_jax.ops.triton.launch import require_kernel_dtype
from aim_jax.ops.triton.prefill import ssd_prefill
from aim_jax.ops.triton.ssd_chunks import Decays, Options, Sizes, product, tile_size, within_chunks
from aim_jax.parallel.sharding import mesh_parts, per_device

# Shortest chunks whose gradients are taken. Shorter ones move more memory for states and do no less
# arithmetic.
SHORTEST_CHUNK = 256
# Logical axes of the arguments of a scan, by name.
AXES = {
    "x": ("batch", None, "heads", None),
    "dt": ("batch", None, "heads"),
    "A": ("heads",),
    "B": ("batch", None, "heads", None),
    "C": ("batch", None, "heads", None),
    "D": ("heads",),
    "z": ("batch", None, "heads", None),
    "dt_bias": ("heads",),
    "initial_state": ("batch", "heads", None, None),
}


def ssd_scan(
    x,
    dt,
    A,
    B,
    C,
    *,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=True,
    initial_state=None,
    chunk_size=64,
    compute_capability=None,
):
    """Run `aim_jax.ops.ssd_scan` with fused kernels; differentiable in reverse mode.

    Without differentiation it is one kernel, `ssd_prefill`. With it, outputs and gradients are
    those of `ssd_training`. The backward pass keeps the arguments only.

    In a function of `aim_jax.parallel.sharding.sharded_jit` every device scans its own part of the
    batch and of the heads.

    Args:
      x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state: see `aim_jax.ops.ssd_scan`.
      chunk_size: largest chunk length; at least 256 with differentiation, at most 32 without.
      compute_capability: see `aim_jax.ops.triton`.

    Returns:
      y like x, and the state after the last position (b, h, p, n) float32.

    Raises:
      ValueError: the shapes do not match, x is not bfloat16, float16 or float32, or chunk_size is
        not positive.
    """
    arrays = {
        "x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias,
        "initial_state": initial_state,
    }  # fmt: skip
    bind_ssd("ssd_scan", **arrays)
    require_kernel_dtype("ssd_scan", x)
    # Heads of one device use groups of the same device.
    repeats = math.lcm(B.shape[2], mesh_parts("heads")) // B.shape[2]
    if repeats > 1:
        arrays |= {name: jnp.repeat(arrays[name], repeats, axis=2) for name in "BC"}
    options = (dt_softplus, chunk_size, compute_capability)
    results = (AXES["x"], AXES["initial_state"])
    return per_device(functools.partial(_scan, options), AXES, results)(arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scan(options, arrays):
    dt_softplus, chunk_size, compute_capability = options
    y, state = ssd_prefill(
        **arrays, dt_softplus=dt_softplus, chunk_size=min(chunk_size, 32),
        compute_capability=compute_capability,
    )  # fmt: skip
    return y, state


def _trained(options, arrays):
    dt_softplus, chunk_size, compute_capability = options
    return ssd_training(
        **arrays, dt_softplus=dt_softplus, chunk_size=max(chunk_size, SHORTEST_CHUNK),
        compute_capability=compute_capability,
    )  # fmt: skip


def _scan_forward(options, primals):
    arrays = jax.tree.map(lambda primal: primal.value, primals)
    return _trained(options, arrays), arrays


def _scan_backward(options, arrays, cotangents):
    used = [i for i, t in enumerate(cotangents) if not isinstance(t, SymbolicZero)]
    # Training does not use the last state: what is computed for it alone is not traced here.
    _, pullback = jax.vjp(lambda arrays: [_trained(options, arrays)[i] for i in used], arrays)
    return pullback([cotangents[i] for i in used])


_scan.defvjp(_scan_forward, _scan_backward, symbolic_zeros=True)


def ssd_training(
    x,
    dt,
    A,
    B,
    C,
    *,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=True,
    initial_state=None,
    chunk_size=64,
    tile=None,
    compute_capability=None,
):
    """Run `aim_jax.ops.ssd_scan` with the kernels that have gradients.

    Products within chunks are kernels (`ssd_chunks`), whose operands have the dtype of x and whose
    sums are float32. States at the boundaries of chunks follow from an associative scan of XLA, as
    in `aim_jax.ops.ssd_scan`; a sequence of one chunk has none to compute unless it is given an
    initial state or its final state is used. Large chunks therefore move the least memory.

    Args:
      x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state: see `aim_jax.ops.ssd_scan`.
      chunk_size: largest chunk length, rounded up to a multiple of `tile`.
      tile: largest number of positions that a program of a kernel computes at once, a power of two
        of at least 16; None is 64, or 32 for float32.
      compute_capability: see `aim_jax.ops.triton`.

    Returns:
      y like x, and the state after the last position (b, h, p, n) float32.

    Raises:
      ValueError: the shapes do not match, or chunk_size is not positive.
    """
    axes = bind_ssd("ssd_training", x, dt, A, B, C, D, z, dt_bias, initial_state)
    b, l, h, p, g, n = (axes[name] for name in "blhpgn")
    _, q = split_length(l, chunk_size)
    T = min(tile or tile_size(x.dtype), max(triton.next_power_of_2(q), 16))
    u = triton.cdiv(q, T)
    c = triton.cdiv(l, u * T)
    q = u * T

    dt = step_sizes(dt, dt_bias, dt_softplus, jnp.float32)
    dt = pad_length(dt, c * q).swapaxes(1, 2).reshape(b, h, c, u, T)
    terms = dt * A.astype(jnp.float32).reshape(1, h, 1, 1, 1)
    after = jnp.pad(terms[..., 1:], [(0, 0)] * 4 + [(0, 1)])
    tiles = segment_sums(jnp.sum(terms, axis=-1))  # (b, h, c, u + 1, u + 1)
    decays = Decays(
        dt=dt,
        terms=terms,
        from_start=jnp.cumsum(terms, axis=-1),
        to_end=jax.lax.cumsum(after, axis=4, reverse=True),
        between=tiles[..., :-1, 1:],
    )
    dtype = jnp.promote_types(B.dtype, C.dtype)
    dtype = dtype if dtype in (jnp.bfloat16, jnp.float16) else jnp.float32
    B, C = (pad_length(t.astype(dtype), c * q).reshape(b, c, q, g, n) for t in (B, C))
    D = jnp.zeros(h, jnp.float32) if D is None else D.astype(jnp.float32)
    starts = c > 1 or initial_state is not None
    rounded = x.dtype if z is None and not starts else jnp.float32
    options = Options(Sizes(l, h, p, g, c, u, T), rounded, compute_capability)
    y = within_chunks(options, x, B, C, decays, D)

    def per_position(factors):  # (b, h, c, u, T) -> (b, c, q, g, r, 1)
        return factors.reshape(b, g, h // g, c, q, 1).transpose(0, 3, 4, 1, 2, 5)

    to_end = per_position(dt * jnp.exp(decays.to_end + tiles[..., -1, 1:, None]))
    outgoing = pad_length(x, c * q).reshape(b, c, q, g, h // g, p)
    outgoing = (to_end * outgoing.astype(jnp.float32)).astype(dtype)
    states = product("bcqgrp,bcqgn->bcgrpn", outgoing, B).reshape(b, c, h, p * n)
    if starts:
        if initial_state is None:
            initial_state = jnp.zeros((b, h, p, n), jnp.float32)
        initial_state = initial_state.astype(jnp.float32).reshape(b, 1, h, p * n)
        factors = jnp.exp(tiles[..., -1, 0]).swapaxes(1, 2)[..., None]
        factors = jnp.concatenate([jnp.ones((b, 1, h, 1), jnp.float32), factors], axis=1)
        states = jnp.concatenate([initial_state, states], axis=1)
        _, states = jax.lax.associative_scan(compose, (factors, states), axis=1)
        incoming = states[:, :-1].reshape(b, c, g, h // g, p, n).astype(dtype)
        from_start = per_position(jnp.exp(decays.from_start + tiles[..., :-1, :1]))
        carried = from_start * product("bcqgn,bcgrpn->bcqgrp", C, incoming)
        y = y + carried.reshape(b, c * q, h, p)[:, :l]
    return skip_and_gate(y, x, None, z), states[:, -1].reshape(b, h, p, n)
