"""Decode step of a Mamba-2 layer in the dual form: a cache of past inputs instead of a state."""

import jax
import triton
import triton.language as tl

from aim_jax.ops.reference import bind_mamba2_step, require
from aim_jax.ops.triton.device import convolve, silu, softplus
from aim_jax.ops.triton.launch import launch, require_power_of_2


@triton.jit
def dual_step_kernel(
    projected, conv_weight, conv_bias, dt_bias, A, D, norm_scale, layer, position,
    conv_in, inputs_in, B_in, log_decay_in,
    y, sum_squares, conv, inputs, B_cache, log_decay,
    h: tl.constexpr, p: tl.constexpr, n: tl.constexpr, g: tl.constexpr, w: tl.constexpr,
    T: tl.constexpr, HEADS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Run the step; a program handles HEADS heads of one group in one row.

    `conv_in` shares its buffer with `conv`, and so do the other pairs.
    """
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    e: tl.constexpr = h * p
    c: tl.constexpr = e + 2 * g * n
    layer = tl.load(layer).to(tl.int64)
    t = tl.load(position)
    cell = layer * tl.num_programs(1) + row  # one layer of one sequence

    z_row = projected + row * (e + c + h)
    conv_row = z_row + e
    dt_row = conv_row + c
    ring = conv + cell * w * c
    weight, bias = conv_weight + layer * w * c, conv_bias + layer * c

    head = block * HEADS + tl.arange(0, HEADS)
    i = tl.arange(0, BLOCK_P)
    j = tl.arange(0, BLOCK_N)
    n_mask = j < n
    group = (block * HEADS) // (h // g)
    x_channel = head[:, None] * p + i[None, :]
    p_mask = tl.broadcast_to((i < p)[None, :], [HEADS, BLOCK_P])
    B_channel = e + group * n + j
    C_channel = B_channel + g * n
    x_now, x = convolve(conv_row, ring, weight, bias, t, x_channel, p_mask, c, w)
    B_now, B = convolve(conv_row, ring, weight, bias, t, B_channel, n_mask, c, w)
    C_now, C = convolve(conv_row, ring, weight, bias, t, C_channel, n_mask, c, w)

    dt = tl.load(dt_row + head).to(tl.float32) + tl.load(dt_bias + layer * h + head)
    dt = softplus(dt)
    a_row = log_decay + cell * T * h + head
    decay = dt * tl.load(A + layer * h + head)
    now = dt[:, None] * x

    # Programs of a group read the same ring buffers and rows of B that one of them updates. This is
    # not a race: they read slots other than t mod w (see `mamba2_step_kernel`) and rows before t.
    writer = n_mask & ((block * HEADS) % (h // g) == 0)
    slot = ring + (t % w) * c
    tl.store(slot + x_channel, x_now, mask=p_mask)
    tl.store(slot + B_channel, B_now, mask=writer)
    tl.store(slot + C_channel, C_now, mask=writer)
    input_row = inputs + cell * T * e + x_channel
    B_row = B_cache + cell * T * g * n + group * n + j
    tl.store(a_row + t * h, tl.zeros([HEADS], tl.float32))
    tl.store(input_row + t * e, now, mask=p_mask)
    tl.store(B_row + t * g * n, B, mask=writer)

    out = tl.sum(C * B, axis=0) * now  # s = t
    for start in tl.range(0, t, BLOCK_T):
        s = start + tl.arange(0, BLOCK_T)
        past = s < t
        B_s = tl.load(
            B_row[None, :] + s[:, None] * (g * n), mask=past[:, None] & n_mask[None, :], other=0
        )
        score = tl.sum(B_s.to(tl.float32) * C[None, :], axis=1)
        a_slot = a_row[None, :] + s[:, None] * h
        a_mask = tl.broadcast_to(past[:, None], [BLOCK_T, HEADS])
        a_s = tl.load(a_slot, mask=a_mask, other=0) + decay[None, :]
        # Several threads may have read an element that one of them updates.
        tl.debug_barrier()
        tl.store(a_slot, a_s, mask=a_mask)
        weight_s = score[:, None] * tl.exp(a_s)
        input_s = tl.load(
            input_row[None, :, :] + s[:, None, None] * e,
            mask=past[:, None, None] & p_mask[None, :, :],
            other=0,
        )
        out += tl.sum(weight_s[:, :, None] * input_s.to(tl.float32), axis=0)

    out += tl.load(D + layer * h + head)[:, None] * x
    out *= silu(tl.load(z_row + x_channel, mask=p_mask, other=0).to(tl.float32))
    scale = tl.load(norm_scale + layer * e + x_channel, mask=p_mask, other=0)
    tl.store(y + row * e + x_channel, out * scale, mask=p_mask)
    square = tl.sum(tl.sum(out * out, axis=1), axis=0)
    tl.store(sum_squares + row * tl.num_programs(0) + block, square)


def dual_step(
    projected,
    conv_cache,
    inputs,
    B_cache,
    log_decay,
    layer,
    position,
    *,
    conv_weight,
    conv_bias,
    dt_bias,
    A,
    D,
    norm_scale,
    heads_per_program=None,
    tokens_per_block=32,
    num_warps=4,
    compute_capability=None,
):
    """Run `aim_jax.ops.dual_step` as one kernel, which updates caches in place.

    See there for the other arguments, results and errors.

    Args:
      heads_per_program: power of two that divides h / g. Heads in one program share the products
        C . B; fewer of them give more programs. None chooses by the number of rows.
      tokens_per_block: power of two, past tokens that a program reads at a time.
      num_warps: warps per program.
      compute_capability: see `aim_jax.ops.triton`.
    """
    sizes = bind_mamba2_step(
        "dual_step",
        projected,
        conv_cache,
        {
            "inputs": (inputs, "LbThp"),
            "B_cache": (B_cache, "LbTgn"),
            "log_decay": (log_decay, "LbTh"),
        },
        conv_weight=conv_weight,
        conv_bias=conv_bias,
        dt_bias=dt_bias,
        A=A,
        D=D,
        norm_scale=norm_scale,
    )
    b, h, p, n, g, e, w, T = (sizes[axis] for axis in "bhpngewT")
    heads = heads_per_program or next(
        k for k in (2, 1) if (h // g) % k == 0 and (k == 1 or b * h >= 512 * k)
    )
    require(
        (h // g) % heads == 0 and heads == triton.next_power_of_2(heads),
        f"dual_step: heads_per_program = {heads}, expected a power of two that divides {h // g}",
    )
    require_power_of_2("dual_step", tokens_per_block=tokens_per_block)
    return launch(
        dual_step_kernel,
        projected, conv_weight, conv_bias, dt_bias, A, D, norm_scale, layer, position,
        conv_cache, inputs, B_cache, log_decay,
        outputs=[
            jax.ShapeDtypeStruct((b, e), projected.dtype),
            jax.ShapeDtypeStruct((b, h // heads), "float32"),
            conv_cache,
            inputs,
            B_cache,
            log_decay,
        ],
        aliases=((9, 2), (10, 3), (11, 4), (12, 5)),
        grid=(h // heads, b),
        num_warps=num_warps,
        compute_capability=compute_capability,
        h=h, p=p, n=n, g=g, w=w, T=T, HEADS=heads, BLOCK_P=triton.next_power_of_2(p),
        BLOCK_N=triton.next_power_of_2(n), BLOCK_T=tokens_per_block,
    )  # fmt: skip
