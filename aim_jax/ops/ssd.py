"""Mamba-2 scan by state-space duality: matrix products within chunks, a scan between them."""

import jax
import jax.numpy as jnp

from aim_jax.ops.implementation import implementation_of, kernels_of, training_default
from aim_jax.ops.products import precision_of, product, round_cotangent
from aim_jax.ops.reference import (
    bind_axes,
    bind_ssd,
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

# Largest number of positions between which decays are summed directly.
BLOCK = 16


@check_arguments
def ssd_scan(
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
    """Run the Mamba-2 recurrence as matrix products within chunks and a scan between them.

        dt_t = softplus(dt_t + dt_bias)
        h_t  = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T        one decay per head
        y_t  = (h_t C_t + D x_t) silu(z_t)

    Unrolled from a state h, with a(s, t) the sum of dt A after position s up to position t,

        y_t = sum_{s <= t} (C_t . B_s) exp(a(s, t)) dt_s x_s + exp(a(0, t)) h C_t

    A chunk acts on its incoming state as h -> a h + S with one scalar a per head. The states at the
    chunk boundaries therefore follow from an associative scan with (a, S) o (a', S') = (a a', a' S
    + S'). (Dao and Gu 2024, section 6.)

    Within a chunk a(s, t) is a sum of terms of one sign in two levels, because a difference of two
    running sums, and its gradient, would lose the digits of small terms beside large ones. The q
    positions of a chunk form u blocks of at most 16. For s in block j and t in a later block i,

        exp(a(s, t)) = exp(a(s, end of j)) exp(a(end of j, start of i)) exp(a(start of i, t))

    The factors scale the inputs, the scores C . B and the outputs, so only pairs of blocks
    (u + 1, u + 1) and pairs of positions of one block (u, k + 1, k + 1) need an exponential. None
    exceeds one.

    Args:
      x: inputs (b, l, h, p).
      dt: step sizes before bias and softplus (b, l, h).
      A: negative decay rates (h,).
      B: input projections (b, l, g, n); head i uses group i // (h / g).
      C: output projections (b, l, g, n).
      D: optional skip weights (h,).
      z: optional gates, like x.
      dt_bias: optional bias of dt (h,).
      dt_softplus: apply softplus to dt.
      initial_state: optional state before the first position (b, h, p, n); zeros when None.
      chunk_size: largest chunk length. Chunks have equal lengths, to keep the padding small.
        "triton" uses chunks of at least 256 where gradients are taken, of at most 32 elsewhere.
      implementation: "xla", or "triton" (kernels for NVIDIA GPUs, differentiable in reverse mode).
        None is "triton" in the steps of a training on NVIDIA GPUs where the kernels are available,
        "xla" otherwise; see `aim_jax.ops.implementation`.

    Returns:
      y like x, and the state after the last position (b, h, p, n). The operands of
      products have the dtypes of x, B and C; sums, decays and states are float32, or float64 for
      float64 x.

    Raises:
      ValueError: the shapes do not match, or chunk_size is not positive.
    """
    implementation = implementation or training_default()
    chosen = implementation_of("ssd_scan", implementation, ("xla", "triton"))
    if chosen != "xla":
        return kernels_of(chosen).ssd_scan(
            x, dt, A, B, C, D=D, z=z, dt_bias=dt_bias, dt_softplus=dt_softplus,
            initial_state=initial_state, chunk_size=chunk_size,
        )  # fmt: skip
    sizes = bind_ssd("ssd_scan", x, dt, A, B, C, D, z, dt_bias, initial_state)
    require_floats("ssd_scan", x=x)
    b, l, h, p, g, n = (sizes[axis] for axis in "blhpgn")
    c, q = split_length(l, chunk_size)
    u, k = split_length(q, BLOCK)
    q = u * k
    r = h // g
    dtype = compute_dtype(x)  # of step sizes, decays, sums and states
    dt = step_sizes(dt, dt_bias, dt_softplus, dtype)

    # Batch, chunk and group are folded into one axis m, so that everything below is a plain batched
    # matrix product without axes of size one, which are slow in XLA on CPU. A padded position has
    # dt = 0, so it neither decays the state nor adds to it.
    m = b * c * g

    def fold(t):
        t = pad_length(t, c * q).reshape(b, c, q, g, -1)
        return t.swapaxes(2, 3).reshape(m, q, -1)

    # Operands of products have the dtype of x: bfloat16 where the model computes in it.
    def operand(t):
        return t.astype(x.dtype)

    B, C = fold(operand(B)), fold(operand(C))
    inputs = fold(dt[..., None] * x.astype(dtype)).reshape(m, q, r, p).swapaxes(1, 2)
    log_decay = fold(dt * with_rank(A.astype(dtype), 3)).swapaxes(1, 2).reshape(m, r, u, k)
    within = jnp.exp(segment_sums(log_decay))  # positions of a block (m, r, u, k + 1, k + 1)
    between = jnp.exp(segment_sums(jnp.sum(log_decay, axis=-1)))  # blocks (m, r, u + 1, u + 1)
    from_start = within[..., 1:, 0]  # of the block (m, r, u, k)
    to_end = within[..., -1, 1:]

    def scaled(factors, t):
        return factors.reshape(m, r, q, 1) * t

    # Pairs of positions in one block, then in different blocks.
    scores = product("mutn,musn->muts", C.reshape(m, u, k, n), B.reshape(m, u, k, n))
    weights = operand(scores[:, None] * within[..., 1:, 1:])
    y = product("mruts,mrusp->mrutp", weights, operand(inputs).reshape(m, r, u, k, p))
    y = operand(y).reshape(m, r, q, p)
    if u > 1:
        scores = product("mtn,msn->mts", C, B).reshape(m, u, k, u, k)
        weights = jnp.einsum(
            "mitjs,mrij->mritjs", scores, between[:, :, :-1, 1:], precision=precision_of(dtype)
        )
        weights = operand(weights).reshape(m, r, q, q)
        earlier = operand(scaled(to_end, inputs))
        y = y + scaled(from_start, operand(product("mrts,mrsp->mrtp", weights, earlier)))

    outgoing = operand(scaled(to_end * between[:, :, -1, 1:, None], inputs))
    outgoing = outgoing.swapaxes(1, 2).reshape(m, q, r * p)
    states = product("msk,msn->mkn", outgoing, B).reshape(b, c, h, p * n)

    if c > 1 or initial_state is not None:
        if initial_state is None:
            initial_state = jnp.zeros((b, h, p, n), dtype)
        initial_state = initial_state.astype(dtype).reshape(b, 1, h, p * n)
        decays = between[:, :, -1, 0].reshape(b, c, h, 1)
        decays = jnp.concatenate([jnp.ones((b, 1, h, 1), dtype), decays], axis=1)
        states = jnp.concatenate([initial_state, states], axis=1)
        _, states = jax.lax.associative_scan(compose, (decays, states), axis=1)
        incoming = operand(states[:, :-1]).reshape(m, r * p, n)
        carried = product("mqn,mkn->mqk", C, incoming).reshape(m, q, r, p).swapaxes(1, 2)
        y = y + scaled(from_start * between[:, :, :-1, :1], carried)

    y = y.reshape(b, c, g, r, q, p).transpose(0, 1, 4, 2, 3, 5).reshape(b, c * q, h, p)[:, :l]
    D = None if D is None else D[:, None]
    y = round_cotangent(skip_and_gate(y, x, D, z), x.dtype)
    return y, states[:, -1].reshape(b, h, p, n)


def segment_sums(terms: jax.Array) -> jax.Array:
    """Sum terms (..., k) between every two of their k + 1 boundaries, as in the SSD paper.

    Returns:
      (..., k + 1, k + 1); entry [j, i] is the sum of terms[i:j], and -inf where j < i. Masking the
      exponential instead would give NaN gradients where it overflows.
    """
    size = terms.shape[-1]
    end = jnp.arange(size + 1)[:, None]
    start = jnp.arange(size + 1)[None]
    # A matrix product: XLA would repeat a cumulative sum for every element that is computed of it.
    term = jnp.arange(size)[:, None, None]
    included = (start[None] <= term) & (term < end[None])
    sums = jnp.tensordot(terms, included.astype(terms.dtype), 1, precision="highest")
    # Added, not selected: the gradient of a selection keeps its mask, in the shape of the sums and
    # for all layers of a model.
    excluded = jnp.where(start <= end, 0, -jnp.inf).astype(sums.dtype)
    return sums + with_rank(excluded, sums.ndim)


@check_arguments
def ssd_step(
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
    """Advance the Mamba-2 recurrence of `ssd_scan` by one position.

    Args:
      state: state before this position (b, h, p, n).
      x: input (b, h, p).
      dt: step size before bias and softplus (b, h).
      A: negative decay rates (h,).
      B: input projection (b, g, n); head i uses group i // (h / g).
      C: output projection (b, g, n).
      D: optional skip weights (h,).
      z: optional gate, like x.
      dt_bias: optional bias of dt (h,).
      dt_softplus: apply softplus to dt.
      implementation: None or "xla".

    Returns:
      y like x, and the new state (b, h, p, n).

    Raises:
      ValueError: the shapes do not match.
    """
    implementation_of("ssd_step", implementation, ("xla",))
    sizes = bind_axes(
        "ssd_step",
        x=(x, "bhp"),
        dt=(dt, "bh"),
        A=(A, "h"),
        B=(B, "bgn"),
        C=(C, "bgn"),
        D=(D, "h"),
        z=(z, "bhp"),
        dt_bias=(dt_bias, "h"),
        state=(state, "bhpn"),
    )
    b, h, p, g, n = (sizes[axis] for axis in "bhpgn")
    dtype = compute_dtype(x)
    require_floats("ssd_step", x=x)
    dt = step_sizes(dt, dt_bias, dt_softplus, dtype)
    # Batch and group are folded into one axis m, as in `ssd_scan`.
    m, r = b * g, h // g
    decay = jnp.exp(dt * with_rank(A.astype(dtype), 2)).reshape(m, r, 1, 1)
    inputs = (dt[..., None] * x.astype(dtype)).reshape(m, r, p, 1)
    B, C = B.astype(dtype).reshape(m, 1, 1, n), C.astype(dtype).reshape(m, n)
    state = decay * state.astype(dtype).reshape(m, r, p, n) + inputs * B
    y = product("mkn,mn->mk", state.reshape(m, r * p, n), C).reshape(b, h, p)
    D = None if D is None else D[:, None]
    return skip_and_gate(y, x, D, z), state.reshape(b, h, p, n)
