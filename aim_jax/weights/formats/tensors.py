"""Tensors in files, which are read when they are needed."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import DTypeLike


class LazyTensor(NamedTuple):
    """A tensor that is read from its file whenever it is converted to an array.

    Attributes:
      shape, dtype: Shape and dtype of the array.
      read: Returns the array, as a separate copy.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        array = self.read()
        return array if dtype is None else array.astype(dtype, copy=False)
