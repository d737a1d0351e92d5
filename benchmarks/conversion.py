"""Conversion of checkpoints of the published sizes: time, peak memory, exactness and a sample.

Example:
  python benchmarks/conversion.py --sizes B,L,XL --work /tmp/conversion

The program writes random weights under the official keys and shapes, with the tokenizer, as one
safetensors file, converts them with aim-jax convert to a model directory and back, compares every
tensor bit by bit, and samples one guided image from the model directory. Each step is a separate
process; its peak resident memory is reported as a multiple of the file size. The exit status is 1
if a tensor differs.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from aim_jax.models import PRESETS, AiMConfig, VQConfig
from aim_jax.weights import convert
from aim_jax.weights.formats.file_names import SAFETENSORS
from aim_jax.weights.formats.files import write_safetensors

ROOT = Path(__file__).resolve().parents[1]
AIM_JAX = ("-m", "aim_jax")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def random_tensor(key: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Return random values with the magnitude of trained weights, so that sampling stays finite."""
    name = key.removesuffix(".weight").rsplit(".", 1)[-1]
    if name == "A_log":
        return np.log(rng.uniform(1, 16, shape)).astype(np.float32)
    if name == "dt_bias":
        return np.log(np.expm1(np.exp(rng.uniform(np.log(1e-3), np.log(0.1), shape))))
    noise = rng.standard_normal(shape, np.float32)
    if len(shape) == 1 and key.endswith(".weight"):  # norms
        return 1 + 0.1 * noise
    fan_in = np.prod(shape[1:], dtype=int) if len(shape) > 1 else shape[0]
    return noise * (0.02 if "embed" in key else fan_in**-0.5)


def random_weights(config: AiMConfig | VQConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Return random float32 weights of a model, by official key."""
    rng = np.random.default_rng(seed)
    shapes = convert.official_shapes(config)
    return {k: random_tensor(k, s, rng).astype(np.float32, copy=False) for k, s in shapes.items()}


def write_random_official(
    path: Path, aim: AiMConfig | None, vq: VQConfig | None, dtype=np.float32, seed: int = 0
) -> None:
    """Write random weights under official keys, one tensor at a time."""
    rng = np.random.default_rng(seed)
    dtype = np.dtype(dtype)
    shapes = {}
    for config in (aim, vq):
        shapes |= convert.official_shapes(config) if config else {}
    tensors = ((key, random_tensor(key, shape, rng).astype(dtype)) for key, shape in shapes.items())
    specs = {key: (shape, dtype) for key, shape in shapes.items()}
    write_safetensors(path, specs, tensors, {"format": "pt"})


def measure(*command) -> tuple[float, int]:
    """Run a program and return its seconds and its peak resident memory in bytes."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(
            f"{' '.join(map(str, command))} ended with status {os.waitstatus_to_exitcode(status)}"
        )
    unit = 1 if sys.platform == "darwin" else 1024
    return time.perf_counter() - start, usage.ru_maxrss * unit


def differences(one: Path, other: Path) -> list[str]:
    """Return the keys whose tensors are not bit-identical, or that only one file has."""
    a = convert.open_weights(one).tensors
    b = convert.open_weights(other).tensors
    different = sorted(a.keys() ^ b.keys())
    for key in a.keys() & b.keys():
        x = np.asarray(a[key])
        y = np.asarray(b[key])
        same = x.dtype == y.dtype and x.shape == y.shape
        if not same or x.tobytes() != y.tobytes():
            different.append(key)
    return different


def run(size: str, dtype: str, work: Path, sample: bool) -> list[str]:
    """Convert a model of one size back and forth, print the figures, and return differences."""
    work.mkdir(parents=True, exist_ok=True)
    source = work / SAFETENSORS
    model = work / "model"
    back = work / "back.safetensors"
    write_random_official(source, PRESETS[size], VQConfig(), DTYPES[dtype])
    total = source.stat().st_size
    print(f"AiM-{size} + VQ-f16, {dtype}: {total / 1e9:.2f} GB", flush=True)
    steps = [
        ("to-jax", [*AIM_JAX, "convert", "to-jax", "--weights", source, "--out", model]),
        ("to-torch", [*AIM_JAX, "convert", "to-torch", "--checkpoint", model, "--out", back]),
    ]
    if sample:
        command = [*AIM_JAX, "sample", "--checkpoint", model, "--classes", "207", "--per_class", 1]
        steps.append(("sample", [*command, "--out", work / "samples"]))
    for name, command in steps:
        seconds, peak = measure(*command)
        print(
            f"  {name:9}{seconds:7.1f} s   peak {peak / 1e9:5.2f} GB = {peak / total:.2f} x the "
            "file",
            flush=True,
        )
    errors = [key for key in differences(source, back) if key != convert.USAGE_HISTORY]
    print(
        f"  round trip: {len(errors)} of {len(convert.open_weights(source).tensors)} tensors differ"
    )
    inferred = convert.infer_aim_config(
        {key: t.shape for key, t in convert.open_weights(source).tensors.items()}
    )
    if inferred != dataclasses.replace(PRESETS[size], position_offset=1):
        errors.append(f"inferred {inferred}")
    return errors


def main(argv=None) -> int:
    """Run the conversions and return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sizes", default="B", help="sizes among B, L, XL, 1B, separated by commas"
    )
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--work", type=Path, required=True, help="directory for the files")
    parser.add_argument("--nosample", action="store_true", help="do not sample an image")
    args = parser.parse_args(argv)
    errors = []
    for size in args.sizes.split(","):
        folder = args.work / f"{size}_{args.dtype}"
        if folder.exists():
            parser.error(f"{folder} already exists; delete it or choose another --work")
        errors += run(size, args.dtype, folder, not args.nosample)
    for line in errors:
        print(line)
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
