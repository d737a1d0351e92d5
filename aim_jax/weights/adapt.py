"""Adaptation of trained weights to a model with other classes, image sizes or adaLN maps."""

import dataclasses
import math

import jax
import numpy as np

from aim_jax.models.config import AiMConfig, VQConfig
from aim_jax.models.layers import group_to_layer, layer_to_group

# What two models must share for the weights of one to mean anything in the other.
AIM_SHAPE = (
    "vocab_size", "d_model", "n_layer", "mixer", "d_state", "d_conv", "expand",
    "headdim", "ngroups", "mlp_hidden", "positions", "condition", "caption_vocab",
    "caption_features",
)  # fmt: skip
VQ_SHAPE = (
    "in_channels", "out_channels", "ch", "ch_mult", "num_res_blocks", "z_channels", "embed_dim",
    "n_embed", "l2_norm",
)  # fmt: skip


def check_same(
    source: AiMConfig | VQConfig, target: AiMConfig | VQConfig, names: tuple[str, ...]
) -> None:
    """Raise ValueError naming every field in which two configurations differ."""
    wrong = [
        f"{name}: {getattr(source, name)} in the weights, {getattr(target, name)} in the model"
        for name in names
        if getattr(source, name) != getattr(target, name)
    ]
    if wrong:
        raise ValueError(f"the weights do not fit the model to train: {'; '.join(wrong)}.")


def rearrange_adaln(
    params: dict, config: AiMConfig, adaln: str, num_groups: int = 1
) -> tuple[dict, AiMConfig, float]:
    """Convert an AiM to another adaLN arrangement.

    Some conversions keep every output: from groups to one map per layer, and to groups whose layers
    already share one map (adaLN-single to any number of groups, or n groups to a multiple of n).
    Any other conversion takes the nearest shared maps and changes the model; see `layer_to_group`.

    Args:
      params: Parameters of the model, as NumPy arrays.
      config: Configuration of the model.
      adaln: "layer" or "group".
      num_groups: Number of groups for "group"; 1 is adaLN-single.

    Returns:
      The new parameters, their configuration, and the relative error of the maps (0 means equal
      outputs).

    Raises:
      ValueError: The arrangement is unknown, or there are more groups than layers.
    """
    target = dataclasses.replace(
        config, adaln=adaln, num_groups=num_groups if adaln == "group" else 1
    )
    if target.num_groups > config.n_layer:
        raise ValueError(
            f"{num_groups} adaLN groups for {config.n_layer} layers; use at most one per layer."
        )
    if (config.adaln, config.num_groups) == (target.adaln, target.num_groups):
        return params, config, 0.0
    weights = params["adaln"]
    error = 0.0
    if config.adaln == "group":
        weights = group_to_layer(weights)
    if adaln == "group":
        weights, error = layer_to_group(weights, num_groups)
    return params | {"adaln": weights}, target, error


def adapt_aim(params: dict, source: AiMConfig, target: AiMConfig) -> tuple[dict, list[str]]:
    """Convert the weights of `source` into initial weights for training `target`.

    Args:
      params: Parameters of `source`, as NumPy arrays.
      source, target: They may differ in the number of classes and of tokens, the adaLN arrangement,
        and all fields that do not affect the shape of a parameter.

    Returns:
      Parameters of `target`, and a line for each change to the weights. If the number of classes
      differs, every class starts as the null class: the model is unconditional at first, and learns
      the contribution of each class. If the number of tokens differs, positions are interpolated;
      see `resized_positions`.

    Raises:
      ValueError: The two differ in fields that must agree; the message names them.
    """
    check_same(source, target, AIM_SHAPE)
    notes = []
    params, _, error = rearrange_adaln(params, source, target.adaln, target.num_groups)
    if (source.adaln, source.num_groups) != (target.adaln, target.num_groups):
        effect = f"nearest maps, relative error {error:.3g}" if error else "equal outputs"
        notes.append(f"adaLN {_name(source)} -> {_name(target)}: {effect}")
    if source.num_classes != target.num_classes:
        table = np.asarray(params["class_embedding"]["table"]["embedding"])
        null = np.repeat(table[-1:], target.num_classes + 1, axis=0)
        params = params | {"class_embedding": {"table": {"embedding": null}}}
        notes.append(
            f"{source.num_classes} -> {target.num_classes} classes: each starts as the null class"
        )
    if source.num_tokens != target.num_tokens:
        if source.positions:
            table = np.asarray(params["position_embedding"]["embedding"])
            table = resized_positions(table, target.num_tokens, target.position_offset)
            params = params | {"position_embedding": {"embedding": table}}
        sides = (
            f"{math.sqrt(c.num_tokens):g} x {math.sqrt(c.num_tokens):g}" for c in (source, target)
        )
        notes.append(f"positions {' -> '.join(sides)}: interpolated")
    return params, notes


def resized_positions(table: np.ndarray, num_tokens: int, offset: int) -> np.ndarray:
    """Interpolate the position embeddings of a square grid of tokens for a grid of another size.

    The rows of the grid are resized as an image by cubic interpolation, as is usual for position
    embeddings of transformers (arXiv 2010.11929, section 3.2). The one row that belongs to no token
    is kept.

    Args:
      table: (t + 1, d), rows of the embedding.
      num_tokens: Tokens of the new grid.
      offset: Row of the first token, 0 or 1; see `AiMConfig.position_offset`.

    Returns:
      (num_tokens + 1, d), in the dtype of `table`.

    Raises:
      ValueError: A grid is not square.
    """
    count, width = len(table) - 1, table.shape[1]
    old, new = math.isqrt(count), math.isqrt(num_tokens)
    for side, tokens in ((old, count), (new, num_tokens)):
        if side * side != tokens:
            raise ValueError(f"positions of {tokens} tokens are no square grid to interpolate.")
    rows = np.asarray(table[offset : offset + count], np.float32).reshape(old, old, width)
    grid = np.asarray(jax.image.resize(rows, (new, new, width), "cubic", antialias=False))
    other = table[-1:] if offset == 0 else table[:1]
    parts = [grid.reshape(num_tokens, width).astype(table.dtype), other]
    return np.concatenate(parts if offset == 0 else parts[::-1])


def _name(config: AiMConfig) -> str:
    return "per layer" if config.adaln == "layer" else f"in {config.num_groups} group(s)"
