"""Scans of whole sequences, so that a given prefix is read by one kernel per layer."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from aim_jax.ops.reference import bind_axes, split_length
from aim_jax.ops.triton.device import silu, softplus
from aim_jax.ops.triton.launch import launch, split_channels, warps_for


@triton.jit
def ssd_prefill_kernel(
    x, dt, A, B, C, D, z, dt_bias, initial_state, y, state,
    l: tl.constexpr, h: tl.constexpr, p: tl.constexpr, n: tl.constexpr, g: tl.constexpr,
    GATE: tl.constexpr, SOFTPLUS: tl.constexpr, START: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program is (a block of channels, a head, a row); its state stays in registers."""
    block, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    group = head // (h // g)
    q = tl.arange(0, BLOCK_L)
    i = block * BLOCK_P + tl.arange(0, BLOCK_P)
    j = tl.arange(0, BLOCK_N)
    here, there = i < p, j < n
    A = tl.load(A + head)
    D = tl.load(D + head)
    dt_bias = tl.load(dt_bias + head)

    # The state is kept as (n, p): then no operand of a product but B has to be transposed.
    tile = (row * h + head) * p * n + i[None, :] * n + j[:, None]
    inside = there[:, None] & here[None, :]
    S = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    if START:
        S = tl.load(initial_state + tile, mask=inside, other=0).to(tl.float32)

    for start in range(0, l, BLOCK_L):
        t = start + q
        real = t < l
        channel = ((row * l + t) * h + head)[:, None] * p + i[None, :]
        vector = ((row * l + t) * g + group)[:, None] * n + j[None, :]
        in_x, in_B = real[:, None] & here[None, :], real[:, None] & there[None, :]
        x_t = tl.load(x + channel, mask=in_x, other=0).to(tl.float32)
        B_t = tl.load(B + vector, mask=in_B, other=0).to(tl.float32)
        C_t = tl.load(C + vector, mask=in_B, other=0).to(tl.float32)
        dt_t = tl.load(dt + (row * l + t) * h + head, mask=real, other=0).to(tl.float32) + dt_bias
        if SOFTPLUS:
            dt_t = softplus(dt_t)
        dt_t = tl.where(real, dt_t, 0.0)  # neither decays the state nor adds to it

        a = tl.cumsum(dt_t * A, axis=0)
        total = tl.sum(dt_t * A, axis=0)
        causal = q[:, None] >= q[None, :]
        decay = tl.exp(tl.where(causal, a[:, None] - a[None, :], float("-inf")))
        weights = tl.dot(C_t, tl.trans(B_t), input_precision="tf32x3") * decay
        now = dt_t[:, None] * x_t
        out = tl.dot(weights, now, input_precision="tf32x3")
        out += tl.exp(a)[:, None] * tl.dot(C_t, S, input_precision="tf32x3") + D * x_t
        if GATE:
            out *= silu(tl.load(z + channel, mask=in_x, other=0).to(tl.float32))
        tl.store(y + channel, out, mask=in_x)
        outgoing = tl.exp(total - a)[:, None] * now
        S = tl.exp(total) * S + tl.dot(tl.trans(B_t), outgoing, input_precision="tf32x3")
    tl.store(state + tile, S, mask=inside)


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
    chunk_size=64,
    compute_capability=None,
):
    """`aim_jax.ops.ssd_scan` as one kernel: matrix products in chunks, a state carried between them.

    The chunks of a head follow each other in one program, so the states at their boundaries never
    leave the registers. Products run on tensor cores with float32 split into three TF32 terms and
    accumulate in float32. (Dao and Gu 2024, sec. 6; equations in `ssd_scan`.)

    Args:
      x: inputs (b, l, h, p).
      dt: step sizes before bias and softplus (b, l, h).
      A: negative decay rates (h,).
      B, C: input and output projections (b, l, g, n); head i uses group i // (h / g).
      D: optional skip weights (h,).
      z: optional gates, like x.
      dt_bias: optional bias of dt (h,).
      dt_softplus: whether softplus is applied to dt.
      initial_state: optional state before the first position (b, h, p, n); zeros when None.
      chunk_size: largest chunk length, rounded to a power of two from 16.
      compute_capability: see the package.

    Returns:
      y like x, and the state after the last position (b, h, p, n) float32.

    Raises:
      ValueError: the shapes do not fit together, or chunk_size is not positive.
    """
    sizes = bind_axes(
        "ssd_prefill",
        x=(x, "blhp"),
        dt=(dt, "blh"),
        A=(A, "h"),
        B=(B, "blgn"),
        C=(C, "blgn"),
        D=(D, "h"),
        z=(z, "blhp"),
        dt_bias=(dt_bias, "h"),
        initial_state=(initial_state, "bhpn"),
    )
    b, l, h, p, g, n = (sizes[axis] for axis in "blhpgn")
    _, chunk = split_length(l, chunk_size)
    zeros = jnp.zeros(h, jnp.float32)
    block = max(split_channels(p, b * h, smallest=16, enough=128), 16)  # of tl.dot, at least 16
    return launch(
        ssd_prefill_kernel,
        x, dt, A, B, C,
        zeros if D is None else D,
        x if z is None else z,  # not read without a gate
        zeros if dt_bias is None else dt_bias,
        x if initial_state is None else initial_state,  # not read without a start
        outputs=[x, jax.ShapeDtypeStruct((b, h, p, n), jnp.float32)],
        grid=(triton.cdiv(p, block), h, b),
        num_warps=4,
        num_stages=1,
        compute_capability=compute_capability,
        l=l, h=h, p=p, n=n, g=g, GATE=z is not None, SOFTPLUS=dt_softplus,
        START=initial_state is not None, BLOCK_L=max(triton.next_power_of_2(chunk), 16),
        BLOCK_P=block, BLOCK_N=max(triton.next_power_of_2(n), 16),
    )  # fmt: skip


