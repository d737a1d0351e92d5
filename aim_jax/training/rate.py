"""Measured speed of training steps on the device at hand."""

import statistics
import time
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from aim_jax.models.captions import condition_shapes
from aim_jax.parallel.sharding import create_sharded, replicate, shard_batch
from aim_jax.training import aim, tokenizer

STEPS = 3  # timed steps, after the first, which compiles


def images_per_second(config: ConfigDict) -> float:
    """Measure how fast a configuration trains, with random data; compiles its training step.

    The median of a few steps counts.

    Raises:
      FileNotFoundError, ValueError: The configuration is invalid, or the weights of LPIPS that it
        needs are missing.
    """
    setup: aim.Setup | tokenizer.Setup
    setup, inputs = _aim(config) if config.stage == "aim" else _tokenizer(config)
    state = create_sharded(setup.new_state, setup.mesh, setup.rules)
    seconds = []
    for _ in range(1 + STEPS):
        start = time.perf_counter()
        state, metrics = setup.train_step(state, *inputs)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    return config.batch_size / statistics.median(seconds[1:])


def _aim(config: ConfigDict) -> tuple[aim.Setup, tuple[Any, ...]]:
    """Return the setup of an AiM, and the inputs of its step beside the state."""
    setup = aim.Setup(config)
    rng = np.random.default_rng(0)
    shape = (config.batch_size, setup.model.num_tokens)
    batch = {"codes": rng.integers(0, setup.model.vocab_size, shape, dtype=np.int32)}
    # Captions of full length, or labels.
    highest = {
        "labels": setup.model.num_classes,
        "captions": max(1, setup.model.caption_vocab),
        "caption_lengths": setup.model.max_caption + 1,
    }
    for name, x in condition_shapes(setup.model, config.batch_size).items():
        batch[name] = rng.integers(0, highest[name], x.shape).astype(x.dtype)
    return setup, (shard_batch(batch, setup.mesh),)


def _tokenizer(config: ConfigDict) -> tuple[tokenizer.Setup, tuple[Any, ...]]:
    """Return the setup of a tokenizer, and the inputs of its step beside the state."""
    setup = tokenizer.Setup(config)
    side = config.data.image_size
    lpips = tokenizer.open_lpips(config.lpips, setup.recipe.losses, side)
    shape = (config.batch_size, side, side, config.data.channels)
    images = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)
    return setup, (shard_batch({"images": images}, setup.mesh), replicate(lpips, setup.mesh))
