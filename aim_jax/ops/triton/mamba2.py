"""Decode step of a Mamba-2 layer in the recurrent form, from in_proj to out_proj."""

import jax
import triton
import triton.language as tl

from aim_jax.ops.reference import bind_mamba2_step
from aim_jax.ops.triton.device import convolve, silu, softplus
from aim_jax.ops.triton.launch import launch, require_power_of_2, split_channels, warps_for


@triton.jit
def mamba2_step_kernel(
    projected, conv_weight, conv_bias, dt_bias, A, D, norm_scale, layer, position,
    conv_in, state_in,
    y, sum_squares, conv, state,
    h: tl.constexpr, p: tl.constexpr, n: tl.constexpr, g: tl.constexpr, w: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Run the step; a program handles a block of channels of one head in one row.

    `conv_in` shares its buffer with `conv`, and `state_in` with `state`.
    """
    block, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    e: tl.constexpr = h * p
    c: tl.constexpr = e + 2 * g * n
    layer = tl.load(layer).to(tl.int64)
    t = tl.load(position)
    cell = layer * tl.num_programs(2) + row  # one layer of one sequence

    z_row = projected + row * (e + c + h)
    conv_row = z_row + e
    dt_row = conv_row + c
    ring = conv + cell * w * c
    weight, bias = conv_weight + layer * w * c, conv_bias + layer * c

    i = block * BLOCK_P + tl.arange(0, BLOCK_P)
    j = tl.arange(0, BLOCK_N)
    p_mask = i < p
    n_mask = j < n
    tile = state + (cell * h + head) * p * n + (i[:, None] * n + j[None, :])
    tile_mask = p_mask[:, None] & n_mask[None, :]
    # Most of the memory traffic, so it is loaded first.
    S = tl.load(tile, mask=tile_mask, other=0).to(tl.float32)

    group = head // (h // g)
    x_channel = head * p + i
    B_channel = e + group * n + j
    C_channel = B_channel + g * n
    x_now, x = convolve(conv_row, ring, weight, bias, t, x_channel, p_mask, c, w)
    B_now, B = convolve(conv_row, ring, weight, bias, t, B_channel, n_mask, c, w)
    C_now, C = convolve(conv_row, ring, weight, bias, t, C_channel, n_mask, c, w)
    dt = tl.load(dt_row + head).to(tl.float32) + tl.load(dt_bias + layer * h + head)
    dt = softplus(dt)
    decay = tl.exp(dt * tl.load(A + layer * h + head))

    S = decay * S + (dt * x)[:, None] * B[None, :]
    out = tl.sum(S * C[None, :], axis=1) + tl.load(D + layer * h + head) * x
    out *= silu(tl.load(z_row + x_channel, mask=p_mask, other=0).to(tl.float32))
    scale = tl.load(norm_scale + layer * e + x_channel, mask=p_mask, other=0)

    tl.store(tile, S, mask=tile_mask)
    tl.store(y + row * e + x_channel, out * scale, mask=p_mask)
    parts = tl.num_programs(0)
    tl.store(sum_squares + (row * h + head) * parts + block, tl.sum(out * out, axis=0))
    # All heads of a group read the same ring buffers of B and C while one of them stores the new
    # input. This is not a race: the store goes to slot t mod w, and the reads go to the other w - 1
    # slots, which hold positions t - 1 to t - (w - 1).
    slot = ring + (t % w) * c
    writer = n_mask & (head % (h // g) == 0) & (block == 0)
    tl.store(slot + x_channel, x_now, mask=p_mask)
    tl.store(slot + B_channel, B_now, mask=writer)
    tl.store(slot + C_channel, C_now, mask=writer)


def mamba2_step(
    projected,
    conv_cache,
    state,
    layer,
    position,
    *,
    conv_weight,
    conv_bias,
    dt_bias,
    A,
    D,
    norm_scale,
    channels_per_program=None,
    num_warps=None,
    compute_capability=None,
):
    """Run `aim_jax.ops.mamba2_step` as one kernel, which updates caches in place.

    See there for the other arguments, results and errors.

    Args:
      channels_per_program: power of two, channels of a head in one program. None chooses by the
        number of rows and heads.
      num_warps: warps per program. None chooses by the size of a program's part of the state.
      compute_capability: see `aim_jax.ops.triton`.
    """
    sizes = bind_mamba2_step(
        "mamba2_step",
        projected,
        conv_cache,
        {"state": (state, "Lbhpn")},
        conv_weight=conv_weight,
        conv_bias=conv_bias,
        dt_bias=dt_bias,
        A=A,
        D=D,
        norm_scale=norm_scale,
    )
    b, h, p, n, e = (sizes[axis] for axis in "bhpne")
    block = channels_per_program or min(split_channels(p, b * h), 32)
    require_power_of_2("mamba2_step", channels_per_program=block)
    block_n = triton.next_power_of_2(n)
    parts = triton.cdiv(p, block)
    return launch(
        mamba2_step_kernel,
        projected, conv_weight, conv_bias, dt_bias, A, D, norm_scale, layer, position,
        conv_cache, state,
        outputs=[
            jax.ShapeDtypeStruct((b, e), projected.dtype),
            jax.ShapeDtypeStruct((b, h * parts), "float32"),
            conv_cache,
            state,
        ],
        aliases=((9, 2), (10, 3)),
        grid=(parts, h, b),
        num_warps=num_warps or warps_for(block * block_n, per_warp=512),
        compute_capability=compute_capability,
        h=h, p=p, n=n, g=sizes["g"], w=sizes["w"], BLOCK_P=block, BLOCK_N=block_n,
    )  # fmt: skip
