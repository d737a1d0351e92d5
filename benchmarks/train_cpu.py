"""Time of training steps on a CPU, beside PyTorch with the official mathematics.

Example:
  python benchmarks/train_cpu.py --rounds 5
  python benchmarks/train_cpu.py --subjects aim_b --all

Subjects: the tokenizer of CIFAR-10 with the squared error (tokenizer) and with LPIPS and
discriminator (tokenizer_full), AiM of CIFAR-10 (aim_small) and AiM-B (aim_b). A step is forward,
backward, clipping and AdamW on the same weights and batch. The contestants run in turns, each in a
separate process with the defaults of its library and large pages of memory; tables show medians
over the rounds. First, every contestant takes two steps (AiM-B with two layers), and losses and
gradient norms must agree. The last line has, for each subject, the time of the fastest PyTorch over
ours.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from aim_jax.models import PRESETS, AiMConfig, VQConfig
from aim_jax.utils.memory import huge_pages

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # find benchmarks/ from anywhere

ROOT = Path(__file__).resolve().parents[1]
Steps = Iterator[tuple[float, float]]  # (loss, gradient norm) of each step, without end


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to train.

    Attributes:
      batch: images per step.
      ours: changes of our model configuration by name; the first one has the defaults.
      theirs: options of the peer by name.
      steps: called with a contestant and True for the check; returns its steps.
      tolerance: relative differences of losses and gradient norms that the check allows. AdamW's
        first update is the sign of the gradient, so rounding of small gradients counts.
    """

    batch: int
    ours: dict[str, dict]
    theirs: dict[str, dict]
    steps: Callable[["Subject", str, bool], Steps]
    tolerance: float = 5e-4


def aim_batch(config: AiMConfig, size: int) -> dict[str, np.ndarray]:
    """Return a batch of random tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, config.vocab_size, (size, config.num_tokens)).astype(np.int32)
    return {"codes": tokens, "labels": (np.arange(size) % config.num_classes).astype(np.int32)}


def our_aim(config: Any, model: AiMConfig, batch: int) -> Steps:
    """Train an AiM with this library."""
    import jax

    from aim_jax.training import aim as train
    from aim_jax.training import loop
    from aim_jax.weights import convert
    from benchmarks.conversion import random_weights

    config.batch_size = batch
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 0
    config.model.update(dataclasses.asdict(model))
    setup = train.Setup(config, jax.devices()[:1])
    state = train.create_sharded(setup.new_state, setup.mesh, setup.rules)
    state = state.with_params(convert.convert_aim(random_weights(model), model))
    data = loop.shard_batch(aim_batch(model, batch), setup.mesh)
    while True:
        state, metrics = setup.train_step(state, data)
        yield float(metrics["loss"]), float(metrics["grad_norm"])


def their_aim(config: Any, model: AiMConfig, batch: int, chunk: int, compiled: bool) -> Steps:
    """Train an AiM with PyTorch."""
    from benchmarks.conversion import random_weights
    from benchmarks.train_peer import Trainer

    peer = Trainer(random_weights(model), model, chunk, config.optimizer.lr, compiled)
    data = aim_batch(model, batch)
    while True:
        yield peer.step(data["codes"], data["labels"])


def aim_b(subject: Subject, name: str, checking: bool) -> Steps:
    """Return the steps of a contestant that trains AiM-B, or the check's two layers of it."""
    from aim_jax.configs.defaults import aim_defaults

    model = dataclasses.replace(PRESETS["B"], class_dropout=0.0)
    changed = dict(subject.ours.get(name, {}))
    batch = subject.batch
    if checking:
        model = dataclasses.replace(model, n_layer=2, vocab_size=512)
        changed.pop("scan_unroll", None)
        batch = 2
    if name in subject.theirs:
        return their_aim(aim_defaults(), model, batch, **subject.theirs[name])
    return our_aim(aim_defaults(), dataclasses.replace(model, **changed), batch)


def aim_small(subject: Subject, name: str, checking: bool) -> Steps:
    """Return the steps of a contestant that trains the AiM of CIFAR-10."""
    from aim_jax.configs.cifar10 import get_config

    config = get_config()
    model = AiMConfig(**config.model.to_dict() | {"class_dropout": 0.0})
    if name in subject.theirs:
        return their_aim(config, model, subject.batch, **subject.theirs[name])
    return our_aim(config, model, subject.batch)


