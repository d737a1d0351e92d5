"""Encodes a data set once, so that training of AiM reads codes instead of pictures.

Example:
  python launch/extract_codes.py --tokenizer runs/cifar10_vq --out codes/cifar10
  python launch/train.py --config configs/cifar10.py --workdir runs/cifar10 \
    --config.tokenizer=runs/cifar10_vq --config.codes=codes/cifar10

Each split becomes a token cache OUT/SPLIT. The data set, and how its pictures are fitted, are those
that the tokenizer was trained on unless flags say otherwise.
"""

import sys
from pathlib import Path

from absl import app, flags

from aim_jax.launching import errors_in_one_line

FLAGS = flags.FLAGS
flags.DEFINE_string("tokenizer", None, "Model directory, training workdir or bundled model.")
flags.DEFINE_string("out", None, "Directory for the token caches.")
flags.DEFINE_string("data_name", "", "Data set; see aim_jax.data.open_images.")
flags.DEFINE_string("data", "", "Directory with the pictures.")
flags.DEFINE_list("split", ["train", "validation"], "Splits to encode.")
flags.DEFINE_bool("flip", True, "Store the mirrored pictures of the train split as well.")
flags.DEFINE_integer("batch_size", 128, "Pictures per step.", lower_bound=1)
flags.mark_flags_as_required(["tokenizer", "out"])


def extract() -> None:
    """Does what the flags say."""
    import jax
    from ml_collections import ConfigDict

    from aim_jax import data
    from aim_jax.config import image_spec
    from aim_jax.models.vq import VQModel
    from aim_jax.monitor import Progress, say
    from aim_jax.train import open_tokenizer

    targets = {split: Path(FLAGS.out) / split for split in FLAGS.split}
    for target in targets.values():
        data.check_cache_target(target)
    tokenizer = open_tokenizer(FLAGS.tokenizer)
    vq = tokenizer.vq_config
    if "data" not in tokenizer.info:
        raise ValueError(f"{FLAGS.tokenizer} does not say which pictures it was trained on")
    described = ConfigDict(tokenizer.info["data"])
    name, spec = FLAGS.data_name or described.name, image_spec(described)
    # The directory belongs to the data set, so the tokenizer's does not go with another name.
    folder = FLAGS.data or (described.get("dir", "") if name == described.name else "") or None
    sources = {split: data.open_images(name, split, folder) for split in targets}
    for source in sources.values():
        data.check_images(source, spec)

    side = spec.image_size // vq.downsampling
    apply = jax.jit(lambda p, x: VQModel(vq).apply({"params": p}, x, method="encode_to_tokens"))
    for split, source in sources.items():
        flip = FLAGS.flip and split == "train"
        chunks = data.extract_codes(
            lambda images: apply(tokenizer.vq_params, images),
            source,
            spec,
            FLAGS.batch_size,
            flip=flip,
            progress=Progress(f"encoding {split}"),
        )
        data.write_token_cache(
            targets[split],
            chunks,
            tokenizer=data.fingerprint(vq, tokenizer.vq_params),
            tokenizer_name=tokenizer.name,
            vocab_size=vq.n_embed,
            grid=(side, side),
            class_names=source.class_names,
            views=("centre", "flip") if flip else ("centre",),
            dataset=name,
            split=split,
        )
        say(f"wrote {targets[split]}: {len(source)} pictures, {side * side} codes each")


def main(_):
    with errors_in_one_line():
        extract()


if __name__ == "__main__":
    sys.exit(app.run(main))
