"""Conversion of images of any size to model inputs: fitting, augmentation, scaling to [-1, 1]."""

import dataclasses
from typing import Literal

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

# Smallest fraction of the shorter side that a random crop keeps when `resize_size` is not set.
MIN_CROP = 0.8


@dataclasses.dataclass(frozen=True)
class ImageSpec:
    """Preprocessing of images into model inputs.

    Attributes:
      image_size: Side S of the square result, in pixels.
      channels: 1 (grey) or 3 (RGB); images of the other kind are converted.
      fit: "resize" scales the shorter side and crops; "pad" centres the unscaled image on black.
      resize_size: Length that the shorter side is scaled to before the crop; `image_size` by
        default.
      random_crop: Crop at a random position in training. Without `resize_size`, the shorter side is
        also random, in [S, S / 0.8].
      random_flip: Mirror half of the images in training.
    """

    image_size: int
    channels: int = 3
    fit: Literal["resize", "pad"] = "resize"
    resize_size: int | None = None
    random_crop: bool = False
    random_flip: bool = False

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise ValueError(f"image_size must be positive, got {self.image_size}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 or 3, got {self.channels}")
        if self.fit not in ("resize", "pad"):
            raise ValueError(f"fit must be 'resize' or 'pad', got {self.fit!r}")
        if self.fit == "pad" and (self.resize_size is not None or self.random_crop):
            raise ValueError("fit='pad' takes neither resize_size nor random_crop")
        if self.resize_size is not None and self.resize_size < self.image_size:
            raise ValueError(
                f"resize_size {self.resize_size} is smaller than image_size {self.image_size}"
            )


def preprocess(
    image: np.ndarray, spec: ImageSpec, rng: np.random.Generator | None = None
) -> np.ndarray:
    """Convert one image to a model input.

    Args:
      image: uint8 (H, W, C), C 1 or 3.
      spec: Fitting, channels and augmentation of the result.
      rng: Generator of the random crop and flip; None takes the centre crop without a flip.

    Returns:
      float32 (S, S, channels) in [-1, 1]: x / 127.5 - 1.

    Raises:
      ValueError: The image has another dtype or shape, or is too large for fit="pad".
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] not in (1, 3):
        raise ValueError(
            f"expected a uint8 image of shape (H, W, 1) or (H, W, 3), "
            f"got {image.dtype} {image.shape}"
        )
    if spec.fit == "pad":
        image = _pad(image, spec.image_size)
    else:
        image = _resize(image, _shorter_side(spec, rng))
        image = _crop(image, spec.image_size, rng if spec.random_crop else None)
    if spec.random_flip and rng is not None and rng.random() < 0.5:
        image = image[:, ::-1]
    pixels = _convert(image, spec.channels).astype(np.float32)
    pixels /= 127.5
    pixels -= 1.0
    return pixels


def _shorter_side(spec: ImageSpec, rng: np.random.Generator | None) -> int:
    if spec.resize_size is not None:
        return spec.resize_size
    if spec.random_crop and rng is not None:
        return int(rng.integers(spec.image_size, int(spec.image_size / MIN_CROP) + 1))
    return spec.image_size


def _resize(image: np.ndarray, shorter: int) -> np.ndarray:
    height, width = image.shape[:2]
    if min(height, width) == shorter:
        return image
    scale = shorter / min(height, width)
    size = max(shorter, round(width * scale)), max(shorter, round(height * scale))
    # When Pillow shrinks an image it widens the bicubic kernel, which avoids aliasing.
    pil_image = Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
    resized = np.asarray(pil_image.resize(size, Image.Resampling.BICUBIC))
    return resized[..., None] if resized.ndim == 2 else resized


def _crop(image: np.ndarray, size: int, rng: np.random.Generator | None) -> np.ndarray:
    spare = image.shape[0] - size, image.shape[1] - size
    if spare == (0, 0):
        return image
    top, left = (n // 2 if rng is None else int(rng.integers(n + 1)) for n in spare)
    return image[top : top + size, left : left + size]


def _pad(image: np.ndarray, size: int) -> np.ndarray:
    height, width, channels = image.shape
    if (height, width) == (size, size):
        return image
    if height > size or width > size:
        raise ValueError(
            f"an image of {height}x{width} does not fit into {size}x{size}: "
            "use a larger image_size, or fit='resize'"
        )
    top = (size - height) // 2
    left = (size - width) // 2
    canvas = np.zeros((size, size, channels), np.uint8)
    canvas[top : top + height, left : left + width] = image
    return canvas


def _convert(image: np.ndarray, channels: int) -> np.ndarray:
    if image.shape[2] == channels:
        return image
    if channels == 3:
        return np.repeat(image, 3, axis=2)
    # ITU-R 601 luma in 16-bit fixed point, as Pillow's mode "L".
    luma = image.astype(np.int32) @ np.array([19595, 38470, 7471], np.int32) + 0x8000
    return (luma >> 16)[..., None]


def describe_data(data: ConfigDict) -> dict:
    """Return a data section as plain values for a model's records, without its local directory."""
    return {k: v for k, v in data.to_dict().items() if k != "dir"}


def image_spec(data: ConfigDict) -> ImageSpec:
    """Return the `ImageSpec` that a data section describes."""
    return ImageSpec(
        image_size=data.image_size,
        channels=data.channels,
        fit=data.fit,
        resize_size=data.resize_size or None,
        random_crop=data.get("random_crop", False),
        random_flip=data.get("random_flip", False),
    )
