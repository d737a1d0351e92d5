"""Scores a model, or images: FID, sFID, Inception Score, KID, precision, recall, density, coverage.

Examples:
  python launch/evaluate.py --checkpoint cifar10 --reference cifar10:train --inception FILE
  python launch/evaluate.py --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz \\
      --inception FILE
  python launch/evaluate.py --checkpoint cifar10 --reconstruct --reference cifar10:test \\
      --inception FILE   # the tokenizer: rFID, PSNR, SSIM, use of the codebook

Samples are balanced over the classes, and an interrupted run goes on. --out gets samples.npz
(arr_0, uint8, NHWC, for any evaluator), report.json, report.md, images.png, and neighbours.png with
the nearest images of the reference. --inception is the network of 2015 in any form that people
have; docs/evaluation.md tells more.
"""

import os
import sys
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from aim_jax.launching import cores_as_devices, errors_in_one_line, parse
from aim_jax.ops.native.build import cache_directory
from aim_jax.parallel import processes

config_flags.DEFINE_config_file(
    "config", str(Path(__file__).parents[1] / "configs" / "eval.py"), "A file of configs/."
)
flags.DEFINE_string("checkpoint", "", "Bundled model, model directory or workdir.")
flags.DEFINE_string(
    "samples", "", "Images to score instead of sampling: npz, folder, or NAME:SPLIT of a data set."
)
flags.DEFINE_string(
    "reference", "", "npz of images, ADM reference npz, folder, or NAME:SPLIT of a data set."
)
flags.DEFINE_string("data", "", "Directory with the data set; short for --config.data.dir.")
flags.DEFINE_string(
    "inception", os.environ.get("AIM_JAX_INCEPTION", ""), "Weights; $AIM_JAX_INCEPTION by default."
)
flags.DEFINE_bool("reconstruct", False, "Score the tokenizer on the reference's pictures.")
flags.DEFINE_string("out", "evaluation", "Directory for the results.")
processes.define_flags()


def main(_):
    from aim_jax.evaluation.evaluate import evaluate
    from aim_jax.weights.convert.inception import EXPECTED, load_inception
    from aim_jax.weights.pretrained import load_pretrained

    f = flags.FLAGS
    cores_as_devices()
    with errors_in_one_line():
        processes.initialize_from(f)
        if not f.reference or bool(f.checkpoint) == bool(f.samples and not f.reconstruct):
            raise ValueError("give --reference, and either --checkpoint or --samples.")
        if not f.inception:
            raise ValueError(
                f"--inception is missing: {EXPECTED}. docs/evaluation.md says where to get one."
            )
        f.config.data.dir = f.data or f.config.data.dir
        model = load_pretrained(f.checkpoint) if f.checkpoint else None
        report = evaluate(
            model, f.samples, f.reference, load_inception(f.inception), f.config, Path(f.out),
            cache_directory() / "references", reconstructions=f.reconstruct,
        )  # fmt: skip
        if report:
            print((Path(f.out) / "report.md").read_text())


if __name__ == "__main__":
    sys.exit(app.run(main, flags_parser=parse))
