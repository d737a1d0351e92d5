"""Scaling of a training step with batch, tokens, width, depth and devices: fits and a plot.

Example:
  python benchmarks/scale.py --plot docs/scaling.png --out scale.json

One property of a small model (below) is changed at a time. On CPU, time is processor time summed
over all cores, so that other programs matter less; on an accelerator it is wall-clock time. Memory
is the temporary memory of the compiled step, without its arguments. The bytes that one device sends
are read from a step compiled for simulated devices. A fit is the slope of log against log.
"""

import argparse
import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from aim_jax.configs.defaults import aim_defaults
from aim_jax.models import AiMConfig
from aim_jax.perf.hlo import Program
from aim_jax.training import aim as train
from aim_jax.training import loop
from aim_jax.utils.plots import pyplot

DEVICES = 8
BASE = AiMConfig(
    vocab_size=1024, num_classes=10, d_model=256, n_layer=4, d_state=64, class_dropout=0.0
)
BATCH = 4
SERIES = {
    "images": ("batch", (2, 4, 8, 16)),
    "tokens": ("num_tokens", (256, 576, 1024)),
    "width": ("d_model", (128, 256, 512)),
    "layers": ("n_layer", (2, 4, 8, 16)),
}
ARRANGEMENTS = {
    "data": lambda n: {"data": n},
    "data, fully sharded": lambda n: {"data": n, "fsdp": True},
    "model": lambda n: {"data": 1, "model": n},
}


def setup_of(model: AiMConfig, batch: int, devices: int = 1, mesh: Mapping = {}) -> train.Setup:
    """Return the setup of a training of a model."""
    config = aim_defaults()
    config.batch_size = batch
    config.model.update(dataclasses.asdict(model))
    config.mesh.update(mesh)
    return train.Setup(config, jax.devices()[:devices])


def measure(model: AiMConfig, batch: int) -> dict:
    """Measure seconds per step (the minimum of three) and bytes of temporary memory."""
    setup = setup_of(model, batch)
    compiled = setup.train_step.lower(*setup.abstract_arguments()).compile()
    state = train.create_sharded(setup.new_state, setup.mesh, setup.rules)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.vocab_size, (batch, model.num_tokens)).astype(np.int32)
    data = loop.shard_batch({"codes": tokens, "labels": np.zeros(batch, np.int32)}, setup.mesh)
    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter
    times = []
    for _ in range(4):
        start = clock()
        state, metrics = setup.train_step(state, data)
        jax.block_until_ready((state, metrics))
        times.append(clock() - start)
    return {"seconds": min(times[1:]), "bytes": compiled.memory_analysis().temp_size_in_bytes}


def sent(devices: int, arrangement: str) -> int:
    """Return the bytes that one device sends in a step of DEVICES images."""
    setup = setup_of(BASE, DEVICES, devices, ARRANGEMENTS[arrangement](devices))
    text = setup.train_step.lower(*setup.abstract_arguments()).compile().as_text()
    return sum(moved for _, moved in Program(text).collectives().values())


def slope(x, y) -> float:
    """Return the exponent of the growth of y with x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def plot(results: dict, path: Path) -> None:
    """Plot time, memory and communication."""
    figure, axes = pyplot().subplots(1, 3, figsize=(13, 4), layout="constrained")
    for ax, key, unit, title in (
        (axes[0], "seconds", 1, "time of a step, s"),
        (axes[1], "bytes", 1e9, "temporary memory, GB"),
    ):
        for name, rows in results["series"].items():
            x = np.array([row["x"] for row in rows])
            y = np.array([row[key] for row in rows]) / unit
            ax.plot(x / x[0], y, "o-", label=f"{name} from {x[0]}: exponent {slope(x, y):.2f}")
        ax.set(xscale="log", yscale="log", xlabel="times the smallest", title=title)
    for name, rows in results["sent"].items():
        axes[2].plot(*zip(*[(n, b / 1e6) for n, b in rows], strict=True), "o-", label=name)
    axes[2].set(xlabel="devices", title="sent by one device in a step, MB")
    for ax in axes:
        ax.grid(alpha=0.3, which="both")
        ax.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main():
    """Run the measurements, and print and save the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--plot", type=Path, help="PNG file for the plot")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", DEVICES)
    counts = [n for n in (2, 4, 8) if n <= jax.device_count()]
    exchanged = {name: [(n, sent(n, name)) for n in counts] for name in ARRANGEMENTS}
    for name, rows in exchanged.items():
        print(f"{name}: " + ", ".join(f"{n} devices {b / 1e6:.1f} MB" for n, b in rows), flush=True)
    results = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "series": {}}
    for name, (field, values) in SERIES.items():
        rows = results["series"][name] = []
        for x in values:
            model = BASE if field == "batch" else dataclasses.replace(BASE, **{field: x})
            rows.append({"x": x} | measure(model, x if field == "batch" else BATCH))
            latest = rows[-1]
            print(
                f"{name} {x}: {latest['seconds']:.2f} s, {latest['bytes'] / 1e9:.2f} GB", flush=True
            )
        x, seconds, size = zip(*[row.values() for row in rows], strict=True)
        print(f"{name}: time grows as x^{slope(x, seconds):.2f}, memory as x^{slope(x, size):.2f}")
    results["sent"] = exchanged
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
