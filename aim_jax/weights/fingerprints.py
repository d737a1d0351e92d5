"""Fingerprints of a model's parameters, which tie evaluation reports to models."""

from collections.abc import Mapping

import jax
import numpy as np

from aim_jax.data import fingerprint
from aim_jax.weights.pretrained import Pretrained


def parameter_fingerprints(model: Pretrained) -> dict[str, str]:
    """Return a `fingerprint` of the parameters of each part that the model has.

    Parameters are compared as float32, so a fingerprint is the same for a model loaded as stored
    and in float32. Configurations are left out: they may gain fields with a new version.

    Returns:
      Hexadecimal SHA-256 by the name of the part, "AiM" and "tokenizer".
    """
    parts = {"AiM": model.aim_params, "tokenizer": model.vq_params}
    return {name: _of_parameters(params) for name, params in parts.items() if params is not None}


def _of_parameters(params: dict) -> str:
    return fingerprint({}, jax.tree.map(lambda x: np.asarray(x, np.float32), params))


def other_parts(measured: Mapping[str, str], model: Pretrained) -> list[str]:
    """Return the names of the parts whose fingerprints differ from those of a model."""
    own = parameter_fingerprints(model)
    return [name for name, value in measured.items() if own.get(name) != value]
