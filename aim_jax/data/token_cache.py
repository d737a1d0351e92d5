"""Token caches: the tokens of a dataset under one tokenizer, on disk, and batches of them.

A cache is a directory with `manifest.json` and one `.npy` file per shard. A row of a shard is one
example: its label, and its tokens (views, t), where a view is one crop of an image. Shards are
mapped into memory, so a batch costs only the pages it touches, and processes of one machine share
them. A cache of captioned images has a file of captions beside every shard, one JSON string per
line. The name of a file holds the SHA-256 of its content. The manifest is written first, and lists
the files once all of them exist.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from aim_jax.data.captions import MOST_CAPTION
from aim_jax.data.features import CaptionTable, caption_entries
from aim_jax.data.loader import Prefetched, index_batches
from aim_jax.utils.checks import shown
from aim_jax.utils.json_files import (
    Check,
    anything,
    choice,
    dict_of,
    flag,
    integer,
    list_of,
    read_json,
    read_json_lines,
    record,
    string,
    text,
)
from aim_jax.utils.logging import Progress
from aim_jax.utils.names import reason_of, short_list

FORMAT = "aim_jax token cache"
VERSION = 2
MANIFEST = "manifest.json"
SHARD = re.compile(r"shard-(\d{5,9})-[0-9a-f]{64}\.npy")
CAPTIONS = re.compile(r"captions-(\d{5,9})-[0-9a-f]{64}\.jsonl")
MOST_HEADER = 2**16  # bytes of a shard before its rows
MOST_MANIFEST = 2**27  # bytes; a name of a shard takes about 90
# Entries of the manifest. Further ones are ignored.
REQUIRED: dict[str, Check] = {
    "tokenizer": text(),
    "tokenizer_name": string,
    "num_examples": integer(1),
    "shard_size": integer(1),
    "views": list_of(text(), 1, 1000),
    "grid": list_of(integer(1, 2**15), 2, 2),
    "num_tokens": integer(1, 2**30),
    "vocab_size": integer(1, 2**31 - 1),
    "dtype": choice("uint16", "uint32"),
    "class_names": list_of(text(), 1),
}
OPTIONAL: dict[str, Check] = {
    "shards": list_of(text()),
    "captioned": flag,
    "captions": list_of(text()),
    "dataset": string,
    "split": string,
    "pictures": dict_of(anything),
    "examples": string,
}


def fingerprint(config: Any, params: Mapping[str, Any]) -> str:
    """Return a fingerprint of a tokenizer's configuration and weights.

    Args:
      config: Configuration of the tokenizer: a dataclass or mapping of JSON values.
      params: Nested dicts of arrays.

    Returns:
      Hexadecimal SHA-256 over the sorted configuration and the path, type, shape and bytes of each
      array, ordered by path.
    """
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        config = dataclasses.asdict(config)
    digest = hashlib.sha256(json.dumps(dict(config), sort_keys=True).encode())
    for path, array in sorted(flatten_dict(params, sep="/").items()):
        array = np.asarray(array)
        digest.update(f"\n{path} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def row_type(manifest: Mapping[str, Any]) -> np.dtype:
    """Return the dtype of a shard's rows: `label` int32, `codes` uint16 or uint32 (views, t)."""
    shape = len(manifest["views"]), manifest["num_tokens"]
    dtype = np.dtype(manifest["dtype"]).newbyteorder("<")
    return np.dtype([("label", "<i4"), ("codes", dtype, shape)])


