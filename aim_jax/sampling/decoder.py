"""Decoders: what the token loop asks of one, and the one that computes with the Flax modules."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from aim_jax import ops
from aim_jax.models.aim import AiM, Block, Cache, Modulation, init_cache
from aim_jax.models.config import AiMConfig
from aim_jax.sampling.engine import Engine
from aim_jax.sampling.logits import sample

# Slots of the dual cache grow in this many steps: XLA reads all there are.
SEGMENTS = 4


def prefill(
    params: dict, x: jax.Array, modulation: Modulation, config: AiMConfig, cache: Cache
) -> Cache:
    """The cache after the inputs x (b, l, d), from the empty one; layers stacked."""
    return AiM(config).apply({"params": params}, x, modulation, cache, method="forward")[1]


class Decoder(Protocol):
    """What the token loop asks of a decoder; its caches are trees of arrays of its own kind.

    Attributes:
      params: AiM parameters without the layers', for the embedding of tokens.
    """

    params: dict

    def segments(self, first: int) -> list[int]:
        """Positions after `first` at which the loop is cut, the end included: caches grow there."""

    def start(self, params: dict, x: jax.Array, tokens: int) -> Any:
        """Caches after the inputs x (b, l, d), l >= 0, with room for `tokens` positions."""

    def grow(self, caches: Any, tokens: int) -> Any:
        """The caches with room for `tokens` positions."""

    def step(self, x: jax.Array, caches: Any, position: jax.Array) -> tuple[jax.Array, Any]:
        """x (b, 1, d) at `position` -> (float32 logits (b, v), the caches after x)."""

    def sample(
        self, logits: jax.Array, uniform: jax.Array, settings: Mapping[str, jax.Array]
    ) -> jax.Array:
        """One token per image, int32 (b,); see `aim_jax.sampling.logits.sample`."""


@struct.dataclass
class ModuleDecoder:
    """A `Decoder` of the Flax modules, one layer after the other.

    A loop over stacked parameters copies the slice of each layer in each step, and casts it; here
    every layer's matrices are taken out once, in the compute dtype and as (out, in): products of
    few rows are fastest on CPU where a matrix row holds the weights of one output.
    """

    params: dict
    modulation: Modulation
    layers: list[dict]
    config: AiMConfig = struct.field(pytree_node=False)
    engine: Engine = struct.field(pytree_node=False)

    @classmethod
    def of(
        cls, params: dict, modulation: Modulation, config: AiMConfig, engine: Engine
    ) -> "ModuleDecoder":
        """params: AiM parameters, layers stacked. modulation: from `AiM.condition`."""
        stacked = flatten_dict(params["layers"])

        def of_layer(i):
            def place(path, x):
                return x[i].astype(config.compute_dtype).T if _is_matrix(path) else x[i]

            return {path: place(path, x) for path, x in stacked.items()}

        rest = {name: value for name, value in params.items() if name != "layers"}
        layers = [of_layer(i) for i in range(config.n_layer)]
        return cls(rest, modulation, layers, config, engine)  # type: ignore[call-arg]

    def segments(self, first: int) -> list[int]:
        """Where the loop over positions is cut, the end included: caches grow there.

        XLA reads a dual cache whole, so it is kept little larger than what it holds.
        """
        last = self.config.num_tokens
        cuts = SEGMENTS if self.engine.form == "dual" else 1
        return sorted({max(first + 1, last * i // cuts) for i in range(1, cuts + 1)})

    def start(self, params: dict, x: jax.Array, tokens: int) -> list[Cache]:
        """Caches after the inputs x (b, l, d), l >= 0, with room for `tokens` positions."""
        dual = tokens if self.engine.form == "dual" else None
        cache = init_cache(self.config, x.shape[0], dual=dual, dtype=self.engine.cache_dtype)
        if x.shape[1]:
            cache = prefill(params, x, self.modulation, self.config, cache)
        # Arrays of their own are updated in place.
        return [jax.tree.map(lambda c: c[i], cache) for i in range(self.config.n_layer)]  # noqa: B023

    def grow(self, caches: list[Cache], tokens: int) -> list[Cache]:
        """The caches with room for `tokens` positions."""
        if self.engine.form != "dual":
            return caches
        grown = []
        for cache in caches:
            state = ops.grow_dual_cache(cache.ssm_state, tokens)  # type: ignore[arg-type]
            grown.append(cache._replace(ssm_state=state))  # type: ignore[arg-type]
        return grown

    def step(
        self, x: jax.Array, caches: list[Cache], position: jax.Array
    ) -> tuple[jax.Array, list[Cache]]:
        """x (b, 1, d) at `position` -> (float32 logits (b, v), the caches after x)."""
        del position  # the caches know
        block, carry, updated = Block(self.config), (x, jnp.zeros_like(x)), []
        for layer, parts, cache in zip(self.layers, self.modulation.layers, caches, strict=True):
            # XLA folds these transposes into the products.
            weights = {path: w.T if _is_matrix(path) else w for path, w in layer.items()}
            carry, cache = block.apply({"params": unflatten_dict(weights)}, carry, parts, cache)
            updated.append(cache)
        model = AiM(self.config)
        variables = {"params": self.params}
        logits = model.apply(variables, *carry, self.modulation.final, method="logits")
        return logits[:, 0], updated

    def sample(
        self, logits: jax.Array, uniform: jax.Array, settings: Mapping[str, jax.Array]
    ) -> jax.Array:
        """See `Decoder`."""
        return sample(logits, uniform, **settings)  # type: ignore[arg-type]  # names of arrays


def _is_matrix(path: tuple[str, ...]) -> bool:
    return path[-1] == "kernel" and not path[-2].startswith("conv_")
