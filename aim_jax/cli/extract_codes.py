r"""Encode a dataset once, so that training of AiM reads tokens instead of images.

Example:
  aim-jax extract_codes --tokenizer runs/cifar10_vq_full --out codes/cifar10
  aim-jax train --config cifar10 --workdir runs/cifar10 \
    --config.tokenizer=runs/cifar10_vq_full --config.codes=codes/cifar10

Each split becomes a token cache OUT/SPLIT. By default, dataset and preprocessing are those that the
tokenizer was trained with; a folder of images has to be named again (--data). The same command
resumes an interrupted run. Machines that share OUT can divide the work, either as connected
processes (--coordinator) or independently (--part 1/N to N/N). See the page "ImageNet" of the
documentation for a full-size example.
"""

import contextlib
import time
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from aim_jax import data
from aim_jax.data.preprocessing import image_spec
from aim_jax.parallel import processes
from aim_jax.parallel.ownership import owned
from aim_jax.parallel.processes import wait_for_all
from aim_jax.utils.logging import Progress, say
from aim_jax.weights.tokenizer import local_encoder, open_tokenizer, tokenizer_fingerprint


def define_flags() -> None:
    """Define the flags of the program."""
    flags.DEFINE_string("tokenizer", None, "Model directory, training workdir or bundled model.")
    flags.DEFINE_string("out", None, "Directory for the token caches.")
    flags.DEFINE_string(
        "data_name", "", "Dataset; see aim_jax.data.open_images. captions: with their captions."
    )
    flags.DEFINE_string("data", "", "Directory with the images.")
    flags.DEFINE_list("split", ["train", "validation"], "Splits to encode.")
    flags.DEFINE_enum(
        "views", "centre_flip", ["centre", "centre_flip", "ten_crop"],
        "Views to store of every image of the train split: the centre crop; the centre crop and "
        "its mirror image; or the centre and four corners of a larger square, and their mirror "
        "images. Other splits store the centre crop.",
    )  # fmt: skip
    flags.DEFINE_float(
        "crop_range", 1.1, "Side of the larger square of ten_crop, as a multiple of the image size."
    )
    flags.DEFINE_integer(
        "image_size", 0, "Side of the images in pixels. Default: that of the tokenizer's training.",
        lower_bound=0,
    )  # fmt: skip
    flags.DEFINE_integer("batch_size", 128, "Images per step and device.", lower_bound=1)
    flags.DEFINE_integer("shard_size", 16384, "Images per file.", lower_bound=1)
    flags.DEFINE_integer(
        "workers", 0, "Processes that decode images; 0 uses threads.", lower_bound=0
    )
    flags.DEFINE_string("part", "", "I/N: encode only every N-th shard, starting with the I-th.")
    processes.define_flags()
    flags.mark_flags_as_required(["tokenizer", "out"])


def main() -> None:
    """Encode the dataset that the flags name."""
    f = flags.FLAGS
    processes.initialize_from(f)
    extract(
        f.tokenizer, Path(f.out), data_name=f.data_name, data_dir=f.data, splits=f.split,
        image_size=f.image_size, views=f.views, crop_range=f.crop_range, batch_size=f.batch_size,
        shard_size=f.shard_size, workers=f.workers, part=f.part,
    )  # fmt: skip


