"""Random keys of a fixed generator, so that seeds do not depend on JAX's default generator."""

from typing import Any

import jax
import jax.numpy as jnp

GENERATOR = "threefry2x32"


def is_key(value: Any) -> bool:
    """Return True for a single typed JAX key."""
    if not isinstance(value, jax.Array):
        return False
    return bool(jnp.issubdtype(value.dtype, jax.dtypes.prng_key)) and value.ndim == 0


def random_key(seed: Any) -> jax.Array:
    """Convert an integer seed to a typed key of `GENERATOR`; return a typed key unchanged."""
    return seed if is_key(seed) else jax.random.key(seed, impl=GENERATOR)
