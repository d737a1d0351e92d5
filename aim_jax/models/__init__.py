"""Flax modules and configurations of AiM, its Mamba mixers, the VQ tokenizer and the metrics."""

from aim_jax.models.aim import AiM, init_cache
from aim_jax.models.config import PRESETS, AiMConfig, VQConfig
from aim_jax.models.vq import VQModel

__all__ = ["PRESETS", "AiM", "AiMConfig", "VQConfig", "VQModel", "init_cache"]
