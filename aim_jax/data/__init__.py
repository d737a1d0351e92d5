"""Image datasets, token caches, and resumable batches of both."""

from aim_jax.data.datasets import open_images
from aim_jax.data.extraction import (
    VIEWS,
    CacheWriter,
    Views,
    extract_codes,
    make_views,
    parse_part,
)
from aim_jax.data.imagenet import TarImages
from aim_jax.data.loader import check_images, image_batches, index_batches
from aim_jax.data.preprocessing import ImageSpec, preprocess
from aim_jax.data.sources import (
    ArrayImages,
    FolderImages,
    ImageSource,
    check_labels,
    decode_image,
    identity_of,
)
from aim_jax.data.token_cache import TokenCache, check_alike, fingerprint, token_batches

__all__ = [
    "VIEWS",
    "ArrayImages",
    "CacheWriter",
    "FolderImages",
    "ImageSource",
    "ImageSpec",
    "TarImages",
    "TokenCache",
    "Views",
    "check_alike",
    "check_images",
    "check_labels",
    "decode_image",
    "extract_codes",
    "fingerprint",
    "identity_of",
    "image_batches",
    "index_batches",
    "make_views",
    "open_images",
    "parse_part",
    "preprocess",
    "token_batches",
]
