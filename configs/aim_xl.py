"""AiM-XL (763M parameters) on ImageNet 256x256 (arXiv 2408.12245, table 2: FID 2.56, IS 257.2).

350 epochs of global batch 2048, 448 million images; learning rate 1e-4 per 256 images, linear
decay, bfloat16. Modelled time (documentation page Training at scale): 122 hours on a v5e-16 (1959
chip hours).

aim-jax train --config aim_xl --workdir runs/aim_xl --config.accumulate=16

The time is modelled with accumulate=16, which fits a v5e-16. For other machines,
aim-jax compile --search finds a value that fits.
"""

from ml_collections import ConfigDict

from aim_jax.configs.defaults import imagenet_recipe


def get_config() -> ConfigDict:
    """Return the configuration."""
    return imagenet_recipe("XL", epochs=350)
