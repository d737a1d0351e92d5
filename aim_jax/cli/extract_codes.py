"""Encodes a data set once, so that training of AiM reads codes instead of pictures.

Example:
  aim-jax extract_codes --tokenizer runs/cifar10_vq_full --out codes/cifar10
  aim-jax train --config cifar10 --workdir runs/cifar10 \\
    --config.tokenizer=runs/cifar10_vq_full --config.codes=codes/cifar10

Each split becomes a token cache OUT/SPLIT. The data set, and how its pictures are fitted, are those
that the tokenizer was trained on unless flags say otherwise; a folder of images has to be named
again (--data). The same command continues an interrupted run. Machines that share OUT divide the
work, as connected processes (--coordinator) or each by itself (--part 1/N to N/N). The
documentation's page ImageNet has an example at full size.
"""

import time
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict

from aim_jax import data
from aim_jax.data.preprocessing import image_spec
from aim_jax.parallel import processes
from aim_jax.parallel.processes import wait_for_all
from aim_jax.utils.logging import Progress, say
from aim_jax.weights.tokenizer import local_encoder, open_tokenizer, tokenizer_fingerprint


def define_flags() -> None:
    flags.DEFINE_string("tokenizer", None, "Model directory, training workdir or bundled model.")
    flags.DEFINE_string("out", None, "Directory for the token caches.")
    flags.DEFINE_string("data_name", "", "Data set; see aim_jax.data.open_images.")
    flags.DEFINE_string("data", "", "Directory with the pictures.")
    flags.DEFINE_list("split", ["train", "validation"], "Splits to encode.")
    flags.DEFINE_enum(
        "views", "centre_flip", ["centre", "centre_flip", "ten_crop"],
        "What to store of every picture of the train split: the centre crop, it and its mirror "
        "image, or the centre and four corners of a larger square and their mirror images. Of "
        "other splits it is the centre crop.",
    )  # fmt: skip
    flags.DEFINE_float("crop_range", 1.1, "Side of the larger square of ten_crop, in image sizes.")
    flags.DEFINE_integer("batch_size", 128, "Pictures per step and device.", lower_bound=1)
    flags.DEFINE_integer("shard_size", 16384, "Pictures per file.", lower_bound=1)
    flags.DEFINE_integer(
        "workers", 0, "Processes that decode pictures; 0 uses threads.", lower_bound=0
    )
    flags.DEFINE_string("part", "", "I/N: encode every N-th shard alone, from the I-th on.")
    processes.define_flags()
    flags.mark_flags_as_required(["tokenizer", "out"])


def main() -> None:
    f = flags.FLAGS
    processes.initialize_from(f)
    extract(
        f.tokenizer, Path(f.out), data_name=f.data_name, data_dir=f.data, splits=f.split,
        views=f.views, crop_range=f.crop_range, batch_size=f.batch_size,
        shard_size=f.shard_size, workers=f.workers, part=f.part,
    )  # fmt: skip


def extract(
    tokenizer: str,
    out: Path,
    *,
    data_name: str = "",
    data_dir: str = "",
    splits: Sequence[str] = ("train", "validation"),
    views: str = "centre_flip",
    crop_range: float = 1.1,
    batch_size: int = 128,
    shard_size: int = 16384,
    workers: int = 0,
    part: str = "",
) -> None:
    """Makes the caches out/SPLIT, or goes on with them; connected processes divide the work.

    Args:
      tokenizer: model directory, training workdir or bundled model.
      data_name: data set; by default the one that the tokenizer was trained on.
      data_dir: directory with the pictures; see `open_images`.
      views: what to store of a training picture; see `make_views`. Of others it is the centre crop.
      batch_size: pictures per step and device. shard_size: pictures per file.
      workers: processes that decode pictures; 0 uses threads.
      part: "I/N": every N-th shard alone, from the I-th on, for processes that are not connected.

    Raises:
      ValueError, FileNotFoundError: no such tokenizer or data set, bad pictures, a cache of
        something else in `out`, or a part where processes are connected.
    """
    if part and jax.process_count() > 1:
        raise ValueError("--part is for processes that are not connected; these divide the work")
    share = data.parse_part(part) if part else (jax.process_index(), jax.process_count())
    model = open_tokenizer(tokenizer)
    if "data" not in model.info:
        raise ValueError(f"{tokenizer} does not say which pictures it was trained on")
    described = ConfigDict(model.info["data"])
    name, spec = data_name or described.name, image_spec(described)
    stored = {
        split: data.make_views(views if split == "train" else "centre", spec, crop_range)
        for split in splits
    }
    sources = {split: data.open_images(name, split, data_dir or None) for split in splits}
    vq_config, _ = model.vq()
    side = spec.image_size // vq_config.downsampling
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
            shard_size=shard_size,
        )
        for split, source in sources.items()
    }
    encode, devices = local_encoder(model)
    missing = [split for split, writer in writers.items() if writer.missing()]
    for split in missing:
        data.check_images(sources[split], spec)
    which = f", part {share[0] + 1}/{share[1]}" if share[1] > 1 else ""
    for split in missing:
        data.extract_codes(
            encode, sources[split], stored[split], writers[split], batch_size * devices,
            part=share, workers=workers, progress=Progress(f"encoding {split}{which}"),
        )  # fmt: skip
    for writer in writers.values():
        left, shards = len(_finish(writer)), len(writer.ranges)
        names, pictures = writer.manifest["views"], writer.manifest["num_examples"]
        if left:
            say(f"{writer.path}: {left} of {shards} shards are left to other parts")
        else:
            say(f"{writer.path}: {pictures} pictures, {len(names)} views, {side * side} codes each")
    # Process 0 reads all shards at the end; JAX aborts it when the others have left.
    wait_for_all("the caches")


def _finish(writer: data.CacheWriter) -> list[int]:
    """Completes a cache if it can be; connected processes first wait for each other's shards."""
    waiting = Progress(f"waiting for the other processes to write into {writer.path}", "shards")
    while jax.process_count() > 1 and (missing := writer.missing()):
        waiting(len(writer.ranges) - len(missing), len(writer.ranges))
        time.sleep(1)
    return writer.finish() if jax.process_index() == 0 else []
