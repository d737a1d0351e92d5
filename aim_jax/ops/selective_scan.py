"""Mamba-1 selective scan, with one decay per channel and state."""

import jax
import jax.numpy as jnp

from aim_jax.ops.implementation import implementation_of, kernels_of
from aim_jax.ops.products import product
from aim_jax.ops.reference import (
    bind_axes,
    compose,
    compute_dtype,
    pad_length,
    require_floats,
    skip_and_gate,
    split_length,
    step_sizes,
    with_rank,
)
from aim_jax.utils.checks import check_arguments


@jax.custom_vjp
def linear_scan(a, s):
    """Compute h_t = a_t h_{t-1} + s_t along axis 0, with h_{-1} = 0.

    The gradient is the same recurrence run backwards, g_t = dh_t + a_{t+1} g_{t+1}. The custom rule
    stores only a and h; differentiating through the scan would store every level of its tree.
    """
    return jax.lax.associative_scan(compose, (a, s))[1]


def _linear_scan_forward(a, s):
    h = linear_scan(a, s)
    return h, (a, h)


def _linear_scan_backward(residuals, dh):
    a, h = residuals
    a_next = jnp.concatenate([a[1:], jnp.zeros_like(a[:1])])
    g = jax.lax.associative_scan(compose, (a_next, dh), reverse=True)[1]
    h_previous = jnp.concatenate([jnp.zeros_like(h[:1]), h[:-1]])
    return g * h_previous, g


linear_scan.defvjp(_linear_scan_forward, _linear_scan_backward)


def bind_selective_scan(op, x, dt, A, B, C, D, z, dt_bias, initial_state):
    """Call `bind_axes` for the arguments of a Mamba-1 scan over a sequence."""
    return bind_axes(
        op,
        x=(x, "ble"),
        dt=(dt, "ble"),
        A=(A, "en"),
        B=(B, "bln"),
        C=(C, "bln"),
        D=(D, "e"),
        z=(z, "ble"),
        dt_bias=(dt_bias, "e"),
        initial_state=(initial_state, "ben"),
    )


@check_arguments
def selective_scan(
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
    initial_state: jax.Array | None = None,
    chunk_size: int = 64,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Run the Mamba-1 recurrence in parallel within chunks and sequentially across them.

        dt_t = softplus(dt_t + dt_bias)
        h_t  = exp(dt_t A) h_{t-1} + dt_t B_t x_t          for every channel and state
        y_t  = (C_t . h_t + D x_t) silu(z_t)

    Within a chunk the maps h -> a h + s compose by the associative rule
    (a, s) o (a', s') = (a a', a' s + s'), so the scan is exact for any decay. Only one chunk of
    states is in memory at a time; the backward pass recomputes it from the state at its start.
    (Gu and Dao 2023, algorithm 2 and section 3.3.)

    Args:
      x: inputs (b, l, e).
      dt: step sizes before bias and softplus (b, l, e).
      A: negative decay rates (e, n).
      B: input projections (b, l, n).
      C: output projections (b, l, n).
      D: optional skip weights (e,).
      z: optional gates, like x.
      dt_bias: optional bias of dt (e,).
      dt_softplus: apply softplus to dt.
      initial_state: optional state before the first position (b, e, n); zeros when None.
      chunk_size: largest number of positions scanned at once; affects memory, not the result.
      implementation: None, "xla", or "triton" (one kernel for NVIDIA GPUs, not differentiable).

    Returns:
      y like x, and the state after the last position (b, e, n). States and decays are float32,
      or float64 for float64 x.

    Raises:
      ValueError: the shapes do not match, or chunk_size is not positive.
    """
    chosen = implementation_of("selective_scan", implementation, ("xla", "triton"))
    if chosen != "xla":
        return kernels_of(chosen).selective_scan_prefill(
            x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus,
            initial_state=initial_state,
        )  # fmt: skip
    sizes = bind_selective_scan("selective_scan", x, dt, A, B, C, D, z, dt_bias, initial_state)
    b, l, e, n = (sizes[axis] for axis in "blen")
    require_floats("selective_scan", x=x)
    num_chunks, chunk = split_length(l, chunk_size)

    dtype = compute_dtype(x)
    dt = step_sizes(dt, dt_bias, dt_softplus, dtype)
    A = A.astype(dtype)
    state = jnp.zeros((b, e, n), dtype) if initial_state is None else initial_state.astype(dtype)

    def chunked(t):
        t = pad_length(t.astype(dtype), num_chunks * chunk)
        return jnp.moveaxis(t, 1, 0).reshape(num_chunks, chunk, b, -1)

    def scan_chunk(state, inputs):
        x, dt, B, C = inputs
        decay = jnp.exp(dt[..., None] * with_rank(A, 4))
        updates = (dt * x)[..., None] * B[:, :, None]
        states = linear_scan(decay, updates.at[0].add(decay[0] * state))
        return states[-1], product("qben,qbn->qbe", states, C)

    inputs = (chunked(x), chunked(dt), chunked(B), chunked(C))
    state, y = jax.lax.scan(jax.checkpoint(scan_chunk), state, inputs)
    y = jnp.moveaxis(y.reshape(num_chunks * chunk, b, e)[:l], 0, 1)
    return skip_and_gate(y, x, D, z), state


@check_arguments
def selective_scan_step(
    state: jax.Array,
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
) -> tuple[jax.Array, jax.Array]:
    """Advance the Mamba-1 recurrence of `selective_scan` by one position.

    Args:
      state: state before this position (b, e, n).
      x: input (b, e).
      dt: step size before bias and softplus (b, e).
      A: negative decay rates (e, n).
      B: input projection (b, n).
      C: output projection (b, n).
      D: optional skip weights (e,).
      z: optional gate, like x.
      dt_bias: optional bias of dt (e,).
      dt_softplus: apply softplus to dt.
      implementation: None or "xla".

    Returns:
      y like x, and the new state (b, e, n).

    Raises:
      ValueError: the shapes do not match.
    """
    implementation_of("selective_scan_step", implementation, ("xla",))
    bind_axes(
        "selective_scan_step",
        x=(x, "be"),
        dt=(dt, "be"),
        A=(A, "en"),
        B=(B, "bn"),
        C=(C, "bn"),
        D=(D, "e"),
        z=(z, "be"),
        dt_bias=(dt_bias, "e"),
        state=(state, "ben"),
    )
    require_floats("selective_scan_step", x=x)
    dtype = compute_dtype(x)
    dt = step_sizes(dt, dt_bias, dt_softplus, dtype)
    decay = jnp.exp(dt[..., None] * with_rank(A.astype(dtype), 3))
    update = (dt * x.astype(dtype))[..., None] * B.astype(dtype)[:, None]
    state = decay * state.astype(dtype) + update
    y = product("ben,bn->be", state, C.astype(dtype))
    return skip_and_gate(y, x, D, z), state
