r"""Search for the best sampling settings of a model, with few samples per combination.

Examples:
  aim-jax sweep --checkpoint cifar10 --reference cifar10:train --inception FILE \
      --cfg_scale 1,1.5,2,3 --out sweep
  aim-jax sweep --checkpoint runs/mine --reference folder:train --data images \
      --inception FILE --cfg_scale 1,2,4 --top_p 0.9,1 --write_defaults

The program writes sweep.json, sweep.md and sweep.png to --out. An interrupted sweep resumes. The
best combination is the one with the best --metric; KID is less biased than FID for few samples.
"""

import os
from pathlib import Path

from absl import flags

from aim_jax.cli.common import cores_as_devices, define_config, numbers
from aim_jax.sampling.config import SETTINGS
from aim_jax.utils.cache import cache_directory
from aim_jax.utils.files import replacing


def define_flags() -> None:
    """Define the flags of the program."""
    define_config("Name of a recipe, or a file.", default="eval")
    flags.DEFINE_string("checkpoint", "", "Bundled model, model directory or workdir.")
    flags.DEFINE_string("reference", "", "Reference, as in aim-jax evaluate.")
    flags.DEFINE_string("data", "", "Directory of the dataset; short for --config.data.dir.")
    flags.DEFINE_string(
        "inception",
        os.environ.get("AIM_JAX_INCEPTION", ""),
        "Weights of the Inception network. Default: $AIM_JAX_INCEPTION.",
    )
    flags.DEFINE_integer(
        "num_samples", 2000, "Samples per combination; replaces config.num_samples.", 10
    )
    for name in SETTINGS:
        flags.DEFINE_list(name, [], "Values to try. Default: that of the model.")
    flags.DEFINE_enum(
        "metric",
        "fid",
        ["fid", "sfid", "kid", "inception_score"],
        "Metric that selects the best combination.",
    )
    flags.DEFINE_bool(
        "write_defaults", False, "Write the best combination to the model as its defaults."
    )
    flags.DEFINE_string("out", "sweep", "Directory for the results.")


def main() -> None:
    """Run the sweep, print the table and write the results."""
    from aim_jax.evaluation import sweep
    from aim_jax.utils.names import printable
    from aim_jax.utils.plots import pyplot
    from aim_jax.weights.convert.inception import EXPECTED, load_inception
    from aim_jax.weights.load import load_pretrained

    f = flags.FLAGS
    out = Path(f.out)
    cores_as_devices()
    grid = {name: numbers(name, getattr(f, name)) for name in SETTINGS if getattr(f, name)}
    if not (f.checkpoint and f.reference and grid):
        raise ValueError("pass --checkpoint, --reference, and values such as --cfg_scale 1,2.")
    if not f.inception:
        raise ValueError(
            f"--inception is missing: {EXPECTED}. See the page 'Evaluation' of the documentation "
            "for where to get one."
        )
    if f.config.stage != "eval":
        raise ValueError("--config is a training configuration; expected one like --config eval.")
    sweep.check_metric(f.metric, f.reference)
    if f.write_defaults:
        sweep.check_writable(f.checkpoint, f.config)
    f.config.num_samples = f.num_samples
    f.config.data.dir = f.data or f.config.data.dir
    pyplot()  # fails early if matplotlib is missing
    model = load_pretrained(f.checkpoint)
    rows = sweep.sweep(
        model, grid, f.reference, load_inception(f.inception), f.config, out,
        cache_directory("references"),
    )  # fmt: skip
    with replacing(out / "sweep.md") as partial:
        partial.write_text(sweep.table(rows))
    best = sweep.best_of(rows, f.metric)
    text = sweep.table(rows, best)
    with replacing(out / "sweep.md") as partial:
        partial.write_text(text)
    print(printable(text))
    print(sweep.draw(rows, out / "sweep.png"))
    if f.write_defaults:
        changed = sweep.write_defaults(f.checkpoint, best["settings"])
        print(f"wrote the settings with the best {f.metric} to {changed}")
