"""Group normalization, optionally followed by swish, with fused gradients on CPUs."""

import functools

import jax
import jax.numpy as jnp

from aim_jax.ops.implementation import implementation_of, kernels_of
from aim_jax.ops.reference import with_rank


def group_norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array,
    groups: int,
    *,
    eps: float = 1e-6,
    swish: bool = False,
    dtype: str = "float32",
    implementation: str | None = None,
) -> jax.Array:
    """Normalize groups of channels (arXiv 1803.08494), then apply scale, bias and swish.

    Args:
      x: inputs (b, ..., c).
      scale, bias: (c,) float32.
      groups: number of groups.
      eps: added to the variance.
      swish: whether to apply x sigmoid(x) to the result.
      dtype: dtype of the result.
      implementation: "xla" (None) or "native", a fused C++ kernel for float32.
    """
    chosen = implementation_of("group_norm", implementation, ("xla", "native"))
    if chosen == "native":
        y = _native(x.reshape(x.shape[0], -1, x.shape[-1]), scale, bias, groups, eps, swish)
        return y.reshape(x.shape)
    y = _xla(x, scale, bias, groups, eps, dtype)
    return jax.nn.swish(y) if swish else y


# A jitted function is traced once for each shape, and a tokenizer normalizes the same shapes dozens
# of times.
@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def _xla(x, scale, bias, groups, eps, dtype):
    wide = x.reshape(*x.shape[:-1], groups, -1)
    wide = wide.astype(jnp.promote_types(x.dtype, jnp.float32))
    axes = (*range(1, x.ndim - 1), x.ndim)
    mean = wide.mean(axes, keepdims=True)
    # The fast variance E[x^2] - E[x]^2 loses digits that parity with released weights needs.
    variance = jnp.square(wide - mean).mean(axes, keepdims=True)
    factor = jax.lax.rsqrt(variance + eps) * with_rank(scale.reshape(groups, -1), wide.ndim)
    normed = ((wide - mean) * factor).reshape(x.shape)
    return (normed + with_rank(bias, x.ndim)).astype(dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _native(x, scale, bias, groups, eps, swish):
    return kernels_of("native").group_norm(x, scale, bias, groups, eps, swish)


def _native_forward(x, scale, bias, groups, eps, swish):
    y = kernels_of("native").group_norm(x, scale, bias, groups, eps, swish)
    return y, (x, scale, bias)


def _native_backward(groups, eps, swish, saved, g):
    return kernels_of("native").group_norm_gradient(*saved, g, groups, eps, swish)


_native.defvjp(_native_forward, _native_backward)
