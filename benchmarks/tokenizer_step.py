"""Time of the training step of the CIFAR-10 tokenizer with different parts of the loss.

Example:
  python benchmarks/tokenizer_step.py --lpips lpips.safetensors

Every variant takes --steps steps on the same random images; the median is printed.
"""

import argparse
import statistics
import time

import jax
import numpy as np

from aim_jax.configs.cifar10_vq import get_config
from aim_jax.parallel.sharding import create_sharded, shard_batch
from aim_jax.training.tokenizer import Setup
from aim_jax.weights.convert.lpips import load_lpips

# (name, whether only the decoder is trained, weights of LPIPS and of the discriminator)
VARIANTS = (
    ("squared error", False, 0.0, 0.0),
    ("LPIPS and discriminator", False, 1.0, 0.5),
    ("decoder only, squared error", True, 0.0, 0.0),
    ("decoder only, LPIPS", True, 1.0, 0.0),
    ("decoder only, LPIPS and discriminator", True, 1.0, 0.5),
)


def seconds(
    decoder_only: bool, perceptual: float, adversarial: float, lpips: dict, steps: int
) -> float:
    """Measure the median seconds of a step."""
    config = get_config("full")
    config.decoder_only = decoder_only
    config.loss.perceptual = perceptual
    config.loss.adversarial = adversarial
    setup = Setup(config)
    state = create_sharded(setup.new_state, setup.mesh, setup.rules)
    size = (config.batch_size, config.data.image_size, config.data.image_size, 3)
    images = np.random.default_rng(0).uniform(-1, 1, size).astype(np.float32)
    batch = shard_batch({"images": images}, setup.mesh)
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        state, metrics = setup.train_step(state, batch, lpips if perceptual else None)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first step compiles


def main():
    """Time every variant and print the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lpips", required=True, help="weights of LPIPS; see docs/tokenizer.md")
    parser.add_argument("--steps", type=int, default=7, help="timed steps (7)")
    args = parser.parse_args()
    lpips = load_lpips(args.lpips)
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
    for name, decoder_only, perceptual, adversarial in VARIANTS:
        median = seconds(decoder_only, perceptual, adversarial, lpips, args.steps)
        print(f"{name}: {median:.2f} s per step of 32 images", flush=True)


if __name__ == "__main__":
    main()
