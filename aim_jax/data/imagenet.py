"""ImageNet (ILSVRC 2012) as it is downloaded: the tar files, read in place, or folders of pictures.

A class is the index of its WordNet id among the 1000 sorted ids, as in torchvision, DiT, LlamaGen
and AiM. The devkit numbers the classes otherwise (ILSVRC2012_ID) and is not needed here:
tensorflow-datasets ships the sorted ids, and the id of every validation picture.
"""

import functools
import io
import os
import re
import tarfile
import zipfile
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from aim_jax.data.sources import (
    FolderImages,
    ImageSource,
    decode_image,
    folders,
    images_in,
    is_image,
)
from aim_jax.utils.files import replacing
from aim_jax.utils.logging import Progress

NAME = "imagenet2012"
TARS = {"train": "ILSVRC2012_img_train.tar", "validation": "ILSVRC2012_img_val.tar"}
FOLDERS = {"train": ("train",), "validation": ("val", "validation")}
NUMBERED = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")

# A tar ends in two blocks of zeros.
TAR_END = bytes(2 * tarfile.BLOCKSIZE)


def imagenet_classes() -> tuple[str, ...]:
    """Names of the 1000 classes of ImageNet, in the order of their WordNet ids."""
    file = resources.files("aim_jax.data") / "imagenet_classes.txt"
    return tuple(file.read_text().splitlines())


def wordnet_ids() -> tuple[str, ...]:
    """WordNet ids of the 1000 classes, sorted: `wordnet_ids()[label]`."""
    return _shipped("labels.txt")


def validation_ids() -> tuple[str, ...]:
    """WordNet ids of the 50,000 validation pictures, in the order of their numbers."""
    return _shipped("validation_labels.txt")


@functools.cache
def _shipped(file: str) -> tuple[str, ...]:
    folder = resources.files("tensorflow_datasets") / "datasets" / NAME
    return tuple((folder / file).read_text().split())


