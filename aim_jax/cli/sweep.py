"""Looks for the sampling settings that suit a model best: few samples for every combination.

Examples:
  aim-jax sweep --checkpoint cifar10 --reference cifar10:train --inception FILE \\
      --cfg_scale 1,1.5,2,3 --out sweep
  aim-jax sweep --checkpoint runs/mine --reference folder:train --data pictures \\
      --inception FILE --cfg_scale 1,2,4 --top_p 0.9,1 --write_defaults

--out gets sweep.json, sweep.md and sweep.png. An interrupted sweep goes on. The best setting is the
one with the best --metric; KID is less biased than FID where samples are few.
"""

import os
from pathlib import Path

from absl import flags

from aim_jax.cli.common import cores_as_devices, define_config, numbers
from aim_jax.ops.native.build import cache_directory
from aim_jax.sampling.config import SETTINGS


def define_flags() -> None:
    define_config("A recipe's name or a file.", default="eval")
    flags.DEFINE_string("checkpoint", "", "Bundled model, model directory or workdir.")
    flags.DEFINE_string("reference", "", "As of aim-jax evaluate.")
    flags.DEFINE_string("data", "", "Directory with the data set; short for --config.data.dir.")
    flags.DEFINE_string(
        "inception",
        os.environ.get("AIM_JAX_INCEPTION", ""),
        "Weights; $AIM_JAX_INCEPTION by default.",
    )
    flags.DEFINE_integer("num_samples", 2000, "For every combination, not config.num_samples.", 10)
    for name in SETTINGS:
        flags.DEFINE_list(name, [], "Values to try; the model's own by default.")
    flags.DEFINE_enum("metric", "fid", ["fid", "sfid", "kid", "inception_score"], "To choose by.")
    flags.DEFINE_bool("write_defaults", False, "Make the best setting the model's own.")
    flags.DEFINE_string("out", "sweep", "Directory for the results.")


def main() -> None:
    from aim_jax.evaluation import sweep
    from aim_jax.utils.plots import pyplot
    from aim_jax.weights.convert.inception import EXPECTED, load_inception
    from aim_jax.weights.pretrained import load_pretrained

    f, out = flags.FLAGS, Path(flags.FLAGS.out)
    cores_as_devices()
    grid = {name: numbers(name, getattr(f, name)) for name in SETTINGS if getattr(f, name)}
    if not (f.checkpoint and f.reference and grid):
        raise ValueError("give --checkpoint, --reference, and values such as --cfg_scale 1,2.")
    if not f.inception:
        raise ValueError(
            f"--inception is missing: {EXPECTED}. The documentation's page Evaluation says where "
            "to get one."
        )
    if f.config.stage != "eval":
        raise ValueError("--config is of a training; expected one like --config eval.")
    if f.write_defaults:
        sweep.check_writable(f.checkpoint, f.config)
    f.config.num_samples, f.config.data.dir = f.num_samples, f.data or f.config.data.dir
    pyplot()  # before any long work starts, rather than after it
    model = load_pretrained(f.checkpoint)
    rows = sweep.sweep(
        model, grid, f.reference, load_inception(f.inception), f.config, out,
        cache_directory() / "references",
    )  # fmt: skip
    (out / "sweep.md").write_text(sweep.table(rows))
    best = sweep.best_of(rows, f.metric)
    text = sweep.table(rows, best)
    (out / "sweep.md").write_text(text)
    print(text)
    print(sweep.draw(rows, out / "sweep.png"))
    if f.write_defaults:
        changed = sweep.write_defaults(f.checkpoint, best["settings"])
        print(f"the setting with the best {f.metric} is now in {changed}")
