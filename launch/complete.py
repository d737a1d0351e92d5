"""Completes pictures: keeps the upper rows of each and draws the rest, several times.

Example:
  python launch/complete.py --checkpoint fashion_mnist --images boot.png --classes "ankle boot"

A row of the grid shows a picture, what is kept of it, and its completions.
"""

import sys

from absl import app, flags

from aim_jax.launching import define_sampling_flags, errors_in_one_line, given_settings, parse

flags.DEFINE_string("checkpoint", "fashion_mnist", "Bundled model, model directory or workdir.")
flags.DEFINE_list("images", None, "Picture files, fitted as the model's training pictures were.")
flags.DEFINE_list("classes", None, "Class name or id of each picture.")
flags.DEFINE_integer("rows", 0, "Rows of codes to keep; half of them by default.", lower_bound=0)
flags.DEFINE_integer("count", 8, "Completions per picture.", lower_bound=1)
flags.DEFINE_integer("seed", 0, "Seed.", lower_bound=0)
define_sampling_flags()
flags.DEFINE_string("out", "completions.png", "The grid: a file, or a directory that is there.")
flags.mark_flags_as_required(["images", "classes"])


def main(_):
    from aim_jax.data import decode_image
    from aim_jax.sampling.grids import complete
    from aim_jax.utils.images import picture_path, save_png
    from aim_jax.weights.pretrained import class_ids, load_pretrained

    f = flags.FLAGS
    with errors_in_one_line():
        model = load_pretrained(f.checkpoint)
        grid = complete(
            model, [decode_image(name, name) for name in f.images], class_ids(model, f.classes),
            f.count, rows=f.rows or None, seed=f.seed, **given_settings(f),
        )  # fmt: skip
        print(save_png(grid, picture_path(f.out, "completions.png")))


if __name__ == "__main__":
    sys.exit(app.run(main, flags_parser=parse))
