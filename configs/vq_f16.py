"""LlamaGen's VQ-f16 on ImageNet at 256 pixels (arXiv 2406.06525, table 1: rFID 2.19, PSNR 20.79).

aim-jax train_vq --config vq_f16 --workdir runs/vq_f16 --data DIR

Needs the weights of LPIPS, in config.lpips or AIM_JAX_LPIPS (documentation page Training a
tokenizer).
"""

from ml_collections import ConfigDict

from aim_jax.configs.defaults import llamagen_recipe


def get_config() -> ConfigDict:
    """Return the configuration."""
    config = llamagen_recipe()
    config.model.update(ch=128, ch_mult=(1, 1, 2, 2, 4))
    return config
