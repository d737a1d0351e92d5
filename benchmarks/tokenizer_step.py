"""Times the training step of the CIFAR-10 tokenizer, part by part of what it is trained with.

Example:
  python benchmarks/tokenizer_step.py --lpips lpips.safetensors

Every variant takes --steps steps on the same random pictures; printed is the median.
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

# (name, whether the decoder alone is trained, weights of LPIPS and of the discriminator)
VARIANTS = (
    ("squared error", False, 0.0, 0.0),
    ("LPIPS and discriminator", False, 1.0, 0.5),
    ("decoder alone, squared error", True, 0.0, 0.0),
    ("decoder alone, LPIPS", True, 1.0, 0.0),
    ("decoder alone, LPIPS and discriminator", True, 1.0, 0.5),
)


def seconds(
    decoder_only: bool, perceptual: float, adversarial: float, lpips: dict, steps: int
) -> float:
    """Of one step, the median."""
    config = get_config("full")
    config.decoder_only = decoder_only
    config.loss.perceptual, config.loss.adversarial = perceptual, adversarial
    setup = Setup(config)
    state = create_sharded(setup.new_state, setup.mesh, setup.rules)
    size = (config.batch_size, config.data.image_size, config.data.image_size, 3)
    images = np.random.default_rng(0).uniform(-1, 1, size).astype(np.float32)
    batch = shard_batch({"images": images}, setup.mesh)
    taken = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        state, metrics = setup.train_step(state, batch, lpips if perceptual else None)
        jax.block_until_ready(metrics)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])  # the first one compiles


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--lpips", required=True, help="weights, see docs/tokenizer.md")
    parser.add_argument("--steps", type=int, default=7)
    args = parser.parse_args()
    lpips = load_lpips(args.lpips)
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
    for name, decoder_only, perceptual, adversarial in VARIANTS:
        found = seconds(decoder_only, perceptual, adversarial, lpips, args.steps)
        print(f"{name}: {found:.2f} s per step of 32 pictures", flush=True)


if __name__ == "__main__":
    main()
