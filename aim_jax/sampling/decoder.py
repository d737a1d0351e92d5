"""Decoder protocol of the token loop, and the decoder built from the Flax modules."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.typing import ArrayLike

from aim_jax import ops
from aim_jax.models.aim import AiM, Block, Cache, Modulation, init_layer_cache, project
from aim_jax.models.config import AiMConfig
from aim_jax.sampling.engine import Engine
from aim_jax.sampling.logits import sample

# Number of steps in which the dual cache grows, because XLA reads every allocated slot.
SEGMENTS = 4


class Layer(NamedTuple):
    """Weights of one layer in the layout of a decoder.

    Attributes:
      weights: pytree of arrays, of the same shapes for every layer.
      index: () int, index of the layer.
    """

    weights: Any
    index: ArrayLike  # type: ignore[assignment]  # tuples have a method of that name


def prefill(
    layers: Sequence[Layer],
    block_params: Callable[[Layer, AiMConfig], dict],
    x: jax.Array,
    modulation: Modulation,
    config: AiMConfig,
    *,
    dual: int | None,
    dtype: str,
) -> list[Cache]:
    """Return the cache of every layer after the inputs x (b, l, d), l >= 1.

    All layers share one compiled program, so that no second copy of the weights is laid out, and a
    new length of the inputs compiles one block.

    Args:
      layers: the layers of a decoder.
      block_params: returns the parameters of `Block` for a layer.
      x: the first inputs.
      modulation: from `AiM.condition`.
      config: configuration of the model.
      dual, dtype: see `init_cache`.
    """
    caches = []
    for layer in layers:
        x, cache = _read(
            layer, x, modulation, block_params=block_params, config=config, dual=dual, dtype=dtype
        )
        caches.append(cache)
    return caches


@functools.partial(jax.jit, static_argnames=("block_params", "config", "dual", "dtype"))
def _read(
    layer: Layer,
    x: jax.Array,
    modulation: Modulation,
    *,
    block_params: Callable[[Layer, AiMConfig], dict],
    config: AiMConfig,
    dual: int | None,
    dtype: str,
) -> tuple[jax.Array, Cache]:
    """Return the residual stream and the cache of a layer after the inputs x (b, l, d)."""
    empty = init_layer_cache(config, x.shape[0], dual=dual, dtype=dtype)
    variables = {"params": block_params(layer, config)}
    reading = modulation.reading and modulation.reading.layers[layer.index]
    parts = modulation.layers[layer.index]
    return Block(config).apply(variables, x, parts, empty, reading, modulation.segments(x.shape[1]))


class Decoder(Protocol):
    """Interface between the token loop and a decoder.

    Each decoder defines the structure of its caches, which are pytrees of arrays.

    Positions and numbers of tokens are those of the image. The caption of a text model, of
    `max_caption` positions with its padding, comes before them in the caches.

    A decoder holds the weights of a model in the layout that its step reads, and is itself a pytree
    of them. It depends on no request, so that it is made once and used for many.

    Attributes:
      params: AiM parameters without those of the layers; they embed conditions and tokens.
      config: configuration of the model.
      engine: a resolved engine.
    """

    params: dict
    config: AiMConfig
    engine: Engine

    def with_engine(self, engine: Engine) -> "Decoder":
        """Return the decoder with another form or cache dtype; weights are shared."""

    def segments(self, first: int) -> list[int]:
        """Return the ends of the loop's segments after `first`; each reads more of the caches."""

    def start(self, x: jax.Array, modulation: Modulation, tokens: int) -> Any:
        """Return caches after the inputs x (b, l, d), l >= 0, with room for `tokens` tokens.

        The inputs begin with the caption of a text model.
        """

    def grow(self, caches: Any, tokens: int) -> Any:
        """Return the caches with room for `tokens` tokens."""

    def step(
        self,
        x: jax.Array,
        modulation: Modulation,
        caches: Any,
        position: ArrayLike,
        tokens: int | None = None,
    ) -> tuple[jax.Array, Any]:
        """Return float32 logits (b, v) and updated caches for x (b, 1, d) at `position`.

        `tokens` is more than `position`, so that no more rows of the caches are read; None is all.
        """

    def sample(
        self, logits: jax.Array, uniform: jax.Array, settings: Mapping[str, jax.Array]
    ) -> jax.Array:
        """Sample one token per image, int32 (b,); see `aim_jax.sampling.logits.sample`."""


