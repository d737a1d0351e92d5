"""Exports a model as a directory that draws images without this library.

Example:
  python launch/export.py --checkpoint cifar10 --out exported
  python exported/sample.py --labels 3,5,8 --out images.png

sample.py there needs jax, flatbuffers, safetensors and pillow alone, and runs on CPU, CUDA and TPU.
The step of the token loop comes with it, as a jax.export artifact and as StableHLO; docs/export.md
tells more.
"""

import sys

from absl import app, flags

from aim_jax.launching import errors_in_one_line, parse

flags.DEFINE_string("checkpoint", None, "Bundled name, model directory, or workdir of a run.")
flags.DEFINE_string("out", None, "Directory to make.")
flags.DEFINE_integer("images", 1, "Images at once in the step of the token loop.", lower_bound=1)
flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16", "float16"], "Type of the stored weights."
)
flags.mark_flags_as_required(["checkpoint", "out"])


def main(_):
    with errors_in_one_line():
        from aim_jax.sampling.export import save_exported
        from aim_jax.utils.logging import say
        from aim_jax.weights.pretrained import load_pretrained

        f = flags.FLAGS
        out = save_exported(load_pretrained(f.checkpoint), f.out, f.images, f.dtype)
        say(f"wrote {out}; python {out}/sample.py draws from it")


if __name__ == "__main__":
    sys.exit(app.run(main, flags_parser=parse))
