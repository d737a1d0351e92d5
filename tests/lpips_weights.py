"""Seeded weights of LPIPS, in the names of the public implementation, and pictures for them."""

import numpy as np

from aim_jax.models import lpips
from aim_jax.weights.convert.lpips import TORCHVISION


def seeded_weights() -> dict[str, np.ndarray]:
    """features.N.weight (out, in, 3, 3) and bias; lin0.model.1.weight (1, c, 1, 1), positive.

    Scaled so that activations keep their size from layer to layer.
    """
    rng, found, inner = np.random.default_rng(2018), {}, 3
    for number, width in zip(TORCHVISION, np.concatenate(lpips.BLOCKS), strict=True):
        scale = (2 / (9 * inner)) ** 0.5
        found[f"features.{number}.weight"] = rng.normal(size=(width, inner, 3, 3)) * scale
        found[f"features.{number}.bias"] = rng.normal(size=width) * 0.1
        inner = width
    for i, widths in enumerate(lpips.BLOCKS):
        found[f"lin{i}.model.1.weight"] = rng.uniform(size=(1, widths[-1], 1, 1))
    return {k: v.astype(np.float32) for k, v in found.items()}


def seeded_pictures() -> tuple[np.ndarray, np.ndarray]:
    """Two times float32 (3, 16, 24, 3) in [-1, 1]; the last pair is far apart."""
    rng = np.random.default_rng(9)
    a = rng.uniform(-1, 1, (3, 16, 24, 3))
    noise = rng.normal(size=a.shape) * np.array([0.02, 0.2, 2.0])[:, None, None, None]
    return a.astype(np.float32), np.clip(a + noise, -1, 1).astype(np.float32)
