r"""Evaluation as published for ImageNet at 256 pixels (arXiv 2408.12245, table 2): 50,000 images.

aim-jax evaluate --config eval_imagenet --checkpoint models/aim_b \
    --reference VIRTUAL_imagenet256_labeled.npz --inception FILE

The reference comes from the ADM evaluator: the statistics of the complete training set, and 10,000
images. Published FID: 3.52 (B), 2.83 (L), 2.56 (XL), 2.21 (1B). aim-jax sweep searches for the
guidance that suits a model.
"""

from ml_collections import ConfigDict

from aim_jax.configs.defaults import eval_defaults


def get_config() -> ConfigDict:
    """Return the configuration."""
    config = eval_defaults()
    config.num_samples = 50_000
    config.neighbour_images = 50_000
    return config
