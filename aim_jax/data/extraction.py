"""Creation of token caches: images are cut into views, encoded, and written shard by shard.

A shard depends only on its number. Several processes can therefore share the work, and an
interrupted extraction resumes with the missing shards.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aim_jax.data.captions import MOST_CAPTION
from aim_jax.data.loader import Prefetched
from aim_jax.data.preprocessing import ImageSpec, preprocess
from aim_jax.data.sources import ImageSource, check_labels
from aim_jax.data.token_cache import (
    FORMAT,
    MANIFEST,
    VERSION,
    captions_bytes,
    captions_name,
    check_shards,
    find_captions,
    find_shards,
    read_manifest,
    row_type,
    shard_name,
    shard_ranges,
)
from aim_jax.parallel.ownership import NO_CLAIM, Claim
from aim_jax.utils.endings import closing_all
from aim_jax.utils.files import replacing
from aim_jax.utils.names import check_text

VIEWS = ("centre", "centre_flip", "ten_crop")

# Position of a crop as a fraction of the spare height and of the spare width.
CROPS = {
    "centre": (1 / 2, 1 / 2),
    "top_left": (0, 0),
    "top_right": (0, 1),
    "bottom_left": (1, 0),
    "bottom_right": (1, 1),
}


class View(NamedTuple):
    """A square cut out of a square image."""

    name: str
    top: int
    left: int
    mirrored: bool


@dataclasses.dataclass(frozen=True)
class Views:
    """The views of an image, and the square that they are cut from.

    Attributes:
      size: Side S of every view, in pixels.
      square: Preprocessing of an image into the square (R, R), R >= S.
      views: Positions in the square. The first view is the centre, not mirrored.
    """

    size: int
    square: ImageSpec
    views: tuple[View, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """One name per view."""
        return tuple(view.name for view in self.views)

    @property
    def pictures(self) -> dict[str, Any]:
        """Preprocessing of the images as plain values, for a cache's manifest."""
        return dataclasses.asdict(self.square) | {"crop_size": self.size}

    def cut(self, squares: np.ndarray) -> Iterator[np.ndarray]:
        """Cut (b, R, R, C) into the views, one array (b, S, S, C) at a time."""
        for view in self.views:
            rows, columns = (slice(start, start + self.size) for start in (view.top, view.left))
            crop = squares[:, rows, columns]
            yield crop[:, :, ::-1] if view.mirrored else crop


def make_views(kind: str, spec: ImageSpec, crop_range: float = 1.1) -> Views:
    """Return the views of a kind.

    "centre" is the centre crop of `spec`. "centre_flip" is the centre crop and its mirror image.
    "ten_crop" is the centre and the four corners of a larger square, and their mirror images. The
    shorter side of an image is scaled to the side of the larger square, int(S * crop_range).
    LlamaGen makes one cache with a crop range of 1.1 and one with 1.05.

    Raises:
      ValueError: The kind is unknown; or ten crops are requested of padded images, or with a
        `crop_range` that leaves no room for them.
    """
    size = spec.image_size
    spec = dataclasses.replace(spec, random_crop=False, random_flip=False)
    if kind in ("centre", "centre_flip"):
        centre = View("centre", 0, 0, False)
        flip = View("flip", 0, 0, True)
        return Views(size, spec, (centre,) if kind == "centre" else (centre, flip))
    if kind != "ten_crop":
        raise ValueError(f"unknown views {kind!r}: expected one of {', '.join(VIEWS)}")
    spare = int(size * crop_range) - size
    if spec.fit != "resize" or spare < 1:
        raise ValueError(
            f"ten_crop has no room: it cuts {size}x{size} from the corners of a square of "
            f"int({size} * {crop_range}) pixels, and needs fit='resize' (here {spec.fit!r}). Use a "
            "larger crop_range, or centre_flip"
        )
    views = [
        View(f"{name}_flip" if mirrored else name, int(y * spare), int(x * spare), mirrored)
        for mirrored in (False, True)
        for name, (y, x) in CROPS.items()
    ]
    square = dataclasses.replace(spec, image_size=size + spare, resize_size=None)
    return Views(size, square, tuple(views))


