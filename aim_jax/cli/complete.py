"""Complete images: keep the upper part of each and generate the rest several times.

Example:
  aim-jax complete --checkpoint fashion_mnist --images boot.png --classes "ankle boot"

Each row of the grid shows an image, its kept part, and its completions.
"""

from absl import flags

from aim_jax.cli.common import define_sampling_flags, given_settings
from aim_jax.cli.sample import chosen, define_caption_features, with_caption_features


def define_flags() -> None:
    """Define the flags of the program."""
    flags.DEFINE_string("checkpoint", "fashion_mnist", "Bundled model, model directory or workdir.")
    flags.DEFINE_list(
        "images", None, "Image files, preprocessed like the training images of the model."
    )
    flags.DEFINE_list("classes", [], "Class name or id of each image.")
    flags.DEFINE_list("captions", [], "Caption of each image, for a model of captions.")
    define_caption_features()
    flags.DEFINE_integer("rows", 0, "Rows of tokens to keep. Default: half of them.", lower_bound=0)
    flags.DEFINE_integer("count", 8, "Completions per image.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Random seed.", lower_bound=0)
    define_sampling_flags()
    flags.DEFINE_string("out", "completions.png", "File of the grid, or an existing directory.")
    flags.mark_flags_as_required(["images"])


def main() -> None:
    """Write the grid of completions and print its path."""
    from aim_jax.data import decode_image
    from aim_jax.sampling.grids import complete
    from aim_jax.utils.images import image_path, save_png
    from aim_jax.weights.load import load_pretrained

    f = flags.FLAGS
    model = with_caption_features(load_pretrained(f.checkpoint), f.caption_features)
    if not f.classes and not f.captions:
        raise ValueError("--classes or --captions: name the class or caption of each image.")
    classes = chosen(model, f.classes, f.captions, "")
    grid = complete(
        model, [decode_image(name, name) for name in f.images], classes, f.count,
        rows=f.rows or None, seed=f.seed, **given_settings(f),
    )  # fmt: skip
    print(save_png(grid, image_path(f.out, "completions.png")))
