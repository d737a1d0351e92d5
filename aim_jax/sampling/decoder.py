"""Decoder protocol of the token loop, and the decoder built from the Flax modules."""

from collections.abc import Mapping
from typing import Any, Protocol

import jax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from aim_jax import ops
from aim_jax.models.aim import AiM, Block, Cache, Modulation, init_cache
from aim_jax.models.config import AiMConfig
from aim_jax.sampling.engine import Engine
from aim_jax.sampling.logits import sample

# Number of steps in which the dual cache grows, because XLA reads every allocated slot.
SEGMENTS = 4


def prefill(
    params: dict, x: jax.Array, modulation: Modulation, config: AiMConfig, cache: Cache
) -> Cache:
    """Return the cache after the inputs x (b, l, d), starting from `cache`; layers are stacked."""
    return AiM(config).apply({"params": params}, x, modulation, cache, method="forward")[1]


class Decoder(Protocol):
    """Interface between the token loop and a decoder.

    Each decoder defines the structure of its caches, which are pytrees of arrays.

    Positions and numbers of tokens are those of the image. The caption of a text model, of
    `max_caption` positions with its padding, comes before them in the caches.

    Attributes:
      params: AiM parameters without those of the layers; they embed the tokens.
    """

    params: dict

    def segments(self, first: int) -> list[int]:
        """Return the ends of the loop's segments after `first`; caches grow between segments."""

    def start(self, params: dict, x: jax.Array, tokens: int) -> Any:
        """Return caches after the inputs x (b, l, d), l >= 0, with room for `tokens` tokens.

        The inputs begin with the caption of a text model.
        """

    def grow(self, caches: Any, tokens: int) -> Any:
        """Return the caches with room for `tokens` tokens."""

    def step(self, x: jax.Array, caches: Any, position: jax.Array) -> tuple[jax.Array, Any]:
        """Return float32 logits (b, v) and updated caches for x (b, 1, d) at `position`."""

    def sample(
        self, logits: jax.Array, uniform: jax.Array, settings: Mapping[str, jax.Array]
    ) -> jax.Array:
        """Sample one token per image, int32 (b,); see `aim_jax.sampling.logits.sample`."""


@struct.dataclass
class ModuleDecoder:
    """Decoder that applies the Flax modules layer by layer.

    A loop over stacked parameters would copy and cast the slice of each layer in each step. Here
    the matrices of every layer are extracted once, in the compute dtype and as (out, in). On CPU,
    products of few rows are fastest when a matrix row holds the weights of one output.
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
        """Create a decoder from the parameters of a model.

        Args:
          params: AiM parameters, layers stacked.
          modulation: from `AiM.condition`.
          config: configuration of the model.
          engine: a resolved engine.
        """
        stacked = flatten_dict(params["layers"])

        def layer_params(i):
            def extract(path, x):
                return x[i].astype(config.compute_dtype).T if _is_matrix(path) else x[i]

            return {path: extract(path, x) for path, x in stacked.items()}

        other_params = {name: value for name, value in params.items() if name != "layers"}
        layers = [layer_params(i) for i in range(config.n_layer)]
        return cls(other_params, modulation, layers, config, engine)  # type: ignore[call-arg]

    def segments(self, first: int) -> list[int]:
        """Return the ends of the loop's segments after `first`; caches grow between segments.

        XLA reads all of a dual cache, so it is kept only slightly larger than its contents.
        """
        last = self.config.num_tokens
        cuts = SEGMENTS if self.engine.form == "dual" else 1
        return sorted({max(first + 1, last * i // cuts) for i in range(1, cuts + 1)})

    def start(self, params: dict, x: jax.Array, tokens: int) -> list[Cache]:
        """Return caches after the inputs x (b, l, d), l >= 0, with room for `tokens` tokens."""
        dual = self.config.max_caption + tokens if self.engine.form == "dual" else None
        cache = init_cache(self.config, x.shape[0], dual=dual, dtype=self.engine.cache_dtype)
        if x.shape[1]:
            cache = prefill(params, x, self.modulation, self.config, cache)
        # Separate arrays per layer are updated in place.
        return [jax.tree.map(lambda c: c[i], cache) for i in range(self.config.n_layer)]  # noqa: B023

    def grow(self, caches: list[Cache], tokens: int) -> list[Cache]:
        """Return the caches with room for `tokens` tokens."""
        if self.engine.form != "dual":
            return caches
        grown = []
        for cache in caches:
            room = self.config.max_caption + tokens
            state = ops.grow_dual_cache(cache.ssm_state, room)  # type: ignore[arg-type]
            grown.append(cache._replace(ssm_state=state))  # type: ignore[arg-type]
        return grown

    def step(
        self, x: jax.Array, caches: list[Cache], position: jax.Array
    ) -> tuple[jax.Array, list[Cache]]:
        """Return float32 logits (b, v) and updated caches for x (b, 1, d) at `position`."""
        del position  # the caches hold it
        block = Block(self.config)
        updated = []
        for layer, parts, cache in zip(self.layers, self.modulation.layers, caches, strict=True):
            # XLA fuses these transposes into the matrix products.
            weights = {path: w.T if _is_matrix(path) else w for path, w in layer.items()}
            x, cache = block.apply({"params": unflatten_dict(weights)}, x, parts, cache)
            updated.append(cache)
        model = AiM(self.config)
        variables = {"params": self.params}
        logits = model.apply(variables, x, self.modulation.final, method="logits")
        return logits[:, 0], updated

    def sample(
        self, logits: jax.Array, uniform: jax.Array, settings: Mapping[str, jax.Array]
    ) -> jax.Array:
        """Sample one token per image, int32 (b,); see `aim_jax.sampling.logits.sample`."""
        return sample(logits, uniform, **settings)  # type: ignore[arg-type]  # array names


def _is_matrix(path: tuple[str, ...]) -> bool:
    return path[-1] == "kernel" and not path[-2].startswith("conv_")