def parse_part(text: str) -> tuple[int, int]:
    """Parse a part such as "3/16", the third of sixteen, into (2, 16); "" is everything, (0, 1).

    Raises:
      ValueError: The text does not have this form, or the number is out of range.
    """
    number, slash, count = (text or "1/1").partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise ValueError(f"invalid part {text!r}: expected the form 3/16, from 1/16 to 16/16")
    return int(number) - 1, int(count)


class CacheWriter:
    """Writer of a token cache, shard by shard; `TokenCache.open` reads the finished cache.

    Args:
      out_dir: Directory to write to: new, empty, or with a part of the same cache.
      tokenizer: The tokenizer's `fingerprint`.
      vocab_size: Number of codebook entries; tokens lie in [0, vocab_size).
      grid: Rows and columns of the token grid; t is their product.
      class_names: One name per label.
      views: One name per view, such as ("centre", "flip").
      num_examples: Number of examples in the finished cache.
      dataset, split, pictures: Name of the dataset, its split, and the preprocessing of its images.
        They are recorded, and compared when an extraction resumes.
      examples: Fingerprint of the images, recorded and compared likewise.
      tokenizer_name: A readable name of the tokenizer, for error messages.
      shard_size: Examples per shard.
      captioned: The examples have captions.

    Raises:
      ValueError: There are no examples, or `out_dir` has other files or a part of another cache.
    """

    def __init__(
        self,
        out_dir: str | os.PathLike,
        *,
        tokenizer: str,
        vocab_size: int,
        grid: tuple[int, int],
        class_names: Iterable[str],
        views: Iterable[str],
        num_examples: int,
        dataset: str = "",
        split: str = "",
        pictures: dict[str, Any] | None = None,
        examples: str = "",
        tokenizer_name: str = "",
        shard_size: int = 16384,
        captioned: bool = False,
    ):
        if num_examples < 1:
            raise ValueError(f"there are no examples to write into the token cache {out_dir}")
        self.path = Path(out_dir)
        self.manifest: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer": tokenizer,
            "tokenizer_name": tokenizer_name,
            "dataset": dataset,
            "split": split,
            "pictures": pictures or {},
            "examples": examples,
            "num_examples": num_examples,
            "shard_size": shard_size,
            "views": list(views),
            "grid": list(grid),
            "num_tokens": grid[0] * grid[1],
            "vocab_size": vocab_size,
            "dtype": "uint16" if vocab_size <= 2**16 else "uint32",
            "class_names": list(class_names),
        } | ({"captioned": True} if captioned else {})
        self.captioned = captioned
        self.ranges = shard_ranges(self.manifest)
        self._claim()

    def missing(self) -> list[int]:
        """Return the numbers of the shards that are not written yet."""
        written = set(find_shards(self.path))
        if self.captioned:
            written &= find_captions(self.path).keys()
        return sorted(set(range(len(self.ranges))) - written)

    def write(
        self,
        shard: int,
        codes: np.ndarray,
        labels: np.ndarray,
        captions: Sequence[str] | None = None,
    ) -> None:
        """Write one shard; each of its files is written atomically.

        Args:
          shard: Number of the shard.
          codes: Tokens, integers (n, views, t), where n is the length of `ranges[shard]`.
          labels: Integers (n,).
          captions: n captions, if the cache is captioned.

        Raises:
          ValueError: A shape, token, label or the captions do not agree with the manifest.
        """
        rows = np.empty(len(self.ranges[shard]), row_type(self.manifest))
        self._check(codes, labels, rows["codes"].shape, self.ranges[shard].start)
        self._check_captions(captions, len(rows))
        rows["codes"] = codes
        rows["label"] = labels
        buffer = io.BytesIO()
        np.save(buffer, rows)
        if captions is not None:
            lines = captions_bytes(captions)
            self._put(captions_name(shard, hashlib.sha256(lines).hexdigest()), lines)
        data = buffer.getbuffer()
        self._put(shard_name(shard, hashlib.sha256(data).hexdigest()), data)

    def finish(self) -> list[int]:
        """Complete the cache if every shard is present and intact; return the missing shards.

        Raises:
          ValueError: A shard is damaged.
        """
        missing = self.missing()
        if not missing:
            lists = {"shards": [name for _, name in sorted(find_shards(self.path).items())]}
            if self.captioned:
                found = sorted(find_captions(self.path).items())
                lists["captions"] = [name for _, name in found]
            names = [name for listed in lists.values() for name in listed]
            check_shards([self.path / name for name in names])
            self._claim()
            self._put(MANIFEST, _json(self.manifest | lists))
            # Partial files of killed processes, and shards that two processes made.
            made = ("shard-*.npy", ".shard-*.partial", "captions-*.jsonl", ".captions-*.partial")
            for file in (file for pattern in made for file in self.path.glob(pattern)):
                if file.name not in names:
                    file.unlink(missing_ok=True)
        return missing

    def _claim(self) -> None:
        """Write the manifest, or check that the one on disk agrees with it."""
        # List files before looking for the manifest: another process writes it before any shard.
        in_use = self.path.exists() and (not self.path.is_dir() or any(self.path.glob("[!.]*")))
        if not (self.path / MANIFEST).is_file():
            if in_use:
                raise ValueError(
                    f"{self.path} already exists and is not a token cache: remove it, or write the "
                    "token cache elsewhere"
                )
            self.path.mkdir(parents=True, exist_ok=True)
            self._put(MANIFEST, _json(self.manifest))
            return
        plain = {"captioned": False}
        stored = plain | read_manifest(self.path)
        # The same tokenizer may be named by another path.
        differences = [
            f"{field}: {_short(stored.get(field))} on disk, {_short(value)} requested"
            for field, value in (plain | self.manifest).items()
            if field != "tokenizer_name" and stored.get(field) != value
        ]
        if differences and find_shards(self.path):
            raise ValueError(
                f"{self.path} holds another token cache ({'; '.join(differences)}): use the "
                "settings it was started with, remove it, or write elsewhere"
            )
        if differences:
            self._put(MANIFEST, _json(self.manifest))

    def _check(
        self, codes: np.ndarray, labels: np.ndarray, shape: tuple[int, ...], start: int
    ) -> None:
        if codes.shape != shape or labels.shape != shape[:1]:
            raise ValueError(
                f"codes have shape {codes.shape} and labels {labels.shape}, expected {shape} and "
                f"{shape[:1]}: examples, views and tokens"
            )
        vocab_size = self.manifest["vocab_size"]
        if codes.min() < 0 or codes.max() >= vocab_size:
            raise ValueError(
                f"tokens range from {codes.min()} to {codes.max()}, expected 0 to {vocab_size - 1}"
            )
        check_labels(labels, len(self.manifest["class_names"]), f"examples from {start} onwards")

    def _check_captions(self, captions: Sequence[str] | None, count: int) -> None:
        if (
            self.captioned != (captions is not None)
            or len(captions or ()) != count * self.captioned
        ):
            raise ValueError(
                f"expected {count if self.captioned else 'no'} captions, got "
                f"{'none' if captions is None else len(captions)}"
            )
        for caption in captions or ():
            check_text("a caption", caption, MOST_CAPTION)

    def _put(self, name: str, data: bytes | memoryview) -> None:
        with replacing(self.path / name) as partial:
            partial.write_bytes(data)


