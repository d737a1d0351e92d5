"""Write a model and its generated card to a directory, and optionally upload it to the hub.

Example:
  aim-jax publish --checkpoint runs/aim --evaluation evaluation --out published
  aim-jax publish --checkpoint runs/aim --out published --repository owner/name --license mit
  aim-jax publish --checkpoint cifar10 --tokenizer runs/decoder --out models/mine
"""

import dataclasses
import functools
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

if TYPE_CHECKING:
    from aim_jax.weights.pretrained import Pretrained


def define_flags() -> None:
    """Define the flags of the program."""
    flags.DEFINE_string("checkpoint", None, "Bundled model, model directory, or workdir of a run.")
    flags.DEFINE_string("out", None, "Directory to create.")
    flags.DEFINE_string(
        "tokenizer", "", "Another tokenizer with the same tokens and a better decoder."
    )
    flags.DEFINE_string(
        "evaluation", "", "Results of aim-jax evaluate for this model, for the card."
    )
    flags.DEFINE_string(
        "repository",
        "",
        "Repository owner/name on the hub to upload to.",
    )
    flags.DEFINE_string("license", "", "Licence for the card, as the hub names it: apache-2.0, ...")
    flags.DEFINE_list("datasets", [], "Data sets for the card, as the hub names them.")
    flags.DEFINE_integer(
        "per_class",
        4,
        "Images per class in the grid of the card; 0: none.",
        lower_bound=0,
    )
    flags.DEFINE_list("captions", [], "Captions of the grid of samples, for a model of captions.")
    flags.mark_flags_as_required(["checkpoint", "out"])


def main() -> None:
    """Write the directory, upload it if requested, and print its path."""
    from aim_jax.evaluation.report import read_report
    from aim_jax.utils.logging import say
    from aim_jax.weights.publish import publish

    f = flags.FLAGS
    out = publish(
        f.checkpoint, f.out,
        report=read_report(Path(f.evaluation)) if f.evaluation else None,
        repository=f.repository, tokenizer=f.tokenizer,
        licence=f.license, datasets=f.datasets, write_samples=write_samples,
    )  # fmt: skip
    say(f"wrote {out}")


def write_samples(model: "Pretrained", file: Path) -> bool:
    """Write the grid of samples of a card; return False if the model or the flags allow none."""
    import jax
    import jax.numpy as jnp

    from aim_jax.sampling.grids import sample_to_directory
    from aim_jax.utils.logging import say
    from aim_jax.weights.pretrained import class_ids

    f = flags.FLAGS
    if not f.per_class or model.aim_config is None or model.vq_config is None:
        return False
    if model.text and not f.captions:
        say("the card has no grid of samples, because --captions names none")
        return False
    to_float = functools.partial(jax.tree.map, lambda x: jnp.asarray(x, jnp.float32))
    model = dataclasses.replace(
        model, aim_params=to_float(model.aim_params), vq_params=to_float(model.vq_params)
    )
    classes = f.captions if model.text else class_ids(model, [])
    with tempfile.TemporaryDirectory() as directory:
        grid, *_ = sample_to_directory(model, classes, f.per_class, Path(directory))
        shutil.copyfile(grid, file)
    return True
