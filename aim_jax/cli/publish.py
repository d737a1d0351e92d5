"""Write a model and its generated card to a directory, and optionally upload it to the hub.

Example:
  aim-jax publish --checkpoint runs/aim --evaluation evaluation --out published
  aim-jax publish --checkpoint runs/aim --out published --repository owner/name
  aim-jax publish --checkpoint cifar10 --tokenizer runs/decoder --out models/mine
"""

from pathlib import Path

from absl import flags


def define_flags() -> None:
    """Define the flags of the program."""
    flags.DEFINE_string("checkpoint", None, "Bundled model, model directory, or workdir of a run.")
    flags.DEFINE_string("out", None, "Directory to create.")
    flags.DEFINE_string(
        "tokenizer", "", "Another tokenizer with the same tokens and a better decoder."
    )
    flags.DEFINE_string(
        "evaluation", "", "Results of aim-jax evaluate for this model, for the card."
    )
    flags.DEFINE_string(
        "repository",
        "",
        "Repository owner/name on the hub to upload to; requires pip install 'aim_jax[hub]'.",
    )
    flags.mark_flags_as_required(["checkpoint", "out"])


def main() -> None:
    """Write the directory, upload it if requested, and print its path."""
    from aim_jax.evaluation.report import read_report
    from aim_jax.utils.logging import say
    from aim_jax.weights.publish import publish

    f = flags.FLAGS
    report = read_report(Path(f.evaluation)) if f.evaluation else None
    say(f"wrote {publish(f.checkpoint, f.out, report, f.repository, f.tokenizer)}")
