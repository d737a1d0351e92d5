"""Flax modules: the AiM stack, its two mixers, and the VQ tokenizer."""

from aim_jax.models.aim import PRESETS, AiM, AiMConfig, init_cache
from aim_jax.models.vq import VQConfig, VQModel

__all__ = ["PRESETS", "AiM", "AiMConfig", "VQConfig", "VQModel", "init_cache"]
