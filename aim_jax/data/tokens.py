"""Token caches: the codes of a data set under one tokenizer, on disk, and batches of them.

A cache is a directory with `manifest.json` and npz shards. Each shard holds `codes`
(n, views, t), uint16 or uint32, and `labels` (n,), int32; a view is one augmentation of a picture.
"""

import dataclasses
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import grain
import numpy as np

from aim_jax.data.images import ImageSource, check_labels
from aim_jax.data.pipeline import ImageSpec, image_batches, index_batches

FORMAT = "aim_jax token cache"
VERSION = 1
MANIFEST = "manifest.json"
FIELDS = {
    "tokenizer",
    "tokenizer_name",
    "num_examples",
    "views",
    "grid",
    "num_tokens",
    "vocab_size",
    "dtype",
    "class_names",
    "shards",
}


def fingerprint(config: Any, params: Mapping[str, Any]) -> str:
    """Identifies a tokenizer by its configuration and weights.

    Args:
      config: Its configuration: a dataclass or a mapping, of what JSON can hold.
      params: Nested mappings of arrays.

    Returns:
      Hexadecimal SHA-256 over the sorted configuration and the path, type, shape and bytes of each
      array in order of its path.
    """
    if dataclasses.is_dataclass(config):
        config = dataclasses.asdict(config)
    digest = hashlib.sha256(json.dumps(dict(config), sort_keys=True).encode())
    for path, array in sorted(_flatten(params)):
        array = np.asarray(array)
        digest.update(f"\n{path} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        path = f"{prefix}/{key}" if prefix else str(key)
        if isinstance(value, Mapping):
            yield from _flatten(value, path)
        else:
            yield path, value


def extract_codes(
    encode_fn: Callable[[np.ndarray], Any],
    source: ImageSource,
    spec: ImageSpec,
    batch_size: int,
    *,
    flip: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Encodes every picture of a source, in order.

    Args:
      encode_fn: Maps float32 (batch_size, S, S, C) to codes (batch_size, t). Its batch never
        changes size: the last one is filled up, and the filling dropped.
      source: The pictures.
      spec: How they become inputs; the centre crop is taken.
      batch_size: Pictures per call.
      flip: Whether to add the mirrored picture as a second view.
      progress: Called with the numbers of pictures done and in all, after each batch.

    Yields:
      `(codes (n, views, t), labels (n,))`, views 2 with `flip`, else 1.
    """
    done = 0
    for batch in image_batches(source, spec, batch_size, train=False):
        images, count = batch["images"], len(batch["labels"])
        images = np.pad(images, [(0, batch_size - count), (0, 0), (0, 0), (0, 0)])
        views = [images, images[:, :, ::-1]] if flip else [images]
        codes = np.stack([np.asarray(encode_fn(view)) for view in views], axis=1)
        yield codes[:count], batch["labels"]
        done += count
        if progress is not None:
            progress(done, len(source))


def write_token_cache(
    out_dir: str | os.PathLike,
    batches: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    tokenizer: str,
    vocab_size: int,
    grid: tuple[int, int],
    class_names: Iterable[str],
    views: Iterable[str],
    dataset: str = "",
    split: str = "",
    tokenizer_name: str = "",
    shard_size: int = 65536,
) -> Path:
    """Writes a token cache; it appears at `out_dir` only when it is whole.

    Args:
      out_dir: Where to put it; must not exist, or be empty.
      batches: Chunks of codes (n, views, t) and labels (n,), of any n.
      tokenizer: The tokenizer's `fingerprint`.
      vocab_size: Codes lie in [0, vocab_size).
      grid: Rows and columns of the token grid; t is their product.
      class_names: One name per label.
      views: One name per view, such as ("centre", "flip").
      dataset: Name of the data set, for the record.
      split: Its split, for the record.
      tokenizer_name: A readable name of the tokenizer, for error messages.
      shard_size: Examples per shard.

    Returns:
      `out_dir` as a Path.

    Raises:
      ValueError: `out_dir` is in use, or codes, labels or shapes do not agree with the rest.
    """
    check_cache_target(out_dir)
    out_dir, views, class_names = Path(out_dir).absolute(), list(views), list(class_names)
    shape = (len(views), grid[0] * grid[1])
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
    partial = out_dir.with_name(f".{out_dir.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        shards = []
        checked = _checked(batches, shape, dtype, vocab_size, len(class_names))
        for codes, labels in _regroup(checked, shard_size):
            name = f"shard-{len(shards):05d}.npz"
            buffer = io.BytesIO()
            np.savez(buffer, codes=codes, labels=labels)
            data = buffer.getvalue()
            (partial / name).write_bytes(data)
            shards.append(
                {"file": name, "examples": len(codes), "sha256": hashlib.sha256(data).hexdigest()}
            )
        if not shards:
            raise ValueError(f"no examples to write into the token cache {out_dir}")
        manifest = {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer": tokenizer,
            "tokenizer_name": tokenizer_name,
            "dataset": dataset,
            "split": split,
            "num_examples": sum(shard["examples"] for shard in shards),
            "views": views,
            "grid": list(grid),
            "num_tokens": shape[1],
            "vocab_size": vocab_size,
            "dtype": dtype.name,
            "class_names": class_names,
            "shards": shards,
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        os.replace(partial, out_dir)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out_dir


def check_cache_target(out_dir: str | os.PathLike) -> None:
    """Raises ValueError when a cache cannot be written to `out_dir` because it is in use."""
    out_dir = Path(out_dir)
    if out_dir.exists() and not (out_dir.is_dir() and not any(out_dir.iterdir())):
        raise ValueError(f"{out_dir} already exists: remove it, or write the token cache elsewhere")


def _checked(batches, shape, dtype, vocab_size, num_classes):
    start = 0
    for codes, labels in batches:
        codes, labels = np.asarray(codes), np.asarray(labels)
        if codes.shape != (len(labels), *shape):
            raise ValueError(
                f"codes have shape {codes.shape}, expected {(len(labels), *shape)}: "
                "labels, views and tokens"
            )
        if codes.size and (codes.min() < 0 or codes.max() >= vocab_size):
            raise ValueError(
                f"codes reach from {codes.min()} to {codes.max()}, expected 0 to {vocab_size - 1}"
            )
        check_labels(labels, num_classes, f"examples from {start} on")
        start += len(labels)
        yield codes.astype(dtype), labels.astype(np.int32)


def _regroup(batches, size):
    """Joins and cuts chunks into groups of `size` examples; the last one may be smaller."""
    parts, held = [], 0
    for codes, labels in batches:
        parts.append((codes, labels))
        held += len(labels)
        while held >= size:
            codes, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
            yield codes[:size], labels[:size]
            parts, held = [(codes[size:], labels[size:])], held - size
    if held:
        yield tuple(np.concatenate(column) for column in zip(*parts, strict=True))


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """A token cache in memory.

    Attributes:
      codes: uint16 or uint32 (N, views, t).
      labels: int32 (N,).
      manifest: What `manifest.json` says.
      path: Where it came from.
    """

    codes: np.ndarray
    labels: np.ndarray
    manifest: dict[str, Any]
    path: Path

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per label."""
        return tuple(self.manifest["class_names"])

    @property
    def num_tokens(self) -> int:
        """Tokens per picture, t."""
        return self.manifest["num_tokens"]

    @property
    def vocab_size(self) -> int:
        """Number of codes of the tokenizer."""
        return self.manifest["vocab_size"]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the token grid."""
        return tuple(self.manifest["grid"])

    @classmethod
    def open(cls, path: str | os.PathLike, expected_tokenizer: str | None = None) -> "TokenCache":
        """Reads a cache and verifies it.

        Args:
          path: Its directory.
          expected_tokenizer: `fingerprint` of the tokenizer in use; None takes any.

        Raises:
          FileNotFoundError: there is no cache, or a shard is missing.
          ValueError: another tokenizer made it, or the manifest or a shard is damaged.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        if expected_tokenizer not in (None, manifest["tokenizer"]):
            name = f" ({manifest['tokenizer_name']})" if manifest["tokenizer_name"] else ""
            raise ValueError(
                f"the token cache {path} was made with the tokenizer {manifest['tokenizer']}"
                f"{name}, but the tokenizer in use is {expected_tokenizer}: use that tokenizer, "
                "or make a cache with this one by launch/extract_codes.py"
            )
        shape = (manifest["num_examples"], len(manifest["views"]), manifest["num_tokens"])
        codes = np.empty(shape, manifest["dtype"])
        labels = np.empty(shape[:1], np.int32)
        start = 0
        for shard in manifest["shards"]:
            stop = start + shard["examples"]
            codes[start:stop], labels[start:stop] = _read_shard(path, shard, shape[1:])
            start = stop
        return cls(codes, labels, manifest, path)


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} is not a token cache (it has no {MANIFEST}): make one by "
            "launch/extract_codes.py"
        )
    try:
        manifest = json.loads(file.read_text())
        kind = manifest["format"], manifest["version"]
        missing = sorted(FIELDS - manifest.keys())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: {error!r}") from error
    if kind != (FORMAT, VERSION):
        raise ValueError(f"{file} describes {kind}, expected {(FORMAT, VERSION)}")
    if missing:
        raise ValueError(f"{file} is damaged: it lacks {', '.join(missing)}")
    counted = sum(shard["examples"] for shard in manifest["shards"])
    if counted != manifest["num_examples"]:
        raise ValueError(
            f"{file} is damaged: its shards hold {counted} examples, not {manifest['num_examples']}"
        )
    return manifest


