"""Evaluates a model as one of several processes, with cheap features; for test_distributed.py.

python -m tests.scoring MODEL PICTURES OUT --coordinator ...
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from aim_jax.configs.defaults import eval_defaults
from aim_jax.evaluation import evaluate
from aim_jax.models import inception
from aim_jax.parallel import processes
from aim_jax.weights.load import load_pretrained


def features(params, images):
    """Waves over the pixels in place of the network, which has tests of its own."""
    x = images.reshape(len(images), -1).astype(jnp.float32) / 255

    def waves(count):
        frequencies = jnp.sin(jnp.arange(x.shape[1] * count, dtype=jnp.float32))
        return jnp.sin(x @ frequencies.reshape(-1, count))

    counts = (inception.NUM_FEATURES, inception.NUM_SPATIAL, inception.NUM_CLASSES)
    return inception.Features(*map(waves, counts))


def distance(a, b):
    """Of means and variances alone: the distance of Fréchet would take seconds each time."""
    variances = np.diag(a.covariance - b.covariance)
    return float(np.square(a.mean - b.mean).sum() + np.abs(variances).sum())


def main(arguments):
    processes.initialize_from(flags.FLAGS)
    inception.extract = jax.jit(features)
    evaluate.frechet_distance = distance
    model, pictures, out = arguments[1:]
    config = eval_defaults()
    config.num_samples, config.batch_size, config.seed, config.neighbour_images = 70, 8, 3, 40
    config.data.update(image_size=4, channels=1)
    for name, reconstructions in (("samples", False), ("reconstructions", True)):
        evaluate.evaluate(
            load_pretrained(model), "", f"{pictures}:train", {"softmax": {}}, config,
            Path(out) / name, Path(out) / "cache", reconstructions,
        )  # fmt: skip


if __name__ == "__main__":
    processes.define_flags()
    sys.exit(app.run(main))
