"""Conversion between official PyTorch weights and the parameters of this library.

`rules` maps tensors, `configs` maps configurations, and `official` converts complete checkpoints to
model directories and back. The files are read and written by `aim_jax.weights.formats`.
"""

from aim_jax.weights.convert.configs import (
    aim_config_from_official,
    infer_aim_config,
    infer_vq_config,
    official_aim_config,
    official_vq_config,
    vq_config_from_official,
)
from aim_jax.weights.convert.official import load_official, to_jax, to_torch
from aim_jax.weights.convert.rules import (
    TIED_HEAD,
    USAGE_HISTORY,
    convert_aim,
    convert_vq,
    export_aim,
    export_vq,
    official_shapes,
    stream_official,
)
from aim_jax.weights.formats.errors import WeightsError
from aim_jax.weights.formats.files import open_weights

__all__ = [
    "TIED_HEAD",
    "USAGE_HISTORY",
    "WeightsError",
    "aim_config_from_official",
    "convert_aim",
    "convert_vq",
    "export_aim",
    "export_vq",
    "infer_aim_config",
    "infer_vq_config",
    "load_official",
    "official_aim_config",
    "official_shapes",
    "official_vq_config",
    "open_weights",
    "stream_official",
    "to_jax",
    "to_torch",
    "vq_config_from_official",
]
