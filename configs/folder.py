"""AiM on your images, in a folder that is named after a colon.

The folder holds class folders, or captioned images for a text-to-image model. Needs the tokenizer
of the recipe folder_vq, in runs/vq or --config.tokenizer. Model size and steps are chosen from the
content of the folder, and printed.

aim-jax train --config folder:images --workdir runs/aim
"""

from ml_collections import ConfigDict

from aim_jax.configs.from_folder import aim_config


def get_config(directory: str = "") -> ConfigDict:
    """Return the configuration for a folder of class folders or captioned images."""
    return aim_config(directory)
