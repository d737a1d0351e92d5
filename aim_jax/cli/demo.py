"""Sample a labelled grid from every bundled model, or serve a web page for sampling.

Example:
  aim-jax demo --out demo                  # as in `make demo`
  aim-jax demo --page                      # requires pip install 'aim_jax[page]'
  aim-jax demo --page --checkpoint runs/aim --port 8000
"""

import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags


def define_flags() -> None:
    """Define the flags of the program."""
    flags.DEFINE_string("out", "demo", "Directory for the images.")
    flags.DEFINE_integer("per_class", 10, "Images per class.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Random seed.", lower_bound=0)
    flags.DEFINE_bool("page", False, "Serve a web page instead of writing images.")
    flags.DEFINE_list("checkpoint", [], "Models to show. Default: the bundled models.")
    flags.DEFINE_string(
        "host", "127.0.0.1", "Address to serve the page on; 0.0.0.0 for all network interfaces."
    )
    flags.DEFINE_integer("port", 7860, "Port to serve the page on.", lower_bound=1)


def main() -> None:
    """Write the grids, or serve the page."""
    serve_page() if flags.FLAGS.page else write_images()


def serve_page() -> None:
    """Serve the page until it is interrupted."""
    from aim_jax.cli.page import serve
    from aim_jax.weights.directories import bundled_models
    from aim_jax.weights.load import load_pretrained

    f = flags.FLAGS
    names = list(f.checkpoint or bundled_models())
    serve(dict(zip(short_names(names), map(load_pretrained, names), strict=True)), f.host, f.port)


def write_images() -> None:
    """Write a grid per model, and all grids side by side."""
    from PIL import Image

    from aim_jax.sampling.grids import sample_to_directory
    from aim_jax.utils.images import save_png, side_by_side
    from aim_jax.weights.directories import bundled_models
    from aim_jax.weights.load import load_pretrained
    from aim_jax.weights.pretrained import class_ids

    f = flags.FLAGS
    start = time.monotonic()
    grids = []
    names = list(f.checkpoint or bundled_models())
    for name, short_name in zip(names, short_names(names), strict=True):
        print(f"{name}:", file=sys.stderr)
        model = load_pretrained(name)
        out = Path(f.out) / short_name
        classes = class_ids(model, [])
        grids += sample_to_directory(
            model, classes, f.per_class, out, seed=f.seed, batch_size=len(classes) * f.per_class
        )
    together = side_by_side([Image.open(grid) for grid in grids])
    grids.append(save_png(together, Path(f.out) / "samples.png"))
    print(f"\nImages written in {time.monotonic() - start:.0f} s:")
    for path in grids:
        print(f"  {path.resolve()}")
    command = own_command()
    print(
        "\nNext:\n"
        f"  {command} sample --checkpoint cifar10 --classes ship --cfg_scale 3\n"
        f"  {command} train --help     # train on your images\n"
    )


def short_names(paths: Sequence[str]) -> list[str]:
    """Return the last parts of paths, those that occur twice after the number of the path."""
    names = [Path(path).name for path in paths]
    return [
        name if names.count(name) == 1 else f"{number}_{name}" for number, name in enumerate(names)
    ]


def own_command() -> str:
    """Return the command that runs this installation from the current directory."""
    script = Path(sys.executable).with_name("aim-jax")
    on_path = shutil.which("aim-jax")
    if on_path and Path(on_path) == script:
        return "aim-jax"
    if not script.exists():
        return f"{sys.executable} -m aim_jax"
    # `make demo` runs in an environment that is not activated.
    current = Path.cwd()
    return str(script.relative_to(current) if script.is_relative_to(current) else script)