def shard_count(manifest: Mapping[str, Any]) -> int:
    """Return the number of shards of a finished cache."""
    return -(-manifest["num_examples"] // manifest["shard_size"])


def shard_ranges(manifest: Mapping[str, Any]) -> list[range]:
    """Return the range of examples of every shard: `shard_size` each, fewer in the last one."""
    size = manifest["shard_size"]
    total = manifest["num_examples"]
    return [range(start, min(start + size, total)) for start in range(0, total, size)]


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """Token cache mapped into memory, with random access to its examples.

    `len(cache)` is the number of examples and `cache[i]` is `{"codes": uint16 or uint32 (views, t),
    "label": int}`.

    Attributes:
      shards: Structured arrays (n,) of `row_type`.
      manifest: Content of `manifest.json`.
      path: Directory of the cache.
    """

    shards: Sequence[np.ndarray]
    manifest: dict[str, Any]
    path: Path

    def __len__(self) -> int:
        return self.manifest["num_examples"]

    def __getitem__(self, index: int) -> dict[str, Any]:
        codes, labels = self.take(np.array([index]))
        return {"codes": codes[0], "label": int(labels[0])}

    def take(
        self, indices: np.ndarray, views: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens and labels of examples.

        Args:
          indices: int (b,), in [0, len).
          views: int (b,), the view to take of each example; None takes all views.

        Returns:
          `(codes, labels int32 (b,))`; the tokens are (b, t), or (b, views, t) without `views`.
        """
        labels = np.empty(len(indices), np.int32)
        shape = self.shards[0].dtype["codes"].shape[0 if views is None else 1 :]
        codes = np.empty((len(indices), *shape), self.manifest["dtype"])
        shard_of, row_of = np.divmod(indices, self.manifest["shard_size"])
        for shard in np.unique(shard_of):
            here = np.flatnonzero(shard_of == shard)
            chosen = row_of[here] if views is None else (row_of[here], views[here])
            codes[here] = self.shards[shard]["codes"][chosen]
            labels[here] = self.shards[shard]["label"][row_of[here]]
        return codes, labels

    @property
    def summary(self) -> str:
        """One line about the cache: images, classes or captions, views."""
        classes = f"{len(self.class_names)} classes ({short_list(self.class_names)})"
        return (
            f"{self.path}: tokens of {len(self)} images ({', '.join(self.views)}); "
            f"{'with captions' if self.captioned else classes}"
        )

    def fingerprint(self) -> str:
        """Return a digest of tokens, labels and captions, from the names of their files."""
        names = [*self.manifest["shards"], *self.manifest.get("captions", ())]
        return hashlib.sha256("\n".join(names).encode()).hexdigest()

    @property
    def captioned(self) -> bool:
        """True if the examples have captions."""
        return self.manifest.get("captioned", False)

    def captions(self) -> list[str]:
        """Read the captions of all examples; an empty one means "no text".

        Raises:
          ValueError: The cache has no captions, or a file of them is damaged.
        """
        if not self.captioned:
            raise ValueError(
                f"the token cache {self.path} has no captions: make it again from captioned images "
                "(aim-jax extract_codes --data_name captions --data DIR)"
            )
        captions: list[str] = []
        ranges = shard_ranges(self.manifest)
        for name, examples in zip(self.manifest["captions"], ranges, strict=True):
            captions += _read_captions(self.path / name, len(examples))
        return captions

    @property
    def views(self) -> tuple[str, ...]:
        """One name per view."""
        return tuple(self.manifest["views"])

    @property
    def class_names(self) -> tuple[str, ...]:
        """One name per label."""
        return tuple(self.manifest["class_names"])

    @property
    def num_tokens(self) -> int:
        """Tokens per image, t."""
        return self.manifest["num_tokens"]

    @property
    def vocab_size(self) -> int:
        """Number of codebook entries of the tokenizer."""
        return self.manifest["vocab_size"]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the token grid."""
        return tuple(self.manifest["grid"])

    @classmethod
    def open(cls, path: str | os.PathLike, expected_tokenizer: str | None = None) -> "TokenCache":
        """Map a cache into memory after verifying its checksums.

        Reading every shard once makes later random access fast, if memory suffices.

        Args:
          path: Directory of the cache.
          expected_tokenizer: `fingerprint` of the tokenizer in use; None accepts any.

        Raises:
          FileNotFoundError: There is no cache, or a shard is missing.
          ValueError: Another tokenizer made the cache, the cache is not finished, or the manifest
            or a shard is damaged.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if expected_tokenizer not in (None, manifest["tokenizer"]):
            name = f" ({shown(manifest['tokenizer_name'])})" if manifest["tokenizer_name"] else ""
            raise ValueError(
                f"the token cache {path} was made with the tokenizer {manifest['tokenizer']}"
                f"{name}, but the tokenizer in use is {expected_tokenizer}: use that tokenizer, "
                "or make a cache with this one (aim-jax extract_codes)"
            )
        if "shards" not in manifest:
            raise ValueError(
                f"the token cache {path} is not finished: {len(find_shards(path))} of "
                f"{shard_count(manifest)} shards exist. Repeat the aim-jax extract_codes "
                "command that started it"
            )
        files = [path / name for name in manifest["shards"]]
        _check_sizes(files, manifest)
        check_shards([*files, *(path / name for name in manifest.get("captions", ()))])
        shards = [_mapped(file) for file in files]
        for file, shard, examples in zip(files, shards, shard_ranges(manifest), strict=True):
            if (shard.dtype, shard.shape) != (row_type(manifest), (len(examples),)):
                raise ValueError(
                    f"{file} holds {shard.dtype} {shard.shape}, expected "
                    f"{row_type(manifest)} ({len(examples)},)"
                )
        return cls(shards, manifest, path)


def read_manifest(path: Path) -> dict[str, Any]:
    """Return the manifest of a cache; an unfinished cache has no `shards` in it.

    Raises:
      FileNotFoundError: There is no manifest.
      ValueError: The manifest is damaged, or describes another format.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} is not a token cache (it has no {MANIFEST}): make one with "
            "aim-jax extract_codes"
        )
    try:
        return read_json(file, _check_manifest, most_bytes=MOST_MANIFEST)
    except ValueError as error:
        raise ValueError(
            f"{error} Remove {path} and make it again with aim-jax extract_codes"
        ) from None


