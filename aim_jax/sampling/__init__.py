"""Image sampling: the jitted token loop, its decoders, logit filters, image grids and export."""

from aim_jax.sampling.config import SamplingConfig
from aim_jax.sampling.decoder import Decoder
from aim_jax.sampling.engine import Engine
from aim_jax.sampling.generate import Samples, decode_images, encode_rows, generate

__all__ = [
    "Decoder",
    "Engine",
    "Samples",
    "SamplingConfig",
    "decode_images",
    "encode_rows",
    "generate",
]
