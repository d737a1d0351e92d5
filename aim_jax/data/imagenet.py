"""ImageNet (ILSVRC 2012) as downloaded: tar files, which are read in place, or image folders.

A class is the index of its WordNet id among the 1000 sorted ids, as in torchvision, DiT, LlamaGen
and AiM. The devkit numbers the classes differently (ILSVRC2012_ID) and is not needed:
tensorflow-datasets ships the sorted ids, and the id of every validation image.
"""

import functools
import io
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from aim_jax.data.sources import (
    FolderImages,
    ImageSource,
    check_labels,
    decode_image,
    folders,
    images_in,
    is_image,
)
from aim_jax.utils.cache import writable_or_cached
from aim_jax.utils.files import replacing
from aim_jax.utils.logging import Progress
from aim_jax.utils.names import reason_of

NAME = "imagenet2012"
TARS = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
FOLDERS = {"train": ("train",), "validation": ("val", "validation")}
NUMBERED = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")

# Errors of NumPy on a damaged npz file, beside ValueError.
UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, MemoryError, SyntaxError, AttributeError)
# A tar file ends in two blocks of zeros.
TAR_END = bytes(2 * tarfile.BLOCKSIZE)


def imagenet_classes() -> tuple[str, ...]:
    """Return the names of the 1000 classes of ImageNet, in the order of their WordNet ids."""
    file = resources.files("aim_jax.data") / "imagenet_classes.txt"
    return tuple(file.read_text().splitlines())


def wordnet_ids() -> tuple[str, ...]:
    """Return the sorted WordNet ids of the 1000 classes: `wordnet_ids()[label]`."""
    return _shipped("labels.txt")


def validation_ids() -> tuple[str, ...]:
    """Return the WordNet ids of the 50,000 validation images, in the order of their numbers."""
    return _shipped("validation_labels.txt")


@functools.cache
def _shipped(file: str) -> tuple[str, ...]:
    folder = resources.files("tensorflow_datasets") / "datasets" / NAME
    return tuple((folder / file).read_text().split())


class TarImages(ImageSource):
    """Images inside an uncompressed tar file, read in place and decoded on access.

    `offsets` and `sizes`, int64 (N,), locate the images in the file; `labels` is int32 (N,).
    """

    def __init__(
        self,
        name: str,
        split: str,
        class_names: tuple[str, ...],
        path: Path,
        offsets: np.ndarray,
        sizes: np.ndarray,
        labels: np.ndarray,
    ):
        super().__init__(name, split, class_names)
        self.path = path
        self.offsets = offsets
        self.sizes = sizes
        self.labels = labels

    def __len__(self) -> int:
        return len(self.offsets)

    def _content(self) -> Iterable[Any]:
        return self.sizes, self.labels

    def __getitem__(self, index: int) -> dict[str, Any]:
        with open(self.path, "rb") as file:
            file.seek(self.offsets[index])
            data = file.read(self.sizes[index])
        image = decode_image(io.BytesIO(data), f"number {index} of {self.path}", as_stored=True)
        return {"image": image, "label": int(self.labels[index])}


def open_imagenet(root: Path, split: str) -> ImageSource:
    """Open a split of ImageNet in a directory with its tar files or its folders.

    Args:
      root: Directory that holds `train/ID/*.JPEG` or ILSVRC2012_img_train.tar to open "train", and
        `val/ID/*.JPEG`, `val/ILSVRC2012_val_*.JPEG` or ILSVRC2012_img_val.tar to open "validation"
        (ID: a WordNet id; the folder may be named "validation" too). Folders take precedence. When
        a tar file is opened for the first time, its index is written beside it (`*.index.npz`), or
        to the cache directory if that is read-only.
      split: "train" or "validation".

    Raises:
      FileNotFoundError: `root` holds neither the folder nor the tar file of the split.
      ValueError: The split is "test", whose labels are not public; classes are missing or unknown;
        or a tar file is truncated or damaged.
    """
    if split not in TARS:
        raise ValueError("ImageNet has no labels for its test images: use train or validation")
    tar = root / TARS[split]
    folder = next((root / name for name in FOLDERS[split] if (root / name).is_dir()), None)
    if folder is not None:
        paths, labels = _in_folder(folder, split)
        return FolderImages(
            NAME, split, imagenet_classes(), paths, labels, as_stored=True, root=folder
        )
    if tar.is_file():
        return TarImages(NAME, split, imagenet_classes(), tar, **_tar_index(tar, split))
    raise FileNotFoundError(
        f"{root} has no {split} images of ImageNet: expected {tar.name}, or a folder "
        f"{FOLDERS[split][0]}/ with one folder per class, named by its WordNet id"
    )


def _in_folder(folder: Path, split: str) -> tuple[list[str], np.ndarray]:
    if split == "validation" and any(map(is_image, os.listdir(folder))):
        paths = images_in(folder)
        return paths, _numbered_labels([os.path.basename(path) for path in paths], folder)
    grouped = [(group.name, path) for group in folders(folder) for path in images_in(group)]
    return [path for _, path in grouped], _grouped_labels([group for group, _ in grouped], folder)


