"""Weights of one model as the start of another: other classes, another adaLN arrangement."""

import dataclasses

import numpy as np

from aim_jax.models.config import AiMConfig, VQConfig
from aim_jax.models.layers import group_to_layer, layer_to_group

# What two models must share for the weights of one to mean anything in the other.
AIM_SHAPE = (
    "vocab_size", "num_tokens", "d_model", "n_layer", "mixer", "d_state", "d_conv", "expand",
    "headdim", "ngroups", "mlp_hidden", "positions",
)  # fmt: skip
VQ_SHAPE = (
    "in_channels", "out_channels", "ch", "ch_mult", "num_res_blocks", "z_channels", "embed_dim",
    "n_embed", "l2_norm",
)  # fmt: skip


def check_same(
    source: AiMConfig | VQConfig, target: AiMConfig | VQConfig, names: tuple[str, ...]
) -> None:
    """Raises ValueError naming every field in which two configurations differ."""
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
    """An AiM with another adaLN arrangement.

    Grouped -> per layer keeps every output, as does a step to groups whose layers share one map
    already (adaLN-single -> any number of groups, or n groups -> a multiple of n). Any other step
    takes the nearest shared maps and changes the model: see `layer_to_group`.

    Args:
      params: parameters of the model, as NumPy arrays.
      config: its shape.
      adaln: "layer" or "group".
      num_groups: for "group"; 1 is adaLN-single.

    Returns:
      New parameters, their shape, and the relative error of the maps (0: equal outputs).

    Raises:
      ValueError: an unknown arrangement, or more groups than layers.
    """
    target = dataclasses.replace(
        config, adaln=adaln, num_groups=num_groups if adaln == "group" else 1
    )
    if target.num_groups > config.n_layer:
        raise ValueError(f"{num_groups} adaLN groups for {config.n_layer} layers; expected fewer.")
    if (config.adaln, config.num_groups) == (target.adaln, target.num_groups):
        return params, config, 0.0
    weights, error = params["adaln"], 0.0
    if config.adaln == "group":
        weights = group_to_layer(weights)
    if adaln == "group":
        weights, error = layer_to_group(weights, num_groups)
    return params | {"adaln": weights}, target, error


def adapt_aim(params: dict, source: AiMConfig, target: AiMConfig) -> tuple[dict, list[str]]:
    """The weights of `source` as a start for training `target`.

    Args:
      params: parameters of `source`, as NumPy arrays.
      source, target: they may differ in the number of classes, in the adaLN arrangement, and in
        everything that does not change the shape of a parameter.

    Returns:
      Parameters of `target`, and a line for each thing that is not simply taken over. Where the
      number of classes differs, every class starts as the null class: the model is unconditional
      at first, and learns what each class adds.

    Raises:
      ValueError: naming every field in which the two differ and may not.
    """
    check_same(source, target, AIM_SHAPE)
    notes = []
    params, _, error = rearrange_adaln(params, source, target.adaln, target.num_groups)
    if (source.adaln, source.num_groups) != (target.adaln, target.num_groups):
        how = f"nearest maps, relative error {error:.3g}" if error else "equal outputs"
        notes.append(f"adaLN {_name(source)} -> {_name(target)}: {how}")
    if source.num_classes != target.num_classes:
        table = np.asarray(params["class_embedding"]["table"]["embedding"])
        null = np.repeat(table[-1:], target.num_classes + 1, axis=0)
        params = params | {"class_embedding": {"table": {"embedding": null}}}
        notes.append(
            f"{source.num_classes} -> {target.num_classes} classes: each starts as the null class"
        )
    return params, notes


def _name(config: AiMConfig) -> str:
    return "per layer" if config.adaln == "layer" else f"in {config.num_groups} group(s)"
