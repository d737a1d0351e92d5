"""How quality follows size and compute over several runs (arXiv 2408.12245)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from aim_jax.models import AiMConfig
from aim_jax.models.aim import init_params
from aim_jax.perf.flops import training_flops
from aim_jax.weights.pretrained import MODEL_FILE

# Of the settings of a report, what has to be the same where FIDs are compared.
COMPARED = ("images", "reference", "reference images", "network")


class Run(NamedTuple):
    """One trained model.

    Attributes:
      name: of its workdir. parameters: of the AiM. flops: of the whole training.
      loss: the last validation loss, nats per code. fid: of its report, or None.
      compared: what the FID was measured with: images, reference, network.
    """

    name: str
    parameters: int
    flops: float
    loss: float
    fid: float | None
    compared: dict | None = None


class Fit(NamedTuple):
    """log y = slope log x + offset, and Pearson's correlation of the logarithms."""

    slope: float
    offset: float
    correlation: float


def parameter_count(config: AiMConfig) -> int:
    """Parameters of an AiM; none are made."""
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def read_run(workdir: Path) -> Run:
    """What a workdir of aim-jax train says, and evaluation/report.json in it, if it is there.

    Raises:
      FileNotFoundError: no such run.
      ValueError: the run has no validation loss yet.
    """
    described = workdir / "model" / MODEL_FILE
    if not described.is_file():
        raise FileNotFoundError(
            f"{workdir}: no workdir of aim-jax train with an exported model (model/{MODEL_FILE})."
        )
    content = json.loads(described.read_text())
    if not content["aim"]:
        raise ValueError(f"{workdir} is a run of a tokenizer; a scaling report compares AiMs.")
    model = AiMConfig(**content["aim"])
    batch = json.loads((workdir / "run.json").read_text())["batch_size"]
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [row for row in rows if "val_loss" in row]
    if not losses:
        raise ValueError(f"{workdir}: no val_loss in metrics.jsonl; let it run to an evaluation.")
    report = workdir / "evaluation" / "report.json"
    content = json.loads(report.read_text()) if report.exists() else {"metrics": {}}
    fid = content["metrics"].get("fid")
    settings = content.get("settings", {})
    compared = None if fid is None else {k: settings.get(k) for k in COMPARED}
    last = losses[-1]
    flops = training_flops(model) * batch * last["step"]
    return Run(workdir.name, parameter_count(model), flops, last["val_loss"], fid, compared)


def fit(x: Sequence[float], y: Sequence[float]) -> Fit:
    """The line through the logarithms.

    Raises:
      ValueError: fewer than two different x.
    """
    log_x = np.log(np.asarray(x, float))
    log_y = np.log(np.asarray(y, float))
    if len(np.unique(log_x)) < 2:
        raise ValueError("a fit needs at least two runs of different size.")
    slope, offset = np.polyfit(log_x, log_y, 1)
    correlation = float(np.corrcoef(log_x, log_y)[0, 1])
    return Fit(float(slope), float(offset), correlation)


def fits(runs: list[Run]) -> dict[str, Fit]:
    """Of loss and FID over parameters and compute, as far as the runs have them.

    Raises:
      ValueError: FIDs that were not measured alike, or no two runs of different size.
    """
    ways = {json.dumps(run.compared) for run in runs if run.compared is not None}
    if len(ways) > 1:
        raise ValueError(
            f"the FIDs of the runs cannot be compared: {' and '.join(sorted(ways))}. Evaluate all "
            "of them with the same number of images, reference and network."
        )
    found = {}
    for x in ("parameters", "flops"):
        for y in ("loss", "fid"):
            known = [run for run in runs if getattr(run, y) is not None]
            if len({getattr(run, x) for run in known}) > 1:
                values = ([getattr(run, name) for run in known] for name in (x, y))
                found[f"{y} over {x}"] = fit(*values)
    if not found:
        raise ValueError("a scaling report needs at least two runs of different size.")
    return found


def report(runs: list[Run]) -> str:
    """Markdown."""
    lines = ["| run | parameters | training FLOPs | loss | FID |", "|---|---|---|---|---|"]
    for run in sorted(runs, key=lambda run: run.parameters):
        fid = "" if run.fid is None else f"{run.fid:.3f}"
        lines.append(
            f"| {run.name} | {run.parameters:,} | {run.flops:.3g} | {run.loss:.4f} | {fid} |"
        )
    lines += ["", "| log-log | exponent | correlation |", "|---|---|---|"]
    for name, found in fits(runs).items():
        lines.append(f"| {name} | {found.slope:.4f} | {found.correlation:.4f} |")
    compared = next((run.compared for run in runs if run.compared), {})
    if compared:
        lines += ["", "FID: " + ", ".join(f"{k} {v}" for k, v in compared.items()) + "."]
    return "\n".join(lines) + "\n"


def draw(runs: list[Run], path: Path) -> Path:
    """A log-log plot of every fit."""
    from aim_jax.utils.plots import new_figure, save_figure

    found = fits(runs)
    figure, plots = new_figure(len(found))
    for plot, (name, line) in zip(plots, found.items(), strict=True):
        y, x = name.split(" over ")
        known = [run for run in runs if getattr(run, y) is not None]
        values = np.array([getattr(run, x) for run in known], float)
        plot.loglog(values, [getattr(run, y) for run in known], "o")
        for run in known:
            plot.annotate(run.name, (getattr(run, x), getattr(run, y)))
        ends = np.array([values.min(), values.max()])
        plot.loglog(ends, np.exp(line.offset) * ends**line.slope, "--")
        plot.set_xlabel(x)
        plot.set_ylabel(y)
        plot.set_title(f"r = {line.correlation:.4f}")
    return save_figure(figure, path)
