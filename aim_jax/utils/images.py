"""Labelled image grids, PNG files and pixel formats."""

import functools
import io
import os
import unicodedata
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from aim_jax.utils.files import replacing

MARGIN = 2


def to_rgb(images: np.ndarray) -> np.ndarray:
    """Convert images uint8 (n, H, W, 1 or 3) to RGB (n, H, W, 3)."""
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else np.asarray(images)


def make_grid(
    images: np.ndarray,
    columns: int,
    row_labels: list[str] | None = None,
    min_side: int = 64,
    column_labels: list[str] | None = None,
) -> Image.Image:
    """Arrange images in a grid, with captions to the left of rows and above columns.

    Args:
      images: uint8 (n, H, W, c), row by row.
      columns: images per row.
      row_labels: one caption per row. A character that the font lacks is shown by its code point.
      min_side: minimum height in pixels; smaller images are enlarged by an integer factor, without
        interpolation.
      column_labels: one caption per column, truncated to the width of the column.
    """
    images = to_rgb(images)
    n, height, width = images.shape[:3]
    factor = max(1, -(-min_side // height))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = height * factor + MARGIN, width * factor + MARGIN
    rows = -(-n // columns)
    font = load_font(max(12, min(20, height // 4)))
    row_labels = [_showable(label) for label in row_labels or []]
    left = 0
    if row_labels:
        left = int(max(font.getlength(label) for label in row_labels)) + 12
    top = 18 if column_labels else 0
    size = left + columns * width + MARGIN, top + rows * height + MARGIN
    canvas = Image.new("RGB", size, "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        corner = left + MARGIN + column * width, top + MARGIN + row * height
        canvas.paste(Image.fromarray(image), corner)
    draw = ImageDraw.Draw(canvas)
    for row, label in enumerate(row_labels):
        middle = top + row * height + height // 2
        draw.text((6, middle), label, fill="black", font=font, anchor="lm")
    small_font = load_font(12)
    for column, label in enumerate(map(_showable, column_labels or [])):
        while small_font.getlength(label) > width:
            label = label[:-1]
        center = left + MARGIN + column * width + width // 2, top // 2
        draw.text(center, label, fill="black", font=small_font, anchor="mm")
    return canvas


@functools.cache
def load_font(size: int) -> ImageFont.FreeTypeFont:
    """Load the font of captions: DejaVu Sans with Latin, Greek and Cyrillic letters."""
    file = resources.files("aim_jax.utils") / "fonts" / "DejaVuSans.ttf"
    data = io.BytesIO(file.read_bytes())
    return ImageFont.truetype(data, size, layout_engine=ImageFont.Layout.BASIC)


@functools.cache
def _has_glyph(character: str) -> bool:
    if "\ud800" <= character <= "\udfff":  # a byte of a file name that is not UTF-8
        return False
    if character.isspace():
        return True
    font = load_font(12)
    return bytes(font.getmask(character)) != bytes(font.getmask("\uffff"))


def _showable(text: str) -> str:
    """Replace characters that the font of captions lacks by their code points, as U+732B."""
    composed = unicodedata.normalize("NFC", text)
    return "".join(c if _has_glyph(c) else f"U+{ord(c):04X}" for c in composed)


def class_caption(names: Sequence[str], label: int) -> str:
    """Return the caption of a class: its name, or its number if letters of the name are missing."""
    if names and _showable(names[label]) == unicodedata.normalize("NFC", names[label]):
        return names[label]
    return str(label)


def side_by_side(images: list[Image.Image]) -> Image.Image:
    """Join images in one row, aligned at the top, on a white background."""
    size = sum(p.width for p in images), max(p.height for p in images)
    canvas = Image.new("RGB", size, "white")
    left = 0
    for image in images:
        canvas.paste(image, (left, 0))
        left += image.width
    return canvas


def framed(image: Image.Image) -> Image.Image:
    """Return an image with a black frame and a white border, to tell it from its neighbours."""
    return ImageOps.expand(ImageOps.expand(image, 2, "black"), 8, "white")


def image_path(out: str | os.PathLike, name: str) -> Path:
    """Return the path of an output image: `name` in `out` if that is a directory, else `out`."""
    return Path(out) / name if Path(out).is_dir() else Path(out)


def save_png(image: Image.Image, path: str | os.PathLike) -> Path:
    """Write a PNG atomically, and return its path."""
    with replacing(path) as partial:
        image.save(partial, format="PNG")
    return Path(path)


def to_uint8(images: jax.Array) -> jax.Array:
    """Convert images in [-1, 1] to uint8; values outside are clipped."""
    return jnp.round(jnp.clip((images + 1) * 127.5, 0, 255)).astype(jnp.uint8)
