"""The decoding step of AiM, laid out for a loop that runs it once per token.

Two forms of the Mamba-2 recurrence, from Dao and Gu 2024 (arXiv 2405.21060): "recurrent" carries
the state, "dual" a cache of the tokens so far. Three sets of kernels: "xla" is the Flax modules
themselves, on any device; "native" and "triton" are fused kernels for CPUs and NVIDIA GPUs, in
`decode_fused`. `Engine` names one of each, or lets `resolve` choose.
"""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
from absl import logging
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from aim_jax import filters, ops
from aim_jax.models.aim import AiM, AiMConfig, Block, Cache, Modulation, init_cache

FORMS = ("auto", "recurrent", "dual")
KERNELS = ("auto", "xla", "native", "triton")
TRITON_PLATFORMS = ("gpu", "cuda")  # what JAX calls NVIDIA GPUs
# Slots of the dual cache of the modules grow in this many steps: XLA reads all there are.
SEGMENTS = 4


@dataclasses.dataclass(frozen=True)
class Engine:
    """How the decode loop computes. It changes speed and rounding, not what is computed.

    Attributes:
      form: "recurrent", "dual" or "auto"; see `choose_form`.
      kernels: "xla", "native" (CPU), "triton" (NVIDIA GPU) or "auto": the fused kernels of the
        device where they exist and the model has a mixer that they know, else "xla".
      cache_dtype: of the states ("recurrent") or of the cached inputs ("dual"): "float32" or
        "bfloat16". The modules keep float32 states.
    """

    form: str = "auto"
    kernels: str = "auto"
    cache_dtype: str = "float32"

    def __post_init__(self):
        for name, known in (
            ("form", FORMS),
            ("kernels", KERNELS),
            ("cache_dtype", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"Engine: {name}={getattr(self, name)!r}; expected one of {', '.join(known)}."
                )


def resolve(engine: Engine, config: AiMConfig, rows: int, platform: str) -> Engine:
    """The engine without "auto".

    Args:
      rows: sequences per device, with guidance two per image.
      platform: "cpu", "gpu", "cuda" or "tpu".

    Raises:
      ValueError: the model or the device does not have what was asked for by name.
    """
    kernels = engine.kernels
    if kernels == "auto":
        kernels = choose_kernels(config, platform)
    elif kernels == "native" and (platform != "cpu" or config.mixer != "mamba2"):
        raise ValueError(
            f"kernels='native' decodes Mamba-2 on CPUs; this is {config.mixer} on {platform}."
        )
    elif kernels == "triton" and platform not in TRITON_PLATFORMS:
        raise ValueError(f"kernels='triton' decodes on NVIDIA GPUs; this is {platform}.")
    form = engine.form
    if form == "auto":
        form = choose_form(config, rows, kernels, platform)
    elif form == "dual" and config.mixer != "mamba2":
        raise ValueError(f"form='dual' is there for Mamba-2; this model has {config.mixer}.")
    engine = dataclasses.replace(engine, form=form, kernels=kernels)
    if engine.cache_dtype == "bfloat16" and (kernels, form) == ("xla", "recurrent"):
        raise ValueError("cache_dtype='bfloat16' needs form='dual' or fused kernels.")
    return engine


def choose_kernels(config: AiMConfig, platform: str) -> str:
    """The fused kernels of the platform if they can be had, else "xla", saying why."""
    if platform in TRITON_PLATFORMS:
        if all(importlib.util.find_spec(name) for name in ("triton", "jax_triton")):
            return "triton"
        logging.log_first_n(
            logging.WARNING,
            "Decoding without fused kernels, which the cuda extra brings: pip install -e '.[cuda]'",
            1,
        )
    if platform == "cpu" and config.mixer == "mamba2":
        return "native" if native_kernels() else "xla"
    return "xla"


@functools.cache
def native_kernels() -> bool:
    """Whether the fused CPU kernels can be used; compiles them at the first call."""
    from aim_jax.ops import native

    try:
        native.register()
    except (native.BuildError, OSError) as error:
        logging.warning("Decoding without fused kernels, at about half the speed: %s", error)
        return False
    return True


def choose_form(config: AiMConfig, rows: int, kernels: str, platform: str) -> str:
    """The form that takes less time per step, on average over an image.

    Per row and layer the recurrent form reads and writes a state of e n values; the dual form reads
    e + g n + h values of every token so far, half of them on average, and writes one row. So images
    of few tokens favour the dual form: of AiM's sizes all up to 460 tokens, were bytes all. They
    are not:

    - "native": the state streams at 1.4 times the rate of the tokens' rows (measured).
    - "triton": a program of the dual kernel walks along the tokens, and fewer than 512 programs do
      not fill a GPU; the state can be split further.
    - "xla": on CPU the modules' dual step is slower than its bytes; measured, never ahead.
    """
    if config.mixer != "mamba2" or (kernels == "xla" and platform == "cpu"):
        return "recurrent"
    e, g, n, h = config.d_inner, config.ngroups, config.d_state, config.n_heads
    if kernels == "triton" and rows * h < 512:
        return "recurrent"
    recurrent, dual = 2 * e * n, config.num_tokens / 2 * (e + g * n + h)
    return "dual" if dual * (1.4 if kernels == "native" else 1) < recurrent else "recurrent"


def prefill(
    params: dict, x: jax.Array, modulation: Modulation, config: AiMConfig, cache: Cache
) -> Cache:
    """The cache after the inputs x (b, l, d), from the empty one; layers stacked."""
    return AiM(config).apply({"params": params}, x, modulation, cache, method="forward")[1]


@struct.dataclass
class ModuleDecoder:
    """Decodes with the Flax modules, one layer after the other.

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
    def of(cls, params: dict, modulation: Modulation, config: AiMConfig, engine: Engine):
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

    sample = staticmethod(filters.sample)


def _is_matrix(path: tuple[str, ...]) -> bool:
    return path[-1] == "kernel" and not path[-2].startswith("conv_")


def make_decoder(params: dict, modulation: Modulation, config: AiMConfig, engine: Engine):
    """The decoder of a resolved engine: a `ModuleDecoder`, or one with the same methods."""
    if engine.kernels == "xla":
        return ModuleDecoder.of(params, modulation, config, engine)
    from aim_jax.decode_fused import FusedDecoder  # its kernels need compilers

    return FusedDecoder.of(params, modulation, config, engine)
