"""The decoding step of AiM, laid out for a loop that runs it once per token."""

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from aim_jax.models.aim import (
    MIXERS,
    AiM,
    AiMConfig,
    Block,
    Cache,
    Modulation,
    init_cache,
)


def split_layers(params: dict, config: AiMConfig) -> list[dict]:
    """Parameters of every layer by itself, matrices in the compute dtype and as (out, in).

    A loop over stacked parameters copies the slice of each layer in each step, and casts it; here
    that is done once. Products of few rows with matrices are fastest on CPU where a matrix row
    holds the weights of one output.

    Args:
      params: AiM parameters, layers stacked.

    Returns:
      For each layer its parameters by path: those of `Block`, with the matrices transposed.
    """
    stacked = flatten_dict(params["layers"])

    def of_layer(i):
        def place(path, x):
            return x[i].astype(config.compute_dtype).T if _is_matrix(path) else x[i]

        return {path: place(path, x) for path, x in stacked.items()}

    return [of_layer(i) for i in range(config.n_layer)]


def _is_matrix(path: tuple[str, ...]) -> bool:
    return path[-1] == "kernel" and not path[-2].startswith("conv_")


def init_caches(config: AiMConfig, batch: int) -> list[Cache]:
    """The zero cache of every layer by itself: arrays of their own are updated in place."""
    return [MIXERS[config.mixer][1](config, batch) for _ in range(config.n_layer)]


def prefill(params: dict, x: jax.Array, modulation: Modulation, config: AiMConfig) -> list[Cache]:
    """The caches after the inputs x (b, l, d), read in one pass over the whole sequence."""
    cache = init_cache(config, x.shape[0])
    _, cache = AiM(config).apply({"params": params}, x, modulation, cache, method="forward")
    return [jax.tree.map(lambda c: c[i], cache) for i in range(config.n_layer)]  # noqa: B023


def decode_step(
    params: dict,
    layers: list[dict],
    x: jax.Array,
    modulation: Modulation,
    caches: list[Cache],
    config: AiMConfig,
) -> tuple[jax.Array, list[Cache]]:
    """One token of every sequence.

    Args:
      params: AiM parameters. layers: from `split_layers`.
      x: inputs (b, 1, d). modulation: from `AiM.condition`, of the same rows.
      caches: one per layer, from `init_caches` or the step before.

    Returns:
      float32 logits (b, v), and the caches after x.
    """
    block, carry, updated = Block(config), (x, jnp.zeros_like(x)), []
    for layer, parts, cache in zip(layers, modulation.layers, caches, strict=True):
        # XLA folds these transposes into the products.
        weights = {path: w.T if _is_matrix(path) else w for path, w in layer.items()}
        carry, cache = block.apply({"params": unflatten_dict(weights)}, carry, parts, cache)
        updated.append(cache)
    logits = AiM(config).apply({"params": params}, *carry, modulation.final, method="logits")
    return logits[:, 0], updated
