"""Samples a labelled grid from every bundled model; what `make demo` runs.

Example:
  python launch/demo.py --out demo
"""

import sys
import time
from pathlib import Path

from absl import app, flags

from aim_jax.launching import errors_in_one_line

flags.DEFINE_string("out", "demo", "Directory for the pictures.")
flags.DEFINE_integer("per_class", 10, "Images per class.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed.", lower_bound=0)


def main(_):
    from PIL import Image

    from aim_jax.checkpoint import bundled_models, load_pretrained
    from aim_jax.gallery import class_ids, sample_to_directory
    from aim_jax.pictures import save_png, side_by_side

    f, start, grids = flags.FLAGS, time.monotonic(), []
    with errors_in_one_line():
        for name in bundled_models():
            print(f"{name}:", file=sys.stderr)
            model = load_pretrained(name)
            out = Path(f.out) / name
            classes = class_ids(model, [])
            grids += sample_to_directory(
                model, classes, f.per_class, out, seed=f.seed, batch_size=len(classes) * f.per_class
            )
        together = side_by_side([Image.open(grid) for grid in grids])
        grids.append(save_png(together, Path(f.out) / "samples.png"))
    print(f"\nPictures, {time.monotonic() - start:.0f} s after the start:")
    for path in grids:
        print(f"  {path.resolve()}")
    print(
        "\nNext:\n"
        "  .venv/bin/python launch/sample.py --checkpoint cifar10 --classes ship --cfg_scale 3\n"
        "  .venv/bin/python launch/train.py --help     # train your own; README.md shows the way\n"
    )


if __name__ == "__main__":
    sys.exit(app.run(main))
