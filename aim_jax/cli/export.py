"""Exports a model as a directory that draws images without this library.

Example:
  aim-jax export --checkpoint cifar10 --out exported
  python exported/sample.py --labels 3,5,8 --out images.png

sample.py there needs jax, flatbuffers, safetensors and pillow alone, and runs on CPU, CUDA and TPU.
The step of the token loop comes with it, as a jax.export artifact and as StableHLO; the
documentation's page Export tells more.
"""

from absl import flags


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "Bundled name, model directory, or workdir of a run.")
    flags.DEFINE_string("out", None, "Directory to make.")
    flags.DEFINE_integer(
        "images", 1, "Images at once in the step of the token loop.", lower_bound=1
    )
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16", "float16"], "Type of the stored weights."
    )
    flags.mark_flags_as_required(["checkpoint", "out"])


def main() -> None:
    from aim_jax.sampling.export import save_exported
    from aim_jax.utils.logging import say
    from aim_jax.weights.pretrained import load_pretrained

    f = flags.FLAGS
    out = save_exported(load_pretrained(f.checkpoint), f.out, f.images, f.dtype)
    say(f"wrote {out}; python {out}/sample.py draws from it")
