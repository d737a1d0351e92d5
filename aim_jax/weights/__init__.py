"""Model directories: load, save, convert from and to PyTorch, publish."""

from aim_jax.weights.pretrained import (
    Pretrained,
    bundled_models,
    class_ids,
    find_model,
    load_pretrained,
    save_model,
)

__all__ = [
    "Pretrained",
    "bundled_models",
    "class_ids",
    "find_model",
    "load_pretrained",
    "save_model",
]
