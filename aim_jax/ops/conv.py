"""Causal depthwise convolution that precedes the scans."""

import functools

import jax
import jax.numpy as jnp

from aim_jax.ops.implementation import implementation_of, kernels_of, training_default
from aim_jax.ops.products import round_cotangent
from aim_jax.ops.reference import bind_axes, compute_dtype, require_floats, with_rank
from aim_jax.utils.checks import check_arguments


@check_arguments
def causal_conv1d(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None = None,
    *,
    initial_state: jax.Array | None = None,
    activation: str | None = "silu",
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Convolve every channel with its own causal filter, and return the last inputs as state.

        y_t = act(bias + sum_k weight_k x_{t - (w - 1) + k}),   k = 0 .. w - 1

    The last tap weighs the current input. A decode step is the same call with l = 1.

    Args:
      x: inputs (b, l, c), with any l >= 1.
      weight: filters (w, c).
      bias: optional bias (c,).
      initial_state: the w - 1 inputs before x (b, w - 1, c); zeros when None.
      activation: "silu" or None.
      implementation: "xla", or "triton" (kernels for NVIDIA GPUs, differentiable in reverse mode).
        None is "triton" in the steps of a training on NVIDIA GPUs where the kernels are available,
        "xla" otherwise; see `aim_jax.ops.implementation`.

    Returns:
      y like x, and the last w - 1 inputs (b, w - 1, c) in at least float32: the initial state of
      the positions that follow.

    Raises:
      ValueError: the shapes do not match, or the activation is unknown.
    """
    implementation = implementation or training_default()
    chosen = implementation_of("causal_conv1d", implementation, ("xla", "triton"))
    if activation not in ("silu", None):
        raise ValueError(f'causal_conv1d: activation is {activation!r}, expected "silu" or None')
    sizes = bind_axes("causal_conv1d", x=(x, "blc"), weight=(weight, "wc"), bias=(bias, "c"))
    b, l, c, w = (sizes[axis] for axis in "blcw")
    require_floats("causal_conv1d", x=x)
    if initial_state is not None and initial_state.shape != (b, w - 1, c):
        raise ValueError(
            f"causal_conv1d: initial_state has shape {initial_state.shape}, "
            f"expected (b, w - 1, c) = {(b, w - 1, c)}"
        )

    dtype = compute_dtype(x)
    fresh = initial_state is None
    if initial_state is None:
        initial_state = jnp.zeros((b, w - 1, c), x.dtype)
    wider = jnp.promote_types(x.dtype, initial_state.dtype)
    inputs = jnp.concatenate([initial_state.astype(wider), x.astype(wider)], axis=1)
    state = inputs[:, l:].astype(dtype)
    if chosen != "xla":
        convolve = functools.partial(kernels_of(chosen).causal_conv1d, silu=activation == "silu")
        y = convolve(x, weight, bias) if fresh else convolve(inputs, weight, bias)[:, w - 1 :]
        return y.astype(x.dtype), state
    weight = weight.astype(dtype)
    taps = [weight[k, None, None] * inputs[:, k : k + l].astype(dtype) for k in range(w)]
    y = sum(taps[1:], taps[0])
    if bias is not None:
        y = y + with_rank(bias.astype(dtype), y.ndim)
    y = round_cotangent(y, x.dtype)
    if activation == "silu":
        y = jax.nn.silu(y)
    return y.astype(x.dtype), state


@check_arguments
def conv_ring(window: jax.Array, position: jax.typing.ArrayLike) -> jax.Array:
    """Convert the state of `causal_conv1d` to the ring buffer that the fused decode steps use.

    A window shifts at every position; in a ring buffer every input keeps its slot.

    Args:
      window: the w - 1 inputs before `position`, oldest first, (..., w - 1, c), as returned by
        `causal_conv1d`.
      position: int (), the next position.

    Returns:
      (..., w, c), with the input of position t in slot t mod w. The slot of `position` is zero; the
      step writes it before it is read.
    """
    empty = jnp.zeros((*window.shape[:-2], 1, window.shape[-1]), window.dtype)
    return jnp.roll(jnp.concatenate([empty, window], axis=-2), position, axis=-2)
