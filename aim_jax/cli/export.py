"""Export a model as a directory that generates images without this library.

Example:
  aim-jax export --checkpoint cifar10 --out exported
  python exported/sample.py --classes cat,dog,ship --per_class 4 --out images.png

The exported sample.py requires only jax, flatbuffers, safetensors and pillow, and runs on CPU, CUDA
and TPU. The directory also holds the step of the token loop as a jax.export artifact and as
StableHLO; see the page "Export" of the documentation.
"""

from absl import flags

from aim_jax.sampling.config import SCHEDULES


def define_flags() -> None:
    """Define the flags of the program."""
    flags.DEFINE_string("checkpoint", None, "Bundled model, model directory, or workdir of a run.")
    flags.DEFINE_string("out", None, "Directory to create.")
    flags.DEFINE_integer("images", 1, "Batch size of the step of the token loop.", lower_bound=1)
    flags.DEFINE_enum(
        "dtype", "float32", ["float32", "bfloat16", "float16"], "Dtype of the stored weights."
    )
    flags.DEFINE_enum(
        "cfg_schedule",
        None,
        list(SCHEDULES),
        "Growth of the guidance scale over an image, which is compiled in. Default: that of the "
        "model.",
    )
    flags.mark_flags_as_required(["checkpoint", "out"])


def main() -> None:
    """Write the exported model and print its path."""
    from aim_jax.sampling.export import save_exported
    from aim_jax.utils.logging import say
    from aim_jax.weights.load import load_pretrained

    f = flags.FLAGS
    out = save_exported(load_pretrained(f.checkpoint), f.out, f.images, f.dtype, f.cfg_schedule)
    say(f"wrote {out}; sample from it with python {out}/sample.py")