class TarImages(ImageSource):
    """Pictures inside an uncompressed tar file, read in place and decoded when read.

    `offsets` and `sizes`, int64 (N,), say where in the file they are; `labels` is int32 (N,).
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

    def __getitem__(self, index: int) -> dict[str, Any]:
        with open(self.path, "rb") as file:
            file.seek(self.offsets[index])
            data = file.read(self.sizes[index])
        image = decode_image(io.BytesIO(data), f"number {index} of {self.path}", as_stored=True)
        return {"image": image, "label": int(self.labels[index])}


def open_imagenet(root: Path, split: str) -> ImageSource:
    """Opens a split of ImageNet in a directory with its tar files or its folders.

    Args:
      root: It holds, for each split that is opened, `train/ID/*.JPEG` or ILSVRC2012_img_train.tar;
        `val/ID/*.JPEG`, `val/ILSVRC2012_val_*.JPEG` or ILSVRC2012_img_val.tar (ID: a WordNet id;
        "validation" is as good as "val"). Folders come first. When a tar file is opened for the
        first time, its index is written beside it (`*.index.npz`).
      split: "train" or "validation".

    Raises:
      FileNotFoundError: `root` holds none of these.
      ValueError: the split is "test", whose labels are not public; classes are missing or unknown;
        a tar file is cut short or damaged.
    """
    if split not in TARS:
        raise ValueError("ImageNet has no labels for its test pictures: use train or validation")
    tar = root / TARS[split]
    folder = next((root / name for name in FOLDERS[split] if (root / name).is_dir()), None)
    if folder is not None:
        paths, labels = _in_folder(folder, split)
        return FolderImages(NAME, split, imagenet_classes(), paths, labels, as_stored=True)
    if tar.is_file():
        return TarImages(NAME, split, imagenet_classes(), tar, **_tar_index(tar, split))
    raise FileNotFoundError(
        f"{root} lacks the {split} pictures of ImageNet: expected {tar.name}, or a folder "
        f"{FOLDERS[split][0]}/ with one folder per class, named by its WordNet id"
    )


def _in_folder(folder: Path, split: str) -> tuple[list[str], np.ndarray]:
    if split == "validation" and any(map(is_image, os.listdir(folder))):
        paths = images_in(folder)
        return paths, _numbered_labels([os.path.basename(path) for path in paths], folder)
    found = [(group.name, path) for group in folders(folder) for path in images_in(group)]
    return [path for _, path in found], _grouped_labels([group for group, _ in found], folder)


def _grouped_labels(groups: Sequence[str], where: Path) -> np.ndarray:
    """Labels of the WordNet ids of the groups that the pictures lie in."""
    label_of = {wordnet_id: label for label, wordnet_id in enumerate(wordnet_ids())}
    for problem, odd in (
        ("holds no pictures of the classes", label_of.keys() - set(groups)),
        ("has pictures in groups that are no classes", set(groups) - label_of.keys()),
    ):
        if odd:
            listed = ", ".join([*sorted(odd)[:5], "..."][: len(odd) + (len(odd) > 5)])
            raise ValueError(
                f"{where} {problem} of ImageNet: {listed} ({len(odd)}). All 1000 WordNet ids are "
                "expected; for a part of ImageNet use folders and the data set name 'folder'"
            )
    return np.array([label_of[group] for group in groups], np.int32)


def _numbered_labels(names: Sequence[str], where: Path) -> np.ndarray:
    """Labels of validation pictures from the numbers in their names."""
    label_of = {wordnet_id: label for label, wordnet_id in enumerate(wordnet_ids())}
    labels = [label_of[wordnet_id] for wordnet_id in validation_ids()]
    numbers = [int(m[1]) if (m := NUMBERED.fullmatch(name)) else 0 for name in names]
    for name, number in zip(names, numbers, strict=True):
        if not 1 <= number <= len(labels):
            raise ValueError(
                f"{name!r} in {where} is no validation picture of ImageNet: expected "
                f"ILSVRC2012_val_00000001.JPEG to ILSVRC2012_val_{len(labels):08d}.JPEG"
            )
    return np.array([labels[number - 1] for number in numbers], np.int32)


def _tar_index(tar: Path, split: str) -> dict[str, np.ndarray]:
    """Where the pictures of a tar file are: from the index beside it, which is made once."""
    file = tar.with_name(f"{tar.name}.index.npz")
    status = tar.stat()
    stamp = np.array([status.st_size, status.st_mtime_ns])
    if file.is_file():
        try:
            with np.load(file, allow_pickle=False) as kept:
                index = dict(kept)
            if np.array_equal(index.pop("stamp"), stamp):
                return index
        except (ValueError, KeyError, OSError, zipfile.BadZipFile) as error:
            raise ValueError(f"{file} is damaged ({error}): remove it") from error
    index = _make_tar_index(tar, split, status.st_size)
    arrays: dict[str, Any] = {"stamp": stamp, **index}
    try:
        with replacing(file) as partial, partial.open("wb") as out:
            np.savez(out, **arrays)
    except OSError as error:
        raise OSError(
            f"cannot write the index {file}: {error.strerror}. Link the tar file (ln -s) into a "
            "directory that can be written to, and use that"
        ) from error
    return index


def _make_tar_index(tar: Path, split: str, size: int) -> dict[str, np.ndarray]:
    """Reads the headers of a tar file, in the order of the pictures' names."""
    with open(tar, "rb") as file:
        file.seek(max(0, size - len(TAR_END)))
        if file.read() != TAR_END:
            raise ValueError(f"{tar} is cut short ({size} bytes): download it again")
    progress, total = Progress(f"indexing {tar.name}", "MB"), -(-size // 10**6)
    found = []
    try:
        for member in _members(tar):
            found.append(member)
            progress(member[2] // 10**6, total)
    except tarfile.TarError as error:
        raise ValueError(
            f"cannot read {tar}: {error}; expected the tar file as it is downloaded"
        ) from error
    progress(total, total)
    groups, names, offsets, sizes = zip(*sorted(found), strict=True) if found else ((),) * 4
    labels = _grouped_labels(groups, tar) if split == "train" else _numbered_labels(names, tar)
    return {"offsets": np.array(offsets), "sizes": np.array(sizes), "labels": labels}


def _members(tar: Path) -> Iterator[tuple[str, str, int, int]]:
    """Group, name, offset and size of every picture of a tar of pictures, or of tars of them."""
    with tarfile.open(tar, "r:") as outer:
        for member in outer:
            if member.name.endswith(".tar"):
                with tarfile.open(fileobj=outer.extractfile(member), mode="r:") as inner:
                    for picture in inner:
                        if is_image(picture.name):
                            offset = member.offset_data + picture.offset_data
                            yield member.name[: -len(".tar")], picture.name, offset, picture.size
            elif is_image(member.name):
                yield "", member.name, member.offset_data, member.size
