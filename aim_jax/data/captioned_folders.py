"""Folders of captioned images: metadata files, text files beside the images, or tar files.

Three forms are recognised by what the folder holds:

* `metadata.jsonl` or `metadata.csv`, as in Hugging Face's imagefolder: one entry per image, with
  `file_name`, relative to the folder of the metadata, and a field with the caption;
* `NAME.txt` beside the image `NAME.png`;
* tar files of WebDataset (`aim_jax.data.webdataset`), in a folder without images.

Splits are folders named like one (`class_folders.split_of`), or tar files named like one. Every
problem is counted in the summary.
"""

import csv
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aim_jax.data import captions as texts
from aim_jax.data.captions import CLASS_NAMES, Problems, caption_of, clean, decoded, looked_for
from aim_jax.data.class_folders import VALIDATION_FRACTION, held_out_share, holds_images, split_of
from aim_jax.data.sources import FolderImages, ImageSource, folders, images_in, is_image, walk
from aim_jax.data.webdataset import is_tar, open_shards
from aim_jax.utils.json_files import MOST_LINE, anything, dict_of, opened, read_json_lines
from aim_jax.utils.names import reason_of, short_list

METADATA = ("metadata.jsonl", "metadata.csv")
FILE_NAME = "file_name"  # the field of an entry that names the image
TEXT_SUFFIX = ".txt"


class Listing(NamedTuple):
    """Files in a folder and its subfolders, as sorted paths relative to the folder.

    Attributes:
      images: Images.
      metadata: Files named like one of `METADATA`.
      text_files: Files with captions, by the path without its suffix.
      others: Numbers of the remaining files by suffix, and of linked folders.
    """

    images: list[str]
    metadata: list[str]
    text_files: dict[str, str]
    others: Counter[str]


def is_captioned(root: Path) -> bool:
    """Return whether a folder holds captions: metadata, tar files, or a text for most images."""
    if not holds_images(root):
        return any(is_tar(name) for _, _, names in walk(root) for name in names)
    listing = _listed(root)
    if any(_names_images(root / path) for path in listing.metadata):
        return True
    with_text = sum(os.path.splitext(image)[0] in listing.text_files for image in listing.images)
    return 2 * with_text > len(listing.images)


def _names_images(metadata: Path) -> bool:
    """Return whether the first line of a metadata file has a field with names of files."""
    with opened(metadata) as file:
        return FILE_NAME.encode() in file.readline(MOST_LINE)


def open_captioned(name: str, root: Path, split: str, field: str = "") -> ImageSource:
    """Open a split of a folder of captioned images.

    Without a validation split, 5 % of the images are held out of "train", chosen by file name.

    Args:
      name: Name of the dataset.
      root: The folder.
      split: "train", "validation" or "test".
      field: Field of the metadata that holds the captions; "" takes "text" or "caption".

    Returns:
      A source with `captions`.

    Raises:
      ValueError: There are no captions, or the splits or a file cannot be read. The message says
        what was looked for.
    """
    if not holds_images(root):
        return open_shards(name, root, split, field)
    splits = _splits(root)
    if split == "test" and split not in splits:
        raise ValueError(f"{root} has no test split: expected a folder {root / 'test'}")
    folder = splits.get(split, splits["train"])
    problems = Problems()
    listing = _listed(folder)
    captions = _captions(root, folder, listing, field, problems)
    if not captions:
        raise ValueError(_nothing(folder, listing, field, problems))
    paths = [str(folder / image) for image in sorted(captions)]
    where = str(folder)
    if split != "test" and "validation" not in splits:
        paths = held_out_share(paths, folder, split)
        where += f" ({'all but ' if split == 'train' else ''}{VALIDATION_FRACTION:.0%})"
    if not paths:
        raise ValueError(f"{root} has too few captioned images to hold out a validation split")
    aside = [f"{count} {kind}" for kind, count in sorted(listing.others.items())]
    outside = 0 if folder == root else _images_outside(root, splits)
    if outside:
        aside.append(f"{outside} images outside of the splits")
    summary = f"{split}: {len(paths)} captioned images in {where}" + (
        f"; left aside: {', '.join(aside)}" if aside else ""
    )
    return FolderImages(
        name, split, CLASS_NAMES, paths, np.zeros(len(paths), np.int32), root=folder,
        summary=texts.summary_of(summary, problems),
        captions=[captions[os.path.relpath(path, folder)] for path in paths],
    )  # fmt: skip


