"""Batch sizes: batches are padded to a few sizes, so that few programs are compiled."""

from typing import Any

import jax
import numpy as np


def padded_count(count: int) -> int:
    """Return the size that a batch of `count` images is padded to.

    Sizes are 1, the even numbers up to 16, and then 20, 24, 28, 32, 40, 48 and so on, four for each
    power of two. A fifth of a batch is padding at most, or one image of four.
    """
    if count == 1:
        return 1
    step = max(2, 2 ** (count - 1).bit_length() // 8)
    return -(-count // step) * step


def pad_rows(tree: Any, count: int) -> Any:
    """Pad the arrays of a tree along their first axis to `count` rows with copies of the first."""

    def pad(x: Any) -> Any:
        order = np.arange(count)
        return x[np.where(order < len(x), order, 0)]

    return jax.tree.map(pad, tree)
