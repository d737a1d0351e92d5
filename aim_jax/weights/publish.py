"""Publication of model directories: with a model card, and optionally on the Hugging Face hub."""

import dataclasses
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from aim_jax.utils.checks import check_arguments
from aim_jax.utils.names import printable, short_list
from aim_jax.weights.directories import save_model
from aim_jax.weights.fingerprints import other_parts
from aim_jax.weights.hub import PREFIX, prepare, upload
from aim_jax.weights.load import find_model, load_pretrained
from aim_jax.weights.model_files import LEFTOVERS
from aim_jax.weights.pretrained import Pretrained

SAMPLES = "samples.png"


@check_arguments
def publish(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    report: Mapping | None = None,
    repository: str = "",
    tokenizer: str | os.PathLike = "",
    *,
    licence: str = "",
    datasets: Sequence[str] = (),
    write_samples: Callable[[Pretrained, Path], bool] | None = None,
) -> Path:
    """Write a model in the published layout with its card, and upload it if a repository is named.

    Args:
      checkpoint: Model to publish; see `load_pretrained`.
      out: Directory to create.
      report: Report of `aim_jax.evaluation.evaluate.evaluate` for the card; see `check_report`.
      repository: "owner/name" on the hub; "" uploads nothing.
      tokenizer: Model directory whose tokenizer replaces the model's own; see
        `Pretrained.with_tokenizer`.
      licence: Licence for the card, as the hub names it, such as "apache-2.0".
      datasets: Data sets for the card, as the hub names them.
      write_samples: Writes a PNG of samples of the model for the card, and returns whether it did.
        The parameters have their stored dtypes.

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
    with tempfile.TemporaryDirectory() as directory:
        samples = Path(directory) / SAMPLES
        has_samples = write_samples is not None and write_samples(model, samples)
        if has_samples:
            files[SAMPLES] = functools.partial(shutil.copyfile, samples)
        card = model_card(
            model, report, repository, licence=licence, datasets=datasets, has_samples=has_samples
        )
        files["README.md"] = lambda file: file.write_text(card)
        save_model(out, model, None, files, layout="published")
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


def model_card(
    model: Pretrained,
    report: Mapping | None = None,
    repository: str = "",
    *,
    licence: str = "",
    datasets: Sequence[str] = (),
    has_samples: bool = False,
) -> str:
    """Return a Markdown model card with the hub's header: contents, usage, limits, evaluation."""
    load = f"{PREFIX}{repository}" if repository else "DIRECTORY"
    title = repository.rpartition("/")[2] or Path(model.name).resolve().name
    parts = {"AiM": model.aim_params, "tokenizer": model.vq_params}
    sizes = {k: sum(x.size for x in jax.tree.leaves(v)) for k, v in parts.items() if v is not None}
    lines = [
        "---", _header(model, report, title, licence, datasets), "---", "",
        f"# {title}", "",
        "A model of [AiM](https://arxiv.org/abs/2408.12245), autoregressive image generation with "
        "Mamba, in the format of the library aim_jax.", "",
    ]  # fmt: skip
    if has_samples:
        lines += [f"![Samples, seed 0]({SAMPLES})", ""]
    lines += ["```bash", "pip install aim_jax"]
    is_generator = model.aim_params is not None and model.vq_params is not None
    if is_generator:
        choice = '--captions "a red apple"' if model.text else "--classes 0,1,2"
        lines.append(f"aim-jax sample --checkpoint {load} {choice}")
    lines += ["```", "", "```python", "import aim_jax"]
    lines.append(f'model = aim_jax.load_pretrained("{load}")')
    if is_generator:
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
    lines += ["", "## Limits", "", *_limits(model, report)]
    if report is not None:
        lines += ["", "## Evaluation", "", "| metric | value |", "|---|---|"]
        lines += [f"| {name} | {_score(value)} |" for name, value in report["metrics"].items()]
        conditions = {**report["settings"], **report["environment"]}
        lines += ["", "; ".join(f"{k} {_text(v)}" for k, v in conditions.items()) + "."]
        lines += ["", *(f"- {_text(note)}" for note in report["notes"])]
    return "\n".join(lines) + "\n"


def _header(
    model: Pretrained, report: Mapping | None, title: str, licence: str, datasets: Sequence[str]
) -> str:
    """Return the metadata of a card, which the hub searches and shows."""
    from huggingface_hub import EvalResult, ModelCardData  # takes a second

    results = []
    for name, value in ({} if report is None else report["metrics"]).items():
        number = value[0] if isinstance(value, list) and value else value
        if isinstance(number, int | float):
            reference = _text(report["settings"].get("reference", "unknown")) if report else ""
            results.append(
                EvalResult(
                    task_type="image-generation", dataset_type=reference, dataset_name=reference,
                    metric_type=name, metric_value=number,
                )
            )  # fmt: skip
    data = ModelCardData(
        library_name="aim_jax",
        license=licence or None,
        pipeline_tag="text-to-image" if model.text else "unconditional-image-generation",
        tags=["image-generation", "mamba", "jax"],
        datasets=list(datasets) or None,
        model_name=title if results else None,
        eval_results=results or None,
    )
    return data.to_yaml()


def _limits(model: Pretrained, report: Mapping | None) -> list[str]:
    lines = []
    size = model.info.get("data", {}).get("image_size")
    if size:
        lines.append(f"- Images have {size} x {size} pixels.")
    if model.aim_config is not None and model.text is None:
        lines.append("- It knows its classes alone, and takes no text.")
    elif model.text is not None:
        lines.append("- It learned the words of its training captions; others may have no effect.")
    lines.append("- It repeats what its training images hold, their errors and biases included.")
    if report is None:
        lines.append("- Its quality was not measured for this card.")
    return lines


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
