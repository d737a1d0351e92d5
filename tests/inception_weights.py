"""Seeded weights of the Inception of 2015, in the names of its graph, and images for them."""

from pathlib import Path

import numpy as np

from aim_jax.models import inception
from aim_jax.weights.formats.files import save_tensors


def seeded_weights() -> dict[str, dict[str, np.ndarray]]:
    """weight (out, in, h, w), beta, mean, var of every convolution; weight (1008, 2048) of softmax.

    Scaled so that activations keep their size from layer to layer.
    """
    rng, found = np.random.default_rng(2015), {}
    for layer, parts in inception.shapes(with_logits=True).items():
        shape = parts["kernel"].shape[::-1]
        if layer == "softmax":
            found[layer] = {"weight": rng.normal(size=shape) * shape[1] ** -0.5}
            continue
        out, inner, w, h = shape
        shape = (out, inner, h, w)
        found[layer] = {
            "weight": rng.normal(size=shape) * (2 / (inner * h * w)) ** 0.5,
            "beta": rng.normal(size=out) * 0.1,
            "mean": rng.normal(size=out) * 0.1,
            "var": rng.uniform(0.5, 1.5, size=out),
        }
    return {k: {p: a.astype(np.float32) for p, a in v.items()} for k, v in found.items()}


def save_seeded_inception(folder: Path) -> Path:
    """A file of ours with those kernels and shifts, the batch norms left out."""
    params = {}
    for layer, parts in seeded_weights().items():
        kernel = parts["weight"].T if layer == "softmax" else parts["weight"].transpose(2, 3, 1, 0)
        params[layer] = {"kernel": kernel}
        if layer != "softmax":
            params[layer]["bias"] = parts["beta"]
    return save_tensors(params, folder / "random.safetensors")


def seeded_images() -> np.ndarray:
    """uint8 (2, 24, 40, 3)."""
    return np.random.default_rng(8).integers(0, 256, (2, 24, 40, 3), dtype=np.uint8)