def _splits(root: Path) -> dict[str, Path]:
    """Return the folders of the splits; the folder itself is "train" if it has none."""
    splits: dict[str, Path] = {}
    for folder in folders(root):
        named = split_of(folder.name)
        if named is None or not holds_images(folder):
            continue
        if named[0] in splits:
            raise ValueError(
                f"{root} has several {named[0]} splits ({splits[named[0]].name}/ and "
                f"{folder.name}/): pass a folder with one of each"
            )
        splits[named[0]] = folder
    if splits and "train" not in splits:
        listed = short_list([f"{folder.name}/" for folder in splits.values()])
        raise ValueError(
            f"{root} has {listed} but no folder with training images: name it train, or pass the "
            "folder of one split"
        )
    return splits or {"train": root}


def _images_outside(root: Path, splits: dict[str, Path]) -> int:
    """Return the number of images in a folder that are in no folder of a split."""
    others = [folder for folder in folders(root) if folder not in splits.values()]
    loose = sum(is_image(name) for name in os.listdir(root))
    return loose + sum(len(images_in(folder)) for folder in others)


def _listed(folder: Path) -> Listing:
    """List a folder; linked folders in it are not followed."""
    listing = Listing([], [], {}, Counter())
    for directory, subfolders, names in walk(folder):
        links = sum(os.path.islink(os.path.join(directory, name)) for name in subfolders)
        listing.others.update({"linked folders": links} if links else {})
        for name in sorted(names):
            path = os.path.relpath(os.path.join(directory, name), folder)
            stem, suffix = os.path.splitext(path)
            if is_image(name):
                listing.images.append(path)
            elif name in METADATA:
                listing.metadata.append(path)
            elif suffix.lower() == TEXT_SUFFIX and not name.startswith("."):
                listing.text_files[stem] = path
            elif not name.startswith("."):
                listing.others[f"{suffix or 'other'} files"] += 1
    return listing


def _captions(
    root: Path, folder: Path, listing: Listing, field: str, problems: Problems
) -> dict[str, str]:
    """Return the captions of images in the folder of a split, by path relative to it."""
    files = [folder / path for path in listing.metadata]
    if folder != root:  # metadata of all splits, with paths such as train/0.png
        files = [*(root / name for name in METADATA if (root / name).is_file()), *files]
    if files:
        if listing.text_files:
            listing.others[f"{TEXT_SUFFIX} files"] += len(listing.text_files)
        captions = _from_metadata(root, folder, files, listing.images, field, problems)
    else:
        captions = _from_text_files(folder, listing, problems)
    for image in listing.images:
        if image not in captions:
            problems.add(texts.MISSING, image)
    return captions


def _from_text_files(folder: Path, listing: Listing, problems: Problems) -> dict[str, str]:
    captions = {}
    without_image = dict(listing.text_files)
    for image in listing.images:
        stem = os.path.splitext(image)[0]
        without_image.pop(stem, None)
        if stem in listing.text_files:
            caption = _read_text(folder / listing.text_files[stem], image, problems)
            if caption is not None:
                captions[image] = caption
    for path in without_image.values():
        problems.add(texts.NO_IMAGE, path)
    return captions


