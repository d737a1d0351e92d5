"""Compare samples that differ in one setting, or interpolate between two classes.

Examples:
  aim-jax compare --checkpoint cifar10 --cfg_scale 1,1.5,2,3,4,6 --out guidance.png
  aim-jax compare --checkpoint cifar10 --temperature 0.6,0.8,1,1.2 --classes ship,horse
  aim-jax compare --checkpoint cifar10 --between automobile,ship --out interpolation.png

Each row of the grid is one value, or one mixture of the two classes. All images of a column have
the same randomness.
"""

from absl import flags

from aim_jax.cli.common import numbers
from aim_jax.sampling.config import SETTINGS


def define_flags() -> None:
    """Define the flags of the program."""
    flags.DEFINE_string("checkpoint", "cifar10", "Bundled model, model directory or workdir.")
    flags.DEFINE_list("classes", [], "Class of each column. Default: all classes, at most 20.")
    for name, setting in SETTINGS.items():
        flags.DEFINE_list(name, [], f"Values to compare. {setting.help}")
    flags.DEFINE_list("between", [], "Two classes to interpolate between.")
    flags.DEFINE_integer("steps", 7, "Number of rows of --between.", lower_bound=2)
    flags.DEFINE_integer("count", 10, "Number of columns of --between.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Random seed.", lower_bound=0)
    flags.DEFINE_string("out", "comparison.png", "File of the grid, or an existing directory.")


def main() -> None:
    """Write the grid and print its path."""
    from aim_jax.sampling.grids import compare_settings, interpolate
    from aim_jax.utils.images import image_path, save_png
    from aim_jax.weights.load import load_pretrained
    from aim_jax.weights.pretrained import class_ids

    f = flags.FLAGS
    names = [name for name in (*SETTINGS, "between") if f[name].value]
    if len(names) != 1:
        raise ValueError(
            f"expected exactly one of {', '.join(f'--{name}' for name in SETTINGS)} and --between, "
            f"got {', '.join(names) or 'none'}."
        )
    if f.between and (len(f.between) != 2 or f.classes):
        raise ValueError("--between requires two classes, such as cat,dog, without --classes.")
    (setting,) = names
    values = [] if f.between else numbers(setting, getattr(f, setting))
    model = load_pretrained(f.checkpoint)
    if f.between:
        first, second = class_ids(model, f.between)
        grid = interpolate(model, first, second, f.steps, f.count, f.seed)
    else:
        grid = compare_settings(model, class_ids(model, f.classes), setting, values, f.seed)
    print(save_png(grid, image_path(f.out, "comparison.png")))
