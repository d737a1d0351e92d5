"""Captions as features of another encoder, such as T5: the file that holds them.

The file is in the format of safetensors, which holds arrays and no code:

    values    (m, f) float16 or float32: the features of all captions, one caption after the other
    starts    (n + 1,) int64: caption i has the rows starts[i] to starts[i + 1] of `values`
    captions  (k,) uint8: the n captions in UTF-8, each followed by a newline

Captions are found by their text, with white space as one space. An empty caption is the null
caption, which needs no features.
"""

import functools
import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aim_jax.models.captions import CaptionFeatures
from aim_jax.utils.checks import check_arguments, check_integer, shown
from aim_jax.utils.files import replacing
from aim_jax.utils.logging import reminding, say

NULL = -1  # number of the null caption


def _spaced(caption: str) -> str:
    return " ".join(caption.split())


class FeatureFile:
    """Features of captions, read from a file as they are needed.

    It takes the place of a text tokenizer: `encode` turns captions into the condition of a model
    with `caption_features`.

    Attributes:
      path: The file.
      width: Features per row, f.
      captions: The captions.

    Raises:
      OSError: The file cannot be read.
      ValueError: It holds no features of captions, or is damaged.
    """

    vocab_size = 0  # features are no tokens

    def __init__(self, path: str | os.PathLike):
        from safetensors import SafetensorError

        self.path = Path(path)
        try:
            with self.path.open("rb"):  # for an error of the system that names the file
                pass
            self._read_index()
        except (KeyError, TypeError, ValueError, SafetensorError) as error:
            raise ValueError(
                f"{self.path} cannot be read as features of captions: {error}"
            ) from error

    def _read_index(self) -> None:
        values = self._file.get_slice("values")
        shape = values.get_shape()
        if len(shape) != 2 or values.get_dtype() not in ("F16", "F32") or not shape[1]:
            raise ValueError(f"values: {values.get_dtype()} {shape}, expected (m, f) F16 or F32.")
        self.width = int(shape[1])
        self._starts = self._file.get_tensor("starts")
        text = self._file.get_tensor("captions")
        if self._starts.dtype != np.int64 or self._starts.ndim != 1 or text.dtype != np.uint8:
            raise ValueError("starts: expected (n + 1,) I64; captions: expected (k,) U8.")
        lines = text.tobytes().decode().split("\n")
        if lines.pop() or len(lines) != len(self._starts) - 1:
            raise ValueError(
                f"{len(lines)} captions for {len(self._starts)} starts; expected one start more, "
                "and a newline after every caption."
            )
        lengths = np.diff(self._starts)
        ends = (0, shape[0])
        if tuple(self._starts[[0, -1]]) != ends or (len(lengths) and lengths.min() < 0):
            raise ValueError(f"starts: expected to grow from {ends[0]} to {ends[1]}.")
        self.captions = lines
        self._numbers = {_spaced(caption): number for number, caption in enumerate(lines)}
        if len(self._numbers) != len(lines):
            raise ValueError("a caption is there twice.")

    @functools.cached_property
    def _file(self) -> Any:
        from safetensors import safe_open

        return safe_open(self.path, "np")

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the file, in hexadecimal digits."""
        with self.path.open("rb") as file, reminding(f"reading {self.path}"):
            return hashlib.file_digest(file, "sha256").hexdigest()

    def numbers(self, captions: Sequence[str]) -> np.ndarray:
        """Return the numbers of captions in the file, int32 (n,); -1 for the null caption.

        Raises:
          ValueError: The file has no features of a caption.
        """
        spaced = [_spaced(caption) for caption in captions]
        missing = [caption for caption in spaced if caption and caption not in self._numbers]
        if missing:
            raise ValueError(
                f"{self.path} has no features of {len(missing)} of {len(captions)} captions; the "
                f"first is {shown(missing[0])}. Write a file with the features of all of them."
            )
        return np.array([self._numbers[c] if c else NULL for c in spaced], np.int32)

    def take(self, numbers: np.ndarray, length: int) -> CaptionFeatures:
        """Return the features of captions by number, at most `length` rows of each."""
        rows = self._file.get_slice("values")
        values = np.zeros((len(numbers), length, self.width), np.float32)
        lengths = np.zeros(len(numbers), np.int32)
        for i, number in enumerate(numbers):
            if number == NULL:
                continue
            start, end = self._starts[number : number + 2].tolist()
            lengths[i] = min(end - start, length)
            if lengths[i]:
                values[i, length - lengths[i] :] = rows[start : start + int(lengths[i])]
        return CaptionFeatures(values, lengths)

    @check_arguments
    def encode(self, captions: Sequence[str], length: int, strict: bool = False) -> CaptionFeatures:
        """Return the features of captions.

        Args:
          captions: n captions. An empty one, or one of white space, is the null caption.
          length: rows per caption. The last rows of a longer one are cut off, and a line says so.
          strict: refuse longer captions instead.

        Raises:
          ValueError: The file has no features of a caption, or one is longer and `strict`.
        """
        check_integer("length", length, 1)
        numbers = self.numbers(captions)
        sizes = np.where(numbers >= 0, self._starts[numbers + 1] - self._starts[numbers], 0)
        if longer := np.flatnonzero(sizes > length).tolist():
            message = (
                f"{len(longer)} of {len(captions)} captions have more than {length} rows of "
                f"features; the first is {shown(captions[longer[0]])}"
            )
            if strict:
                raise ValueError(f"{message}. Shorten them, or raise max_caption.")
            say(f"{message}. Their ends are cut off")
        return self.take(numbers, length)

    def __getstate__(self) -> dict[str, Any]:  # another process opens the file itself
        return {k: v for k, v in self.__dict__.items() if k != "_file"}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FeatureFile) and other.fingerprint == self.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)


class FeatureRows:
    """Features of the captions of a dataset, indexed like an array.

    Attributes:
      file: The features.
      numbers: Number of the caption of every example, int32 (n,).
      length: Rows per caption.
    """

    def __init__(self, file: FeatureFile, captions: Sequence[str], length: int):
        self.file = file
        self.numbers = file.numbers(captions)
        self.length = length

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, indices: np.ndarray) -> CaptionFeatures:
        return self.file.take(self.numbers[indices], self.length)


# What the captions of a dataset are kept as: tokens (n, l), -1 on the left, or rows of a file.
CaptionTable = np.ndarray | FeatureRows


def caption_entries(table: CaptionTable, indices: np.ndarray) -> dict[str, np.ndarray]:
    """Return the captions of examples as entries of a batch.

    These are "captions", int32 (b, l); or float32 (b, l, f) with "caption_lengths" int32 (b,).
    """
    rows = table[indices]
    if isinstance(rows, CaptionFeatures):
        return {"captions": np.asarray(rows.values), "caption_lengths": np.asarray(rows.lengths)}
    return {"captions": rows.astype(np.int32)}


@check_arguments
def write_features(
    path: str | os.PathLike, captions: Sequence[str], features: Iterable[np.ndarray]
) -> None:
    """Write the features of captions to a file, atomically.

    Args:
      path: The file.
      captions: n captions in one line each, all different.
      features: Array (l, f) of each caption, float16 or float32, without padding.

    Raises:
      ValueError: A caption is empty, there twice or of several lines, or the features do not fit.
    """
    from safetensors.numpy import save_file

    arrays = [np.asarray(array) for array in features]
    spaced = [_spaced(caption) for caption in captions]
    if len(set(spaced)) != len(spaced) or not all(spaced) or any("\n" in c for c in captions):
        raise ValueError("captions: expected different ones, none empty, each in one line.")
    kinds = {(array.dtype.name, array.shape[1:]) for array in arrays}
    fits = len(arrays) == len(captions) and len(kinds) == 1
    if not fits or arrays[0].ndim != 2 or arrays[0].dtype.name not in ("float16", "float32"):
        raise ValueError(
            f"features: expected an array (l, f) float16 or float32 for each of {len(captions)} "
            f"captions, got {len(arrays)} with {sorted(kinds)[:3]}."
        )
    text = "".join(f"{caption}\n" for caption in captions).encode()
    tensors = {
        "values": np.concatenate(arrays),
        "starts": np.cumsum([0, *map(len, arrays)]).astype(np.int64),
        "captions": np.frombuffer(text, np.uint8),
    }
    with replacing(Path(path)) as partial:
        save_file(tensors, partial)
