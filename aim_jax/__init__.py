"""AiM: autoregressive image generation with Mamba (arXiv 2408.12245), in JAX and Flax.

Example:
    >>> import aim_jax
    >>> model = aim_jax.load_pretrained("cifar10")
    >>> images = aim_jax.generate(model, labels=["cat", "ship"]).images

Importing this package imports nothing else, not even JAX: names and subpackages load on first use.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

__all__ = [
    "PRESETS",
    "AiM",
    "AiMConfig",
    "PreparedModel",
    "Pretrained",
    "Samples",
    "SamplingConfig",
    "VQConfig",
    "VQModel",
    "data",
    "evaluation",
    "generate",
    "init_cache",
    "keep_compiled_programs",
    "load_pretrained",
    "models",
    "ops",
    "parallel",
    "perf",
    "prepare",
    "sampling",
    "save_model",
    "training",
    "utils",
    "weights",
]

if TYPE_CHECKING:
    from aim_jax import (
        data,
        evaluation,
        models,
        ops,
        parallel,
        perf,
        sampling,
        training,
        utils,
        weights,
    )
    from aim_jax.models import PRESETS, AiM, AiMConfig, VQConfig, VQModel, init_cache
    from aim_jax.sampling.config import SamplingConfig
    from aim_jax.sampling.generate import PreparedModel, generate, prepare
    from aim_jax.sampling.images import Samples
    from aim_jax.utils.compiled import keep_compiled_programs
    from aim_jax.weights import Pretrained, load_pretrained, save_model

# Public names by the module that exports them. All other names in `__all__` are subpackages.
_EXPORTS = {
    "models": ("PRESETS", "AiM", "AiMConfig", "VQConfig", "VQModel", "init_cache"),
    "sampling": ("PreparedModel", "SamplingConfig", "Samples", "generate", "prepare"),
    "utils.compiled": ("keep_compiled_programs",),
    "weights": ("Pretrained", "load_pretrained", "save_model"),
}


def __getattr__(name: str) -> Any:
    for module, names in _EXPORTS.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
