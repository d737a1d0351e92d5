"""Compares samples that differ in one setting, or goes from one class to another.

Examples:
  aim-jax compare --checkpoint cifar10 --cfg_scale 1,1.5,2,3,4,6 --out guidance.png
  aim-jax compare --checkpoint cifar10 --temperature 0.6,0.8,1,1.2 --classes ship,horse
  aim-jax compare --checkpoint cifar10 --between automobile,ship --out interpolation.png

A row of the grid is a value, or a mixture of the two classes; a column has the same randomness.
"""

from absl import flags

from aim_jax.cli.common import numbers
from aim_jax.sampling.config import SETTINGS


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", "cifar10", "Bundled model, model directory or workdir.")
    flags.DEFINE_list("classes", [], "Class of each column; all classes (at most 20) by default.")
    for name, setting in SETTINGS.items():
        flags.DEFINE_list(name, [], f"Values to compare. {setting.help}")
    flags.DEFINE_list("between", [], "Two classes to go from and to.")
    flags.DEFINE_integer("steps", 7, "Rows of --between.", lower_bound=2)
    flags.DEFINE_integer("count", 10, "Columns of --between.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed.", lower_bound=0)
    flags.DEFINE_string("out", "comparison.png", "The grid: a file, or a directory that is there.")


def main() -> None:
    from aim_jax.sampling.grids import compare_settings, interpolate
    from aim_jax.utils.images import picture_path, save_png
    from aim_jax.weights.pretrained import class_ids, load_pretrained

    f = flags.FLAGS
    given = [name for name in (*SETTINGS, "between") if f[name].value]
    if len(given) != 1:
        raise ValueError(
            f"expected one of {', '.join(f'--{name}' for name in SETTINGS)} and --between, "
            f"not {', '.join(given) or 'none'}."
        )
    if f.between and (len(f.between) != 2 or f.classes):
        raise ValueError("--between takes two classes, such as cat,dog, and no --classes.")
    (setting,) = given
    values = [] if f.between else numbers(setting, getattr(f, setting))
    model = load_pretrained(f.checkpoint)
    if f.between:
        first, second = class_ids(model, f.between)
        grid = interpolate(model, first, second, f.steps, f.count, f.seed)
    else:
        grid = compare_settings(model, class_ids(model, f.classes), setting, values, f.seed)
    print(save_png(grid, picture_path(f.out, "comparison.png")))
