"""Seconds from the start of a process to the first picture, beside PyTorch.

Example:
  python benchmarks/first_image.py --work /tmp/first

Random weights of AiM-B and the f16 tokenizer are written once into --work: an official checkpoint,
and converted from it a model directory. Then one guided picture of 256 x 256 pixels is made by:

  cold      aim-jax sample with an empty cache of compiled code (kernels and XLA programs)
  warm      the same again, with that cache
  official  a program that loads the checkpoint and runs the official step in PyTorch (peers.py)
  tuned     the same with the tuned step

each in a process of its own, one at a time, from its start to the PNG on disk. What the PyTorch
programs spend on importing this library, which they need for nothing but sizes, is taken off.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # wherever the package is installed

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("official", "tuned")
AIM_JAX = ("-m", "aim_jax")


def prepare(work: Path) -> tuple[Path, Path]:
    """The official checkpoint and the model directory, made if they are not there."""
    from aim_jax.models import PRESETS, VQConfig
    from benchmarks.conversion import write_random_official

    source, model = work / "official.safetensors", work / "model"
    if not model.exists():
        work.mkdir(parents=True, exist_ok=True)
        write_random_official(source, PRESETS["B"], VQConfig())
        command = [*AIM_JAX, "convert", "to-jax", "--weights", source, "--out", model]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return source, model


def measure(command: list, cache: Path | None = None) -> float:
    """Seconds that a program of this repository takes, less what it says to take off."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"}
    environment |= {"XDG_CACHE_HOME": str(cache)} if cache else {}
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=environment, check=True,
        capture_output=True, text=True,
    )  # fmt: skip
    took = time.perf_counter() - start
    off = [line for line in done.stdout.splitlines() if line.startswith("off ")]
    return took - (float(off[0].split()[1]) if off else 0.0)


def run_peer(name: str, source: Path, out: Path) -> None:
    """The first picture by PyTorch, in this process."""
    start = time.perf_counter()
    from aim_jax.models import PRESETS, VQConfig

    imported = time.perf_counter() - start
    import torch
    from PIL import Image
    from safetensors.torch import load_file

    from benchmarks import peers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    weights, config = load_file(source), PRESETS["B"]
    kind = {"official": peers.OfficialAiM, "tuned": peers.TunedAiM}[name]
    decoder = kind(weights, config, peers.with_null([207], config.num_classes))
    codes = peers.generate(decoder, config.num_tokens)
    pixels = peers.VQDecoder(weights, VQConfig(), torch.channels_last)(codes)[0]
    pixels = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte()
    Image.fromarray(pixels.numpy()).save(out)
    print("off", imported)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="directory for weights (1.4 GB)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write all results as JSON")
    parser.add_argument("--peer", choices=PEERS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.peer:
        run_peer(args.peer, args.work / "official.safetensors", args.work / f"{args.peer}.png")
        return 0
    from benchmarks.decode_cpu import surroundings

    print(json.dumps(around := surroundings()))
    _, model = prepare(args.work)
    command = [*AIM_JAX, "sample", "--checkpoint", model, "--classes", "207", "--per_class", "1"]
    command += ["--out", args.work / "samples"]
    results = {}
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory() as cache:
            jobs = [(name, command, Path(cache)) for name in ("cold", "warm")]
            jobs += [
                (name, ["benchmarks/first_image.py", "--work", args.work, "--peer", name], None)
                for name in PEERS
            ]
            for name, job, where in jobs:
                results.setdefault(name, []).append(measure(job, where))
                print(f"round {number + 1}  {name:9}{results[name][-1]:7.1f} s", flush=True)
    if args.out:
        args.out.write_text(json.dumps({"machine": around, "results": results}, indent=1) + "\n")
    print("  ".join(f"{name} {statistics.median(took):.1f} s" for name, took in results.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
