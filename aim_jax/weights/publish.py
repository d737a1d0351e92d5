"""Publication of model directories: with a model card, and optionally on the Hugging Face hub."""

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from aim_jax.utils.checks import check_arguments
from aim_jax.utils.names import printable, short_list
from aim_jax.weights.fingerprints import other_parts
from aim_jax.weights.hub import PREFIX, prepare, upload
from aim_jax.weights.model_files import LEFTOVERS
from aim_jax.weights.pretrained import Pretrained, find_model, load_pretrained, save_model


@check_arguments
def publish(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    report: Mapping | None = None,
    repository: str = "",
    tokenizer: str | os.PathLike = "",
) -> Path:
    """Write a model directory with its card, and upload it if a repository is named.

    Args:
      checkpoint: Model to publish; see `find_model`.
      out: Directory to create.
      report: Report of `aim_jax.evaluation.evaluate.evaluate` for the card; see `check_report`.
      repository: "owner/name" on the hub; "" uploads nothing.
      tokenizer: Model directory whose tokenizer replaces the model's own; see
        `Pretrained.with_tokenizer`.

    Raises:
      FileExistsError: `out` exists.
      ValueError: The tokens of the other tokenizer differ from those of the model's own, or the
        report is not of the published parameters.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists; choose another directory.")
    source = find_model(checkpoint)
    model = load_pretrained(source, as_stored=True)
    files: dict[str, Callable] = {}
    if (source / LEFTOVERS).is_file() and not tokenizer:
        files[LEFTOVERS] = functools.partial(shutil.copyfile, source / LEFTOVERS)
    if tokenizer:
        model = model.with_tokenizer(load_pretrained(tokenizer, as_stored=True))
    if report is not None:
        check_report(report, model)
    if repository:
        prepare(repository)  # creates the repository, so only once the model is known to load
    model = dataclasses.replace(model, name=str(checkpoint))
    card = model_card(model, report, repository)
    files["README.md"] = lambda file: file.write_text(card)
    save_model(out, model, None, files)
    if repository:
        upload(out, repository)
    return out


def check_report(report: Mapping, model: Pretrained) -> None:
    """Check that a report was measured with the parameters of a model.

    Raises:
      ValueError: The report is of other parameters, or does not say of which.
    """
    measured = report.get("parameters")
    again = (
        "evaluate the model that you publish: aim-jax evaluate --checkpoint; it reuses the samples "
        "of its --out, if they are of this model"
    )
    if not isinstance(measured, Mapping):
        raise ValueError(
            "the evaluation report does not record which parameters it is of, because an older "
            f"version wrote it; {again}."
        )
    if not measured:
        raise ValueError(
            "the evaluation report is of images from files (--samples), whose origin is unknown; "
            f"{again}."
        )
    if other := other_parts(measured, model):
        scored = _text(report["settings"].get("model", "another model"))
        names = " and the ".join(_text(name) for name in other)
        raise ValueError(
            f"the evaluation report is of other parameters than {model.name}: the "
            f"{names} of {scored} made its images; {again}."
        )


def model_card(model: Pretrained, report: Mapping | None = None, repository: str = "") -> str:
    """Return a Markdown model card with the hub's header: contents, usage and evaluation."""
    load = f"{PREFIX}{repository}" if repository else "DIRECTORY"
    title = repository.rpartition("/")[2] or Path(model.name).resolve().name
    parts = {"AiM": model.aim_params, "tokenizer": model.vq_params}
    sizes = {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in parts.items() if v is not None}
    lines = [
        "---", "library_name: aim_jax", "tags: [image-generation, mamba, jax]", "---", "",
        f"# {title}", "",
        "A model of [AiM](https://arxiv.org/abs/2408.12245), autoregressive image generation with "
        "Mamba, in the format of the library aim_jax.", "",
        "```python", "import aim_jax", f'model = aim_jax.load_pretrained("{load}")',
    ]  # fmt: skip
    if model.aim_params is not None and model.vq_params is not None:
        what = '["a red apple"]' if model.text else "[0, 1, 2]"
        lines.append(f"images = aim_jax.generate(model, {what}, seed=0).images")
    lines += ["```", "", "| | |", "|---|---|"]
    lines += [f"| parameters, {name} | {count:,} |" for name, count in sizes.items()]
    if model.aim_config is not None:
        c = model.aim_config
        lines.append(
            f"| AiM | {c.n_layer} layers of width {c.d_model}, {c.mixer}, adaLN {c.adaln}, "
            f"{c.num_tokens} tokens, vocabulary of {c.vocab_size} |"
        )
    if model.vq_config is not None:
        v = model.vq_config
        lines.append(f"| tokenizer | f{v.downsampling}, {v.n_embed} codebook entries |")
    if model.text is not None and model.aim_config is not None:
        lines.append(
            f"| captions | at most {model.aim_config.max_caption} tokens, vocabulary of "
            f"{model.text.vocab_size} |"
        )
    if model.class_names:
        lines.append(f"| classes | {len(model.class_names)}: {short_list(model.class_names, 20)} |")
    lines.append("| sampling | " + ", ".join(f"{k} {v}" for k, v in model.sampling.items()) + " |")
    lines += [f"| {k} | {_text(v)} |" for k, v in model.info.items()]
    if report is not None:
        lines += ["", "## Evaluation", "", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {_score(value)} |" for name, value in report["metrics"].items()]
        conditions = {**report["settings"], **report["environment"]}
        lines += ["", "; ".join(f"{k} {_text(v)}" for k, v in conditions.items()) + "."]
        lines += ["", *(f"- {_text(note)}" for note in report["notes"])]
    return "\n".join(lines) + "\n"


def _text(value: Any) -> str:
    """Return a value of any file on one line."""
    if isinstance(value, float):
        return f"{value:.5g}"
    text = json.dumps(value) if isinstance(value, dict | list) else str(value)
    return printable(text, lines=False)


def _score(value: Any) -> str:
    """Return a metric of a report: a number, or its mean and standard deviation."""
    if isinstance(value, list) and len(value) == 2:
        return f"{value[0]:.5g} ± {value[1]:.2g}"
    return _text(value)
