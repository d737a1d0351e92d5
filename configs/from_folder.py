"""Configurations for a folder of class folders or captioned images, chosen from its images."""

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from aim_jax.configs.defaults import aim_defaults, vq_defaults
from aim_jax.data import FolderImages, open_images
from aim_jax.data.captioned_folders import is_captioned
from aim_jax.data.captions import NAME as CAPTIONED
from aim_jax.data.sources import is_grey

LOOKED_AT = 64  # number of images whose size is inspected
SIDES = (16, 32, 64, 128, 256)
# Sizes, smallest first: `ch`, `num_res_blocks` and the last of `ch_mult` of tokenizers, and
# `d_model` and `n_layer` of AiM. Wider models get a lower learning rate.
TOKENIZERS = ((32, 1, 2), (64, 1, 2), (64, 2, 4), (128, 2, 4))
TOKENIZER_LR = {32: 1e-3, 64: 3e-4, 128: 1e-4}
AIMS = ((128, 6), (192, 8), (256, 12), (512, 16), (768, 24))
AIM_LR = {128: 3e-3, 192: 2e-3, 256: 1e-3, 512: 5e-4, 768: 2e-4}
MAX_CAPTION = 128  # most tokens of a caption that a model of a folder reads
CAPTIONS_WHOLE = 0.995  # share of the captions that are not cut
WITHOUT_LPIPS = (
    "without LPIPS; for sharper images set AIM_JAX_LPIPS=FILE, or --config.lpips=FILE "
    "--config.loss.perceptual=1 (documentation page Training a tokenizer)"
)


class Survey(NamedTuple):
    """Summary of a folder of images.

    Attributes:
      directory: Folder of the class folders or captioned images, or of train/ and validation/ with
        them.
      images: Number of training images.
      classes: Number of classes.
      channels: 1 if all images are grey, else 3.
      side: Median of the shorter sides of the inspected images, in pixels.
      dataset: Name of the dataset in `open_images`.
    """

    directory: str
    images: int
    classes: int
    channels: int
    side: int
    dataset: str = "folder"

    @property
    def captioned(self) -> bool:
        """True if the images have captions instead of classes."""
        return self.dataset.partition(":")[0] == CAPTIONED

    @property
    def image_size(self) -> int:
        """The nearest of `SIDES`, compared by ratio."""
        return min(SIDES, key=lambda size: abs(math.log(size / self.side)))

    @property
    def downsampling(self) -> int:
        """Side of the pixel square of one token: small images get 8 x 8 tokens, others 16 x 16."""
        return self.image_size // (8 if self.image_size <= 32 else 16)

    @property
    def codes(self) -> int:
        """Number of codebook entries."""
        limits = {5_000: 256, 100_000: 1024, 1_000_000: 4096}
        return next((codes for limit, codes in limits.items() if self.images < limit), 16384)


def survey(directory: str, field: str = "") -> Survey:
    """Count the classes and images of a folder, and inspect its images.

    Args:
      directory: The folder.
      field: Field of the metadata that holds the captions; "" takes the usual ones.

    Raises:
      ValueError, FileNotFoundError: There is no such folder, or it has neither class folders nor
        captions; see `open_images`.
    """
    if not directory:
        raise ValueError(
            "this recipe needs the folder of your class folders or captioned images after a colon: "
            "--config folder_vq:DIR, or --config folder:DIR"
        )
    captioned = field or (Path(directory).is_dir() and is_captioned(Path(directory)))
    dataset = ":".join([CAPTIONED, field] if field else [CAPTIONED]) if captioned else "folder"
    source = open_images(dataset, "train", directory)
    some = np.linspace(0, len(source) - 1, min(LOOKED_AT, len(source))).astype(int)
    shapes = [source[int(i)]["image"].shape for i in some]
    # All images decide: one image in colour among thousands of grey ones would lose it.
    paths = source.paths if isinstance(source, FolderImages) else []
    grey = all(shape[2] == 1 for shape in shapes) and all(map(is_grey, paths))
    return Survey(
        directory, len(source), len(source.class_names), 1 if grey else 3,
        int(np.median([min(shape[:2]) for shape in shapes])), dataset,
    )  # fmt: skip


# The folders that recipes were chosen for, by their path, for `describe`.
_surveyed: dict[str, Survey] = {}


def _common(config: ConfigDict, folder: Survey) -> None:
    _surveyed[folder.directory] = folder
    config.data.name = folder.dataset
    config.data.dir = folder.directory
    config.data.image_size = folder.image_size
    config.data.channels = folder.channels
    config.log_every = 50
    config.optimizer.schedule = "cosine"
    # Minutes that both stages may take together. None: 60 on a CPU, no limit on an accelerator.
    # 0: no limit. See `aim_jax.configs.budget`.
    config.budget_minutes = placeholder(float)


