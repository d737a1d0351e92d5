"""Captioned images in tar files of WebDataset, read in place with random access.

A sample is the files of one tar file whose names agree up to the first dot: `0001.jpg` with its
caption in `0001.txt`, or in a field of `0001.json`. Opening a dataset reads the headers and the
captions; an image is read when it is needed.
"""

import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from aim_jax.data import captions as texts
from aim_jax.data.captions import CLASS_NAMES, Problems, caption_of, clean, decoded, looked_for
from aim_jax.data.class_folders import VALIDATION_FRACTION, held_out_share, split_of
from aim_jax.data.sources import ImageSource, decode_image, folders
from aim_jax.utils.json_files import anything, dict_of, opened, parse_json
from aim_jax.utils.logging import Progress
from aim_jax.utils.names import reason_of, short_list

TAR = ".tar"
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
IMAGES = ("jpg", "jpeg", "png", "webp")
TEXT = "txt"
JSON = "json"
MOST_JSON = 2**20  # bytes


class Place(NamedTuple):
    """Place of a file in a tar file: first byte and number of bytes."""

    offset: int
    size: int


class Sample(NamedTuple):
    """A captioned image in a tar file.

    Attributes:
      name: Path of the tar file relative to the dataset, and the name of the sample in it.
      file: Number of the tar file.
      image: Place of the image.
      caption: Its caption.
    """

    name: str
    file: int
    image: Place
    caption: str


class ShardImages(ImageSource):
    """Captioned images inside uncompressed tar files, decoded on access.

    Args:
      files: The tar files.
      samples: The images in them.
    """

    def __init__(
        self, name: str, split: str, files: Sequence[Path], samples: Sequence[Sample], summary: str
    ):
        super().__init__(name, split, CLASS_NAMES)
        self._captions = [sample.caption for sample in samples]
        self.captions = self._captions
        self.names = [sample.name for sample in samples]
        self._files = files
        self._file_of = np.array([sample.file for sample in samples], np.int32)
        self._places = np.array([sample.image for sample in samples], np.int64).reshape(-1, 2)
        self._summary = summary

    def __len__(self) -> int:
        return len(self.names)

    @property
    def summary(self) -> str:
        """Lines about the split as understood: images, what was left aside, problems."""
        return self._summary

    def _content(self) -> Iterable[Any]:
        yield from (os.fsencode(name) + b"\0" for name in self.names)
        yield self._places[:, 1].tobytes()

    def __getitem__(self, index: int) -> dict[str, Any]:
        offset, size = self._places[index].tolist()
        with open(self._files[self._file_of[index]], "rb") as file:
            file.seek(offset)
            data = file.read(size)
        image = decode_image(io.BytesIO(data), self.names[index])
        return {"image": image, "label": 0, "caption": self._captions[index]}


def is_tar(name: str) -> bool:
    """Return whether a file name is that of an uncompressed tar file and not hidden."""
    return name.lower().endswith(TAR) and not name.startswith(".")


def open_shards(name: str, root: Path, split: str, field: str = "") -> ShardImages:
    """Open a split of a WebDataset: the tar files in a folder, or in folders named by their split.

    Tar files in `root` belong to the split that their name says (`val-0001.tar`), others to
    "train". Without a validation split, 5 % of the images are held out of "train", by their name.

    Args:
      name, root, split, field: As in `captioned_folders.open_captioned`.

    Raises:
      ValueError: There are no tar files or captions, or a tar file is damaged.
    """
    splits = _splits(root)
    files = splits.get(split, splits["train"] if split == "validation" else [])
    if not files:
        raise ValueError(f"{root} has no {split} images: expected tar files named {split}-0000.tar")
    problems = Problems()
    aside: Counter[str] = Counter()
    samples: list[Sample] = []
    progress = Progress(f"reading the {split} captions", "tar files")
    for number, file in enumerate(files):
        samples += _samples(file, str(file.relative_to(root)), number, field, problems, aside)
        if len(files) > 1:
            progress(number + 1, len(files))
    if not samples:
        raise ValueError(
            f"{root} has {len(files)} tar files but no captioned images: looked for "
            f"NAME.{{{','.join(IMAGES)}}} with NAME.{TEXT}, or NAME.{JSON} with the field "
            f"{looked_for(field)} (found {'; '.join(problems.lines()) or 'neither'})"
        )
    where = f"{len(files)} tar files of {root}"
    if split != "test" and "validation" not in splits:
        kept = set(held_out_share([str(root / s.name) for s in samples], root, split))
        samples = [sample for sample in samples if str(root / sample.name) in kept]
        where += f" ({'all but ' if split == 'train' else ''}{VALIDATION_FRACTION:.0%})"
    if not samples:
        raise ValueError(f"{root} has too few captioned images to hold out a validation split")
    listed = ", ".join(f"{count} {kind} files" for kind, count in sorted(aside.items()))
    summary = f"{split}: {len(samples)} captioned images in {where}"
    summary += f"; left aside: {listed}" if listed else ""
    return ShardImages(name, split, files, samples, texts.summary_of(summary, problems))


