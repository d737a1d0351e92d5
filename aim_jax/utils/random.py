"""Random keys of a fixed generator, so that seeds do not depend on JAX's default generator."""

import functools
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
    """Convert an integer seed, or a typed key of any generator, to a typed key of `GENERATOR`."""
    if not is_key(seed):
        return jax.random.key(seed, impl=GENERATOR)
    if str(jax.random.key_impl(seed)) == GENERATOR:
        return seed
    # Keys of other generators may give other numbers in a batch than alone.
    words = jax.random.key_data(seed).ravel()
    return functools.reduce(jax.random.fold_in, words, jax.random.key(0, impl=GENERATOR))
