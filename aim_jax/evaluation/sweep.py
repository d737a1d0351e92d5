"""Search for the best sampling settings of a model, with few samples per setting."""

import hashlib
import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from aim_jax.evaluation import evaluate
from aim_jax.evaluation.features import FeatureExtractor
from aim_jax.evaluation.image_sets import NpzImages
from aim_jax.evaluation.prompts import open_prompts
from aim_jax.evaluation.references import (
    check_alike,
    open_reference,
    open_target,
    statistics_alone,
    stored_statistics,
)
from aim_jax.evaluation.report import METRICS as METRICS_BY_NAME
from aim_jax.evaluation.report import NOTES
from aim_jax.parallel.ownership import Claim, owned
from aim_jax.sampling.config import SETTINGS, SamplingConfig
from aim_jax.utils.checks import check_arguments
from aim_jax.utils.files import write_json
from aim_jax.utils.json_files import Check, anything, dict_of, list_of, read_json, record
from aim_jax.utils.logging import say
from aim_jax.weights import seal
from aim_jax.weights.load import own_directory
from aim_jax.weights.model_files import check_sampling, read_description
from aim_jax.weights.pretrained import Pretrained

_ROW: Check = record({"settings": check_sampling, "metrics": METRICS_BY_NAME, "notes": NOTES})


def _check_sweep(name: str, value: Any) -> None:
    """Check sweep.json: all rows have the same settings and metrics."""
    record({"identity": dict_of(anything), "rows": list_of(_ROW)})(name, value)
    for number, row in enumerate(value["rows"]):
        for part in ("settings", "metrics"):
            same = record(dict.fromkeys(value["rows"][0][part], anything), closed=True)
            same(f"rows[{number}].{part}", row[part])


# Metrics that a sweep can optimize, and whether higher is better.
METRICS = {"fid": False, "sfid": False, "kid": False, "inception_score": True}


def value_of(metrics: Mapping, name: str) -> float:
    """Return the value of a metric; of [mean, deviation] the mean."""
    value = metrics[name]
    return value[0] if isinstance(value, Sequence) else value


def best_of(rows: Sequence[Mapping], metric: str) -> Mapping:
    """Return the row with the best value of a metric.

    Raises:
      ValueError: if no row has the metric.
    """
    rows = [row for row in rows if metric in row["metrics"]]
    if not rows:
        raise ValueError(f"no setting has a value of {metric}; see the notes in sweep.md.")
    choose = max if METRICS[metric] else min
    return choose(rows, key=lambda row: value_of(row["metrics"], metric))


def check_metric(metric: str, reference: str) -> None:
    """Check before a sweep that a reference allows the metric.

    Raises:
      ValueError: if the metric requires images or statistics that the reference does not have.
    """
    if not statistics_alone(reference):
        return
    missing = metric == "kid" or (
        metric == "sfid" and not {"mu_s", "sigma_s"} <= set(stored_statistics(reference))
    )
    if missing:
        raise ValueError(
            f"--metric={metric}: {reference} holds statistics without images, which do not give "
            f"{metric}; use --metric=fid, or a reference with images."
        )


@check_arguments
def sweep(
    model: Pretrained,
    grid: Mapping[str, Sequence],
    reference: str,
    inception_params: dict,
    config: ConfigDict,
    out: Path,
    cache: Path,
) -> list[dict]:
    """Score every combination of settings; an interrupted sweep resumes.

    Args:
      model: with an AiM and a tokenizer.
      grid: values of numeric fields of `SamplingConfig`, by name.
      reference: see `evaluate.evaluate`.
      inception_params: see `evaluate.evaluate`.
      config: see `evaluate.evaluate`.
      out: directory for the results.
      cache: see `evaluate.evaluate`.

    Returns:
      One row per combination with `settings`, `metrics` and `notes`; also in out/sweep.json. Images
      are not kept.

    Raises:
      ValueError: if the model lacks a part, a setting is out of range, `out` holds another sweep,
        or there are several processes.
      OwnershipError: if another run uses `out`.
    """
    with owned(out) as claim:
        return _sweep(model, grid, reference, inception_params, config, out, cache, claim)