def _read_shard(path: Path, shard: dict[str, Any], shape: tuple[int, ...]):
    file = path / shard["file"]
    if not file.is_file():
        raise FileNotFoundError(
            f"the shard {file} is missing: make the token cache again by launch/extract_codes.py"
        )
    data = file.read_bytes()
    if hashlib.sha256(data).hexdigest() != shard["sha256"]:
        raise ValueError(
            f"the shard {file} is damaged (its SHA-256 is not that of the manifest): make the "
            "token cache again by launch/extract_codes.py"
        )
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        codes, labels = arrays["codes"], arrays["labels"]
    if codes.shape != (shard["examples"], *shape):
        raise ValueError(f"{file} has codes {codes.shape}, not {(shard['examples'], *shape)}")
    return codes, labels


def token_batches(
    cache: TokenCache,
    batch_size: int,
    *,
    seed: int = 0,
    train: bool,
    shard_index: int = 0,
    shard_count: int = 1,
) -> grain.DatasetIterator:
    """Iterates over batches of codes, in the order of `image_batches`.

    In training each draw takes one of the views at random; otherwise it is the first.

    Args:
      cache: The codes.
      batch_size: Examples per whole batch; a multiple of `shard_count`.
      seed: Of order and views, in [0, 2**32).
      train: Shuffled and endless, or one pass in order.
      shard_index, shard_count: Which part of every batch to take; see `image_batches`.

    Returns:
      A resumable iterator of `{"codes": int32 (b, t), "labels": int32 (b,)}`, where b is
      `batch_size / shard_count`.
    """

    def gather(indices: np.ndarray, seeds: np.ndarray | None) -> dict[str, np.ndarray]:
        views = 0 if seeds is None else seeds % cache.codes.shape[1]
        return {
            "codes": cache.codes[indices, views].astype(np.int32),
            "labels": cache.labels[indices],
        }

    return index_batches(
        len(cache),
        gather,
        batch_size,
        seed=seed,
        train=train,
        shard_index=shard_index,
        shard_count=shard_count,
    )
