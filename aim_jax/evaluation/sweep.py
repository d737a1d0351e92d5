"""Looks for the sampling settings that suit a model best, with few samples each."""

import hashlib
import itertools
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from aim_jax.evaluation import evaluate
from aim_jax.evaluation.features import FeatureExtractor
from aim_jax.evaluation.image_sets import NpzImages
from aim_jax.evaluation.references import check_alike, open_reference, open_set
from aim_jax.sampling.config import SETTINGS, SamplingConfig
from aim_jax.utils.files import write_json
from aim_jax.utils.logging import say
from aim_jax.weights import hub
from aim_jax.weights.pretrained import (
    MODEL_FILE,
    Pretrained,
    bundled_models,
    find_model,
)

# Metrics that a sweep can look for the best of, and whether more of it is better.
METRICS = {"fid": False, "sfid": False, "kid": False, "inception_score": True}


def value_of(metrics: Mapping, name: str) -> float:
    """A metric, or the mean of one that has a deviation."""
    value = metrics[name]
    return value[0] if isinstance(value, Sequence) else value


def best_of(rows: Sequence[Mapping], metric: str) -> Mapping:
    """The row with the best value of a metric.

    Raises:
      ValueError: no row has the metric.
    """
    rows = [row for row in rows if metric in row["metrics"]]
    if not rows:
        raise ValueError(f"no setting has a value of {metric}; the notes of sweep.md say why.")
    choose = max if METRICS[metric] else min
    return choose(rows, key=lambda row: value_of(row["metrics"], metric))


def sweep(
    model: Pretrained,
    grid: Mapping[str, Sequence],
    reference: str,
    inception_params: dict,
    config: ConfigDict,
    out: Path,
    cache: Path,
) -> list[dict]:
    """Scores every combination of settings; a sweep that was interrupted goes on.

    Args:
      grid: values of numeric fields of `SamplingConfig`, by name.
      reference, inception_params, config, out, cache: see `evaluate.evaluate`.

    Returns:
      One row per combination: `settings`, `metrics`, `notes`; also in out/sweep.json. None of the
      images are kept.
    """
    if model.aim_params is None or model.vq_params is None:
        raise ValueError(f"{model.name} lacks the tokenizer or the AiM that a sweep needs.")
    for name, values in grid.items():  # before any long work starts
        for value in values:
            SamplingConfig(**{name: value})
    target = open_set(reference, model, config)
    check_alike(model.name, evaluate.size_of_samples(model), target)
    extract = FeatureExtractor(inception_params)
    ref = open_reference(reference, extract, model, config, cache)
    if ref.features is None:
        raise ValueError("a sweep runs in one process; this is one of several.")
    counts = {"samples": config.num_samples, "the reference": len(ref.features.features)}
    evaluate.check_enough(config, counts)
    out.mkdir(parents=True, exist_ok=True)
    combinations = [
        dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())
    ]
    identity = {
        "num_samples": config.num_samples, "seed": config.seed, "reference": ref.images.identity,
        "neighbour_images": config.neighbour_images,
        "cfg_schedule": config.sample.cfg_schedule,
        "model": evaluate.identity_of(model), "inception": extract.identity,
    }  # fmt: skip
    file, rows = out / "sweep.json", []
    if file.exists():
        old = json.loads(file.read_text())
        if old["identity"] != identity:
            raise ValueError(
                f"{out} holds a sweep of another model, reference, schedule, seed or number of "
                "samples; give another --out, or delete it."
            )
        rows = old["rows"]
    for number, settings in enumerate(combinations, start=1):
        # What the grid leaves open is part of the row too: the model's own settings.
        chosen = ConfigDict(config.to_dict())
        chosen.sample.update(settings)
        settings = evaluate.sampling_settings(model, chosen)
        if any(row["settings"] == settings for row in rows):
            continue
        say(f"setting {number} of {len(combinations)}: {settings}")
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        samples = out / f"samples_{key}"
        images = NpzImages(evaluate.sample_npz(model, chosen, samples))
        metrics, notes = evaluate.score(extract.of(images, config.neighbour_images), ref.features)
        rows.append({"settings": settings, "metrics": metrics, "notes": notes})
        write_json(file, {"identity": identity, "rows": rows})
        shutil.rmtree(samples, ignore_errors=True)
    return rows


def table(rows: Sequence[Mapping], best: Mapping | None = None) -> str:
    """Markdown; the best row is bold."""
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
    """Plots of the metrics over the setting with most values, a line per rest of the settings."""
    from aim_jax.utils.plots import new_figure, save_figure

    names = list(rows[0]["settings"])
    axis = max(names, key=lambda name: len({row["settings"][name] for row in rows}))
    metrics = [name for name in (*METRICS, "precision", "recall") if name in rows[0]["metrics"]]
    figure, plots = new_figure(len(metrics))
    lines: dict[str, list] = {}
    for row in rows:
        rest = {k: v for k, v in row["settings"].items() if k != axis}
        changing = {k: v for k, v in rest.items() if len({r["settings"][k] for r in rows}) > 1}
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
    """Raises ValueError where `write_defaults` cannot be used: to be asked before the sweep."""
    if str(checkpoint) in bundled_models() or str(checkpoint).startswith(hub.PREFIX):
        raise ValueError(
            f"--write_defaults: {checkpoint} is not yours to change; make a copy with "
            f"aim-jax publish --checkpoint {checkpoint} --out DIR and give --checkpoint DIR."
        )
    if config.sample.cfg_schedule != "constant":
        raise ValueError(
            "--write_defaults: a model's own settings hold constant guidance, not a schedule."
        )


def write_defaults(checkpoint: str, settings: Mapping) -> Path:
    """Makes settings the sampling defaults of a model directory.

    Returns:
      The file that was changed.
    """
    file = find_model(checkpoint) / MODEL_FILE
    content = json.loads(file.read_text())
    content["sampling"] |= {name: settings[name] for name in SETTINGS if name in settings}
    write_json(file, content)
    return file
