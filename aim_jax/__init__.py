"""AiM: autoregressive image generation with Mamba (arXiv 2408.12245), in JAX and Flax.

import aim_jax
images = aim_jax.generate(aim_jax.load_pretrained("cifar10"), labels=[3, 5, 8]).images
"""

from aim_jax.models import PRESETS, AiM, AiMConfig, VQConfig, VQModel, init_cache
from aim_jax.pretrained import Pretrained, load_pretrained, save_model
from aim_jax.sampling import Samples, generate

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "AiM",
    "AiMConfig",
    "Pretrained",
    "Samples",
    "VQConfig",
    "VQModel",
    "generate",
    "init_cache",
    "load_pretrained",
    "save_model",
]
