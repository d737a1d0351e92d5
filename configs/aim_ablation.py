"""Ablations of AiM-L (arXiv 2408.12245, section 4.3); the variant is named after a colon.

no_position  without position embeddings    adaln_layer   adaLN on every layer ("adaLN-full")
adaln_single one map for all layers         groups_2, groups_4, groups_8   adaLN-Group; 4 is AiM-L
mamba1       Mamba-1 mixers, d_state 16     ema           averaged parameters, decay 0.9999

The paper's FID with guidance (tables 3 and 4): adaLN-single 2.95, adaLN 2.89, adaLN-Group 2.83. Its
3.41 and 3.34, without and with positions, belong to models without adaLN, which this package does
not have: no_position has adaLN-Group and no published figure.

aim-jax train --config aim_ablation:groups_8 --workdir runs/groups_8
"""

from ml_collections import ConfigDict

from aim_jax.configs.defaults import imagenet_recipe

MODEL = {
    "no_position": {"positions": False},
    "adaln_layer": {"adaln": "layer"},
    "adaln_single": {"num_groups": 1},
    "groups_2": {"num_groups": 2},
    "groups_4": {"num_groups": 4},
    "groups_8": {"num_groups": 8},
    # The exact scan of Mamba-1 keeps a state per channel; short chunks limit its memory.
    "mamba1": {"mixer": "mamba1", "d_state": 16, "chunk_size": 32},
    "ema": {},
}


def get_config(variant: str = "groups_4") -> ConfigDict:
    """Return the configuration of one variant."""
    if variant not in MODEL:
        raise ValueError(f"unknown variant {variant!r}; expected one of {', '.join(MODEL)}.")
    config = imagenet_recipe("L", epochs=300)
    config.model.update(MODEL[variant])
    if variant == "ema":
        config.ema_decay = 0.9999
    return config