def _read_text(file: Path, image: str, problems: Problems) -> str | None:
    """Return the caption in a file, which anybody may have written; None if it has none."""
    try:
        with opened(file) as stream:
            data = stream.read(texts.MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        problems.add(texts.DAMAGED, f"{image} ({reason_of(error)})")
        return None
    caption = decoded(data, image, problems)
    return None if caption is None else clean(caption, image, problems)


def _from_metadata(
    root: Path,
    folder: Path,
    files: Iterable[Path],
    images: Iterable[str],
    field: str,
    problems: Problems,
) -> dict[str, str]:
    """Return captions by image, from metadata; the first caption of an image counts.

    A name is only compared with the names of the images in the folder, so none leads elsewhere.
    Systems write the same letters in different ways (NFC, NFD), so names are compared in NFC.
    """
    inside = os.path.relpath(folder, root)
    image_of = {_composed(os.path.normpath(os.path.join(inside, x))): x for x in images}
    other_splits = [f"{p.name}/" for p in folders(root) if p != folder] if folder != root else []
    captions: dict[str, str] = {}
    seen = set()
    for file in files:
        if file.parent in seen:
            raise ValueError(f"{file.parent} has both {' and '.join(METADATA)}: keep one of them")
        seen.add(file.parent)
        start = os.path.relpath(file.parent, root)
        for where, entry in _entries(file, problems):
            name = entry.get(FILE_NAME)
            if not isinstance(name, str) or not name or "\0" in name:
                problems.add(texts.DAMAGED, f"{where} (no {FILE_NAME})")
                continue
            inner = os.path.normpath(name)
            path = _composed(os.path.normpath(os.path.join(start, inner)))
            if os.path.isabs(inner) or inner.split(os.sep)[0] == os.pardir:
                problems.add(texts.OUTSIDE, name)
            elif path not in image_of:
                if not path.startswith(tuple(other_splits)):
                    problems.add(texts.NO_IMAGE, name)
            elif image_of[path] in captions:
                problems.add(texts.SEVERAL, name)
            else:
                caption = caption_of(entry, field, name, problems)
                if caption is not None:
                    captions[image_of[path]] = caption
    return captions


def _entries(file: Path, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the entries of a metadata file, each with its name for messages."""
    return _csv_entries(file, problems) if file.suffix == ".csv" else _json_entries(file, problems)


def _json_entries(file: Path, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(read_json_lines(file, dict_of(anything)), 1):
        where = f"{file.name}, entry {number}"
        if line.problem:
            kind = texts.DAMAGED if _is_text(line.data) else texts.NOT_TEXT
            problems.add(kind, f"{where} ({line.problem})" if kind == texts.DAMAGED else where)
        else:
            yield where, line.content


def _csv_entries(file: Path, problems: Problems) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows under the header; a byte that is not UTF-8 becomes half of a character."""
    opened(file).close()  # refuses a pipe
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
        rows = csv.reader(_bounded(stream, file))
        try:
            header = next(rows, [])
            if FILE_NAME not in header or len(set(header)) < len(header):
                raise ValueError(
                    f"{file}: expected a first line with different names of fields, {FILE_NAME} "
                    f"among them, got {short_list(header)}"
                )
            for row in rows:
                where = f"{file.name}, line {rows.line_num}"
                if len(row) == len(header):
                    yield where, dict(zip(header, row, strict=True))
                elif row:
                    problems.add(
                        texts.DAMAGED, f"{where} ({len(row)} fields, expected {len(header)})"
                    )
        except csv.Error as error:
            raise ValueError(f"{file}, line {rows.line_num}: {reason_of(error)}") from None


def _bounded(stream: Any, file: Path) -> Iterator[str]:
    """Yield the lines of a file.

    Raises:
      ValueError: A line is longer than `MOST_LINE`.
    """
    while line := stream.readline(MOST_LINE):
        if len(line) == MOST_LINE and not line.endswith("\n"):
            raise ValueError(f"{file}: a line is longer than {MOST_LINE:,} characters")
        yield line


def _is_text(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _composed(path: str) -> str:
    return unicodedata.normalize("NFC", path.replace(os.sep, "/"))


def _nothing(folder: Path, listing: Listing, field: str, problems: Problems) -> str:
    """Return the message about a folder without captions."""
    found = "; ".join(problems.lines())
    return (
        f"{folder} has {len(listing.images)} images but no captions: looked for the field "
        f"{looked_for(field)} in {' and '.join(METADATA)}, and for a {TEXT_SUFFIX} file beside "
        f"every image (found {found}). Choose another field with the dataset name "
        f"{texts.NAME}:FIELD"
    )
