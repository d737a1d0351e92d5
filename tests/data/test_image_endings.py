"""Endings of image files that Pillow reads."""

import numpy as np
import pytest
from PIL import Image

from aim_jax.data import decode_image
from aim_jax.data.sources import IMAGE_SUFFIXES, images_in, is_image

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".JFIF", *IMAGE_SUFFIXES])
def test_common_endings_are_images(suffix, tmp_path):
    file = tmp_path / f"a{suffix}"
    mode = {".pgm": "L", ".pbm": "1"}.get(suffix, "RGB")
    Image.fromarray(PIXELS).convert(mode).save(
        file, format=Image.registered_extensions()[suffix.lower()]
    )
    assert images_in(tmp_path) == [str(file)]
    assert decode_image(file, "a").shape == (8, 8, 3 if mode == "RGB" else 1)


def test_other_endings_are_not_images():
    assert not any(map(is_image, ("a.txt", "a.json", "jfif", ".a.jfif", "a.jfif.part")))
