"""Samples a labelled grid from every bundled model, or serves a page to sample in a browser.

Example:
  aim-jax demo --out demo                  # what `make demo` runs
  aim-jax demo --page                      # needs pip install 'aim_jax[page]'
  aim-jax demo --page --checkpoint runs/aim --port 8000
"""

import shutil
import sys
import time
from pathlib import Path

from absl import flags


def define_flags() -> None:
    flags.DEFINE_string("out", "demo", "Directory for the pictures.")
    flags.DEFINE_integer("per_class", 10, "Images per class.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Seed.", lower_bound=0)
    flags.DEFINE_bool("page", False, "Serve a page instead of writing pictures.")
    flags.DEFINE_list("checkpoint", [], "Models to show; the bundled ones by default.")
    flags.DEFINE_string(
        "host", "127.0.0.1", "Address of the page; 0.0.0.0 is all of this machine's."
    )
    flags.DEFINE_integer("port", 7860, "Port of the page.", lower_bound=1)


def main() -> None:
    serve_page() if flags.FLAGS.page else write_pictures()


def serve_page() -> None:
    from aim_jax.cli.page import serve
    from aim_jax.weights.pretrained import bundled_models, load_pretrained

    f = flags.FLAGS
    names = f.checkpoint or bundled_models()
    serve({name: load_pretrained(name) for name in names}, f.host, f.port)


def write_pictures() -> None:
    from PIL import Image

    from aim_jax.sampling.grids import sample_to_directory
    from aim_jax.utils.images import save_png, side_by_side
    from aim_jax.weights.pretrained import bundled_models, class_ids, load_pretrained

    f, start, grids = flags.FLAGS, time.monotonic(), []
    names = f.checkpoint or bundled_models()
    for number, name in enumerate(names):
        print(f"{name}:", file=sys.stderr)
        model = load_pretrained(name)
        alone = [Path(other).name for other in names].count(Path(name).name) == 1
        out = Path(f.out) / (Path(name).name if alone else f"{number}_{Path(name).name}")
        classes = class_ids(model, [])
        grids += sample_to_directory(
            model, classes, f.per_class, out, seed=f.seed, batch_size=len(classes) * f.per_class
        )
    together = side_by_side([Image.open(grid) for grid in grids])
    grids.append(save_png(together, Path(f.out) / "samples.png"))
    print(f"\nPictures, {time.monotonic() - start:.0f} s after the start:")
    for path in grids:
        print(f"  {path.resolve()}")
    command = own_command()
    print(
        "\nNext:\n"
        f"  {command} sample --checkpoint cifar10 --classes ship --cfg_scale 3\n"
        f"  {command} train --help     # train on images of your own\n"
    )


def own_command() -> str:
    """Returns how a user at this prompt runs the installation that this process belongs to."""
    script = Path(sys.executable).with_name("aim-jax")
    on_path = shutil.which("aim-jax")
    if on_path and Path(on_path) == script:
        return "aim-jax"
    if not script.exists():
        return f"{sys.executable} -m aim_jax"
    # `make demo` runs in an environment that nobody has activated.
    here = Path.cwd()
    return str(script.relative_to(here) if script.is_relative_to(here) else script)
