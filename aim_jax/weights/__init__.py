"""Model directories: load, save, convert from and to PyTorch, publish."""

from aim_jax.weights.directories import bundled_models, save_model
from aim_jax.weights.load import find_model, load_pretrained
from aim_jax.weights.pretrained import Pretrained, class_ids

__all__ = [
    "Pretrained",
    "bundled_models",
    "class_ids",
    "find_model",
    "load_pretrained",
    "save_model",
]
