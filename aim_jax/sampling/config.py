"""Sampling settings, which are defined in `models` because model files hold them."""

from aim_jax.models.sampling_config import FIELDS, SCHEDULES, SETTINGS, SamplingConfig, Setting

__all__ = ["FIELDS", "SCHEDULES", "SETTINGS", "SamplingConfig", "Setting"]
