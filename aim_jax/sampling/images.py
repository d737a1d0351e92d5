"""Images of tokens, and tokens of images, with the tokenizer of a model.

Shapes: b images, t tokens per image.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from aim_jax.models.config import VQConfig
from aim_jax.models.vq import VQModel
from aim_jax.sampling.padding import pad_rows, padded_count
from aim_jax.utils.images import to_uint8
from aim_jax.weights.pretrained import Pretrained


class Samples(NamedTuple):
    """Generated tokens and images.

    Attributes:
      tokens: int32 (b, t), in raster order.
      images: uint8 (b, H, W, c).
    """

    tokens: jax.Array
    images: jax.Array


def decode_images(params: dict, tokens: jax.Array, *, config: VQConfig) -> jax.Array:
    """Decode tokens (b, t) into images uint8 (b, H, W, c) with the decoder of the tokenizer.

    Batches are padded to the sizes of `aim_jax.sampling.padding`.
    """
    b = len(tokens)
    return decode_padded(params, pad_rows(tokens, padded_count(b)), config=config)[:b]


@functools.partial(jax.jit, static_argnames="config")
def decode_padded(params: dict, tokens: jax.Array, *, config: VQConfig) -> jax.Array:
    """Decode tokens (b, t) into images uint8 (b, H, W, c), compiled for b."""
    return to_uint8(VQModel(config).apply({"params": params}, tokens, method="decode_tokens"))


@functools.partial(jax.jit, static_argnames="config")
def _encode(params: dict, images: jax.Array, *, config: VQConfig) -> jax.Array:
    return VQModel(config).apply({"params": params}, images, method="encode_to_tokens")


def unfinished(model: Pretrained, tokens: jax.Array) -> Samples:
    """Return partial images from their first tokens (b, n); the missing part is grey."""
    n = tokens.shape[1]
    config, params = model.vq()
    assert model.aim_config is not None
    total = model.aim_config.num_tokens
    padded = jnp.pad(tokens, ((0, 0), (0, total - n)))
    images = decode_images(params, padded, config=config)
    side = math.isqrt(total)
    known = (jnp.arange(total) < n).reshape(side, side)
    known = jnp.repeat(jnp.repeat(known, config.downsampling, 0), config.downsampling, 1)
    return Samples(tokens, jnp.where(known[..., None], images, jnp.uint8(128)))


def encode_rows(model: Pretrained, images: np.ndarray, rows: int) -> np.ndarray:
    """Encode the upper part of images as tokens, for `generate(prefix=...)`.

    The encoder sees the entire image, so the tokens carry a little information about the part below
    them.

    Args:
      model: a `Pretrained` with a tokenizer.
      images: float (b, H, W, c) in [-1, 1]; see `aim_jax.data.preprocess`.
      rows: rows of tokens to keep, each `downsampling` pixels high.

    Returns:
      int32 (b, rows * tokens per row).

    Raises:
      ValueError: if no rows, or all rows, would be kept, or the model has no tokenizer.
    """
    if model.vq_config is None or model.vq_params is None:
        raise ValueError(f"{model.name} has no tokenizer.")
    height, width = (size // model.vq_config.downsampling for size in images.shape[1:3])
    if not 0 < rows < height:
        raise ValueError(f"rows={rows}: expected 1 to {height - 1} of {height} rows of tokens.")
    inputs = pad_rows(np.asarray(images), padded_count(len(images)))
    tokens = _encode(model.vq_params, inputs, config=model.vq_config)
    return np.asarray(tokens[: len(images), : rows * width])
