"""The tokenizer of a model directory: opening, encoding with it, and its fingerprint."""

import dataclasses
from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from aim_jax.data import fingerprint
from aim_jax.models.vq import VQModel, encoder_params
from aim_jax.parallel.sharding import batch_sharding, make_mesh
from aim_jax.weights.pretrained import Pretrained, load_pretrained


def open_tokenizer(name_or_path: str) -> Pretrained:
    """The tokenizer of a model directory.

    Raises:
      ValueError: none was given, or the directory holds no tokenizer.
    """
    if not name_or_path:
        raise ValueError(
            "config.tokenizer is empty: give the model directory of a trained tokenizer "
            "(--config.tokenizer=DIR, made by aim-jax train_vq), or a bundled model's name."
        )
    tokenizer = load_pretrained(name_or_path)
    tokenizer.vq()  # raises where there is none
    return tokenizer


def local_encoder(tokenizer: Pretrained) -> tuple[Callable[[np.ndarray], jax.Array], int]:
    """A function from float32 pictures (b, S, S, C) to codes (b, t), and the number of devices.

    The devices of this process share every batch, so that b is a multiple of their number.
    """
    mesh = make_mesh(devices=jax.local_devices())
    config, params = tokenizer.vq()
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    model = VQModel(config)
    batch = batch_sharding(mesh)
    apply = jax.jit(lambda p, x: model.apply({"params": p}, x, method="encode_to_tokens"))
    return lambda images: apply(params, jax.device_put(images, batch)), mesh.size


def tokenizer_fingerprint(tokenizer: Pretrained) -> str:
    """The `fingerprint` of what codes depend on; decoder and training may be others."""
    config, params = tokenizer.vq()
    fields = dataclasses.asdict(config)
    for name in ("out_channels", "beta", "entropy_loss_ratio", "dropout"):
        del fields[name]
    return fingerprint(fields, encoder_params(params))