def _check_manifest(name: str, content: Any) -> None:
    record({"format": text(), "version": integer()})(name, content)
    version = content["format"], content["version"]
    if version != (FORMAT, VERSION):
        raise ValueError(f"it describes {version}, expected {(FORMAT, VERSION)}.")
    record(REQUIRED, OPTIONAL)(name, content)
    rows, columns = content["grid"]
    if content["num_tokens"] != rows * columns:
        raise ValueError(
            f"num_tokens: expected {rows * columns} in a grid of {rows} x {columns}, got "
            f"{content['num_tokens']}."
        )
    if content["vocab_size"] > np.iinfo(content["dtype"]).max + 1:
        raise ValueError(
            f"vocab_size: {content['vocab_size']} tokens do not fit into {content['dtype']}."
        )
    if ("captions" in content) != (content.get("captioned", False) and "shards" in content):
        raise ValueError("captions: expected a list in a finished cache with captions, else none.")
    _check_names("shards", content, SHARD, shard_name)
    _check_names("captions", content, CAPTIONS, captions_name)


def _check_names(
    entry: str, manifest: Mapping[str, Any], pattern: re.Pattern, name_of: Callable[[int, str], str]
) -> None:
    """Check the number and form of the names of files that a manifest lists, if it does."""
    if entry not in manifest:
        return
    names = manifest[entry]
    expected = shard_count(manifest)
    if len(names) != expected:
        raise ValueError(f"it lists {len(names)} {entry}, expected {expected}.")
    for number, name in enumerate(names):
        match = pattern.fullmatch(name)
        if match is None or int(match[1]) != number:
            raise ValueError(
                f"{entry}[{number}]: expected a name like {name_of(number, 'SHA-256')}, got "
                f"{shown(name)}."
            )


def _check_sizes(files: Sequence[Path], manifest: Mapping[str, Any]) -> None:
    """Check the examples of a manifest against the sizes of its shards, before any is opened.

    Raises:
      ValueError: A shard has another size than its rows take.
    """
    codes = len(manifest["views"]) * manifest["num_tokens"]
    row = np.dtype("<i4").itemsize + codes * np.dtype(manifest["dtype"]).itemsize
    for file, examples in zip(files, shard_ranges(manifest), strict=True):
        if not file.is_file():
            continue  # `check_shards` names it
        header = file.stat().st_size - row * len(examples)
        if not 0 < header <= MOST_HEADER:
            raise ValueError(
                f"{file} is damaged: it has {file.stat().st_size:,} bytes, and {MANIFEST} "
                f"describes {len(examples):,} examples of {row:,} bytes in it"
            )


def _mapped(file: Path) -> np.ndarray:
    try:
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, SyntaxError, TypeError) as error:
        raise ValueError(f"{file} is no array of tokens ({reason_of(error)})") from None


def captions_bytes(captions: Sequence[str]) -> bytes:
    """Return the content of a file of captions, at most `MOST_CAPTION` characters each."""
    return b"".join(json.dumps(c, ensure_ascii=False).encode() + b"\n" for c in captions)


def _read_captions(file: Path, count: int) -> list[str]:
    captions = []
    for line in read_json_lines(file, text(MOST_CAPTION)):
        if line.problem:
            raise ValueError(f"{line.name} is no caption: {line.problem}")
        captions.append(line.content)
    if len(captions) != count:
        raise ValueError(f"{file} has {len(captions)} captions, expected {count}")
    return captions


def shard_name(number: int, sha256: str) -> str:
    """Return the file name of a shard."""
    return f"shard-{number:05d}-{sha256}.npy"


def captions_name(number: int, sha256: str) -> str:
    """Return the file name of the captions of a shard."""
    return f"captions-{number:05d}-{sha256}.jsonl"


