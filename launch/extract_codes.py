"""Encodes a data set once, so that training of AiM reads codes instead of pictures.

Example:
  python launch/extract_codes.py --tokenizer runs/cifar10_vq --out codes/cifar10
  python launch/train.py --config configs/cifar10.py --workdir runs/cifar10 \\
    --config.tokenizer=runs/cifar10_vq --config.codes=codes/cifar10

Each split becomes a token cache OUT/SPLIT. The data set, and how its pictures are fitted, are those
that the tokenizer was trained on unless flags say otherwise. The same command continues an
interrupted run. Machines that share OUT divide the work, as connected processes (--coordinator) or
each by itself (--part 1/N to N/N). docs/imagenet.md has an example at full size.
"""

import sys
import time
from pathlib import Path

from absl import app, flags

from aim_jax import distributed
from aim_jax.launching import errors_in_one_line

FLAGS = flags.FLAGS
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
distributed.define_flags()
flags.mark_flags_as_required(["tokenizer", "out"])


def extract() -> None:
    """Does what the flags say."""
    import jax
    from ml_collections import ConfigDict

    from aim_jax import data
    from aim_jax.codes import local_encoder, open_tokenizer, tokenizer_fingerprint
    from aim_jax.config import image_spec
    from aim_jax.monitor import Progress, say

    distributed.initialize_from(FLAGS)
    part = jax.process_index(), jax.process_count()
    if FLAGS.part and part[1] > 1:
        raise ValueError("--part is for processes that are not connected; these divide the work")
    if FLAGS.part:
        part = data.parse_part(FLAGS.part)
    tokenizer = open_tokenizer(FLAGS.tokenizer)
    vq = tokenizer.vq_config
    if "data" not in tokenizer.info:
        raise ValueError(f"{FLAGS.tokenizer} does not say which pictures it was trained on")
    described = ConfigDict(tokenizer.info["data"])
    name, spec = FLAGS.data_name or described.name, image_spec(described)
    folder = FLAGS.data or None
    views = {
        split: data.make_views(
            FLAGS.views if split == "train" else "centre", spec, FLAGS.crop_range
        )
        for split in FLAGS.split
    }
    sources = {split: data.open_images(name, split, folder) for split in FLAGS.split}
    side = spec.image_size // vq.downsampling
    writers = {
        split: data.CacheWriter(
            Path(FLAGS.out) / split,
            tokenizer=tokenizer_fingerprint(tokenizer),
            tokenizer_name=tokenizer.name,
            vocab_size=vq.n_embed,
            grid=(side, side),
            class_names=source.class_names,
            views=views[split].names,
            num_examples=len(source),
            dataset=name,
            split=split,
            pictures=views[split].pictures,
            shard_size=FLAGS.shard_size,
        )
        for split, source in sources.items()
    }
    encode, devices = local_encoder(tokenizer)
    missing = [split for split, writer in writers.items() if writer.missing()]
    for split in missing:
        data.check_images(sources[split], spec)
    which = f", part {part[0] + 1}/{part[1]}" if part[1] > 1 else ""
    for split in missing:
        data.extract_codes(
            encode,
            sources[split],
            views[split],
            writers[split],
            FLAGS.batch_size * devices,
            part=part,
            workers=FLAGS.workers,
            progress=Progress(f"encoding {split}{which}"),
        )
    for writer in writers.values():
        left, shards = len(finish(writer)), len(writer.ranges)
        names, pictures = writer.manifest["views"], writer.manifest["num_examples"]
        if left:
            say(f"{writer.path}: {left} of {shards} shards are left to other parts")
        else:
            say(f"{writer.path}: {pictures} pictures, {len(names)} views, {side * side} codes each")


def finish(writer) -> list[int]:
    """Completes a cache if it can be; connected processes first wait for each other's shards."""
    import jax

    from aim_jax.monitor import Progress

    waiting = Progress(f"waiting for the other processes to write into {writer.path}", "shards")
    while jax.process_count() > 1 and (missing := writer.missing()):
        waiting(len(writer.ranges) - len(missing), len(writer.ranges))
        time.sleep(1)
    return writer.finish() if jax.process_index() == 0 else []


def main(_):
    with errors_in_one_line():
        extract()


if __name__ == "__main__":
    sys.exit(app.run(main))
