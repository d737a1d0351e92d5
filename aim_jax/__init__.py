"""AiM: autoregressive image generation with Mamba (arXiv 2408.12245), in JAX and Flax.

import aim_jax
images = aim_jax.generate(aim_jax.load_pretrained("cifar10"), labels=["cat", "ship"]).images

Importing this package imports nothing else, JAX included: names and rooms load when they are used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

__all__ = [
    "PRESETS",
    "AiM",
    "AiMConfig",
    "Pretrained",
    "Samples",
    "SamplingConfig",
    "VQConfig",
    "VQModel",
    "data",
    "evaluation",
    "generate",
    "init_cache",
    "load_pretrained",
    "models",
    "ops",
    "parallel",
    "perf",
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
    from aim_jax.sampling.generate import Samples, generate
    from aim_jax.weights import Pretrained, load_pretrained, save_model

# The room that each name is defined in; names that are not here are rooms themselves.
_HOMES = {
    "models": ("PRESETS", "AiM", "AiMConfig", "VQConfig", "VQModel", "init_cache"),
    "sampling": ("SamplingConfig", "Samples", "generate"),
    "weights": ("Pretrained", "load_pretrained", "save_model"),
}


def __getattr__(name: str) -> Any:
    for room, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{room}"), name)
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
