"""AiM: autoregressive image generation with Mamba (arXiv 2408.12245), in JAX and Flax.

import aim_jax
images = aim_jax.generate(aim_jax.load_pretrained("cifar10"), labels=["cat", "ship"]).images

Importing this package imports nothing else, JAX included: names and rooms load when they are used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public names, by the module that defines them.
_NAMES = {
    "PRESETS": "aim_jax.models",
    "AiM": "aim_jax.models",
    "AiMConfig": "aim_jax.models",
    "Pretrained": "aim_jax.weights.pretrained",
    "Samples": "aim_jax.sampling",
    "VQConfig": "aim_jax.models",
    "VQModel": "aim_jax.models",
    "generate": "aim_jax.sampling",
    "init_cache": "aim_jax.models",
    "load_pretrained": "aim_jax.weights.pretrained",
    "save_model": "aim_jax.weights.pretrained",
}
_ROOMS = ("data", "models", "ops", "sampling")

__all__ = [*_NAMES, *_ROOMS]

if TYPE_CHECKING:
    from aim_jax import data, models, ops, sampling
    from aim_jax.models import PRESETS, AiM, AiMConfig, VQConfig, VQModel, init_cache
    from aim_jax.sampling import Samples, generate
    from aim_jax.weights.pretrained import Pretrained, load_pretrained, save_model


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
