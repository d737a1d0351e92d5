"""Measured speed of training steps on the device at hand."""

import statistics
import time

import jax
import numpy as np
from ml_collections import ConfigDict

from aim_jax.parallel.sharding import create_sharded, replicate, shard_batch
from aim_jax.training import aim, tokenizer
from aim_jax.training.state import TrainState

STEPS = 3  # timed steps, after the first, which compiles


def images_per_second(config: ConfigDict) -> float:
    """Measure how fast a configuration trains, with random data; compiles its training step.

    The median of a few steps counts.

    Raises:
      FileNotFoundError, ValueError: The configuration is invalid, or the weights of LPIPS that it
        needs are missing.
    """
    rng = np.random.default_rng(0)
    if config.stage == "aim":
        setup = aim.Setup(config)
        shape = (config.batch_size, setup.model.num_tokens)
        batch = {
            "codes": rng.integers(0, setup.model.vocab_size, shape, dtype=np.int32),
            "labels": rng.integers(0, setup.model.num_classes, shape[:1], dtype=np.int32),
        }
        extra: tuple = ()
    else:
        setup = tokenizer.Setup(config)
        side = config.data.image_size
        shape = (config.batch_size, side, side, config.data.channels)
        batch = {"images": rng.uniform(-1, 1, shape).astype(np.float32)}
        lpips = tokenizer.open_lpips(config.lpips, setup.recipe.losses, side)
        extra = (replicate(lpips, setup.mesh),)
    state: TrainState = create_sharded(setup.new_state, setup.mesh, setup.rules)
    batch = shard_batch(batch, setup.mesh)
    seconds = []
    for _ in range(1 + STEPS):
        start = time.perf_counter()
        state, metrics = setup.train_step(state, batch, *extra)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - start)
    return config.batch_size / statistics.median(seconds[1:])
