"""Sampling of images: the jitted token loop, its decoders, filters of logits, grids, export."""

from aim_jax.sampling.engine import Engine
from aim_jax.sampling.generate import Samples, decode_images, encode_rows, generate

__all__ = ["Engine", "Samples", "decode_images", "encode_rows", "generate"]
