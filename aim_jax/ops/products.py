"""Matrix products of the models: one rule for precision, sums and gradients."""

import functools
import re

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from aim_jax.ops.reference import compute_dtype


def precision_of(dtype: DTypeLike) -> jax.lax.Precision | None:
    """Return the precision of products and convolutions with operands of `dtype`.

    Float32 operands are multiplied as float32. Without a precision, GPUs would round them to TF32
    and TPUs to bfloat16, and keep three of their seven digits. A default that the user has set,
    such as `jax.default_matmul_precision("tensorfloat32")`, overrules it.
    """
    is_wide = jnp.finfo(dtype).bits >= 32
    is_default = jax.config.jax_default_matmul_precision is None  # type: ignore[attr-defined]
    return jax.lax.Precision.HIGHEST if is_wide and is_default else None


def product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Compute the einsum of two arrays, with sums in at least float32.

    The gradients of bfloat16 operands are products of bfloat16 operands too: the cotangent is
    rounded as they were. JAX would multiply the float32 cotangent and the operand in float32, at a
    fraction of the rate and with more memory traffic.

    Args:
      equation: einsum of two operands, such as "md,vd->mv". No index is in one term alone.
      a, b: the operands; of two dtypes, the wider one holds both.

    Returns:
      The product, in at least float32.
    """
    dtype = jnp.promote_types(a.dtype, b.dtype)
    a, b = a.astype(dtype), b.astype(dtype)
    if dtype == compute_dtype(a):
        return _einsum(equation, a, b)
    return _narrow_product(equation, a, b)


def _einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(
        equation, a, b, precision=precision_of(a.dtype), preferred_element_type=compute_dtype(a)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _narrow_product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return _einsum(equation, a, b)


def _narrow_forward(equation, a, b):
    return _einsum(equation, a, b), (a, b)


def _narrow_backward(equation, operands, cotangent):
    a, b = operands
    left, right, out = re.split(",|->", equation)
    cotangent = cotangent.astype(a.dtype)
    da = _einsum(f"{out},{right}->{left}", cotangent, b)
    db = _einsum(f"{left},{out}->{right}", a, cotangent)
    return da.astype(a.dtype), db.astype(b.dtype)


_narrow_product.defvjp(_narrow_forward, _narrow_backward)


def round_cotangent(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Return x, whose cotangent is rounded to `dtype` and stored in it.

    A cast alone may not do so. XLA keeps the wider value through a cast to bfloat16 and back, and
    stores it where it has several uses.
    """
    return x if dtype == compute_dtype(x) else _round_cotangent(x, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _round_cotangent(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    return x


_round_cotangent.defvjp(
    lambda x, dtype: (x, None),
    lambda dtype, _, g: (jax.lax.optimization_barrier(g.astype(dtype)).astype(g.dtype),),
)
