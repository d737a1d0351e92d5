"""Image sampling: the jitted token loop, its decoders, logit filters, image grids and export."""

from aim_jax.sampling.config import SamplingConfig
from aim_jax.sampling.decoder import Decoder
from aim_jax.sampling.engine import Engine
from aim_jax.sampling.generate import PreparedModel, generate, prepare
from aim_jax.sampling.images import Samples, decode_images, encode_rows

__all__ = [
    "Decoder",
    "Engine",
    "PreparedModel",
    "Samples",
    "SamplingConfig",
    "decode_images",
    "encode_rows",
    "generate",
    "prepare",
]
