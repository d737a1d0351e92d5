"""Completes pictures: keeps the upper rows of each and draws the rest, several times.

Example:
  aim-jax complete --checkpoint fashion_mnist --images boot.png --classes "ankle boot"

A row of the grid shows a picture, what is kept of it, and its completions.
"""

from absl import flags

from aim_jax.cli.common import define_sampling_flags, given_settings


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", "fashion_mnist", "Bundled model, model directory or workdir.")
    flags.DEFINE_list(
        "images", None, "Picture files, fitted as the model's training pictures were."
    )
    flags.DEFINE_list("classes", None, "Class name or id of each picture.")
    flags.DEFINE_integer(
        "rows", 0, "Rows of codes to keep; half of them by default.", lower_bound=0
    )
    flags.DEFINE_integer("count", 8, "Completions per picture.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed.", lower_bound=0)
    define_sampling_flags()
    flags.DEFINE_string("out", "completions.png", "The grid: a file, or a directory that is there.")
    flags.mark_flags_as_required(["images", "classes"])


def main() -> None:
    from aim_jax.data import decode_image
    from aim_jax.sampling.grids import complete
    from aim_jax.utils.images import picture_path, save_png
    from aim_jax.weights.pretrained import class_ids, load_pretrained

    f = flags.FLAGS
    model = load_pretrained(f.checkpoint)
    grid = complete(
        model, [decode_image(name, name) for name in f.images], class_ids(model, f.classes),
        f.count, rows=f.rows or None, seed=f.seed, **given_settings(f),
    )  # fmt: skip
    print(save_png(grid, picture_path(f.out, "completions.png")))
