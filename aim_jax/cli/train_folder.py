r"""Train a tokenizer and AiM on a folder of images, and draw samples: both stages in one command.

Example:
  aim-jax train-folder images --out runs/mine
  aim-jax train-folder images --out runs/mine --budget_minutes 180
  aim-jax sample --checkpoint runs/mine/aim

The folder holds one folder of images per class, or captioned images for a text-to-image model. OUT
receives the tokenizer's run (vq), AiM's run with its tokens (aim), and a grid of samples
(samples/grid.png). The same command resumes an interrupted run and keeps its choices. The two
stages by themselves, with all their settings, are `train_vq --config folder_vq:images` and
`train --config folder:images`.
"""

import time
from pathlib import Path

from absl import flags

from aim_jax.cli import common
from aim_jax.utils.logging import duration, say

POSITIONAL = "images"


def define_flags() -> None:
    """Define the flags of the program."""
    flags.DEFINE_string(
        "images",
        None,
        "Folder with a folder of images per class, or with captioned images; the flag may be left "
        "out.",
    )
    flags.DEFINE_string("out", None, "Directory for the results.")
    flags.DEFINE_float(
        "budget_minutes",
        None,
        "Minutes for everything. Default: 60 on a CPU, no limit on an accelerator; 0: no limit.",
        lower_bound=0,
    )
    flags.DEFINE_integer("seed", 0, "Random seed of both trainings.", lower_bound=0)
    flags.DEFINE_integer("per_class", 8, "Samples per class or caption.", lower_bound=1)
    flags.DEFINE_string(
        "caption_field", "", "Field of the metadata that holds the captions. Default: text, or "
        "caption.",
    )  # fmt: skip
    flags.mark_flags_as_required(["images", "out"])


def main() -> int:
    """Train both stages and write the samples; return the exit status."""
    f = flags.FLAGS
    return train_folder(
        f.images, Path(f.out), f.budget_minutes, f.seed, f.per_class, f.caption_field
    )


def train_folder(
    images: str,
    out: Path,
    budget_minutes: float | None = None,
    seed: int = 0,
    per_class: int = 8,
    caption_field: str = "",
) -> int:
    """Train tokenizer and AiM on a folder of images, and write a grid of samples.

    Args:
      images: Folder with a folder of images per class, or with captioned images.
      out: Directory for the results.
      budget_minutes: Minutes for everything; None: 60 on a CPU, else no limit; 0: no limit.
      seed: Random seed of both trainings.
      per_class: Samples per class or caption in the grid.
      caption_field: Field of the metadata that holds the captions; "" takes the usual ones.

    Returns:
      `EXIT_STOPPED` if a signal ended it, else 0.

    Raises:
      ValueError, FileNotFoundError: The folder or a setting is invalid.
    """
    from aim_jax.cli.folder import prepare
    from aim_jax.configs.from_folder import aim_config, vq_config
    from aim_jax.data import open_images
    from aim_jax.sampling.grids import sample_to_directory
    from aim_jax.training import aim, tokenizer
    from aim_jax.training.inputs import captions_of, example_captions
    from aim_jax.training.monitor import last_stop
    from aim_jax.weights.load import load_pretrained
    from aim_jax.weights.pretrained import class_ids

    start = time.perf_counter()
    stages = (
        ("1 of 3: tokenizer", out / "vq", vq_config, tokenizer.train),
        ("2 of 3: AiM", out / "aim", aim_config, aim.train),
    )
    for title, workdir, recipe, train in stages:
        say(f"\nstage {title} ({duration(time.perf_counter() - start)} so far)")
        config = recipe(images, caption_field)
        config.seed = seed
        config.budget_minutes = budget_minutes
        if config.stage == "aim":
            config.tokenizer = str(out / "vq")
        given = {"seed"} if budget_minutes is None else {"seed", "budget_minutes"}
        prepare(config, workdir, given)
        state = train(config, workdir)
        if int(state.step) < config.steps or last_stop():
            return common.EXIT_STOPPED
    say(f"\nstage 3 of 3: samples ({duration(time.perf_counter() - start)} so far)")
    model = load_pretrained(out / "aim")
    if config.model.condition == "text":
        held_out = captions_of(open_images(config.data.name, "validation", images))
        labels: list[int] | list[str] = example_captions(held_out, config.sample.classes) or [""]
    else:
        labels = class_ids(model, [])
    paths = sample_to_directory(model, labels, per_class, out / "samples", seed=seed)
    for path in paths:
        print(path)
    say(f"finished in {duration(time.perf_counter() - start)}")
    return 0