def find_shards(path: Path) -> dict[int, str]:
    """Return the file names of the shards in a directory, by number."""
    return _find(path, "shard-*.npy", SHARD)


def find_captions(path: Path) -> dict[int, str]:
    """Return the file names of the captions in a directory, by the number of their shard."""
    return _find(path, "captions-*.jsonl", CAPTIONS)


def _find(path: Path, names: str, pattern: re.Pattern) -> dict[int, str]:
    found = (file.name for file in sorted(path.glob(names)))
    return {int(match[1]): name for name in found if (match := pattern.fullmatch(name))}


def check_shards(files: Sequence[Path]) -> None:
    """Verify the content of shards and captions against the SHA-256 in their names.

    Raises:
      FileNotFoundError: A shard is missing.
      ValueError: A shard is damaged.
    """
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"the shard {file} is missing: "
                "repeat the aim-jax extract_codes command of its cache"
            )
    total = sum(file.stat().st_size for file in files)
    progress = Progress(f"checking {files[0].parent}", "MB")
    done = 0
    quick = total < 2**28

    def digest(file: Path) -> str:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for file, actual in zip(files, pool.map(digest, files), strict=True):
            if actual not in file.name:
                raise ValueError(
                    f"the shard {file} is damaged (its SHA-256 differs from its name): remove it "
                    "and repeat the aim-jax extract_codes command that made it"
                )
            done += file.stat().st_size
            if not quick:
                progress(done // 10**6, total // 10**6)


def check_alike(caches: Sequence[TokenCache]) -> None:
    """Raise ValueError unless all caches have the tokenizer, grid and classes of the first."""
    first = caches[0]
    for cache, field in itertools.product(
        caches[1:], ("tokenizer", "vocab_size", "grid", "class_names")
    ):
        if cache.manifest[field] != first.manifest[field]:
            raise ValueError(
                f"the token caches {first.path} and {cache.path} cannot be mixed: their {field} "
                f"differ, {reprlib.repr(first.manifest[field])} and "
                f"{reprlib.repr(cache.manifest[field])}"
            )


def token_batches(
    caches: Sequence[TokenCache],
    batch_size: int,
    *,
    weights: Sequence[float] | None = None,
    captions: Sequence[CaptionTable] | None = None,
    seed: int = 0,
    train: bool,
    shard_index: int = 0,
    shard_count: int = 1,
) -> Prefetched:
    """Return an iterator over batches of tokens, in the order of `image_batches`.

    In training, one of the views of each example is chosen at random; otherwise the first view is
    used. Several caches are each shuffled and repeated separately, and mixed in fixed proportions:
    every example of a cache is returned once before one of them is repeated.

    Args:
      caches: The caches, which must agree as `check_alike` demands.
      batch_size: Examples per batch of all parts; a multiple of `shard_count`.
      weights: Relative frequency of an example of each cache; equal by default.
      captions: Captions of the examples of each cache, to add to the batches.
      seed: Seed of order and views, in [0, 2**32).
      train: Shuffled and endless, or one pass in order.
      shard_index, shard_count: The part of every batch to return; see `image_batches`.

    Returns:
      A resumable iterator of `{"codes": int32 (b, t), "labels": int32 (b,)}`, where b is
      `batch_size / shard_count`; with `captions`, also the entries of `caption_entries`.
    """
    check_alike(caches)
    sizes = [len(cache) for cache in caches]
    starts = np.cumsum([0, *sizes[:-1]])

    def gather(indices: np.ndarray, seeds: np.ndarray | None) -> dict[str, np.ndarray]:
        batch = {
            "codes": np.empty((len(indices), caches[0].num_tokens), np.int32),
            "labels": np.empty(len(indices), np.int32),
        }
        owners = np.searchsorted(starts, indices, side="right") - 1
        for owner in np.unique(owners):
            here = np.flatnonzero(owners == owner)
            cache = caches[owner]
            rows = indices[here] - starts[owner]
            views = np.zeros(len(here), int) if seeds is None else seeds[here] % len(cache.views)
            batch["codes"][here], batch["labels"][here] = cache.take(rows, views)
            if captions is not None:
                for name, values in caption_entries(captions[owner], rows).items():
                    shape = (len(indices), *values.shape[1:])
                    batch.setdefault(name, np.empty(shape, values.dtype))[here] = values
        return batch

    return index_batches(
        sizes,
        gather,
        batch_size,
        seed=seed,
        train=train,
        shard_index=shard_index,
        shard_count=shard_count,
        weights=weights,
    )
