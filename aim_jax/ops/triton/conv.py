"""The causal convolution before the scans, with its activation and gradients."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from aim_jax.ops.triton.device import silu
from aim_jax.ops.triton.launch import launch, require_kernel_dtype
from aim_jax.parallel.sharding import per_device

BLOCK_L = 64  # positions of a program
# Logical axes of the arguments, by name. Channels do not depend on each other.
AXES = {"x": ("batch", None, "inner"), "weight": (None, "inner"), "bias": ("inner",)}


@triton.jit
def filtered(x, weight, bias, t, channel, l: tl.constexpr, c: tl.constexpr, w: tl.constexpr):
    """Compute bias + sum_k weight_k x_{t - (w - 1) + k} for positions t of one row and channels."""
    c_mask = channel < c
    total = tl.load(bias + channel, mask=c_mask, other=0)[None, :]
    for k in tl.static_range(w):
        s = t - (w - 1) + k
        mask = ((s >= 0) & (s < l))[:, None] & c_mask[None, :]
        x_s = tl.load(x + s[:, None] * c + channel[None, :], mask=mask, other=0).to(tl.float32)
        total += tl.load(weight + k * c + channel, mask=c_mask, other=0)[None, :] * x_s
    return total


@triton.jit
def conv_outputs_kernel(
    x, weight, bias, y,
    l: tl.constexpr, c: tl.constexpr, w: tl.constexpr, SILU: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute a block of positions and channels of one row."""
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    t = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    row = tl.program_id(2).to(tl.int64)
    out = filtered(x + row * l * c, weight, bias, t, channel, l, c, w)
    if SILU:
        out = silu(out)
    mask = (t < l)[:, None] & (channel < c)[None, :]
    tl.store(y + row * l * c + t[:, None] * c + channel[None, :], out, mask=mask)


@triton.jit
def conv_gradients_kernel(
    x, weight, bias, dy, dx, dweight, dbias,
    l: tl.constexpr, c: tl.constexpr, w: tl.constexpr, SILU: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Compute dx of a block of positions and channels of one row, and its part of dweight, dbias.

    An input reaches w outputs. What the activation gets there is computed again for each of them,
    from inputs that are in the cache.
    """
    channel = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.program_id(1) * BLOCK_L + tl.arange(0, BLOCK_L)
    row = tl.program_id(2).to(tl.int64)
    part = row * tl.num_programs(1) + tl.program_id(1)
    x += row * l * c
    dy += row * l * c
    dx += row * l * c
    c_mask = channel < c
    total = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)
    d_sum = tl.zeros([BLOCK_L, BLOCK_C], tl.float32)  # at t, of the last round at s
    for k in range(w):  # not unrolled: all loads at once would take most registers
        t = s + (w - 1) - k
        mask = (t < l)[:, None] & c_mask[None, :]
        d_sum = tl.load(dy + t[:, None] * c + channel[None, :], mask=mask, other=0).to(tl.float32)
        if SILU:
            before = filtered(x, weight, bias, t, channel, l, c, w)
            sigmoid = 1 / (1 + tl.exp(-before))
            d_sum *= sigmoid * (1 + before * (1 - sigmoid))
        total += tl.load(weight + k * c + channel, mask=c_mask, other=0)[None, :] * d_sum
    mask = (s < l)[:, None] & c_mask[None, :]
    tl.store(dx + s[:, None] * c + channel[None, :], total, mask=mask)

    tl.store(dbias + part * c + channel, tl.sum(d_sum, axis=0), mask=c_mask)
    for k in tl.static_range(w):
        t = s - (w - 1) + k
        mask = ((t >= 0) & (t < l))[:, None] & c_mask[None, :]
        x_t = tl.load(x + t[:, None] * c + channel[None, :], mask=mask, other=0).to(tl.float32)
        tl.store(dweight + (part * w + k) * c + channel, tl.sum(d_sum * x_t, axis=0), mask=c_mask)


def conv_outputs(x, weight, bias, *, silu, compute_capability=None):
    """Compute `aim_jax.ops.causal_conv1d` from a zero state, in one kernel.

    Args:
      x: inputs (b, l, c).
      weight: filters (w, c) float32.
      bias: bias (c,) float32.
      silu: apply SiLU.
      compute_capability: see `aim_jax.ops.triton`.

    Returns:
      y like x.
    """
    (y,) = _launch(
        conv_outputs_kernel, x, weight, bias, outputs=[x], SILU=silu,
        compute_capability=compute_capability,
    )  # fmt: skip
    return y


def conv_gradients(x, weight, bias, dy, *, silu, compute_capability=None):
    """Compute the gradients of `conv_outputs` with respect to x, weight and bias, in one kernel.

    Args:
      x, weight, bias, silu, compute_capability: arguments of `conv_outputs`.
      dy: gradient with respect to the outputs (b, l, c).

    Returns:
      dx like x; and parts of the other two, (b, parts, w, c) and (b, parts, c) float32, to be
      summed.
    """
    b, l, c = x.shape
    parts = (b, triton.cdiv(l, BLOCK_L))
    outputs = [
        x,
        jax.ShapeDtypeStruct((*parts, len(weight), c), jnp.float32),
        jax.ShapeDtypeStruct((*parts, c), jnp.float32),
    ]
    return _launch(
        conv_gradients_kernel, x, weight, bias, dy, outputs=outputs, SILU=silu,
        compute_capability=compute_capability,
    )  # fmt: skip


def _launch(kernel, x, weight, *arrays, **options):
    b, l, c = x.shape
    block = min(triton.next_power_of_2(c), 64)
    return launch(
        kernel, x, weight, *arrays, grid=(triton.cdiv(c, block), triton.cdiv(l, BLOCK_L), b),
        num_warps=8, l=l, c=c, w=len(weight), BLOCK_L=BLOCK_L, BLOCK_C=block, **options,
    )  # fmt: skip


class Options(NamedTuple):
    """Static arguments of the convolution: its activation, and the compute capability."""

    silu: bool
    compute_capability: int | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _conv(options, arrays):
    return (conv_outputs(**arrays, **options._asdict()),)


def _conv_forward(options, arrays):
    return _conv(options, arrays), arrays


def _conv_backward(options, arrays, cotangents):
    dx, dweight, dbias = conv_gradients(**arrays, dy=cotangents[0], **options._asdict())
    return (
        {"x": dx, "weight": jnp.sum(dweight, axis=(0, 1)), "bias": jnp.sum(dbias, axis=(0, 1))},
    )


_conv.defvjp(_conv_forward, _conv_backward)


def causal_conv1d(x, weight, bias=None, *, silu=True, compute_capability=None):
    """Run `aim_jax.ops.causal_conv1d` from a zero state; differentiable in reverse mode.

    The backward pass keeps the arguments only. In a function of
    `aim_jax.parallel.sharding.sharded_jit` every device convolves its own part of the batch and of
    the channels.

    Args:
      x: inputs (b, l, c).
      weight: filters (w, c).
      bias: optional bias (c,).
      silu: apply SiLU.
      compute_capability: see `aim_jax.ops.triton`.

    Returns:
      y like x.

    Raises:
      ValueError: x is not bfloat16, float16 or float32.
    """
    require_kernel_dtype("causal_conv1d", x)
    bias = jnp.zeros(x.shape[-1], jnp.float32) if bias is None else bias.astype(jnp.float32)
    arrays = {"x": x, "weight": weight.astype(jnp.float32), "bias": bias}
    convolve = functools.partial(_conv, Options(silu, compute_capability))
    (y,) = per_device(convolve, AXES, (AXES["x"],))(arrays)
    return y
