r"""Score a model or images: FID, sFID, Inception Score, KID, precision, recall, density, coverage.

Examples:
  aim-jax evaluate --checkpoint cifar10 --reference cifar10:train --inception FILE
  aim-jax evaluate --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz \
      --inception FILE
  aim-jax evaluate --checkpoint cifar10 --reconstruct --reference cifar10:test \
      --inception FILE   # the tokenizer: rFID, PSNR, SSIM, codebook usage
  aim-jax evaluate --checkpoint runs/mine/aim --reference captioned:validation \
      --inception FILE   # a model of captions, from those of the reference

Samples are balanced over the classes or captions, and an interrupted run resumes. The program
writes to --out: samples.npz (arr_0, uint8, NHWC, for any evaluator; labels or captions),
report.json, report.md, images.png, and neighbours.png with the nearest reference images. If
--reference holds only the statistics mu and sigma, metrics that need its images are left out.
--inception accepts the 2015 Inception network in any common format; see the page "Evaluation" of
the documentation.
"""

import os
from pathlib import Path

from absl import flags

from aim_jax.cli.common import cores_as_devices, define_config
from aim_jax.cli.sample import define_caption_features, with_caption_features
from aim_jax.parallel import processes
from aim_jax.utils.cache import cache_directory


def define_flags() -> None:
    """Define the flags of the program."""
    define_config("Name of a recipe, or a file.", default="eval")
    flags.DEFINE_string("checkpoint", "", "Bundled model, model directory or workdir.")
    flags.DEFINE_string(
        "samples",
        "",
        "Images to score instead of sampling: npz, folder, or NAME:SPLIT of a dataset.",
    )
    flags.DEFINE_string(
        "reference",
        "",
        "npz of images, ADM reference npz, npz of FID statistics alone (mu, sigma), folder, or "
        "NAME:SPLIT of a dataset.",
    )
    flags.DEFINE_string(
        "captions",
        "",
        "Prompts of a model of captions: a text file of one caption per line, or NAME:SPLIT of a "
        "dataset; short for --config.captions. Default: the captions of the reference.",
    )
    define_caption_features()
    flags.DEFINE_string("data", "", "Directory of the dataset; short for --config.data.dir.")
    flags.DEFINE_string(
        "inception",
        os.environ.get("AIM_JAX_INCEPTION", ""),
        "Weights of the Inception network. Default: $AIM_JAX_INCEPTION.",
    )
    flags.DEFINE_bool("reconstruct", False, "Score the tokenizer on the reference images.")
    flags.DEFINE_string("out", "evaluation", "Directory for the results.")
    processes.define_flags()


def main() -> None:
    """Evaluate and print the report."""
    from aim_jax.evaluation.evaluate import evaluate
    from aim_jax.utils.names import printable
    from aim_jax.weights.convert.inception import EXPECTED, load_inception
    from aim_jax.weights.load import load_pretrained

    f = flags.FLAGS
    cores_as_devices()
    processes.initialize_from(f)
    if not f.reference or bool(f.checkpoint) == bool(f.samples and not f.reconstruct):
        raise ValueError("pass --reference, and either --checkpoint or --samples.")
    if not f.inception:
        raise ValueError(
            f"--inception is missing: {EXPECTED}. See the page 'Evaluation' of the documentation "
            "for where to get one."
        )
    f.config.data.dir = f.data or f.config.data.dir
    f.config.captions = f.captions or f.config.captions
    model = None
    if f.checkpoint:
        model = with_caption_features(load_pretrained(f.checkpoint), f.caption_features)
    report = evaluate(
        model, f.samples, f.reference, load_inception(f.inception), f.config, Path(f.out),
        cache_directory("references"), reconstructions=f.reconstruct,
    )  # fmt: skip
    if report:
        print(printable((Path(f.out) / "report.md").read_text()))
