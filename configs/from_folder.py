"""Configurations for a folder of class folders, chosen from what is in it."""

import math
import os
import sys
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from aim_jax.configs.defaults import aim_defaults, vq_defaults
from aim_jax.data import open_images

LOOKED_AT = 64  # pictures
SIDES = (16, 32, 64, 128, 256)
WITHOUT_LPIPS = (
    "without LPIPS, which would make it sharper: AIM_JAX_LPIPS=FILE, or --config.lpips=FILE "
    "--config.loss.perceptual=1 (the documentation's page Training a tokenizer)"
)


class Survey(NamedTuple):
    """What is in a folder of pictures.

    Attributes:
      directory: of the class folders, or of train/ and validation/ with them.
      images: training pictures. classes: their number.
      channels: 1 where all that were looked at are grey, else 3.
      side: median of their shorter sides, pixels.
    """

    directory: str
    images: int
    classes: int
    channels: int
    side: int

    @property
    def image_size(self) -> int:
        """The one of `SIDES` that is nearest, as a ratio."""
        return min(SIDES, key=lambda size: abs(math.log(size / self.side)))

    @property
    def downsampling(self) -> int:
        """So that small pictures have 8 x 8 codes and others 16 x 16."""
        return self.image_size // (8 if self.image_size <= 32 else 16)

    @property
    def codes(self) -> int:
        """Size of the codebook."""
        limits = {5_000: 256, 100_000: 1024, 1_000_000: 4096}
        return next((codes for limit, codes in limits.items() if self.images < limit), 16384)


def survey(directory: str) -> Survey:
    """Looks at the class folders and at some of the pictures.

    Raises:
      ValueError, FileNotFoundError: no such folder, or no class folders in it; see `open_images`.
    """
    if not directory:
        raise ValueError(
            "this configuration needs the folder of your class folders after a colon: "
            "--config folder_vq:DIR, or folder:DIR"
        )
    source = open_images("folder", "train", directory)
    some = np.linspace(0, len(source) - 1, min(LOOKED_AT, len(source))).astype(int)
    shapes = [source[int(i)]["image"].shape for i in some]
    return Survey(
        directory, len(source), len(source.class_names), max(shape[2] for shape in shapes),
        int(np.median([min(shape[:2]) for shape in shapes])),
    )  # fmt: skip


def _common(config: ConfigDict, found: Survey) -> None:
    config.data.name, config.data.dir = "folder", found.directory
    config.data.image_size, config.data.channels = found.image_size, found.channels
    config.log_every = 50
    # Of small data sets often enough to watch, of large ones a fiftieth of the run.
    every = max(200, config.steps // 50)
    config.eval_every = config.sample_every = config.save_every = config.export_every = every
    config.optimizer.schedule, config.optimizer.warmup_steps = "cosine", 100


def vq_config(directory: str) -> ConfigDict:
    """Training of a tokenizer for the pictures in a folder; says what was chosen."""
    found, config = survey(directory), vq_defaults()
    small, f = found.image_size <= 32, found.downsampling
    config.batch_size = 32
    config.steps = int(np.clip(20 * found.images // config.batch_size, 600, 200_000))
    _common(config, found)
    config.ema_decay = 0.99 if config.steps < 10_000 else 0.999
    config.restart_codes = 200
    width = 32 if small else 64 if found.image_size == 64 else 128
    config.optimizer.lr = {32: 1e-3, 64: 3e-4, 128: 1e-4}[width]
    halvings = int(math.log2(f))
    config.model.update(
        in_channels=found.channels, out_channels=found.channels, ch=width,
        ch_mult=(*(1,) * ((halvings + 1) // 2), *(2,) * (halvings // 2), 2 if small else 4),
        num_res_blocks=1 if small else 2, z_channels=2 * width, embed_dim=8, n_embed=found.codes,
        entropy_loss_ratio=0.05,
    )  # fmt: skip
    if os.environ.get("AIM_JAX_LPIPS"):
        config.loss.perceptual = 1.0
    _tell(
        f"{_describe(found)}; a tokenizer f{f} with {found.codes} codes, {config.steps} steps of "
        f"{config.batch_size} pictures, "
        + ("with LPIPS" if config.loss.perceptual else WITHOUT_LPIPS)
    )
    return config


def aim_config(directory: str) -> ConfigDict:
    """Training of AiM on the pictures in a folder, encoded on the way; says what was chosen."""
    found, config = survey(directory), aim_defaults()
    config.tokenizer = "runs/vq"
    config.batch_size = 64
    config.steps = int(np.clip(40 * found.images // config.batch_size, 600, 300_000))
    _common(config, found)
    config.ema_decay = 0.99 if config.steps < 10_000 else 0.9999
    sizes = {20_000: (128, 6, 3e-3), 200_000: (256, 12, 1e-3), 1_000_000: (512, 16, 5e-4)}
    chosen = (size for limit, size in sizes.items() if found.images < limit)
    width, layers, config.optimizer.lr = next(chosen, (768, 24, 2e-4))
    config.model.update(
        vocab_size=found.codes, num_classes=found.classes,
        num_tokens=(found.image_size // found.downsampling) ** 2, d_model=width, n_layer=layers,
        d_state=32 if width < 512 else 128, headdim=64, adaln="group",
        num_groups=2 if layers < 12 else 4, class_dropout=0.1,
    )  # fmt: skip
    config.sample.classes = min(10, found.classes)
    _tell(
        f"{_describe(found)}; AiM with {layers} layers of width {width} on "
        f"{config.model.num_tokens} tokens, {config.steps} steps of {config.batch_size} pictures; "
        f"tokenizer of {config.tokenizer}"
    )
    return config


def _tell(line: str) -> None:
    # Flags are being parsed: which process this is, `say` could not know yet.
    print(line, file=sys.stderr, flush=True)


def _describe(found: Survey) -> str:
    kind = "grey" if found.channels == 1 else "colour"
    return (
        f"{found.directory}: {found.images} {kind} pictures of {found.classes} classes, about "
        f"{found.side} pixels -> {found.image_size}"
    )
