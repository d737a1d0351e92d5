"""Decode step of a Mamba-1 layer: the convolution and, after x_proj and dt_proj, the state."""

import jax
import triton
import triton.language as tl

from aim_jax.ops.reference import bind_axes, require
from aim_jax.ops.triton.device import convolve, silu, softplus
from aim_jax.ops.triton.launch import launch, split_channels, warps_for


@triton.jit
def conv_step_kernel(
    projected, conv_weight, conv_bias, layer, position, conv_in, y, conv,
    q: tl.constexpr, c: tl.constexpr, w: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Run the step; a program handles a block of channels in one row.

    `conv_in` shares its buffer with `conv`.
    """
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    layer = tl.load(layer).to(tl.int64)
    t = tl.load(position)
    ring = conv + (layer * tl.num_programs(1) + row) * w * c
    weight, bias = conv_weight + layer * w * c, conv_bias + layer * c
    i = block * BLOCK + tl.arange(0, BLOCK)
    now, out = convolve(projected + row * q, ring, weight, bias, t, i, i < c, c, w)
    tl.store(ring + (t % w) * c + i, now, mask=i < c)
    tl.store(y + row * c + i, out, mask=i < c)


def conv_step(
    projected, conv_cache, layer, position, *, conv_weight, conv_bias, compute_capability=None
):
    """Run `aim_jax.ops.conv_step` as one kernel; see there for arguments, results and errors.

    Args:
      compute_capability: see `aim_jax.ops.triton`.
    """
    sizes = bind_axes(
        "conv_step",
        conv_weight=(conv_weight, "Lwc"),
        conv_bias=(conv_bias, "Lc"),
        conv_cache=(conv_cache, "Lbwc"),
        projected=(projected, "bq"),
    )
    b, c, q, w = (sizes[axis] for axis in "bcqw")
    require(q >= c, f"conv_step: projected has {q} columns, expected at least c = {c}")
    block = split_channels(c, b, smallest=64)
    return launch(
        conv_step_kernel,
        projected, conv_weight, conv_bias, layer, position, conv_cache,
        outputs=[jax.ShapeDtypeStruct((b, c), projected.dtype), conv_cache],
        aliases=((5, 1),),
        grid=(triton.cdiv(c, block), b),
        num_warps=warps_for(block, per_warp=128),
        compute_capability=compute_capability,
        q=q, c=c, w=w, BLOCK=block,
    )  # fmt: skip


@triton.jit
def mamba1_step_kernel(
    x, dt, BC, projected, dt_bias, A, D, layer, state_in, y, state,
    q: tl.constexpr, k: tl.constexpr, e: tl.constexpr, n: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Run the step; a program handles a block of channels in one row.

    `state_in` shares its buffer with `state`.
    """
    block, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    layer = tl.load(layer).to(tl.int64)
    i = block * BLOCK_E + tl.arange(0, BLOCK_E)
    j = tl.arange(0, BLOCK_N)
    e_mask = i < e
    n_mask = j < n
    tile_mask = e_mask[:, None] & n_mask[None, :]
    offset = i[:, None] * n + j[None, :]
    tile = state + (layer * tl.num_programs(1) + row) * e * n + offset
    S = tl.load(tile, mask=tile_mask, other=0).to(tl.float32)

    C_row = BC + row * k + (k - n)
    B = tl.load(C_row - n + j, mask=n_mask, other=0).to(tl.float32)
    C = tl.load(C_row + j, mask=n_mask, other=0).to(tl.float32)
    x = tl.load(x + row * e + i, mask=e_mask, other=0).to(tl.float32)
    z = tl.load(projected + row * q + (q - e) + i, mask=e_mask, other=0).to(tl.float32)
    dt = tl.load(dt + row * e + i, mask=e_mask, other=0).to(tl.float32)
    dt = softplus(dt + tl.load(dt_bias + layer * e + i, mask=e_mask, other=0))
    A = tl.load(A + layer * e * n + offset, mask=tile_mask, other=0)

    S = tl.exp(dt[:, None] * A) * S + (dt * x)[:, None] * B[None, :]
    tl.store(tile, S, mask=tile_mask)
    out = tl.sum(S * C[None, :], axis=1) + tl.load(D + layer * e + i, mask=e_mask, other=0) * x
    tl.store(y + row * e + i, out * silu(z), mask=e_mask)


def mamba1_step(x, dt, BC, projected, state, layer, *, dt_bias, A, D, compute_capability=None):
    """Run `aim_jax.ops.mamba1_step` as one kernel; see there for arguments, results and errors.

    Args:
      compute_capability: see `aim_jax.ops.triton`.
    """
    sizes = bind_axes(
        "mamba1_step",
        state=(state, "Lben"),
        x=(x, "be"),
        dt=(dt, "be"),
        BC=(BC, "bk"),
        projected=(projected, "bq"),
        dt_bias=(dt_bias, "Le"),
        A=(A, "Len"),
        D=(D, "Le"),
    )
    b, e, n, k, q = (sizes[axis] for axis in "benkq")
    require(k >= 2 * n, f"mamba1_step: BC has {k} columns, expected at least 2 n = {2 * n}")
    require(q >= e, f"mamba1_step: projected has {q} columns, expected at least e = {e}")
    block = min(split_channels(e, b, smallest=32), 128)
    block_n = triton.next_power_of_2(n)
    return launch(
        mamba1_step_kernel,
        x, dt, BC, projected, dt_bias, A, D, layer, state,
        outputs=[x, state],
        aliases=((8, 1),),
        grid=(triton.cdiv(e, block), b),
        num_warps=warps_for(block * block_n, per_warp=512),
        compute_capability=compute_capability,
        q=q, k=k, e=e, n=n, BLOCK_E=block, BLOCK_N=block_n,
    )  # fmt: skip
