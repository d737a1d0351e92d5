"""Class accuracy of generated images, judged by a classifier trained on real data.

Example:
  python benchmarks/class_accuracy.py --model fashion_mnist --data path/to/fashion_mnist

A small convolutional network is trained on the real training images, and scored on the real test
images and on images that the model generates. The result is printed as one line of JSON.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from flax import linen as nn
from ml_collections import ConfigDict

from aim_jax.cli.common import define_sampling_flags, errors_in_one_line, given_settings
from aim_jax.data import image_batches, open_images
from aim_jax.data.preprocessing import image_spec
from aim_jax.sampling.grids import generate_many
from aim_jax.utils.logging import Progress
from aim_jax.weights.load import load_pretrained

FLAGS = flags.FLAGS
flags.DEFINE_string("model", "fashion_mnist", "Bundled model, model directory or workdir.")
flags.DEFINE_string("data", "", "Directory with the real images.")
flags.DEFINE_integer("per_class", 100, "Generated images per class.", lower_bound=1)
flags.DEFINE_integer("epochs", 3, "Training epochs of the classifier.", lower_bound=1)
flags.DEFINE_integer("seed", 1, "Random seed of classifier and samples.", lower_bound=0)
define_sampling_flags()


class Classifier(nn.Module):
    """Convolutional classifier: three stages with group norm and pooling, then a spatial mean."""

    num_classes: int

    @nn.compact
    def __call__(self, x):
        """Return logits (b, num_classes) of images (b, H, W, c)."""
        for width in (16, 32, 64):
            x = nn.relu(nn.GroupNorm(8)(nn.Conv(width, (3, 3), use_bias=False)(x)))
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.GroupNorm(8)(nn.Conv(64, (3, 3), use_bias=False)(x)))
        return nn.Dense(self.num_classes)(x.mean(axis=(1, 2)))


def train_classifier(source, spec, epochs: int, seed: int, batch_size: int = 128):
    """Train a classifier and return it as a function from images to class ids (b,).

    The images are (b, H, W, c) in [-1, 1].
    """
    model = Classifier(len(source.class_names))
    steps = epochs * len(source) // batch_size
    optimizer = optax.adamw(optax.cosine_onecycle_schedule(steps, 4e-3), weight_decay=0.02)
    shape = (1, spec.image_size, spec.image_size, spec.channels)
    params = model.init(jax.random.key(seed), jnp.zeros(shape))
    opt_state = optimizer.init(params)

    @jax.jit
    def step(params, opt_state, batch):
        def loss(params):
            logits = model.apply(params, batch["images"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean()

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    batches = image_batches(source, spec, batch_size, seed=seed, train=True)
    progress = Progress("training the classifier", "steps")
    for i in range(steps):
        params, opt_state = step(params, opt_state, next(batches))
        progress(i + 1, steps)
    return jax.jit(lambda images: model.apply(params, images).argmax(axis=-1))


def measure():
    """Train the classifier, generate images and print the accuracies."""
    model = load_pretrained(FLAGS.model)
    data = ConfigDict(model.info["data"])
    spec = dataclasses.replace(image_spec(data), random_flip=data.name != "fashion_mnist")
    sources = {s: open_images(data.name, s, FLAGS.data or None) for s in ("train", "test")}
    classify = train_classifier(sources["train"], spec, FLAGS.epochs, FLAGS.seed)

    correct = [
        np.asarray(classify(batch["images"])) == batch["labels"]
        for batch in image_batches(sources["test"], spec, 500, train=False)
    ]
    overrides = {name: value for name, value in given_settings(FLAGS).items() if value is not None}
    labels = np.arange(model.aim_config.num_classes).repeat(FLAGS.per_class)
    parts = generate_many(model, labels, FLAGS.seed, 100, **overrides)
    guesses = np.concatenate([classify(part.astype(np.float32) / 127.5 - 1) for part in parts])
    by_class = (guesses == labels).reshape(-1, FLAGS.per_class).mean(axis=1)
    result = {
        "model": FLAGS.model,
        "real_test_accuracy": round(float(np.concatenate(correct).mean()), 4),
        "generated_accuracy": round(float(by_class.mean()), 4),
        "by_class": dict(zip(model.class_names, by_class.round(3).tolist(), strict=True)),
        "generated": len(labels),
        "sampling": model.sampling | overrides,
        "seed": FLAGS.seed,
    }
    print(json.dumps(result))


def main(_):
    """Run the measurement."""
    with errors_in_one_line():
        measure()


if __name__ == "__main__":
    sys.exit(app.run(main))