def length_settings(stage: str, steps: int) -> dict[str, Any]:
    """Return the settings that follow from the number of steps, by dotted name."""
    # Short runs are evaluated often enough to watch, long ones every fiftieth of the run.
    every = max(200, steps // 50)
    reports = ("eval_every", "sample_every", "save_every", "export_every")
    slow_decay = {"vq": 0.999, "aim": 0.9999}[stage]
    return dict.fromkeys(reports, every) | {
        "steps": steps,
        "ema_decay": 0.99 if steps < 10_000 else slow_decay,
        "optimizer.warmup_steps": min(100, steps // 10),
    }


def tokenizer_settings(size: tuple[int, int, int], downsampling: int) -> dict[str, Any]:
    """Return the settings of a tokenizer of one of `TOKENIZERS`, by dotted name."""
    width, blocks, last = size
    halvings = int(math.log2(downsampling))
    wide = halvings // 2 if last > 2 else 0
    return {
        "model.ch": width,
        "model.ch_mult": (*(1,) * (halvings - wide), *(2,) * wide, last),
        "model.num_res_blocks": blocks,
        "model.z_channels": 2 * width,
        "optimizer.lr": TOKENIZER_LR[width],
    }


def aim_settings(size: tuple[int, int]) -> dict[str, Any]:
    """Return the settings of an AiM of one of `AIMS`, by dotted name."""
    width, layers = size
    return {
        "model.d_model": width,
        "model.n_layer": layers,
        "model.d_state": 32 if width < 512 else 128,
        "model.num_groups": 2 if layers < 12 else 4,
        "model.scan_unroll": layers
        if width < 256
        else 1,  # faster, for more memory and compilation
        "optimizer.lr": AIM_LR[width],
    }


def vq_config(directory: str, field: str = "") -> ConfigDict:
    """Return a recipe for training a tokenizer on the images in a folder; see `survey`."""
    folder = survey(directory, field)
    config = vq_defaults()
    _common(config, folder)
    config.batch_size = 32
    config.restart_codes = 200
    config.model.update(
        in_channels=folder.channels, out_channels=folder.channels, embed_dim=8,
        n_embed=folder.codes, entropy_loss_ratio=0.05,
    )  # fmt: skip
    steps = int(np.clip(20 * folder.images // config.batch_size, 600, 200_000))
    size = tokenizer_size(folder.image_size)
    config.update_from_flattened_dict(
        length_settings("vq", steps) | tokenizer_settings(size, folder.downsampling)
    )
    if os.environ.get("AIM_JAX_LPIPS"):
        config.loss.perceptual = 1.0
    return config


def tokenizer_size(image_size: int) -> tuple[int, int, int]:
    """Return the entry of `TOKENIZERS` for an image size, without a budget."""
    return TOKENIZERS[0 if image_size <= 32 else 2 if image_size == 64 else 3]


def aim_config(directory: str, field: str = "") -> ConfigDict:
    """Return a recipe for training AiM on the images in a folder; see `survey`.

    The sizes of vocabulary and images are those of the tokenizer that `vq_config` chooses; the
    program takes them from the tokenizer that it is given. On captioned images the model generates
    from text; the program takes the sizes of captions from the text tokenizer.
    """
    folder = survey(directory, field)
    config = aim_defaults()
    _common(config, folder)
    config.tokenizer = "runs/vq"
    config.batch_size = 64
    config.model.update(
        vocab_size=folder.codes, num_classes=folder.classes,
        num_tokens=(folder.image_size // folder.downsampling) ** 2, headdim=64, adaln="group",
        class_dropout=0.1,
    )  # fmt: skip
    if folder.captioned:
        config.model.update(
            condition="text", num_classes=0, max_caption=MAX_CAPTION,
            caption_vocab=text_vocab_size(folder.images),
        )  # fmt: skip
    steps = int(np.clip(40 * folder.images // config.batch_size, 600, 300_000))
    config.update_from_flattened_dict(
        length_settings("aim", steps) | aim_settings(aim_size(folder.images))
    )
    config.sample.classes = 10 if folder.captioned else min(10, folder.classes)
    return config


def text_vocab_size(images: int) -> int:
    """Return the most tokens of a text tokenizer of the captions of this number of images."""
    limits = {10_000: 2048, 100_000: 4096, 1_000_000: 8192}
    return next((size for limit, size in limits.items() if images < limit), 16384)


def caption_length(lengths: np.ndarray) -> int:
    """Return the tokens of captions that a model reads: enough for 99.5 % of them.

    Args:
      lengths: Tokens of each caption, (n,).

    Returns:
      A multiple of 8, at most `MAX_CAPTION`.
    """
    most = float(np.quantile(lengths, CAPTIONS_WHOLE)) if len(lengths) else 1.0
    return min(MAX_CAPTION, 8 * max(1, math.ceil(most / 8)))


def aim_size(images: int) -> tuple[int, int]:
    """Return the entry of `AIMS` for a number of images: the largest worth training on them."""
    limits = (2_000, 20_000, 200_000, 1_000_000)
    return AIMS[sum(images >= limit for limit in limits)]


def surveyed(config: ConfigDict) -> Survey:
    """Return the survey of the folder that a recipe of this module was chosen for."""
    directory = config.data.dir
    return _surveyed.get(directory) or survey(directory)


def describe(config: ConfigDict) -> str:
    """Return the choices for a folder in words, with the values that the run will use.

    Args:
      config: A recipe of this module, after changes by the user.
    """
    folder = surveyed(config)
    directory = folder.directory
    kind = "grey" if folder.channels == 1 else "colour"
    fitted = str(config.data.image_size)
    if config.data.channels != folder.channels:
        fitted += " in grey" if config.data.channels == 1 else " in colour"
    content = "with captions" if folder.captioned else f"of {folder.classes} classes"
    images = (
        f"{directory}: {folder.images} {kind} images {content}, about {folder.side} pixels -> "
        f"{fitted}"
    )
    run = f"{config.steps} steps of {config.batch_size} images"
    model = config.model
    if config.stage == "vq":
        lpips = "with LPIPS" if config.loss.perceptual else WITHOUT_LPIPS
        downsampling = 2 ** (len(model.ch_mult) - 1)
        return (
            f"{images}; tokenizer f{downsampling} with {model.n_embed} codebook entries, {run}, "
            f"{lpips}"
        )
    read = f"after up to {model.max_caption} of text, " if folder.captioned else ""
    return (
        f"{images}; AiM with {model.n_layer} layers of width {model.d_model} on "
        f"{model.num_tokens} tokens, {read}{run}; tokenizer of {config.tokenizer}"
    )
