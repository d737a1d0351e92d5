r"""Evaluation with 10,000 images, to compare models on one machine; biased against 50,000.

aim-jax evaluate --config eval --checkpoint cifar10 \
    --reference cifar10:train --inception FILE
"""

from ml_collections import ConfigDict

from aim_jax.configs.defaults import eval_defaults


def get_config() -> ConfigDict:
    """Return the configuration."""
    return eval_defaults()
