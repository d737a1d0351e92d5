"""Time for which saving a checkpoint delays the next step of a training run.

Example:
  python benchmarks/save_stall.py --size B

The state of a training run (parameters, both moments, average) is saved as in the training loop: it
is copied from the devices, then written in the background. The program prints the size of the
checkpoint, the seconds until the loop continues, and the seconds until the checkpoint is complete,
as medians over --repeats saves.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp

from aim_jax.configs.defaults import imagenet_recipe
from aim_jax.data.loader import Prefetched
from aim_jax.models import PRESETS
from aim_jax.parallel.sharding import create_sharded
from aim_jax.training.aim import Setup
from aim_jax.training.checkpoint import RunCheckpoints


def noisy(x: jax.Array) -> jax.Array:
    """Replace floating-point values by random numbers, because zeros are written faster."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    return jax.device_put(jax.random.normal(jax.random.key(x.size), x.shape, x.dtype), x.sharding)


def measure(state, iterator, workdir: Path) -> tuple[float, float]:
    """Measure the seconds until the run continues, and until the checkpoint is complete."""
    checkpoints = RunCheckpoints(workdir, keep=1)
    start = time.perf_counter()
    checkpoints.save(1, state, iterator)
    stalled = time.perf_counter() - start
    checkpoints.wait()
    complete = time.perf_counter() - start
    checkpoints.close()
    return stalled, complete


def main():
    """Save repeatedly and print the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="B", choices=PRESETS, help="size of the model")
    parser.add_argument(
        "--out", type=Path, help="directory to write to (default: the temporary directory)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="number of saves (3)")
    args = parser.parse_args()
    setup = Setup(imagenet_recipe(args.size, epochs=300))
    state = jax.tree.map(noisy, create_sharded(setup.new_state, setup.mesh, setup.rules))
    jax.block_until_ready(state)
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    iterator = Prefetched(grain.MapDataset.range(1), threads=1)
    times = []
    for repeat in range(args.repeats):
        print(f"save {repeat + 1} of {args.repeats}", flush=True)
        with tempfile.TemporaryDirectory(dir=args.out) as workdir:
            times.append(measure(state, iterator, Path(workdir)))
    stalled, complete = map(statistics.median, zip(*times, strict=True))
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    print(
        f"AiM-{args.size} on {device}: {size / 1e9:.2f} GB; the run continues after "
        f"{stalled:.2f} s, the checkpoint is complete after {complete:.2f} s"
    )


if __name__ == "__main__":
    main()
