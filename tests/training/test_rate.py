"""Measured training rates."""

import dataclasses

import pytest

from aim_jax.configs.defaults import aim_defaults, vq_defaults
from aim_jax.training.rate import images_per_second
from tests.conftest import TINY_AIM


def test_rate_of_a_tiny_aim_is_measured():
    config = aim_defaults()
    config.batch_size = 8
    config.model.update(dataclasses.asdict(TINY_AIM))
    assert images_per_second(config) > 0


def test_missing_lpips_is_said_before_anything_compiles(monkeypatch):
    monkeypatch.delenv("AIM_JAX_LPIPS", raising=False)
    config = vq_defaults()
    config.batch_size = 8
    config.model.update(ch=32, ch_mult=(1, 1))
    config.data.image_size = 32
    config.loss.perceptual = 1.0
    with pytest.raises(ValueError, match="needs the weights of LPIPS"):
        images_per_second(config)
