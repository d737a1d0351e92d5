"""Preparation of runs with the folder recipes: sizes that fit the budget, and tokens."""

from collections.abc import Collection
from pathlib import Path

from ml_collections import ConfigDict

from aim_jax.cli.extract_codes import extract
from aim_jax.cli.train_text_tokenizer import measure, train_text_tokenizer
from aim_jax.configs.budget import apply_budget
from aim_jax.configs.from_folder import caption_length, describe, text_vocab_size
from aim_jax.data import open_images
from aim_jax.data.text import TEXT_TOKENIZER_FILE
from aim_jax.parallel.ownership import owned
from aim_jax.training.checkpoint import has_checkpoint
from aim_jax.training.inputs import captions_of, open_text_tokenizer
from aim_jax.utils.logging import say
from aim_jax.weights.tokenizer import open_tokenizer


def prepare(config: ConfigDict, workdir: Path, given: Collection[str]) -> None:
    """Complete a folder recipe for the device, the tokenizer and the images, and say the choices.

    AiM takes the sizes of its tokenizer. Its images are encoded once, into WORKDIR/codes, unless
    they are cropped or mirrored at random, or there is a token cache already. A text-to-image model
    gets a text tokenizer of its captions, in the workdir, unless one is named.

    Args:
      config: Recipe of `aim_jax.configs.from_folder`, changed in place.
      workdir: Directory of the run.
      given: Dotted names of the settings that the user chose, which stay as they are.

    Raises:
      ValueError, FileNotFoundError: The tokenizer is missing, or a setting is invalid.
      OwnershipError: Another run uses the workdir.
    """
    with owned(workdir):  # refuses a second run before any work
        pass
    if config.stage == "aim":
        _follow_tokenizer(config, given)
        if config.model.condition == "text":
            _follow_captions(config, workdir, given)
    apply_budget(config, workdir, given)
    say(describe(config))
    is_fixed = not (config.data.random_crop or config.data.random_flip)
    if config.stage == "aim" and not config.codes and is_fixed:
        codes = workdir / "codes"
        extract(
            config.tokenizer, codes, data_name=config.data.name, data_dir=config.data.dir,
            views="centre", workers=config.data.workers,
        )  # fmt: skip
        config.codes = str(codes)


def _follow_tokenizer(config: ConfigDict, given: Collection[str]) -> None:
    """Take vocabulary, image size and number of tokens from the tokenizer."""
    tokenizer = open_tokenizer(config.tokenizer)
    vq, _ = tokenizer.vq()
    side = tokenizer.info.get("data", {}).get("image_size", config.data.image_size)
    settings = {
        "data.image_size": side,
        "model.vocab_size": vq.n_embed,
        "model.num_tokens": (side // vq.downsampling) ** 2,
    }
    config.update_from_flattened_dict({k: v for k, v in settings.items() if k not in given})


def _follow_captions(config: ConfigDict, workdir: Path, given: Collection[str]) -> None:
    """Take the sizes of captions from the text tokenizer, which is trained if none is named."""
    captions = captions_of(open_images(config.data.name, "train", config.data.dir))
    file = workdir / TEXT_TOKENIZER_FILE
    if not config.text_tokenizer:
        config.text_tokenizer = str(file)
        if not (file.is_file() and has_checkpoint(workdir)):
            train_text_tokenizer(captions, file, text_vocab_size(len(captions)))
    tokenizer = open_text_tokenizer(config.text_tokenizer)
    settings = {
        "model.caption_vocab": tokenizer.vocab_size,
        "model.max_caption": caption_length(measure(tokenizer, captions).lengths),
    }
    config.update_from_flattened_dict({k: v for k, v in settings.items() if k not in given})