def _sweep(
    model: Pretrained,
    grid: Mapping[str, Sequence],
    reference: str,
    inception_params: dict,
    config: ConfigDict,
    out: Path,
    cache: Path,
    claim: Claim,
) -> list[dict]:
    """Sweep into a directory that this run owns."""
    if model.aim_params is None or model.vq_params is None:
        raise ValueError(f"{model.name}: a sweep requires an AiM and a tokenizer.")
    for name, values in grid.items():  # fail before long computations
        for value in values:
            SamplingConfig(**{name: value})
    prompts = open_prompts(model, config, reference)
    target = open_target(reference, model, config)
    if target is not None:
        check_alike(model.name, evaluate.size_of_samples(model), target)
    extract = FeatureExtractor(inception_params)
    ref = open_reference(reference, extract, model, config, cache)
    if ref.features is None:
        raise ValueError("a sweep runs in a single process; start it without other processes.")
    counts = {"samples": config.num_samples}
    if ref.images is not None:
        counts["the reference"] = len(ref.features.features)
    evaluate.check_enough(config, counts)
    out.mkdir(parents=True, exist_ok=True)
    combinations = [
        dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
    ]
    identity = {
        "num_samples": config.num_samples, "seed": config.seed, "reference": ref.identity,
        "neighbour_images": config.neighbour_images,
        "cfg_schedule": evaluate.sampling_settings(model, config)["cfg_schedule"],
        "model": evaluate.identity_of(model), "inception": extract.identity,
    }  # fmt: skip
    file = out / "sweep.json"
    rows = []
    if file.exists():
        rows = stored_rows(file, identity)
    for number, settings in enumerate(combinations, start=1):
        # Settings outside the grid, which are the model's defaults, are part of the row too.
        chosen = ConfigDict(config.to_dict())
        chosen.sample.update(settings)
        settings = evaluate.sampling_settings(model, chosen)
        if any(row["settings"] == settings for row in rows):
            continue
        say(f"setting {number} of {len(combinations)}: {settings}")
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        samples = out / f"samples_{key}"
        images = NpzImages(evaluate.sample_npz(model, chosen, samples, claim, prompts))
        metrics, notes = evaluate.score(extract.of(images, config.neighbour_images), ref.features)
        rows.append({"settings": settings, "metrics": metrics, "notes": notes})
        claim.check()
        write_json(file, {"identity": identity, "rows": rows})
        shutil.rmtree(samples, ignore_errors=True)
    return rows


def stored_rows(file: Path, identity: Mapping[str, Any]) -> list[dict]:
    """Return the rows of an interrupted sweep.

    Raises:
      ValueError: if the file is damaged, or of another sweep.
    """
    old = read_json(file, _check_sweep, allow_nan=True)
    if old["identity"] != identity:
        raise ValueError(
            f"{file} is of a sweep of another model, reference, schedule, seed or number of "
            "samples; choose another --out, or delete it."
        )
    return old["rows"]


def table(rows: Sequence[Mapping], best: Mapping | None = None) -> str:
    """Format rows as a Markdown table with their notes; the best row is bold."""
    names = [*rows[0]["settings"], *rows[0]["metrics"]]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for row in rows:
        cells = [str(value) for value in row["settings"].values()]
        cells += [f"{value_of(row['metrics'], name):.5g}" for name in row["metrics"]]
        cells = [f"**{cell}**" for cell in cells] if row is best else cells
        lines.append("| " + " | ".join(cells) + " |")
    notes = dict.fromkeys(note for row in rows for note in row["notes"])
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)]) + "\n"


def draw(rows: Sequence[Mapping], path: Path) -> Path:
    """Plot the metrics against the setting with most values, one line per other combination."""
    from aim_jax.utils.plots import new_figure, save_figure

    names = list(rows[0]["settings"])

    def differ(name: str) -> int:
        return len({repr(row["settings"][name]) for row in rows})

    axis = max(names, key=differ)
    metrics = [name for name in (*METRICS, "precision", "recall") if name in rows[0]["metrics"]]
    figure, plots = new_figure(len(metrics))
    lines: dict[str, list] = {}
    for row in rows:
        others = {k: v for k, v in row["settings"].items() if k != axis}
        changing = {k: v for k, v in others.items() if differ(k) > 1}
        lines.setdefault(", ".join(f"{k} {v}" for k, v in changing.items()), []).append(row)
    for plot, name in zip(plots, metrics, strict=True):
        for label, points in lines.items():
            points = sorted(points, key=lambda row: row["settings"][axis])
            plot.plot(
                [row["settings"][axis] for row in points],
                [value_of(row["metrics"], name) for row in points],
                marker="o", label=label or None,
            )  # fmt: skip
        plot.set_xlabel(axis)
        plot.set_title(name)
    if len(lines) > 1:
        plots[0].legend()
    return save_figure(figure, path)


def check_writable(checkpoint: str, config: ConfigDict) -> None:
    """Check before a sweep that `write_defaults` will be able to change a model.

    Raises:
      ValueError: if the model is not the user's own (see `own_directory`), or guidance is not
        constant.
    """
    own_directory(checkpoint)
    if config.sample.cfg_schedule not in (None, "constant"):
        raise ValueError(
            "--write_defaults: sampling defaults of a model cannot hold a guidance schedule; use "
            "cfg_schedule 'constant'."
        )


def write_defaults(checkpoint: str, settings: Mapping) -> Path:
    """Write settings as the sampling defaults of a model directory.

    Returns:
      The path of the changed file.
    """
    file, content = read_description(own_directory(checkpoint))
    if seal.is_sealed(content):
        seal.check_description(file, content)
    content["sampling"] |= {name: settings[name] for name in SETTINGS if name in settings}
    seal.write_description(file, content)
    return file
