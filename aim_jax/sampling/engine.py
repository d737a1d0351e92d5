"""How the token loop of AiM computes: which form of the recurrence, by which implementation.

Two forms of the Mamba-2 recurrence, from Dao and Gu 2024 (arXiv 2405.21060): "recurrent" carries
the state, "dual" a cache of the tokens so far. Implementations are those of
`aim_jax.ops.implementation`: "xla" is the Flax modules themselves (`decoder`), on any device;
"native" and "triton" are fused kernels for CPUs and NVIDIA GPUs (`fused_decoder`). `Engine` names
one of each, or lets `resolve` choose.
"""

import dataclasses
import functools

import jax
from absl import logging

from aim_jax.models.config import AiMConfig
from aim_jax.ops.triton_availability import triton_unavailable_because

FORMS = ("recurrent", "dual")
DECODERS = ("xla", "native", "triton")  # implementations of the token loop
TRITON_PLATFORMS = ("gpu", "cuda")  # what JAX calls NVIDIA GPUs


@dataclasses.dataclass(frozen=True)
class Engine:
    """How the token loop computes. It changes speed and rounding, not what is computed.

    Attributes:
      form: "recurrent" or "dual"; None is the faster one, see `choose_form`.
      implementation: "xla", "native" (CPU) or "triton" (NVIDIA GPU); None is the fused kernels of
        the device where they exist and the model has a mixer that they know, else "xla".
      cache_dtype: of the states ("recurrent") or of the cached inputs ("dual"): "float32" or
        "bfloat16". The modules keep float32 states.

    Raises:
      ValueError: an unknown name.
    """

    form: str | None = None
    implementation: str | None = None
    cache_dtype: str = "float32"

    def __post_init__(self):
        for name, known in (
            ("form", (None, *FORMS)),
            ("implementation", (None, *DECODERS)),
            ("cache_dtype", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}; expected one of {', '.join(map(str, known))}."
                )


def resolve(engine: Engine, config: AiMConfig, rows: int, platform: str) -> Engine:
    """The engine with a form and an implementation in the place of None.

    Args:
      rows: sequences per device, with guidance two per image.
      platform: "cpu", "gpu", "cuda" or "tpu".

    Raises:
      ValueError: the model or the device does not have what is named.
    """
    implementation = engine.implementation
    if implementation is None:
        implementation = choose_implementation(config, platform)
    elif implementation == "native" and (platform != "cpu" or config.mixer != "mamba2"):
        raise ValueError(
            f"implementation='native' decodes Mamba-2 on CPUs; this is {config.mixer} on "
            f"{platform}."
        )
    elif implementation == "triton" and platform not in TRITON_PLATFORMS:
        raise ValueError(f"implementation='triton' decodes on NVIDIA GPUs; this is {platform}.")
    elif implementation == "triton" and (reason := triton_unavailable_because()):
        raise ValueError(f"implementation='triton': {reason}")
    form = engine.form
    if form is None:
        form = choose_form(config, rows, implementation, platform)
    elif form == "dual" and config.mixer != "mamba2":
        raise ValueError(f"form='dual' is there for Mamba-2; this model has {config.mixer}.")
    engine = dataclasses.replace(engine, form=form, implementation=implementation)
    if engine.cache_dtype == "bfloat16" and (implementation, form) == ("xla", "recurrent"):
        raise ValueError("cache_dtype='bfloat16' needs form='dual' or fused kernels.")
    return engine


def choose_implementation(config: AiMConfig, platform: str) -> str:
    """The fused kernels of the platform if they can be had, else "xla", saying why."""
    if platform in TRITON_PLATFORMS:
        if newer_than_assembler():
            logging.log_first_n(
                logging.WARNING,
                "Decoding without fused kernels: for GPUs from Blackwell on Triton writes PTX that "
                "the assembler of the cuda extra does not read. implementation='triton' tries it.",
                1,
            )
            return "xla"
        reason = triton_unavailable_because()
        if not reason:
            return "triton"
        logging.log_first_n(logging.WARNING, "Decoding without fused kernels: %s", 1, reason)
    if platform == "cpu" and config.mixer == "mamba2":
        return "native" if native_kernels() else "xla"
    return "xla"


def newer_than_assembler() -> bool:
    """Whether the GPU at hand is of compute capability 10 or more."""
    capability = getattr(jax.devices()[0], "compute_capability", None)
    return capability is not None and float(capability) >= 10


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


def choose_form(config: AiMConfig, rows: int, implementation: str, platform: str) -> str:
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
    if config.mixer != "mamba2" or (implementation == "xla" and platform == "cpu"):
        return "recurrent"
    e, g, n, h = config.d_inner, config.ngroups, config.d_state, config.n_heads
    if implementation == "triton" and rows * h < 512:
        return "recurrent"
    recurrent, dual = 2 * e * n, config.num_tokens / 2 * (e + g * n + h)
    return "dual" if dual * (1.4 if implementation == "native" else 1) < recurrent else "recurrent"
