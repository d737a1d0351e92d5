"""Tokenizer f4 on ImageNet at 256 pixels, 8192 entries, with the recipe of LlamaGen's f8 and f16.

aim-jax train_vq --config vq_f4 --workdir runs/vq_f4 --data DIR

Needs the weights of LPIPS, in config.lpips or AIM_JAX_LPIPS (documentation page Training a
tokenizer).
"""

from ml_collections import ConfigDict

from aim_jax.configs.defaults import llamagen_recipe


def get_config() -> ConfigDict:
    """Return the configuration."""
    config = llamagen_recipe()
    config.model.update(ch=128, ch_mult=(1, 2, 4), n_embed=8192)
    return config
