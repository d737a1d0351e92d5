"""A tokenizer for your pictures, whose folder of class folders is named after a colon.

Size, channels, codes and steps are chosen from what is in it, and printed; every field can be
overridden as always.

aim-jax train_vq --config folder_vq:pictures --workdir runs/vq
"""

from ml_collections import ConfigDict

from aim_jax.configs.from_folder import vq_config


def get_config(directory: str = "") -> ConfigDict:
    return vq_config(directory)