def _json(manifest: dict[str, Any]) -> bytes:
    return (json.dumps(manifest, indent=1) + "\n").encode()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def extract_codes(
    encode_fn: Callable[[np.ndarray], Any],
    source: ImageSource,
    views: Views,
    writer: CacheWriter,
    batch_size: int,
    *,
    part: tuple[int, int] = (0, 1),
    workers: int = 0,
    progress: Callable[[int, int], None] | None = None,
    claim: Claim = NO_CLAIM,
) -> None:
    """Encode the images of all missing shards, or of one process's part of them.

    Images are decoded ahead of time while others are encoded.

    Args:
      encode_fn: Maps float32 (batch_size, S, S, C) to tokens (batch_size, t). Its batch size never
        changes: the last batch of a shard is padded, and the padding dropped.
      source: The images.
      views: The views to encode of each image.
      writer: Destination of the tokens.
      batch_size: Images per call.
      part: (i, n) takes every n-th shard, starting with the i-th.
      workers: Processes that decode images; 0 uses threads of this process.
      progress: Called after each batch with the number of images done and the total.
      claim: Ownership of the writer's directory.

    Raises:
      OwnershipError: The ownership was lost.
      ValueError: The first image does not fit `views`, or an image cannot be read.
    """
    preprocess(source[0]["image"], views.square)
    shards = [shard for shard in writer.missing() if shard % part[1] == part[0]]
    pieces = [
        (shard, writer.ranges[shard][start : start + batch_size])
        for shard in shards
        for start in range(0, len(writer.ranges[shard]), batch_size)
    ]
    total = sum(len(piece) for _, piece in pieces)
    done = 0
    encoded = _encode(encode_fn, source, views, batch_size, pieces, workers)
    with closing_all() as at_end:
        at_end(encoded.close)
        for shard, group in itertools.groupby(encoded, key=lambda item: item[0]):
            codes = []
            labels = []
            for _, some_codes, some_labels in group:
                codes.append(some_codes)
                labels.append(some_labels)
                done += len(some_labels)
                if progress is not None:
                    progress(done, total)
            claim.check()
            captions = source.captions and [source.captions[i] for i in writer.ranges[shard]]
            writer.write(shard, np.concatenate(codes), np.concatenate(labels), captions)


