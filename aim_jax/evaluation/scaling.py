"""Scaling of loss and FID with model size and compute over several runs (arXiv 2408.12245)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from aim_jax.evaluation.report import KIND, SCORES
from aim_jax.models import AiMConfig
from aim_jax.models.aim import param_shapes
from aim_jax.perf.flops import training_flops
from aim_jax.utils.checks import Range, check_integer, check_number
from aim_jax.utils.json_files import (
    METRICS_LINE,
    MOST_INTEGER,
    integer,
    read_json,
    read_json_lines,
    record,
)
from aim_jax.utils.logging import say
from aim_jax.weights.fingerprints import other_parts
from aim_jax.weights.load import load_pretrained
from aim_jax.weights.model_files import MODEL_FILE, read_description

POSITIVE = Range(0.0, includes_low=False)  # numbers with a logarithm
RUN = record({"batch_size": integer(1)})  # the part of run.json that counts here
# Settings of a report that must agree for FIDs to be comparable.
COMPARED = ("images", "reference", "reference images", "network")


class Run(NamedTuple):
    """Size, compute and quality of a trained model.

    Attributes:
      name: name of the workdir.
      parameters: number of parameters of the AiM.
      flops: FLOPs of the complete training.
      loss: last validation loss in nats per token.
      fid: FID of its evaluation report, or None.
      compared: settings of the FID: images, reference, network.
    """

    name: str
    parameters: int
    flops: float
    loss: float
    fid: float | None
    compared: dict | None = None


class Fit(NamedTuple):
    """Fit of a power law, log y = slope log x + offset.

    Attributes:
      slope: exponent of the power law.
      offset: log y at x = 1.
      correlation: Pearson's correlation of the logarithms.
    """

    slope: float
    offset: float
    correlation: float


def parameter_count(config: AiMConfig) -> int:
    """Return the number of parameters of an AiM without allocating them."""
    return sum(leaf.size for leaf in jax.tree.leaves(param_shapes(config)))


def read_run(workdir: Path) -> Run:
    """Read a workdir of aim-jax train, and evaluation/report.json in it if it exists.

    Raises:
      FileNotFoundError: if there is no such run.
      ValueError: if the run trains a tokenizer, has no validation loss yet, or its report is of
        other parameters than its model.
    """
    model_file = workdir / "model" / MODEL_FILE
    if not model_file.is_file():
        raise FileNotFoundError(
            f"{workdir}: not a workdir of aim-jax train with an exported model "
            f"(model/{MODEL_FILE})."
        )
    _, content = read_description(workdir / "model")
    if content["aim"] is None:
        raise ValueError(f"{workdir} trains a tokenizer; expected a workdir of aim-jax train.")
    model = AiMConfig(**content["aim"])
    batch = read_json(workdir / "run.json", RUN)["batch_size"]
    last = last_validation(workdir / "metrics.jsonl")
    if last is None:
        raise ValueError(
            f"{workdir}: no val_loss in metrics.jsonl; train until the first evaluation."
        )
    report = workdir / "evaluation" / "report.json"
    scores: dict = {"metrics": {}}
    if report.exists():
        scores = read_json(report, SCORES, KIND, allow_nan=True)
    fid = scores["metrics"].get("fid")
    if fid is not None:
        check_number(f"{report}: metrics.fid", fid, POSITIVE)
        _check_parameters(report, scores.get("parameters"), workdir)
    settings = scores.get("settings", {})
    compared = None if fid is None else {k: settings.get(k) for k in COMPARED}
    flops = training_flops(model) * batch * last["step"]
    return Run(workdir.name, parameter_count(model), flops, last["val_loss"], fid, compared)


def last_validation(file: Path) -> dict | None:
    """Return the last line of metrics.jsonl with a validation loss, or None.

    Raises:
      ValueError: A line is damaged. A killed process may leave an incomplete last line.
    """
    last = None
    for line in read_json_lines(file, METRICS_LINE, allow_nan=True):
        if line.problem and line.data.endswith(b"\n"):
            raise ValueError(f"{line.name}: {line.problem}")
        if not line.problem and "val_loss" in line.content:
            last = line
    if last is None:
        return None
    check_number(f"{last.name}: val_loss", last.content["val_loss"], POSITIVE)
    check_integer(f"{last.name}: step", last.content["step"], 1, MOST_INTEGER)
    return last.content


def _check_parameters(report: Path, measured: dict | None, workdir: Path) -> None:
    """Raise ValueError if a report is of other parameters than the model of a run."""
    if not measured:
        say(f"{report}: does not record its parameters; its FID may be of an earlier state")
    elif other := other_parts(measured, load_pretrained(workdir, as_stored=True)):
        raise ValueError(
            f"{report} is of other parameters than the model of the run (its {' and '.join(other)} "
            "changed, as by further training); evaluate the run again, or delete the report."
        )


def fit(x: Sequence[float], y: Sequence[float]) -> Fit:
    """Fit a line to the logarithms of x and y by least squares.

    Raises:
      ValueError: if x has fewer than two different values.
    """
    log_x = np.log(np.asarray(x, float))
    log_y = np.log(np.asarray(y, float))
    if len(np.unique(log_x)) < 2:
        raise ValueError("a fit requires at least two runs of different size.")
    slope, offset = np.polyfit(log_x, log_y, 1)
    correlation = float(np.corrcoef(log_x, log_y)[0, 1])
    return Fit(float(slope), float(offset), correlation)


def fits(runs: list[Run]) -> dict[str, Fit]:
    """Fit loss and FID against parameters and compute, where the runs have values.

    Returns:
      The fits by name, such as "loss over parameters".

    Raises:
      ValueError: if FIDs were measured with different settings, or no two runs differ in size.
    """
    settings = {json.dumps(run.compared) for run in runs if run.compared is not None}
    if len(settings) > 1:
        raise ValueError(
            f"the FIDs of the runs cannot be compared: {' and '.join(sorted(settings))}. Evaluate "
            "all of them with the same number of images, reference and network."
        )
    results = {}
    for x in ("parameters", "flops"):
        for y in ("loss", "fid"):
            known = [run for run in runs if getattr(run, y) is not None]
            if len({getattr(run, x) for run in known}) > 1:
                values = ([getattr(run, name) for run in known] for name in (x, y))
                results[f"{y} over {x}"] = fit(*values)
    if not results:
        raise ValueError("a scaling report requires at least two runs of different size.")
    return results


def report(runs: list[Run]) -> str:
    """Format the runs and their fits as Markdown."""
    lines = ["| run | parameters | training FLOPs | loss | FID |", "|---|---|---|---|---|"]
    for run in sorted(runs, key=lambda run: run.parameters):
        fid = "" if run.fid is None else f"{run.fid:.3f}"
        lines.append(
            f"| {run.name} | {run.parameters:,} | {run.flops:.3g} | {run.loss:.4f} | {fid} |"
        )
    lines += ["", "| log-log | exponent | correlation |", "|---|---|---|"]
    for name, line in fits(runs).items():
        lines.append(f"| {name} | {line.slope:.4f} | {line.correlation:.4f} |")
    compared = next((run.compared for run in runs if run.compared), {})
    if compared:
        lines += ["", "FID: " + ", ".join(f"{k} {v}" for k, v in compared.items()) + "."]
    return "\n".join(lines) + "\n"


def draw(runs: list[Run], path: Path) -> Path:
    """Plot every fit on log-log axes and return the path of the file."""
    from aim_jax.utils.plots import new_figure, save_figure

    results = fits(runs)
    figure, plots = new_figure(len(results))
    for plot, (name, line) in zip(plots, results.items(), strict=True):
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