def tokenizer(subject: Subject, name: str, checking: bool, full: bool = False) -> Steps:
    """Return the steps of a contestant that trains the tokenizer of CIFAR-10."""
    from aim_jax.configs.cifar10_vq import get_config
    from benchmarks.conversion import random_weights

    config = get_config("full" if full else "whole")
    config.optimizer.schedule = "constant"
    config.optimizer.warmup_steps = 0
    config.optimizer.lr = 1e-4
    model = VQConfig(**config.model)
    weights = random_weights(model)
    side = config.data.image_size
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (subject.batch, side, side, 3)).astype(np.float32)
    lpips = random_lpips() if full else None
    critic = random_critic(config) if full else None
    if name in subject.theirs:
        return their_tokenizer(
            config, model, weights, images, lpips, critic, **subject.theirs[name]
        )
    return our_tokenizer(config, model, weights, images, lpips, critic)


def our_tokenizer(config, model, weights, images, lpips, critic) -> Steps:
    """Train a tokenizer with this library."""
    import jax

    from aim_jax.parallel.sharding import create_sharded, shard_batch
    from aim_jax.training.tokenizer import Setup
    from aim_jax.weights import convert

    setup = Setup(config)
    state = create_sharded(setup.new_state, setup.mesh, setup.rules)
    state = state.with_params(convert.convert_vq(weights, model))
    if critic:
        state = state.replace(
            discriminator=state.discriminator.replace(params=jax.device_put(critic))
        )
    data = shard_batch({"images": images}, setup.mesh)
    while True:
        state, metrics = setup.train_step(state, data, lpips)
        yield float(metrics["loss"]), float(metrics["grad_norm"])


def their_tokenizer(config, model, weights, images, lpips, critic, compiled: bool) -> Steps:
    """Train a tokenizer with PyTorch."""
    from benchmarks.train_vq_peer import Settings, Trainer

    o = config.optimizer
    settings = Settings(o.lr, o.b1, o.b2, o.weight_decay, o.clip_norm, config.ema_decay)
    peer = Trainer(weights, model, settings, lpips, critic, config.loss.adversarial, compiled)
    while True:
        yield peer.step(images)


def random_lpips() -> dict:
    """Return random parameters of LPIPS."""
    import jax

    from aim_jax.models.lpips import shapes

    rng = np.random.default_rng(1)

    def draw(x):
        values = rng.standard_normal(x.shape, np.float32)
        values = values * np.sqrt(2 / np.prod(x.shape[:-1])) if x.ndim > 1 else np.abs(values) / 10
        return values.astype(np.float32)

    return jax.tree.map(draw, shapes())


