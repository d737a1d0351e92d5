"""Batch sizes: batches are padded to a few sizes, so that few programs are compiled."""

from typing import Any

import jax
import numpy as np


def padded_count(count: int) -> int:
    """Return the size that a batch of `count` images is padded to.

    Sizes are the powers of two up to 8, and above them 10, 12, 14, 16, 20, 24, 28, 32, 40 and so
    on, so that at most a fifth of a large batch is padding. Small batches cost little more than one
    image, because a step then mostly waits for the weights.
    """
    step = max(1, 2 ** (count - 1).bit_length() // 8)
    if count <= 8:
        return int(2 ** (count - 1).bit_length())
    return -(-count // step) * step


def pad_rows(tree: Any, count: int) -> Any:
    """Pad the arrays of a tree along their first axis to `count` rows with copies of the first."""

    def pad(x: Any) -> Any:
        order = np.arange(count)
        return x[np.where(order < len(x), order, 0)]

    return jax.tree.map(pad, tree)