def _encode(
    encode_fn: Callable[[np.ndarray], Any],
    source: ImageSource,
    views: Views,
    batch_size: int,
    pieces: Sequence[tuple[int, range]],
    workers: int,
) -> Generator[tuple[int, np.ndarray, np.ndarray], None, None]:
    """Yield shard, tokens (n, views, t) and labels (n,) of every piece, one encoded ahead."""
    import grain

    side = views.square.image_size
    channels = views.square.channels

    def load(number: int) -> dict[str, np.ndarray]:
        indices = pieces[number][1]
        squares = np.zeros((batch_size, side, side, channels), np.float32)
        labels = np.empty(len(indices), np.int32)
        for row, index in enumerate(indices):
            example = source[index]
            squares[row] = preprocess(example["image"], views.square)
            labels[row] = example["label"]
        return {"squares": squares, "labels": labels}

    def fetch(shard: int, codes: list, labels: np.ndarray) -> tuple[int, np.ndarray, np.ndarray]:
        return shard, np.stack([np.asarray(c) for c in codes], axis=1)[: len(labels)], labels

    if not pieces:
        return
    ahead: tuple[int, list, np.ndarray] | None = None
    numbers = grain.MapDataset.range(len(pieces))
    loaded = Prefetched(numbers.map(load), min(8, os.cpu_count() or 1), workers)
    with closing_all() as at_end:
        at_end(loaded.close)  # ends its processes
        for (shard, _), batch in zip(pieces, loaded, strict=True):
            codes = [encode_fn(view) for view in views.cut(batch["squares"])]
            if ahead is not None:
                yield fetch(*ahead)
            ahead = shard, codes, np.array(batch["labels"])
        if ahead is not None:
            yield fetch(*ahead)
