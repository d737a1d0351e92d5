"""Dual form of Mamba-2 decoding: a cache of past inputs instead of a recurrent state."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from aim_jax.ops.implementation import implementation_of
from aim_jax.ops.products import product
from aim_jax.ops.reference import (
    bind_axes,
    compute_dtype,
    require_floats,
    skip_and_gate,
    step_sizes,
    with_rank,
)
from aim_jax.utils.checks import check_arguments


class DualCache(NamedTuple):
    """Cache of the dual form, with room for T positions.

    Inputs and B of unused positions are zeros.

    Attributes:
      inputs: dt x (b, T, h, p), float32 or bfloat16.
      B: input projections (b, T, g, n), float32 or bfloat16.
      log_decay: logarithm of the decay from each position to the newest one, the sum of dt A over
        the positions between (b, T, h) float32.
      position: int32 (), number of positions in use.
    """

    inputs: jax.Array
    B: jax.Array
    log_decay: jax.Array
    position: jax.Array


@check_arguments
def init_dual_cache(
    b: int, tokens: int, h: int, p: int, g: int, n: int, dtype: jax.typing.DTypeLike = jnp.float32
) -> DualCache:
    """Return an empty cache of b sequences with room for `tokens` positions."""
    return DualCache(
        inputs=jnp.zeros((b, tokens, h, p), dtype),
        B=jnp.zeros((b, tokens, g, n), dtype),
        log_decay=jnp.zeros((b, tokens, h), jnp.float32),
        position=jnp.zeros((), jnp.int32),
    )


@check_arguments
def grow_dual_cache(cache: DualCache, tokens: int) -> DualCache:
    """Extend the cache to room for `tokens` positions; ValueError if it already has more."""

    def padded(x):
        return jnp.pad(x, [(0, 0), (0, tokens - x.shape[1])] + [(0, 0)] * (x.ndim - 2))

    return cache._replace(
        inputs=padded(cache.inputs), B=padded(cache.B), log_decay=padded(cache.log_decay)
    )


@check_arguments
def ssd_dual_extend(
    cache: DualCache,
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    *,
    dt_bias: jax.Array | None = None,
    dt_softplus: bool = True,
    implementation: str | None = None,
) -> DualCache:
    """Append l positions to the cache, and decay those before.

    Decays to the newest position are sums of terms of one sign. Differences of running sums would
    lose the digits of small terms beside large ones.

    Args:
      cache: cache of the positions before, with room for l more.
      x: inputs (b, l, h, p).
      dt: step sizes before bias and softplus (b, l, h).
      A: negative decay rates (h,).
      B: input projections (b, l, g, n).
      dt_bias: optional bias of dt (h,).
      dt_softplus: apply softplus to dt.
      implementation: None or "xla".

    Raises:
      ValueError: the shapes do not match.
    """
    implementation_of("ssd_dual_extend", implementation, ("xla",))
    bind_axes(
        "ssd_dual_extend",
        x=(x, "blhp"),
        dt=(dt, "blh"),
        A=(A, "h"),
        B=(B, "blgn"),
        dt_bias=(dt_bias, "h"),
        inputs=(cache.inputs, "bThp"),
        B_cache=(cache.B, "bTgn"),
        log_decay=(cache.log_decay, "bTh"),
    )
    dtype = cache.log_decay.dtype
    dt = step_sizes(dt, dt_bias, dt_softplus, dtype)
    terms = dt * with_rank(A.astype(dtype), 3)
    after = jnp.pad(terms[:, 1:], [(0, 0), (0, 1), (0, 0)])
    log_decay = jax.lax.cumsum(after, axis=1, reverse=True)
    used = jnp.arange(cache.log_decay.shape[1])[None, :, None] < cache.position
    earlier = cache.log_decay + jnp.where(used, jnp.sum(terms, axis=1, keepdims=True), 0)

    def put(buffer, rows):
        return jax.lax.dynamic_update_slice_in_dim(
            buffer, rows.astype(buffer.dtype), cache.position, axis=1
        )

    return DualCache(
        inputs=put(cache.inputs, dt[..., None] * x.astype(dtype)),
        B=put(cache.B, B),
        log_decay=put(earlier, log_decay),
        position=cache.position + x.shape[1],
    )


@check_arguments
def ssd_dual_step(
    cache: DualCache,
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    *,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    dt_bias: jax.Array | None = None,
    dt_softplus: bool = True,
    implementation: str | None = None,
) -> tuple[jax.Array, DualCache]:
    """Advance the recurrence of `ssd_scan` by one position, from a cache of its inputs.

    Unrolled from a zero state, with a_s the sum of dt A after position s up to position t,

        y_t = (sum_{s <= t} (C_t . B_s) exp(a_s) dt_s x_s + D x_t) silu(z_t)

    This is one row of the quadratic form (Dao and Gu 2024, sections 5 and 6). The step reads the
    whole cache, e + g n + h values per position. It adds dt_t A to the sums a, and writes one row
    of the other arrays. The recurrent form reads and writes e n values.

    Args:
      cache: cache of the positions before, with room for one more.
      x, dt, A, B, C, D, z, dt_bias, dt_softplus: see `ssd_step`.
      implementation: None or "xla".

    Returns:
      y like x, and the cache with this position.

    Raises:
      ValueError: the shapes do not match.
    """
    implementation_of("ssd_dual_step", implementation, ("xla",))
    sizes = bind_axes("ssd_dual_step", x=(x, "bhp"), C=(C, "bgn"), D=(D, "h"), z=(z, "bhp"))
    h, g = sizes["h"], sizes["g"]
    require_floats("ssd_dual_step", x=x)
    cache = ssd_dual_extend(
        cache, x[:, None], dt[:, None], A, B[:, None], dt_bias=dt_bias, dt_softplus=dt_softplus
    )
    dtype = compute_dtype(x)
    # Unused positions hold zeros in B and the inputs, which two products multiply, so neither needs
    # a mask. The whole buffer is read, because a slice of it would be copied.
    scores = product("btgn,bgn->btg", cache.B.astype(dtype), C.astype(dtype))
    weights = jnp.repeat(scores, h // g, axis=-1) * jnp.exp(cache.log_decay)
    y = jnp.sum(weights[..., None] * cache.inputs.astype(dtype), axis=1)
    D = None if D is None else D[:, None]
    return skip_and_gate(y.astype(dtype), x, D, z), cache
