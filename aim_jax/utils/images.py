"""Pictures for people: labelled grids as PNG."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from aim_jax.utils.files import replacing

MARGIN = 2


def to_rgb(images: np.ndarray) -> np.ndarray:
    """uint8 (n, H, W, 1 or 3) -> uint8 (n, H, W, 3)."""
    return np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else np.asarray(images)


def make_grid(
    images: np.ndarray,
    columns: int,
    row_labels: list[str] | None = None,
    min_side: int = 64,
    column_labels: list[str] | None = None,
) -> Image.Image:
    """Lays images out in rows, with captions at the left of rows and above columns.

    Args:
      images: uint8 (n, H, W, c), row by row.
      columns: images per row.
      row_labels: one caption per row.
      min_side: smaller images are enlarged by a whole factor, pixels kept sharp.
      column_labels: one caption per column, cut off where it is wider than the column.
    """
    images = to_rgb(images)
    n, height, width = images.shape[:3]
    factor = max(1, -(-min_side // height))
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = height * factor + MARGIN, width * factor + MARGIN
    rows = -(-n // columns)
    font = ImageFont.load_default(size=max(12, min(20, height // 4)))
    left = 0
    if row_labels:
        left = int(max(font.getlength(label) for label in row_labels)) + 12
    top = 18 if column_labels else 0
    size = left + columns * width + MARGIN, top + rows * height + MARGIN
    canvas = Image.new("RGB", size, "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        place = left + MARGIN + column * width, top + MARGIN + row * height
        canvas.paste(Image.fromarray(image), place)
    draw = ImageDraw.Draw(canvas)
    for row, label in enumerate(row_labels or []):
        middle = top + row * height + height // 2
        draw.text((6, middle), label, fill="black", font=font, anchor="lm")
    small = ImageFont.load_default(size=12)
    for column, label in enumerate(column_labels or []):
        while small.getlength(label) > width:
            label = label[:-1]
        place = left + MARGIN + column * width + width // 2, top // 2
        draw.text(place, label, fill="black", font=small, anchor="mm")
    return canvas


def side_by_side(pictures: list[Image.Image]) -> Image.Image:
    """Pictures in one row, aligned at the top, on white."""
    size = sum(p.width for p in pictures), max(p.height for p in pictures)
    canvas = Image.new("RGB", size, "white")
    left = 0
    for picture in pictures:
        canvas.paste(picture, (left, 0))
        left += picture.width
    return canvas


def picture_path(out: str | os.PathLike, name: str) -> Path:
    """Where a program writes its picture: the file `out`, or `name` in a directory `out`."""
    return Path(out) / name if Path(out).is_dir() else Path(out)


def save_png(image: Image.Image, path: str | os.PathLike) -> Path:
    """Writes a PNG, whole or not at all."""
    with replacing(path) as partial:
        image.save(partial, format="PNG")
    return Path(path)


def to_uint8(images: jax.Array) -> jax.Array:
    """Images in [-1, 1] (values outside are clipped) -> uint8."""
    return jnp.round(jnp.clip((images + 1) * 127.5, 0, 255)).astype(jnp.uint8)
