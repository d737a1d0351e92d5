"""Tokenizer of a model directory: loading, encoding and fingerprint."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from aim_jax.data import fingerprint
from aim_jax.models.vq import VQModel, encoder_params
from aim_jax.parallel.sharding import batch_sharding, make_mesh
from aim_jax.weights.load import load_pretrained
from aim_jax.weights.pretrained import Pretrained


def open_tokenizer(name_or_path: str) -> Pretrained:
    """Load the tokenizer of a model directory.

    Raises:
      ValueError: No model is named, or the directory holds no tokenizer.
    """
    if not name_or_path:
        raise ValueError(
            "config.tokenizer is empty: set it to the model directory of a trained tokenizer "
            "(--config.tokenizer=DIR, made by aim-jax train_vq), or to a bundled model's name."
        )
    tokenizer = load_pretrained(name_or_path)
    tokenizer.vq()  # raises if there is none
    return tokenizer


def local_encoder(tokenizer: Pretrained) -> tuple[Callable[[np.ndarray], jax.Array], int]:
    """Return an encoder on this process's devices, and the number of devices.

    The encoder maps float32 images (b, S, S, C) to tokens (b, t). The devices share every batch, so
    b must be a multiple of their number.
    """
    mesh = make_mesh(devices=jax.local_devices())
    config, params = tokenizer.vq()
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    model = VQModel(config)
    batch = batch_sharding(mesh)
    apply = jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode_to_tokens"))
    return lambda images: apply(params, jax.device_put(images, batch)), mesh.size


def tokenizer_fingerprint(tokenizer: Pretrained) -> str:
    """Return the `fingerprint` of everything that tokens depend on; the decoder is not included."""
    config, params = tokenizer.vq()
    fields = dataclasses.asdict(config)
    for name in ("out_channels", "beta", "entropy_loss_ratio", "dropout"):
        del fields[name]
    return fingerprint(fields, encoder_params(params))
