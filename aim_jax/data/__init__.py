"""Pictures, token caches and resumable batches of both."""

from aim_jax.data.images import (
    ArrayImages,
    FolderImages,
    ImageSource,
    check_labels,
    decode_image,
    open_images,
)
from aim_jax.data.pipeline import (
    ImageSpec,
    check_images,
    image_batches,
    index_batches,
    preprocess,
)
from aim_jax.data.tokens import (
    TokenCache,
    check_cache_target,
    extract_codes,
    fingerprint,
    token_batches,
    write_token_cache,
)

__all__ = [
    "ArrayImages",
    "FolderImages",
    "ImageSource",
    "ImageSpec",
    "TokenCache",
    "check_cache_target",
    "check_images",
    "check_labels",
    "decode_image",
    "extract_codes",
    "fingerprint",
    "image_batches",
    "index_batches",
    "open_images",
    "preprocess",
    "token_batches",
    "write_token_cache",
]