def growing_segments(last: int, first: int) -> list[int]:
    """Return the ends of `SEGMENTS` segments of up to `last` tokens that lie after `first`."""
    return sorted({max(first + 1, last * i // SEGMENTS) for i in range(1, SEGMENTS + 1)})


def own_head(params: dict, config: AiMConfig) -> jax.Array | None:
    """Return the matrix of the logits (v, d), or None if it is the table of the tokens as it is."""
    table = params["token_embedding"]["embedding"]
    return None if table.dtype == config.compute_dtype else table.astype(config.compute_dtype)


def output_table(params: dict, head: jax.Array | None) -> jax.Array:
    """Return the matrix of the logits (v, d) of a decoder; see `own_head`."""
    return params["token_embedding"]["embedding"] if head is None else head


@struct.dataclass
class ModuleDecoder:
    """Decoder that applies the Flax modules layer by layer, for plain XLA on CPUs.

    On a CPU, a loop over stacked parameters would copy the slice of each layer in each step. Here
    every layer has matrices of its own, in the compute dtype and as (out, in). On CPU, products of
    few rows are fastest when a matrix row holds the weights of one output.

    Attributes:
      params: AiM parameters without those of the layers.
      layers: the parameters of each layer by path.
      head: see `own_head`.
      config: configuration of the model.
      engine: a resolved engine.
    """

    params: dict
    layers: list[dict]
    head: jax.Array | None
    config: AiMConfig = struct.field(pytree_node=False)
    engine: Engine = struct.field(pytree_node=False)

    @classmethod
    def of(cls, params: dict, config: AiMConfig, engine: Engine) -> "ModuleDecoder":
        """Create a decoder from the parameters of a model.

        Args:
          params: AiM parameters, layers stacked.
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
        head = own_head(params, config)
        return cls(other_params, layers, head, config, engine)  # type: ignore[call-arg]

    def with_engine(self, engine: Engine) -> "ModuleDecoder":
        """Return the decoder with another form or cache dtype; weights are shared."""
        return self.replace(engine=engine)  # type: ignore[attr-defined]

    def segments(self, first: int) -> list[int]:
        """Return the ends of the loop's segments after `first`; caches grow between segments.

        XLA reads all of a dual cache, so it is kept only slightly larger than its contents.
        """
        last = self.config.num_tokens
        return growing_segments(last, first) if self.engine.form == "dual" else [last]

    def start(self, x: jax.Array, modulation: Modulation, tokens: int) -> list[Cache]:
        """Return caches after the inputs x (b, l, d), l >= 0, with room for `tokens` tokens."""
        dual = self.config.max_caption + tokens if self.engine.form == "dual" else None
        dtype = self.engine.cache_dtype
        if not x.shape[1]:
            # Separate arrays per layer are updated in place.
            return [
                init_layer_cache(self.config, x.shape[0], dual=dual, dtype=dtype)
                for _ in self.layers
            ]
        layers = [Layer(weights, i) for i, weights in enumerate(self.layers)]
        return prefill(layers, _block_params, x, modulation, self.config, dual=dual, dtype=dtype)

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
        self,
        x: jax.Array,
        modulation: Modulation,
        caches: list[Cache],
        position: ArrayLike,
        tokens: int | None = None,
    ) -> tuple[jax.Array, list[Cache]]:
        """Return float32 logits (b, v) and updated caches for x (b, 1, d) at `position`."""
        del position, tokens  # the caches hold the position, and have the size that is read
        block = Block(self.config)
        updated = []
        for i, (weights, cache) in enumerate(zip(self.layers, caches, strict=True)):
            variables = {"params": _block_params(Layer(weights, i), self.config)}
            x, cache = block.apply(variables, x, modulation.layers[i], cache)
            updated.append(cache)
        model = AiM(self.config)
        x = model.apply({"params": self.params}, x, modulation.final, method="final")
        return project(x, output_table(self.params, self.head))[:, 0], updated

    def sample(
        self, logits: jax.Array, uniform: jax.Array, settings: Mapping[str, jax.Array]
    ) -> jax.Array:
        """Sample one token per image, int32 (b,); see `aim_jax.sampling.logits.sample`."""
        return sample(logits, uniform, **settings)  # type: ignore[arg-type]  # array names


def _block_params(layer: Layer, config: AiMConfig) -> dict:
    """Return the parameters of `Block` for a layer of `ModuleDecoder`."""
    del config
    # XLA fuses these transposes into the matrix products.
    weights = {path: w.T if _is_matrix(path) else w for path, w in layer.weights.items()}
    return unflatten_dict(weights)


def _is_matrix(path: tuple[str, ...]) -> bool:
    return path[-1] == "kernel" and not path[-2].startswith("conv_")
