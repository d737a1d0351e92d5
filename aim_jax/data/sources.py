"""Sources of labelled images with random access: memory, files and TensorFlow Datasets."""

import abc
import hashlib
import io
import itertools
import math
import os
import struct
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from aim_jax.data.captions import digested
from aim_jax.utils.names import check_text, short_list

# Endings of image files; a build of Pillow may lack AVIF and JPEG 2000.
IMAGE_SUFFIXES: tuple[str, ...] = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif", ".tif",
    ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga",
)  # fmt: skip
IMAGE_SUFFIXES += tuple(x for x in (".avif", ".jp2") if x in Image.registered_extensions())

# Folders that systems and archives leave behind, beside hidden ones.
BOOKKEEPING = ("__MACOSX", "__pycache__", "@eaDir", "lost+found", "$RECYCLE.BIN",
               "System Volume Information")  # fmt: skip
GREY_MODES = ("1", "L", "LA")  # of Pillow
# Total bytes up to which decoded tfds images are kept in memory.
KEEP_BYTES = 2**30
# Exceptions that Pillow raises on damaged files.
UNREADABLE = (
    OSError, ValueError, TypeError, SyntaxError, struct.error, Image.DecompressionBombError
)  # fmt: skip


class ImageSource(abc.ABC):
    """Random access to labelled images.

    `len(source)` is the number of images and `source[i]` is
    `{"image": uint8 (H, W, C), "label": int}` with C 1 or 3, and "caption", str, if there are
    captions.

    Attributes:
      name: Dataset name, as passed to `open_images`.
      split: "train", "validation" or "test".
      class_names: One name per label, in label order.
      captions: One text per image, or None. An empty one means "no text".

    Raises:
      ValueError: A class name is refused by `check_text`.
    """

    captions: Sequence[str] | None = None

    def __init__(self, name: str, split: str, class_names: tuple[str, ...]):
        self.name = name
        self.split = split
        self.class_names = tuple(class_names)
        for label, class_name in enumerate(self.class_names):
            check_text(f"{name}, name of class {label}", class_name)

    @abc.abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abc.abstractmethod
    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return the image and label at an index in [0, len)."""

    @property
    def summary(self) -> str:
        """One line about the split as understood: images, classes, what was left aside."""
        classes = f"{len(self.class_names)} classes ({short_list(self.class_names)})"
        return f"{self.split}: {len(self)} images of {self.name}; {classes}"

    def fingerprint(self) -> str:
        """Return a digest of the examples: the same data in the same order have the same one."""
        digest = hashlib.sha256(repr((self.name, self.split, len(self))).encode())
        for part in itertools.chain(self._content(), digested(self.captions or ())):
            digest.update(part)
        return digest.hexdigest()

    def _content(self) -> Iterable[Any]:
        """Return the parts, as bytes or arrays, that differ between two sets of examples."""
        return ()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(name={self.name!r}, split={self.split!r}, "
            f"images={len(self)}, classes={len(self.class_names)})"
        )


def identity_of(sources: Iterable[ImageSource]) -> dict[str, Any]:
    """Return what tells the splits of one dataset from others, as JSON: classes and contents."""
    listed = list(sources)
    contents = {s.split: {"images": len(s), "sha256": s.fingerprint()} for s in listed}
    return {"class_names": list(listed[0].class_names)} | contents


class ArrayImages(ImageSource):
    """Images held in memory: `images` uint8 (N, H, W, C) and `labels` (N,)."""

    def __init__(
        self,
        name: str,
        split: str,
        class_names: tuple[str, ...],
        images: np.ndarray,
        labels: np.ndarray,
    ):
        super().__init__(name, split, class_names)
        if images.dtype != np.uint8 or images.ndim != 4:
            raise ValueError(
                f"{name}: expected uint8 images of shape (N, H, W, C), "
                f"got {images.dtype} {images.shape}"
            )
        if len(images) != len(labels):
            raise ValueError(f"{name}: {len(images)} images but {len(labels)} labels")
        self.images = images
        self.labels = np.asarray(labels, np.int32)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.images[index], "label": int(self.labels[index])}

    def _content(self) -> Iterable[Any]:
        return np.ascontiguousarray(self.images), self.labels


class FolderImages(ImageSource):
    """Image files labelled by their class folders, or captioned, decoded on access.

    `as_stored` is passed to `decode_image`. `root` is the folder that names of files are relative
    to in the fingerprint.
    """

    def __init__(
        self,
        name: str,
        split: str,
        class_names: tuple[str, ...],
        paths: list[str],
        labels: Sequence[int] | np.ndarray,
        as_stored: bool = False,
        root: str | os.PathLike = "/",
        summary: str = "",
        captions: Sequence[str] | None = None,
    ):
        super().__init__(name, split, class_names)
        self.paths = paths
        self.captions = captions
        self._as_stored = as_stored
        self._root = root
        self._summary = summary
        self.labels = np.asarray(labels, np.int32)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def summary(self) -> str:
        """One line about the split as understood: images, classes, what was left aside."""
        return self._summary or super().summary

    def _content(self) -> Iterable[Any]:
        for path in self.paths:
            name = os.path.relpath(path, self._root).replace(os.sep, "/")
            yield os.fsencode(name) + b"\0%d\0" % os.path.getsize(path)
        yield self.labels

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self.paths[index]
        image = decode_image(path, path, self._as_stored)
        example = {"image": image, "label": int(self.labels[index])}
        return example if self.captions is None else example | {"caption": self.captions[index]}


class TfdsImages(ImageSource):
    """A random-access tfds data source of undecoded `image` and `label` features.

    `captions` belong to the records with the numbers `chosen`; without captions all records count.
    A record without `label` has the label 0.

    If all images have one size (`shape`) and are small enough in total, they stay in memory once
    decoded: decoding them again would cost more than keeping them.
    """

    def __init__(
        self,
        name: str,
        split: str,
        class_names: tuple[str, ...],
        data_source: Sequence[Mapping[str, Any]],
        shape: tuple[int | None, ...],
        version: str = "",
        captions: Sequence[str] | None = None,
        chosen: Sequence[int] = (),
        summary: str = "",
    ):
        super().__init__(name, split, class_names)
        self.captions = captions
        self._data_source = data_source
        self._version = version
        self._chosen = range(len(data_source)) if captions is None else chosen
        self._summary = summary
        self._labels = np.full(len(self._chosen), -1, np.int32)
        self._images: np.ndarray | None = None
        sizes = [size for size in shape if size is not None]
        if len(sizes) == len(shape) and len(self) * math.prod(sizes) <= KEEP_BYTES:
            self._images = np.empty((len(self), *sizes), np.uint8)

    def __len__(self) -> int:
        return len(self._chosen)

    @property
    def summary(self) -> str:
        """Lines about the split as understood."""
        return self._summary or super().summary

    def _content(self) -> Iterable[Any]:
        return (self._version.encode(),)

    def __getitem__(self, index: int) -> dict[str, Any]:
        example = self._labelled(index)
        return example if self.captions is None else example | {"caption": self.captions[index]}

    def _labelled(self, index: int) -> dict[str, Any]:
        if self._images is not None and self._labels[index] >= 0:
            return {"image": self._images[index], "label": int(self._labels[index])}
        record = self._data_source[self._chosen[index]]
        image = decode_image(io.BytesIO(record["image"]), f"{index} of {self.name}", as_stored=True)
        label = int(record.get("label", 0))
        if self._images is not None:
            # The label marks the image as present, so it is written second.
            self._images[index] = image
            self._labels[index] = label
        return {"image": image, "label": label}


def decode_image(
    file: str | os.PathLike | IO[bytes], name: str, as_stored: bool = False
) -> np.ndarray:
    """Decode an image file to uint8 (H, W, C), with C 1 for grey images and 3 for all others.

    Args:
      file: Path or open file.
      name: Name of the image in error messages.
      as_stored: Ignore the EXIF orientation and transparency, as published pipelines do for
        ImageNet. Otherwise the image is rotated as EXIF says, and transparent pixels become white.

    Raises:
      ValueError: The file is not a readable image, or has more than eight bits per channel.
    """
    try:
        with Image.open(file) as image:
            if image.mode[0] in "IF":
                raise ValueError(f"its mode {image.mode} is not 8 bits per channel")
            mode = "L" if image.mode in GREY_MODES else "RGB"
            converted: Image.Image = image
            if not as_stored:
                # When Pillow rotates an image, it rewrites all EXIF tags and fails on damaged ones.
                # Only the orientation matters here.
                exif = image.getexif()
                for tag in set(exif) - {ExifTags.Base.Orientation}:
                    del exif[tag]
                ImageOps.exif_transpose(image, in_place=True)
                if converted.has_transparency_data:
                    converted = converted.convert("RGBA")
                    converted = Image.alpha_composite(
                        Image.new("RGBA", converted.size, "white"), converted
                    )
            pixels = np.asarray(converted.convert(mode))
    except UNREADABLE as error:
        raise ValueError(f"cannot read the image {name}: {error}") from error
    return pixels[..., None] if pixels.ndim == 2 else pixels


def is_grey(path: str | os.PathLike) -> bool:
    """Return whether `decode_image` gives one channel; only the head of the file is read."""
    try:
        with Image.open(path) as image:
            return image.mode in GREY_MODES
    except UNREADABLE as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error


def check_labels(labels: np.ndarray, num_classes: int, name: str) -> None:
    """Raise ValueError, naming examples, unless every label lies in [0, num_classes)."""
    labels = np.asarray(labels)
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if bad.size:
        listed = ", ".join(f"{labels[i]} (example {i})" for i in bad[:5])
        raise ValueError(
            f"{name}: {bad.size} labels are out of range: {listed}; expected 0 to {num_classes - 1}"
        )


def folders(root: Path) -> list[Path]:
    """Return the sorted subfolders of a folder, without hidden and bookkeeping ones."""
    return sorted(p for p in root.iterdir() if p.is_dir() and not is_bookkeeping(p.name))


def is_bookkeeping(name: str) -> bool:
    """Return whether a folder is hidden, or one that systems and archives leave behind."""
    return name.startswith(".") or name in BOOKKEEPING


def is_image(name: str) -> bool:
    """Return whether a file name has the suffix of an image and is not hidden."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def walk(folder: Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """Walk a folder as `os.walk`, without hidden and bookkeeping folders."""
    for directory, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not is_bookkeeping(name))
        yield directory, subfolders, names


def images_in(folder: Path, aside: Counter[str] | None = None) -> list[str]:
    """Return the sorted paths of the images in a folder and its subfolders.

    Args:
      folder: The folder. Linked folders inside it are not followed.
      aside: Counter of what is left aside: files by their suffix, and linked folders.
    """
    paths = []
    for directory, subfolders, names in walk(folder):
        paths += [os.path.join(directory, name) for name in names if is_image(name)]
        if aside is not None:
            others = (n for n in names if not is_image(n) and not n.startswith("."))
            aside.update(f"{os.path.splitext(name)[1] or 'other'} files" for name in others)
            links = sum(os.path.islink(os.path.join(directory, name)) for name in subfolders)
            aside.update({"linked folders": links} if links else {})
    return sorted(paths)