@triton.jit
def selective_scan_prefill_kernel(
    x, dt, A, B, C, D, z, dt_bias, initial_state, y, state,
    l: tl.constexpr, e: tl.constexpr, n: tl.constexpr,
    GATE: tl.constexpr, SOFTPLUS: tl.constexpr, START: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program is (a block of channels, a row); its state stays in registers."""
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = block * BLOCK_E + tl.arange(0, BLOCK_E)
    j = tl.arange(0, BLOCK_N)
    here, there = i < e, j < n
    inside = here[:, None] & there[None, :]
    within = i[:, None] * n + j[None, :]
    A = tl.load(A + within, mask=inside, other=0)
    D = tl.load(D + i, mask=here, other=0)
    dt_bias = tl.load(dt_bias + i, mask=here, other=0)
    S = tl.zeros([BLOCK_E, BLOCK_N], tl.float32)
    if START:
        S = tl.load(initial_state + row * e * n + within, mask=inside, other=0).to(tl.float32)

    for t in range(l):
        channel, vector = (row * l + t) * e + i, (row * l + t) * n + j
        x_t = tl.load(x + channel, mask=here, other=0).to(tl.float32)
        dt_t = tl.load(dt + channel, mask=here, other=0).to(tl.float32) + dt_bias
        B_t = tl.load(B + vector, mask=there, other=0).to(tl.float32)
        C_t = tl.load(C + vector, mask=there, other=0).to(tl.float32)
        if SOFTPLUS:
            dt_t = softplus(dt_t)
        S = tl.exp(dt_t[:, None] * A) * S + (dt_t * x_t)[:, None] * B_t[None, :]
        out = tl.sum(S * C_t[None, :], axis=1) + D * x_t
        if GATE:
            out *= silu(tl.load(z + channel, mask=here, other=0).to(tl.float32))
        tl.store(y + channel, out, mask=here)
    tl.store(state + row * e * n + within, S, mask=inside)


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
    """`aim_jax.ops.selective_scan` as one kernel: the recurrence itself, its state in registers.

    Every program walks along the sequence with a block of channels, so no state but the last
    reaches memory. (Gu and Dao 2023, alg. 2 and sec. 3.3; equations in `selective_scan`.)

    Args:
      x: inputs (b, l, e).
      dt: step sizes before bias and softplus (b, l, e).
      A: negative decay rates (e, n).
      B, C: input and output projections (b, l, n).
      D: optional skip weights (e,).
      z: optional gates, like x.
      dt_bias: optional bias of dt (e,).
      dt_softplus: whether softplus is applied to dt.
      initial_state: optional state before the first position (b, e, n); zeros when None.
      compute_capability: see the package.

    Returns:
      y like x, and the state after the last position (b, e, n) float32.

    Raises:
      ValueError: the shapes do not fit together.
    """
    sizes = bind_axes(
        "selective_scan_prefill",
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
    b, l, e, n = (sizes[axis] for axis in "blen")
    zeros = jnp.zeros(e, jnp.float32)
    block, block_n = split_channels(e, b, smallest=32), triton.next_power_of_2(n)
    return launch(
        selective_scan_prefill_kernel,
        x, dt, A, B, C,
        zeros if D is None else D,
        x if z is None else z,  # not read without a gate
        zeros if dt_bias is None else dt_bias,
        x if initial_state is None else initial_state,  # not read without a start
        outputs=[x, jax.ShapeDtypeStruct((b, e, n), jnp.float32)],
        grid=(triton.cdiv(e, block), b),
        num_warps=warps_for(block * block_n),
        compute_capability=compute_capability,
        l=l, e=e, n=n, GATE=z is not None, SOFTPLUS=dt_softplus, START=initial_state is not None,
        BLOCK_E=block, BLOCK_N=block_n,
    )  # fmt: skip
