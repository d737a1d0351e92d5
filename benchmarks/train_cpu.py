"""Time of a training step of AiM-B on a CPU, beside PyTorch with the official mathematics.

Example:
  python benchmarks/train_cpu.py --batch 4 --rounds 3

A step is forward, backward, clipping and AdamW on the same weights and batch. The contestants run
in turns, each in a separate process; the table shows medians over the rounds. First, a small model
of the same width takes two steps with each contestant, and losses and gradient norms must agree.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from aim_jax.models import PRESETS, AiMConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # find benchmarks/ from anywhere

ROOT = Path(__file__).resolve().parents[1]

# Contestants: changes of our model configuration, and tokens per chunk of PyTorch.
OURS = {
    "ours": {},
    "ours, chunk 256": {"chunk_size": 256},
    "ours, chunk 128": {"chunk_size": 128},
    "ours, unrolled": {"chunk_size": 128, "scan_unroll": 24},
    "ours, unrolled, bfloat16": {
        "chunk_size": 128,
        "scan_unroll": 24,
        "compute_dtype": "bfloat16",
    },
    "ours, remat dots": {"remat": "dots"},
    "ours, logits_chunk 32": {"logits_chunk": 32},
}
PEERS = {"torch, official": 256, "torch, chunk 64": 64}


def batch_of(config: AiMConfig, size: int) -> dict[str, np.ndarray]:
    """Return a batch of random tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (size, config.num_tokens)).astype(np.int32)
    return {"codes": tokens, "labels": (np.arange(size) % config.num_classes).astype(np.int32)}


def our_steps(model: AiMConfig, batch: int):
    """Train with this library, yielding (loss, gradient norm) of each step without end."""
    import jax

    from aim_jax.configs.defaults import aim_defaults
    from aim_jax.training import aim as train
    from aim_jax.training import loop
    from aim_jax.weights import convert
    from benchmarks.conversion import random_weights

    config = aim_defaults()
    config.batch_size = batch
    config.optimizer.schedule = "constant"
    config.model.update(dataclasses.asdict(model))
    setup = train.Setup(config, jax.devices()[:1])
    state = train.create_sharded(setup.new_state, setup.mesh, setup.rules)
    state = state.with_params(convert.convert_aim(random_weights(model), model))
    data = loop.shard_batch(batch_of(model, batch), setup.mesh)
    while True:
        state, metrics = setup.train_step(state, data)
        yield float(metrics["loss"]), float(metrics["grad_norm"])


def their_steps(model: AiMConfig, batch: int, chunk: int):
    """Train with PyTorch, yielding (loss, gradient norm) of each step without end."""
    from benchmarks.conversion import random_weights
    from benchmarks.train_peer import Trainer

    peer = Trainer(random_weights(model), model, chunk)
    data = batch_of(model, batch)
    while True:
        yield peer.step(data["codes"], data["labels"])


def steps_of(name: str, model: AiMConfig, batch: int):
    """Return the steps of a contestant."""
    if name in PEERS:
        return their_steps(model, batch, PEERS[name])
    return our_steps(dataclasses.replace(model, **OURS[name]), batch)


def without_dropout(model: AiMConfig) -> AiMConfig:
    """Return the configuration without class dropout."""
    return dataclasses.replace(model, class_dropout=0.0)


def check(name: str) -> dict:
    """Return loss and gradient norm of two steps of a model with two layers."""
    model = dataclasses.replace(without_dropout(PRESETS["B"]), n_layer=2, vocab_size=512)
    changed = dict(OURS.get(name, {}))
    if "scan_unroll" in changed:
        changed["scan_unroll"] = model.n_layer
    steps = (
        their_steps(model, 2, PEERS[name])
        if name in PEERS
        else our_steps(dataclasses.replace(model, **changed), 2)
    )
    return {"steps": [next(steps) for _ in range(2)]}


def measure(name: str, batch: int, count: int) -> dict:
    """Measure the seconds of `count` steps after a first one, and the peak memory in GB."""
    import resource

    steps = steps_of(name, without_dropout(PRESETS["B"]), batch)
    next(steps)
    times = []
    for _ in range(count):
        start = time.perf_counter()
        next(steps)
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": times, "GB": peak / 1e9}


def gemm_flops() -> float:
    """Measure FLOP/s of float32 matrix products in PyTorch, the best of eight."""
    import torch

    a = torch.randn(2048, 2048)
    b = torch.randn(2048, 2048)
    best = np.inf
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * 2048**3 / best


def child(*options: str) -> dict:
    """Run this program in another process and return its result."""
    command = [sys.executable, "-m", "benchmarks.train_cpu", *options]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ)
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{process.stderr[-3000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def main():
    """Check the contestants, time them, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=4, help="images per step (4)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds over all contestants (3)")
    parser.add_argument("--steps", type=int, default=2, help="timed steps per round (2)")
    parser.add_argument("--only", default="", help="contestants, separated by ; (all)")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, _, name = args.child.partition(":")
        if kind == "gemm":
            print(json.dumps({"flops": gemm_flops()}))
        else:
            result = check(name) if kind == "check" else measure(name, args.batch, args.steps)
            print(json.dumps(result))
        return

    from aim_jax.perf.flops import training_flops

    names = args.only.split(";") if args.only else [*OURS, *PEERS]
    reference = None
    for name in names:
        steps = child("--child", f"check:{name}")["steps"]
        reference = reference or steps
        tolerance = 0.02 if "bfloat16" in name else 2e-4
        if not np.allclose(steps, reference, rtol=tolerance):
            sys.exit(f"{name}: expected losses and gradient norms {reference}, got {steps}")
    print("check passed: losses and gradient norms agree", flush=True)
    peak = child("--child", "gemm:")["flops"]
    floor = training_flops(PRESETS["B"]) * args.batch / peak
    print(
        f"float32 matrix products: {peak / 1e9:.0f} GFLOP/s, so a step takes at least {floor:.2f} s"
    )
    times = {name: [] for name in names}
    memory = {}
    for number in range(args.rounds):
        for name in names:
            result = child(
                "--child", f"time:{name}", "--batch", str(args.batch), "--steps", str(args.steps)
            )
            times[name] += result["seconds"]
            memory[name] = max(memory.get(name, 0), result["GB"])
            print(f"round {number}: {name}: {min(result['seconds']):.2f} s", flush=True)
    print(f"\n| AiM-B, {args.batch} images | s per step (median) | peak GB |\n|---|---|---|")
    for name in names:
        print(f"| {name} | {statistics.median(times[name]):.2f} | {memory[name]:.1f} |")
    for peer in filter(PEERS.__contains__, names):
        ratio = statistics.median(times[peer]) / statistics.median(times[names[0]])
        print(f"{peer}: {ratio:.2f} x the time of {names[0]}")


if __name__ == "__main__":
    main()
