"""Random keys of a named generator, so that a seed means the same whatever JAX's default is."""

from typing import Any

import jax
import jax.numpy as jnp

GENERATOR = "threefry2x32"


def is_key(value: Any) -> bool:
    """Whether this is one typed JAX key."""
    if not isinstance(value, jax.Array):
        return False
    return bool(jnp.issubdtype(value.dtype, jax.dtypes.prng_key)) and value.ndim == 0


def random_key(seed: Any) -> jax.Array:
    """An integer seed as a typed key of `GENERATOR`; a typed key as it is."""
    return seed if is_key(seed) else jax.random.key(seed, impl=GENERATOR)
