"""Encodes a data set once, so that training of AiM reads codes instead of pictures.

Example:
  python launch/extract_codes.py --tokenizer runs/cifar10_vq_full --out codes/cifar10
  python launch/train.py --config configs/cifar10.py --workdir runs/cifar10 \\
    --config.tokenizer=runs/cifar10_vq_full --config.codes=codes/cifar10

Each split becomes a token cache OUT/SPLIT. The data set, and how its pictures are fitted, are those
that the tokenizer was trained on unless flags say otherwise. The same command continues an
interrupted run. Machines that share OUT divide the work, as connected processes (--coordinator) or
each by itself (--part 1/N to N/N). docs/imagenet.md has an example at full size.
"""

import sys
from pathlib import Path

from absl import app, flags

from aim_jax.launching import errors_in_one_line, parse
from aim_jax.parallel import processes

flags.DEFINE_string("tokenizer", None, "Model directory, training workdir or bundled model.")
flags.DEFINE_string("out", None, "Directory for the token caches.")
flags.DEFINE_string("data_name", "", "Data set; see aim_jax.data.open_images.")
flags.DEFINE_string("data", "", "Directory with the pictures.")
flags.DEFINE_list("split", ["train", "validation"], "Splits to encode.")
flags.DEFINE_enum(
    "views", "centre_flip", ["centre", "centre_flip", "ten_crop"],
    "What to store of every picture of the train split: the centre crop, it and its mirror image, "
    "or the centre and four corners of a larger square and their mirror images. Of other splits it "
    "is the centre crop.",
)  # fmt: skip
flags.DEFINE_float("crop_range", 1.1, "Side of the larger square of ten_crop, in image sizes.")
flags.DEFINE_integer("batch_size", 128, "Pictures per step and device.", lower_bound=1)
flags.DEFINE_integer("shard_size", 16384, "Pictures per file.", lower_bound=1)
flags.DEFINE_integer("workers", 0, "Processes that decode pictures; 0 uses threads.", lower_bound=0)
flags.DEFINE_string("part", "", "I/N: encode every N-th shard alone, from the I-th on.")
processes.define_flags()
flags.mark_flags_as_required(["tokenizer", "out"])


def main(_):
    from aim_jax.extract import extract

    f = flags.FLAGS
    with errors_in_one_line():
        processes.initialize_from(f)
        extract(
            f.tokenizer, Path(f.out), data_name=f.data_name, data_dir=f.data, splits=f.split,
            views=f.views, crop_range=f.crop_range, batch_size=f.batch_size,
            shard_size=f.shard_size, workers=f.workers, part=f.part,
        )  # fmt: skip


if __name__ == "__main__":
    sys.exit(app.run(main, flags_parser=parse))
