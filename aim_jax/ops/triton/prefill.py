"""Scans of whole sequences, which read a prefix with one kernel per layer."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from aim_jax.ops.reference import bind_selective_scan, bind_ssd, split_length
from aim_jax.ops.triton.device import silu, softplus
from aim_jax.ops.triton.launch import launch, split_channels, warps_for


@triton.jit
def ssd_prefill_kernel(
    x, dt, A, B, C, D, z, dt_bias, state_in, y, state,
    l: tl.constexpr, h: tl.constexpr, p: tl.constexpr, n: tl.constexpr, g: tl.constexpr,
    GATE: tl.constexpr, SOFTPLUS: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Run the scan; a program handles a block of channels of one head in one row.

    `state_in` shares its buffer with `state`. The state is updated in place, a block of n at a
    time, so that it stays in the GPU's cache and registers suffice for any n.
    """
    block, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // (h // g)
    q = tl.arange(0, BLOCK_L)
    i = block * BLOCK_P + tl.arange(0, BLOCK_P)
    p_mask = i < p
    causal = q[:, None] >= q[None, :]
    A = tl.load(A + head)
    D = tl.load(D + head)
    dt_bias = tl.load(dt_bias + head)
    # From here on, 32-bit offsets within a row suffice and take half the registers.
    x += (row * l * h + head) * p
    y += (row * l * h + head) * p
    z += (row * l * h + head) * p
    dt += row * l * h + head
    B += (row * l * g + group) * n
    C += (row * l * g + group) * n
    state += (row * h + head) * p * n

    for start in range(0, l, BLOCK_L):
        t = start + q
        t_mask = t < l
        dt_t = tl.load(dt + t * h, mask=t_mask, other=0).to(tl.float32) + dt_bias
        if SOFTPLUS:
            dt_t = softplus(dt_t)
        dt_t = tl.where(t_mask, dt_t, 0.0)  # neither decays the state nor adds to it
        # Sums of dt A after position s up to t, of terms of one sign: a difference of two running
        # sums would lose the digits of small terms beside large ones.
        terms = dt_t * A
        after = tl.where(q[:, None] > q[None, :], terms[:, None], 0.0)
        between = tl.cumsum(after, axis=0)
        a = tl.cumsum(terms, axis=0)
        total = tl.sum(terms, axis=0)
        channel = t[:, None] * (h * p) + i[None, :]
        x_mask = t_mask[:, None] & p_mask[None, :]
        x_t = tl.load(x + channel, mask=x_mask, other=0).to(tl.float32)
        now = dt_t[:, None] * x_t
        outgoing = tl.exp(tl.sum(after, axis=0))[:, None] * now

        scores = tl.zeros([BLOCK_L, BLOCK_L], tl.float32)
        carried = tl.zeros([BLOCK_L, BLOCK_P], tl.float32)
        for first in range(0, n, BLOCK_N):
            j = first + tl.arange(0, BLOCK_N)
            vector = t[:, None] * (g * n) + j[None, :]
            B_mask = t_mask[:, None] & (j < n)[None, :]
            B_t = tl.load(B + vector, mask=B_mask, other=0).to(tl.float32)
            C_t = tl.load(C + vector, mask=B_mask, other=0).to(tl.float32)
            tile = j[:, None] + i[None, :] * n
            tile_mask = (j < n)[:, None] & p_mask[None, :]
            S = tl.load(state + tile, mask=tile_mask, other=0)
            scores = tl.dot(C_t, tl.trans(B_t), scores, input_precision="tf32x3")
            carried = tl.dot(C_t, S, carried, input_precision="tf32x3")
            S = tl.exp(total) * S
            S = tl.dot(tl.trans(B_t), outgoing, S, input_precision="tf32x3")
            tl.store(state + tile, S, mask=tile_mask)

        decay = tl.exp(tl.where(causal, between, float("-inf")))
        out = tl.dot(scores * decay, now, input_precision="tf32x3")
        out += tl.exp(a)[:, None] * carried + D * x_t
        if GATE:
            out *= silu(tl.load(z + channel, mask=x_mask, other=0).to(tl.float32))
        tl.store(y + channel, out, mask=x_mask)
        # In the next chunk, a thread may read an element of the state that another thread wrote.
        tl.debug_barrier()


