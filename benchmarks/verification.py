"""Time for which a model directory is verified when it is loaded.

Example:
  python benchmarks/verification.py --size XL --dtype float32

The program writes a directory with random parameters of a preset, and loads it in turn with and
without the check of its SHA-256; its files are in the system's cache by then. It prints the medians
over --repeats, and the rate and the time of a processor core of the check alone.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from aim_jax.models import PRESETS
from aim_jax.models.aim import param_shapes
from aim_jax.utils.checksums import sha256
from aim_jax.weights.directories import EXPORT_DTYPES, save_model
from aim_jax.weights.load import load_pretrained
from aim_jax.weights.pretrained import Pretrained


def random_model(size: str) -> Pretrained:
    """Return an AiM of random float32 values, which cannot be compressed."""
    config = PRESETS[size]
    rng = np.random.default_rng(0)
    shapes = param_shapes(config)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)
    return Pretrained(f"AiM-{size}", aim_config=config, aim_params=params)


def seconds_of_loading(path: Path, verify: bool) -> float:
    """Return the seconds in which a directory is loaded as stored."""
    start = time.perf_counter()
    load_pretrained(path, as_stored=True, verify=verify)
    return time.perf_counter() - start


def main():
    """Load repeatedly and print the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", default="B", choices=PRESETS, help="size of the model")
    parser.add_argument("--dtype", default="float32", choices=EXPORT_DTYPES, help="as stored")
    parser.add_argument("--out", type=Path, help="directory to write to (default: temporary)")
    parser.add_argument("--repeats", type=int, default=3, help="number of loads (3)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.out) as work:
        path = save_model(Path(work) / "model", random_model(args.size), args.dtype)
        files = [file for file in path.rglob("*") if file.is_file()]
        size = sum(file.stat().st_size for file in files)
        plain, verified, alone, cores = [], [], [], []
        for _ in range(args.repeats):
            plain.append(seconds_of_loading(path, False))
            verified.append(seconds_of_loading(path, True))
            start, core = time.perf_counter(), time.process_time()
            sha256(files)
            alone.append(time.perf_counter() - start)
            cores.append(time.process_time() - core)
    medians = (statistics.median(times) for times in (plain, verified, alone, cores))
    unverified, whole, check, core = medians
    print(
        f"AiM-{args.size}, {args.dtype}: {size / 1e9:.2f} GB in {len(files)} files; loaded in "
        f"{unverified:.1f} s, verified and loaded in {whole:.1f} s; the check alone takes "
        f"{check:.1f} s ({size / check / 1e9:.2f} GB/s) and {core:.1f} s of a core"
    )


if __name__ == "__main__":
    main()
