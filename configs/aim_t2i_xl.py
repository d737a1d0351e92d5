"""AiM-XL (789M parameters) from captions at 256x256, on images in WebDataset.

The paper leaves text to image as future work, so there is no published result; not trained here.
The length is that of 30 passes over 12 million pairs in batches of 1024. aim_t2i_b names the
commands that make the text tokenizer and the tokens.

aim-jax train --config aim_t2i_xl --workdir runs/aim_t2i_xl --config.accumulate=16
"""

from ml_collections import ConfigDict

from aim_jax.configs.defaults import text_recipe


def get_config() -> ConfigDict:
    """Return the configuration."""
    return text_recipe("XL", steps=351_000)