def ssd_prefill(
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
    chunk_size=32,
    compute_capability=None,
):
    """Run `aim_jax.ops.ssd_scan` as one kernel: products in chunks, a state carried between them.

    One program processes the chunks of a head in order. Products run on tensor cores, with every
    float32 split into two TF32 numbers, and accumulate in float32. (Dao and Gu 2024, section 6; see
    `aim_jax.ops.ssd_scan` for the equations.)

    Args:
      x: inputs (b, l, h, p).
      dt: step sizes before bias and softplus (b, l, h).
      A: negative decay rates (h,).
      B, C: input and output projections (b, l, g, n); head i uses group i // (h / g).
      D: optional skip weights (h,).
      z: optional gates, like x.
      dt_bias: optional bias of dt (h,).
      dt_softplus: apply softplus to dt.
      initial_state: optional state before the first position (b, h, p, n); zeros when None. A
        float32 state is overwritten with the final state in place.
      chunk_size: largest chunk length, rounded to a power of two of at least 16; above 32 registers
        spill.
      compute_capability: see `aim_jax.ops.triton`.

    Returns:
      y like x, and the state after the last position (b, h, p, n) float32.

    Raises:
      ValueError: the shapes do not match, or chunk_size is not positive.
    """
    sizes = bind_ssd("ssd_prefill", x, dt, A, B, C, D, z, dt_bias, initial_state)
    b, l, h, p, g, n = (sizes[axis] for axis in "blhpgn")
    _, chunk = split_length(l, chunk_size)
    zeros = jnp.zeros(h, jnp.float32)
    if initial_state is None:
        initial_state = jnp.zeros((b, h, p, n), jnp.float32)
    initial_state = initial_state.astype(jnp.float32)
    block = min(max(triton.next_power_of_2(p), 16), 64)
    return launch(
        ssd_prefill_kernel,
        x, dt, A, B, C,
        zeros if D is None else D,
        x if z is None else z,  # a placeholder, not read without a gate
        zeros if dt_bias is None else dt_bias,
        initial_state,
        outputs=[x, initial_state],
        aliases=((8, 1),),
        grid=(triton.cdiv(p, block), h, b),
        num_warps=8,
        num_stages=1,
        compute_capability=compute_capability,
        l=l, h=h, p=p, n=n, g=g, GATE=z is not None, SOFTPLUS=dt_softplus,
        BLOCK_L=max(triton.next_power_of_2(chunk), 16), BLOCK_P=block, BLOCK_N=16,
    )  # fmt: skip


@triton.jit
def selective_scan_prefill_kernel(
    x, dt, A, B, C, D, z, dt_bias, initial_state, y, state,
    l: tl.constexpr, e: tl.constexpr, n: tl.constexpr,
    GATE: tl.constexpr, SOFTPLUS: tl.constexpr, START: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Run the scan; a program handles a block of channels in one row, its state in registers."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = block * BLOCK_E + tl.arange(0, BLOCK_E)
    j = tl.arange(0, BLOCK_N)
    e_mask = i < e
    n_mask = j < n
    tile_mask = e_mask[:, None] & n_mask[None, :]
    offset = i[:, None] * n + j[None, :]
    A = tl.load(A + offset, mask=tile_mask, other=0)
    D = tl.load(D + i, mask=e_mask, other=0)
    dt_bias = tl.load(dt_bias + i, mask=e_mask, other=0)
    S = tl.zeros([BLOCK_E, BLOCK_N], tl.float32)
    if START:
        S = tl.load(initial_state + row * e * n + offset, mask=tile_mask, other=0).to(tl.float32)

    for t in range(l):
        channel = (row * l + t) * e + i
        vector = (row * l + t) * n + j
        x_t = tl.load(x + channel, mask=e_mask, other=0).to(tl.float32)
        dt_t = tl.load(dt + channel, mask=e_mask, other=0).to(tl.float32) + dt_bias
        B_t = tl.load(B + vector, mask=n_mask, other=0).to(tl.float32)
        C_t = tl.load(C + vector, mask=n_mask, other=0).to(tl.float32)
        if SOFTPLUS:
            dt_t = softplus(dt_t)
        S = tl.exp(dt_t[:, None] * A) * S + (dt_t * x_t)[:, None] * B_t[None, :]
        out = tl.sum(S * C_t[None, :], axis=1) + D * x_t
        if GATE:
            out *= silu(tl.load(z + channel, mask=e_mask, other=0).to(tl.float32))
        tl.store(y + channel, out, mask=e_mask)
    tl.store(state + row * e * n + offset, S, mask=tile_mask)


def selective_scan_prefill(
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
    compute_capability=None,
):
    """Run `aim_jax.ops.selective_scan` as one kernel: a recurrence with its state in registers.

    Every program steps through the sequence with a block of channels, so only the final state is
    written to memory. (Gu and Dao 2023, algorithm 2 and section 3.3; see
    `aim_jax.ops.selective_scan` for the equations.)

    Args:
      x: inputs (b, l, e).
      dt: step sizes before bias and softplus (b, l, e).
      A: negative decay rates (e, n).
      B, C: input and output projections (b, l, n).
      D: optional skip weights (e,).
      z: optional gates, like x.
      dt_bias: optional bias of dt (e,).
      dt_softplus: apply softplus to dt.
      initial_state: optional state before the first position (b, e, n); zeros when None.
      compute_capability: see `aim_jax.ops.triton`.

    Returns:
      y like x, and the state after the last position (b, e, n) float32.

    Raises:
      ValueError: the shapes do not match.
    """
    sizes = bind_selective_scan(
        "selective_scan_prefill", x, dt, A, B, C, D, z, dt_bias, initial_state
    )
    b, l, e, n = (sizes[axis] for axis in "blen")
    zeros = jnp.zeros(e, jnp.float32)
    block = min(split_channels(e, b, smallest=32), 128)
    block_n = triton.next_power_of_2(n)
    return launch(
        selective_scan_prefill_kernel,
        x, dt, A, B, C,
        zeros if D is None else D,
        x if z is None else z,  # a placeholder, not read without a gate
        zeros if dt_bias is None else dt_bias,
        x if initial_state is None else initial_state,  # a placeholder, not read without a state
        outputs=[x, jax.ShapeDtypeStruct((b, e, n), jnp.float32)],
        grid=(triton.cdiv(e, block), b),
        num_warps=warps_for(block * block_n),
        compute_capability=compute_capability,
        l=l, e=e, n=n, GATE=z is not None, SOFTPLUS=dt_softplus, START=initial_state is not None,
        BLOCK_E=block, BLOCK_N=block_n,
    )  # fmt: skip
