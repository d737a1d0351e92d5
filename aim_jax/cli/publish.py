"""Makes a directory to publish: a model and its generated card; uploads it on request.

Example:
  aim-jax publish --checkpoint runs/aim --evaluation evaluation --out published
  aim-jax publish --checkpoint runs/aim --out published --repository owner/name
  aim-jax publish --checkpoint cifar10 --tokenizer runs/decoder --out models/mine
"""

import json
from pathlib import Path

from absl import flags


def define_flags() -> None:
    flags.DEFINE_string("checkpoint", None, "Bundled name, model directory, or workdir of a run.")
    flags.DEFINE_string("out", None, "Directory to make.")
    flags.DEFINE_string(
        "tokenizer", "", "Another tokenizer of the same codes, with a better decoder."
    )
    flags.DEFINE_string("evaluation", "", "Directory of aim-jax evaluate, for the card.")
    flags.DEFINE_string(
        "repository", "", "owner/name on the hub, to upload to; needs pip install 'aim_jax[hub]'."
    )
    flags.mark_flags_as_required(["checkpoint", "out"])


def main() -> None:
    from aim_jax.utils.logging import say
    from aim_jax.weights.publish import publish

    f = flags.FLAGS
    report = json.loads((Path(f.evaluation) / "report.json").read_text()) if f.evaluation else None
    say(f"wrote {publish(f.checkpoint, f.out, report, f.repository, f.tokenizer)}")
