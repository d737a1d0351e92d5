"""Choice of the recurrence form and the implementation of the token loop.

The Mamba-2 recurrence has two forms (Dao and Gu 2024, arXiv 2405.21060). "recurrent" carries the
state; "dual" carries a cache of the tokens so far. Implementations are those of
`aim_jax.ops.implementation`: "native" and "triton" are fused kernels for CPUs and NVIDIA GPUs
(`fused_decoder`). "xla" is plain XLA on any device: the Flax modules on CPUs (`decoder`), and the
fused ops in a loop over layers on GPUs and TPUs. `Engine` names one of each, or lets `resolve`
choose.
"""

import dataclasses
import functools

from absl import logging

from aim_jax.models.config import AiMConfig
from aim_jax.ops.implementation import TRITON_PLATFORMS
from aim_jax.ops.triton_availability import newer_than_assembler, triton_unavailable_because

FORMS = ("recurrent", "dual")
DECODERS = ("xla", "native", "triton")  # implementations of the token loop


@dataclasses.dataclass(frozen=True)
class Engine:
    """Recurrence form, implementation and cache dtype of the token loop.

    The choice changes speed and rounding, not what is computed.

    Attributes:
      form: "recurrent" or "dual"; None selects the faster one, see `choose_form`.
      implementation: "xla", "native" (CPU) or "triton" (NVIDIA GPU). None selects the fused kernels
        of the device where they are available and support the model's mixer, else "xla".
      cache_dtype: dtype of the states ("recurrent") or of the cached inputs ("dual"): "float32" or
        "bfloat16". "xla" keeps float32 states.

    Raises:
      ValueError: if a field has an unknown value.
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
    """Return the engine with a form and an implementation chosen where they are None.

    Args:
      engine: the requested engine.
      config: configuration of the model.
      rows: number of sequences per device; two per image with guidance.
      platform: "cpu", "gpu", "cuda" or "tpu".

    Raises:
      ValueError: if the model or the device does not support the requested engine.
    """
    implementation = engine.implementation
    if implementation is None:
        implementation = choose_implementation(config, platform)
    elif implementation == "native" and (platform != "cpu" or config.mixer != "mamba2"):
        raise ValueError(
            f"implementation='native' requires Mamba-2 on a CPU, got {config.mixer} on {platform}; "
            "use 'xla'."
        )
    elif implementation == "triton" and platform not in TRITON_PLATFORMS:
        raise ValueError(
            f"implementation='triton' requires an NVIDIA GPU, got {platform}; use 'xla'."
        )
    elif implementation == "triton" and (reason := triton_unavailable_because()):
        raise ValueError(f"implementation='triton': {reason}")
    form = engine.form
    if form is None:
        form = choose_form(config, rows, implementation, platform)
    elif form == "dual" and config.mixer != "mamba2":
        raise ValueError(
            f"form='dual' requires Mamba-2, got a {config.mixer} model; use 'recurrent'."
        )
    engine = dataclasses.replace(engine, form=form, implementation=implementation)
    if engine.cache_dtype == "bfloat16" and (implementation, form) == ("xla", "recurrent"):
        raise ValueError(
            "cache_dtype='bfloat16' requires form='dual' or a fused implementation ('native' or "
            "'triton')."
        )
    return engine


def choose_implementation(config: AiMConfig, platform: str) -> str:
    """Return the implementation with fused kernels if one is available, else "xla".

    Logs a warning with the reason where kernels of the platform are unavailable.
    """
    if platform in TRITON_PLATFORMS:
        if newer_than_assembler():
            logging.log_first_n(
                logging.WARNING,
                "Decoding without fused kernels: on Blackwell and newer GPUs, Triton emits PTX "
                "that the assembler of the cuda extra cannot read. Pass implementation='triton' to "
                "try the kernels anyway.",
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


@functools.cache
def native_kernels() -> bool:
    """Return whether the fused CPU kernels are usable; the first call compiles them."""
    from aim_jax.ops import native

    try:
        native.register()
    except (native.BuildError, OSError) as error:
        logging.warning(
            "Decoding without fused kernels at about half the speed, and training tokenizers more "
            "slowly: %s",
            error,
        )
        return False
    return True


def choose_form(config: AiMConfig, rows: int, implementation: str, platform: str) -> str:
    """Return the form that takes less time per step, on average over an image.

    Per row and layer, the recurrent form reads and writes a state of e n values. The dual form
    reads e + g n + h values for every token so far, all of the caption and half of the image on
    average, and writes one row. So images of few tokens favour the dual form. By bytes alone it
    would win for every AiM size up to 460 tokens, but bytes are not the only cost:

    - "native": the state streams at 1.4 times the rate of the token rows (measured).
    - "triton": each program of the dual kernel iterates over the tokens, and fewer than 512
      programs do not fill a GPU. The recurrent form can split the state further.
    - "xla": on CPU the dual step of the modules is slower than its bytes suggest; measured, it was
      never faster.
    """
    if config.mixer != "mamba2" or (implementation == "xla" and platform == "cpu"):
        return "recurrent"
    e = config.d_inner
    g = config.ngroups
    n = config.d_state
    h = config.n_heads
    if implementation == "triton" and rows * h < 512:
        return "recurrent"
    recurrent = 2 * e * n
    dual = (config.max_caption + config.num_tokens / 2) * (e + g * n + h)
    return "dual" if dual * (1.4 if implementation == "native" else 1) < recurrent else "recurrent"