def extract(
    tokenizer: str,
    out: Path,
    *,
    data_name: str = "",
    data_dir: str = "",
    splits: Sequence[str] = ("train", "validation"),
    image_size: int = 0,
    views: str = "centre_flip",
    crop_range: float = 1.1,
    batch_size: int = 128,
    shard_size: int = 16384,
    workers: int = 0,
    part: str = "",
) -> None:
    """Write the token caches out/SPLIT, or resume them; connected processes divide the work.

    Args:
      tokenizer: model directory, training workdir or bundled model.
      out: directory for the token caches.
      data_name: dataset; by default the one that the tokenizer was trained on.
      data_dir: directory with the images; see `open_images`.
      splits: splits to encode.
      image_size: side of the images in pixels; 0 is that of the tokenizer's training.
      views: views to store of a training image; see `make_views`. Other splits store the centre
        crop.
      crop_range: side of the larger square of ten_crop, as a multiple of the image size.
      batch_size: images per step and device.
      shard_size: images per file.
      workers: processes that decode images; 0 uses threads.
      part: "I/N" encodes only every N-th shard, starting with the I-th, for processes that are not
        connected.

    Raises:
      ValueError: if the tokenizer, the dataset or an image is invalid, `out` holds another cache,
        or `part` is given with connected processes.
      FileNotFoundError: if the tokenizer or the dataset is missing.
      OwnershipError: if another run writes one of the caches.
    """
    if part and jax.process_count() > 1:
        raise ValueError(
            "--part is for processes that are not connected; connected processes divide the work "
            "without it."
        )
    share = data.parse_part(part) if part else (jax.process_index(), jax.process_count())
    model = open_tokenizer(tokenizer)
    if "data" not in model.info:
        raise ValueError(f"{tokenizer} does not record the images that it was trained on.")
    data_config = ConfigDict(model.info["data"])
    name = data_name or data_config.name
    vq_config, _ = model.vq()
    if image_size % vq_config.downsampling:
        raise ValueError(
            f"--image_size={image_size} is not a multiple of {vq_config.downsampling}, the side of "
            "a token of this tokenizer."
        )
    if image_size:
        data_config.update(image_size=image_size, resize_size=0)
    spec = image_spec(data_config)
    stored = {
        split: data.make_views(views if split == "train" else "centre", spec, crop_range)
        for split in splits
    }
    sources = {split: data.open_images(name, split, data_dir or None) for split in splits}
    for source in sources.values():
        say(source.summary)
    side = spec.image_size // vq_config.downsampling
    with contextlib.ExitStack() as claimed:
        claims = {
            split: claimed.enter_context(owned(out / split, share if part else (0, 1)))
            for split in sources
        }
        writers = {
            split: data.CacheWriter(
                out / split,
                tokenizer=tokenizer_fingerprint(model),
                tokenizer_name=model.name,
                vocab_size=vq_config.n_embed,
                grid=(side, side),
                class_names=source.class_names,
                views=stored[split].names,
                num_examples=len(source),
                dataset=name,
                split=split,
                pictures=stored[split].pictures,
                examples=source.fingerprint(),
                shard_size=shard_size,
                captioned=source.captions is not None,
            )
            for split, source in sources.items()
        }
        encode, devices = local_encoder(model)
        missing = [split for split, writer in writers.items() if writer.missing()]
        for split in missing:
            data.check_images(sources[split], spec)
        part_name = f", part {share[0] + 1}/{share[1]}" if share[1] > 1 else ""
        for split in missing:
            data.extract_codes(
                encode, sources[split], stored[split], writers[split], batch_size * devices,
                part=share, workers=workers, progress=Progress(f"encoding {split}{part_name}"),
                claim=claims[split],
            )  # fmt: skip
        for split, writer in writers.items():
            claims[split].check()
            remaining = len(_finish(writer))
            shards = len(writer.ranges)
            names = writer.manifest["views"]
            count = writer.manifest["num_examples"]
            if remaining:
                say(f"{writer.path}: {remaining} of {shards} shards are left to other parts")
            else:
                size = f"{len(names)} views of {side * side} tokens each"
                say(f"{writer.path}: {count} images, {size}")
        # Process 0 reads all shards at the end; JAX aborts it if the other processes exit before.
        wait_for_all("the caches")


def _finish(writer: data.CacheWriter) -> list[int]:
    """Finish a cache on process 0 if possible, and return its missing shards.

    Connected processes first wait until all of them have written their shards.
    """
    waiting = Progress(f"waiting for the other processes to write into {writer.path}", "shards")
    while jax.process_count() > 1 and (missing := writer.missing()):
        waiting(len(writer.ranges) - len(missing), len(writer.ranges))
        time.sleep(1)
    return writer.finish() if jax.process_index() == 0 else []
