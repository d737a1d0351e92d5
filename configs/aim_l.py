"""AiM-L (350M parameters) on ImageNet 256x256 (arXiv 2408.12245, table 2: FID 2.83, IS 244.6).

300 epochs of global batch 2048, 384 million images; learning rate 1e-4 per 256 images, linear
decay, bfloat16. Modelled time (the page Training at scale): 44 hours on a v5e-16 (707 chip hours).

aim-jax train --config aim_l --workdir runs/aim_l --config.accumulate=8

accumulate=8 fits there, and is what that time is modelled with; aim-jax compile
--search finds one that fits other machines.
"""

from ml_collections import ConfigDict

from aim_jax.configs.defaults import imagenet_recipe


def get_config() -> ConfigDict:
    return imagenet_recipe("L", epochs=300)