def random_critic(config) -> dict:
    """Return random parameters of the discriminator, as NumPy arrays."""
    import jax

    from aim_jax.models.patchgan import PatchGAN

    module = PatchGAN(**config.discriminator)
    side = config.data.image_size
    images = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(2)

    def draw(path, x):
        noise = 0.02 * rng.standard_normal(x.shape, np.float32)
        return (noise + (path[-1].key == "scale")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def full_tokenizer(subject: Subject, name: str, checking: bool) -> Steps:
    """Return the steps of `tokenizer` with LPIPS and discriminator."""
    return tokenizer(subject, name, checking, full=True)


EAGER_OR_COMPILED = {"torch": {"compiled": False}, "torch, compiled": {"compiled": True}}
UNROLLED = {"chunk_size": 128, "scan_unroll": 24}
SUBJECTS = {
    "tokenizer": Subject(32, {"ours": {}}, EAGER_OR_COMPILED, tokenizer),
    "tokenizer_full": Subject(32, {"ours": {}}, EAGER_OR_COMPILED, full_tokenizer, 5e-3),
    "aim_small": Subject(
        64,
        {"ours": {}},
        {name: {"chunk": 64} | options for name, options in EAGER_OR_COMPILED.items()},
        aim_small,
    ),
    "aim_b": Subject(
        4,
        {
            "ours": {},
            "ours, chunk 256": {"chunk_size": 256},
            "ours, chunk 128": {"chunk_size": 128},
            "ours, unrolled": UNROLLED,
            "ours, unrolled, bfloat16": UNROLLED | {"compute_dtype": "bfloat16"},
            "ours, remat none": {"remat": "none"},
            "ours, logits_chunk 32": {"logits_chunk": 32},
        },
        {
            "torch, official": {"chunk": 256, "compiled": False},
            "torch, chunk 64": {"chunk": 64, "compiled": False},
            "torch, chunk 64, compiled": {"chunk": 64, "compiled": True},
        },
        aim_b,
    ),
}


def check(subject: Subject, name: str) -> dict:
    """Return loss and gradient norm of two steps."""
    steps = subject.steps(subject, name, True)
    return {"steps": [next(steps) for _ in range(2)]}


def measure(subject: Subject, name: str, seconds: float) -> dict:
    """Measure steps for about `seconds`, two or more after two first ones, and the peak memory."""
    import resource

    steps = subject.steps(subject, name, False)
    next(steps)
    next(steps)
    times = []
    while len(times) < 2 or sum(times) < seconds:
        start = time.perf_counter()
        next(steps)
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": statistics.median(times), "GB": peak / 1e9}


def child(*options: str) -> dict | None:
    """Run this program in another process and return its result, or None where it failed.

    Every contestant has the large pages of memory that our programs ask for.
    """
    command = [sys.executable, "-m", "benchmarks.train_cpu", *options]
    environment = os.environ | huge_pages(dict(os.environ))
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    if process.returncode:
        print(f"{' '.join(command)}\n{process.stderr[-3000:]}", file=sys.stderr, flush=True)
        return None
    return json.loads(process.stdout.splitlines()[-1])


def compete(title: str, contestants: list[str], rounds: int, seconds: float) -> float:
    """Check and time the contestants of a subject, print a table and return the ratio."""
    subject = SUBJECTS[title]
    taking_part = []
    reference = None
    for name in contestants:
        result = child("--child", f"check:{title}:{name}")
        if result is None:
            if "compiled" not in name:
                sys.exit(f"{title}: {name} failed; its error is above.")
            print(f"{title}: {name} does not run here and is left out", flush=True)
            continue
        reference = reference or result["steps"]
        tolerance = 0.02 if "bfloat16" in name else subject.tolerance
        if not np.allclose(result["steps"], reference, rtol=tolerance):
            sys.exit(f"{title}: {name}: expected {reference}, got {result['steps']}")
        taking_part.append(name)
    print(f"{title}: losses and gradient norms agree", flush=True)
    times: dict[str, list[float]] = {name: [] for name in taking_part}
    memory = dict.fromkeys(taking_part, 0.0)
    for number in range(rounds):
        for name in taking_part:
            result = child("--child", f"time:{title}:{name}", "--seconds", str(seconds))
            if result is None:
                sys.exit(f"{title}: {name} failed; its error is above.")
            times[name].append(result["seconds"])
            memory[name] = max(memory[name], result["GB"])
            print(f"round {number}: {title}: {name}: {result['seconds']:.3f} s", flush=True)
    medians = {name: statistics.median(values) for name, values in times.items()}
    print(f"\n| {title}, {subject.batch} images | s per step | images/s | peak GB |")
    print("|---|---|---|---|")
    for name, median in medians.items():
        rate = subject.batch / median
        print(f"| {name} | {median:.3f} | {rate:.1f} | {memory[name]:.1f} |", flush=True)
    peers = [medians[name] for name in taking_part if name in subject.theirs]
    return min(peers, default=np.nan) / medians[taking_part[0]]


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


def print_floor() -> None:
    """Print the time that the matrix products of a step of AiM-B take at least."""
    from aim_jax.perf.flops import training_flops

    result = child("--child", "gemm::")
    if result:
        floor = training_flops(PRESETS["B"]) * SUBJECTS["aim_b"].batch / result["flops"]
        speed = result["flops"] / 1e9
        print(f"float32 products: {speed:.0f} GFLOP/s, so aim_b takes at least {floor:.2f} s")


def main():
    """Check the contestants, time them, and print tables and ratios."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--subjects", default=",".join(SUBJECTS), help="comma-separated (all)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds over all contestants (3)")
    parser.add_argument("--seconds", type=float, default=10, help="timed seconds per round (10)")
    parser.add_argument("--all", action="store_true", help="our other settings of AiM-B too")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, title, name = args.child.split(":")
        if kind == "gemm":
            result = {"flops": gemm_flops()}
        elif kind == "check":
            result = check(SUBJECTS[title], name)
        else:
            result = measure(SUBJECTS[title], name, args.seconds)
        print(json.dumps(result))
        return
    ratios = {}
    for title in args.subjects.split(","):
        subject = SUBJECTS[title]
        ours = list(subject.ours)[: None if args.all else 1]
        ratios[title] = compete(title, [*ours, *subject.theirs], args.rounds, args.seconds)
    if "aim_b" in ratios:
        print_floor()
    print(" ".join(f"{title} {ratio:.2f}" for title, ratio in ratios.items()))


if __name__ == "__main__":
    main()