def _splits(root: Path) -> dict[str, list[Path]]:
    """Return the sorted tar files by split; there are some of "train".

    Raises:
      ValueError: There are none, or they are compressed.
    """
    splits: dict[str, list[Path]] = {}
    for folder in (root, *(f for f in folders(root) if split_of(f.name))):
        names = sorted(os.listdir(folder))
        compressed = [name for name in names if name.lower().endswith(COMPRESSED)]
        if compressed:
            raise ValueError(
                f"{folder} has compressed tar files ({short_list(compressed, 3)}), which have no "
                "random access: unpack the compression (gunzip, say)"
            )
        for name in filter(is_tar, names):
            said = split_of(folder.name if folder != root else re.sub(r"[\d{}.]+", " ", name[:-4]))
            splits.setdefault(said[0] if said else "train", []).append(folder / name)
    if "train" not in splits:
        raise ValueError(
            f"{root} has no images, and no tar files to train on: expected captioned images "
            f"(NAME.png and NAME.txt, or metadata.jsonl), or tar files such as train-0000{TAR}"
        )
    return splits


def _samples(
    file: Path, shown: str, number: int, field: str, problems: Problems, aside: Counter[str]
) -> list[Sample]:
    """Return the captioned images of a tar file in its order."""
    with opened(file) as stream:
        images: dict[str, Place] = {}
        captions: dict[str, dict[str, Place]] = {}
        for member in _members(file, stream):
            name = member.name
            place = Place(member.offset_data, member.size)
            folder, _, base = name.rpartition("/")
            stem, _, suffix = base.partition(".")
            if member.isdir() or base.startswith("."):
                continue
            if not member.isreg() or member.issparse():
                aside["linked"] += 1
                continue
            key = f"{folder}/{stem}" if folder else stem
            suffix = suffix.lower()
            if suffix in (TEXT, JSON):
                if suffix in captions.setdefault(key, {}):
                    problems.add(texts.SEVERAL, f"{shown}/{name}")
                captions[key].setdefault(suffix, place)
            elif suffix in IMAGES and key not in images:
                images[key] = place
            else:
                aside[f".{suffix}" if suffix else "other"] += 1
        for key in captions.keys() - images.keys():
            problems.add(texts.NO_IMAGE, f"{shown}/{key}")
        samples = []
        for key, place in images.items():
            name = f"{shown}/{key}"
            caption = _caption(stream, captions.get(key, {}), field, name, problems)
            if caption is None:
                problems.add(texts.MISSING, name)
            else:
                samples.append(Sample(name, number, place, caption))
    return samples


def _caption(
    stream: IO[bytes], places: dict[str, Place], field: str, name: str, problems: Problems
) -> str | None:
    """Return the caption of a sample: its text, unless a field of its JSON is chosen."""

    def read(place: Place, most: int) -> bytes:
        stream.seek(place.offset)
        return stream.read(min(place.size, most + 1))

    if TEXT in places and not field:
        caption = decoded(read(places[TEXT], texts.MOST_BYTES), name, problems)
        return None if caption is None else clean(caption, name, problems)
    if JSON not in places:
        return None
    data = read(places[JSON], MOST_JSON)
    try:
        if len(data) > MOST_JSON:
            raise ValueError(f"more than {MOST_JSON:,} bytes")
        entry = parse_json(data, dict_of(anything))
    except ValueError as error:
        problems.add(texts.DAMAGED, f"{name}.{JSON} ({reason_of(error)})")
        return None
    return caption_of(entry, field, name, problems)


def _members(path: Path, stream: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a tar file.

    Raises:
      ValueError: The file is damaged or cut off.
    """
    size = os.fstat(stream.fileno()).st_size
    end = 0
    try:
        with tarfile.open(fileobj=stream, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # it would keep all of them
                if archive.offset <= end or not _is_inside(member, size):
                    raise ValueError(f"wrong size at byte {end:,}")
                end = archive.offset
                yield member
    except (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError) as error:
        raise ValueError(
            f"{path} cannot be read as a tar file ({reason_of(error)}): repair or remove it"
        ) from None
    stream.seek(end)
    # The library takes a damaged header for the end, which is a block of zeros.
    if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise ValueError(
            f"{path} is damaged or cut off at byte {end:,} of {size:,}: repair or remove it"
        )


def _is_inside(member: tarfile.TarInfo, size: int) -> bool:
    """Return whether the data of a member lies in a file of `size` bytes."""
    return not member.isreg() or 0 <= member.size <= size - member.offset_data
