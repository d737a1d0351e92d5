"""AiM-L (350M parameters) on ImageNet 256x256 (arXiv 2408.12245, table 2: FID 2.83, IS 244.6).

300 epochs of global batch 2048, 384 million images; learning rate 1e-4 per 256 images, linear
decay, bfloat16. Modelled time (documentation page Training at scale): 44 hours on a v5e-16 (707
chip hours).

aim-jax train --config aim_l --workdir runs/aim_l --config.accumulate=8

The time is modelled with accumulate=8, which fits a v5e-16. For other machines,
aim-jax compile --search finds a value that fits.
"""

from ml_collections import ConfigDict

from aim_jax.configs.defaults import imagenet_recipe


def get_config() -> ConfigDict:
    """Return the configuration."""
    return imagenet_recipe("L", epochs=300)
