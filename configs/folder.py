"""AiM on your pictures, whose folder of class folders is named after a colon.

Needs the tokenizer of the recipe folder_vq, in runs/vq or --config.tokenizer. Size and steps are
chosen from what is in the folder, and printed.

aim-jax train --config folder:pictures --workdir runs/aim
"""

from ml_collections import ConfigDict

from aim_jax.configs.from_folder import aim_config


def get_config(directory: str = "") -> ConfigDict:
    return aim_config(directory)
