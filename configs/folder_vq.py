"""Tokenizer for your images, in a folder that is named after a colon.

Image size, channels, codebook size and steps are chosen from the content of the folder, and
printed. Every field can be overridden, as in other recipes.

aim-jax train_vq --config folder_vq:images --workdir runs/vq
"""

from ml_collections import ConfigDict

from aim_jax.configs.from_folder import vq_config


def get_config(directory: str = "") -> ConfigDict:
    """Return the configuration for a folder of class folders or captioned images."""
    return vq_config(directory)