def _grouped_labels(groups: Sequence[str], source: Path) -> np.ndarray:
    """Return labels from the WordNet ids of the groups (folders or inner tars) of the images."""
    label_of = {wordnet_id: label for label, wordnet_id in enumerate(wordnet_ids())}
    for problem, unmatched in (
        ("holds no images of the classes", label_of.keys() - set(groups)),
        ("has images in groups that are not classes", set(groups) - label_of.keys()),
    ):
        if unmatched:
            count = len(unmatched)
            listed = ", ".join([*sorted(unmatched)[:5], "..."][: count + (count > 5)])
            raise ValueError(
                f"{source} {problem} of ImageNet: {listed} ({count}). All 1000 WordNet ids are "
                "expected; for a part of ImageNet use folders and the dataset name 'folder'"
            )
    return np.array([label_of[group] for group in groups], np.int32)


def _numbered_labels(names: Sequence[str], source: Path) -> np.ndarray:
    """Return labels of validation images from the numbers in their file names."""
    label_of = {wordnet_id: label for label, wordnet_id in enumerate(wordnet_ids())}
    labels = [label_of[wordnet_id] for wordnet_id in validation_ids()]
    numbers = [int(m[1]) if (m := NUMBERED.fullmatch(name)) else 0 for name in names]
    for name, number in zip(names, numbers, strict=True):
        if not 1 <= number <= len(labels):
            raise ValueError(
                f"{name!r} in {source} is not a validation image of ImageNet: expected "
                f"ILSVRC2012_val_00000001.JPEG to ILSVRC2012_val_{len(labels):08d}.JPEG"
            )
    return np.array([labels[number - 1] for number in numbers], np.int32)


def _tar_index(tar: Path, split: str) -> dict[str, np.ndarray]:
    """Return offsets, sizes and labels of the images of a tar file, from the index beside it.

    The index is created if it does not exist or belongs to another version of the tar file. It is
    kept in the cache directory if the directory of the tar file is read-only.
    """
    beside = tar.with_name(f"{tar.name}.index.npz")
    status = tar.stat()
    stamp = np.array([status.st_size, status.st_mtime_ns])
    index = _saved_index(beside, stamp)
    if index is not None:
        return index
    file = writable_or_cached(beside)
    index = None if file == beside else _saved_index(file, stamp)
    if index is not None:
        return index
    index = _make_tar_index(tar, split, status.st_size)
    arrays: dict[str, Any] = {"stamp": stamp, **index}
    try:
        with replacing(file) as partial, partial.open("wb") as out:
            np.savez(out, **arrays)
    except OSError as error:
        raise OSError(
            f"cannot write the index {file}: {error.strerror}. Link the tar file (ln -s) into a "
            "writable directory, and use that directory"
        ) from error
    return index


def _saved_index(file: Path, stamp: np.ndarray) -> dict[str, np.ndarray] | None:
    """Read an index; None if there is none, or it is of another version of the tar file."""
    if not file.is_file():
        return None
    try:
        with np.load(file, allow_pickle=False) as saved:
            if not np.array_equal(saved["stamp"], stamp):
                return None
            index = {name: saved[name] for name in ("offsets", "sizes", "labels")}
        _check_index(index, int(stamp[0]))
        return index
    except (*UNREADABLE, OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({reason_of(error)}): remove it") from error


def _check_index(index: dict[str, np.ndarray], size: int) -> None:
    """Raise ValueError unless an index locates images inside a tar file of `size` bytes."""
    shapes = {array.shape for array in index.values()}
    if len(shapes) > 1 or any(x.ndim != 1 or x.dtype.kind != "i" for x in index.values()):
        raise ValueError("expected offsets, sizes and labels, one integer per image")
    offsets, sizes, labels = index["offsets"], index["sizes"], index["labels"]
    inside = (offsets >= 0) & (sizes >= 0) & (sizes <= size) & (offsets <= size - sizes)
    check_labels(labels, len(wordnet_ids()), "its images")
    if not inside.all():
        raise ValueError(f"images are outside of the tar file of {size} bytes")


def _make_tar_index(tar: Path, split: str, size: int) -> dict[str, np.ndarray]:
    """Read the headers of a tar file and return its index, sorted by group and name."""
    with open(tar, "rb") as file:
        file.seek(max(0, size - len(TAR_END)))
        if file.read() != TAR_END:
            raise ValueError(f"{tar} is truncated ({size} bytes): download it again")
    progress = Progress(f"indexing {tar.name}", "MB")
    total = -(-size // 10**6)
    members = []
    try:
        for member in _members(tar):
            members.append(member)
            progress(member[2] // 10**6, total)
    except tarfile.TarError as error:
        raise ValueError(
            f"cannot read {tar}: {error}; expected the tar file as downloaded"
        ) from error
    progress(total, total)
    groups, names, offsets, sizes = zip(*sorted(members), strict=True) if members else ((),) * 4
    labels = _grouped_labels(groups, tar) if split == "train" else _numbered_labels(names, tar)
    return {"offsets": np.array(offsets), "sizes": np.array(sizes), "labels": labels}


def _members(tar: Path) -> Iterator[tuple[str, str, int, int]]:
    """Yield group, name, offset and size of every image in a tar file, including nested tars."""
    with tarfile.open(tar, "r:") as outer:
        for member in outer:
            if member.name.endswith(".tar"):
                with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                    for image in inner:
                        if is_image(image.name):
                            offset = member.offset_data + image.offset_data
                            yield member.name[: -len(".tar")], image.name, offset, image.size
            elif is_image(member.name):
                yield "", member.name, member.offset_data, member.size
