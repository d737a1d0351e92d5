"""Sets of images that the metrics read in batches, never all images at once."""

import abc
import contextlib
import dataclasses
import hashlib
import json
import lzma
import math
import os
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from PIL import ExifTags, Image

from aim_jax.data import ArrayImages, FolderImages, ImageSource, ImageSpec, preprocess
from aim_jax.data.loader import Prefetched
from aim_jax.data.sources import UNREADABLE
from aim_jax.utils.files import replacing
from aim_jax.utils.json_files import anything, dict_of, read_json
from aim_jax.utils.logging import say
from aim_jax.utils.names import reason_of, short_list

# Errors of reading a damaged npz file, beside ValueError and OSError.
DAMAGED = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, MemoryError, RuntimeError,
    SyntaxError, TypeError, AttributeError, struct.error,
)  # fmt: skip
# Images of a source without files that are decoded to learn its sizes.
LOOKED_AT = 32
MANY_FILES = 10_000  # about ten seconds


class ImageSet(abc.ABC):
    """Set of uint8 images of one size.

    Attributes:
      name: name for reports and messages.
      shape: (n, H, W, c), where c is 1 or 3.
      identity: changes whenever the images change; used as a cache key.
      class_after_class: whether the images may be sorted by class.
      fitted: for reports, how the images were resized or cropped; "" if they were not.
    """

    name: str
    shape: tuple[int, int, int, int]
    identity: str
    class_after_class = False
    fitted = ""

    def __len__(self) -> int:
        return self.shape[0]

    @abc.abstractmethod
    def batches(self, size: int, first: int = 0, step: int = 1) -> Iterator[np.ndarray]:
        """Yield every `step`-th batch from batch `first` on, in order, as uint8 (b, H, W, c).

        b is `size`, except in the last batch of the set.
        """

    def take(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the images at some indices, uint8 (b, H, W, c), in one pass over the set."""
        images = {}
        wanted = set(map(int, indices))
        start = 0
        for batch in self.batches(256):
            for i in wanted & set(range(start, start + len(batch))):
                images[i] = batch[i - start].copy()
            start += len(batch)
            if len(images) == len(wanted):
                break
        return np.stack([images[int(i)] for i in indices])


class SourceImages(ImageSet):
    """Images of datasets, preprocessed as for a model, with the centre crop.

    Args:
      sources: image sources that are concatenated, such as the splits of a dataset.
      spec: preprocessing; its random crop and flip are switched off.
      shapes: see `stored_shapes`; counted here by default.
    """

    class_after_class = True

    def __init__(
        self,
        sources: Sequence[ImageSource],
        spec: ImageSpec,
        shapes: Mapping[tuple[int, int, int], int] | None = None,
    ):
        spec = dataclasses.replace(spec, random_crop=False, random_flip=False)
        self._sources = sources
        self._spec = spec
        self._ends = np.cumsum([len(source) for source in sources])
        self.name = f"{sources[0].name}, {' + '.join(source.split for source in sources)}"
        count = int(self._ends[-1])
        self.shape = (count, spec.image_size, spec.image_size, spec.channels)
        self.fitted = describe_fit(shapes or stored_shapes(sources), spec)
        content = hashlib.sha256(b"".join(map(_content, sources))).hexdigest()
        self.identity = f"{self.name} {self.shape} {spec} {content}"

    def _image(self, index: int) -> np.ndarray:
        number = int(np.searchsorted(self._ends, index, side="right"))
        start = self._ends[number - 1] if number else 0
        pixels = preprocess(self._sources[number][int(index - start)]["image"], self._spec)
        return np.round((pixels + 1) * 127.5).astype(np.uint8)

    def batches(self, size: int, first: int = 0, step: int = 1) -> Iterator[np.ndarray]:
        """Yield every `step`-th batch from batch `first` on; see `ImageSet.batches`."""
        import grain

        starts = grain.MapDataset.range(first * size, len(self), step * size)
        batches = starts.map(lambda start: self.take(range(start, min(start + size, len(self)))))
        return Prefetched(batches, threads=min(8, os.cpu_count() or 1))

    def take(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return the images at some indices, uint8 (b, H, W, c)."""
        return np.stack([self._image(int(i)) for i in indices])


def stored_shapes(sources: Sequence[ImageSource]) -> Counter[tuple[int, int, int]]:
    """Count the shapes (H, W, c) of the images of some sources.

    Of image files and of arrays, every image counts. Of other sources, 32 images are decoded.
    """
    shapes: Counter[tuple[int, int, int]] = Counter()
    for source in sources:
        if isinstance(source, ArrayImages):
            _, height, width, channels = source.images.shape
            shapes[height, width, channels] += len(source)
        elif isinstance(source, FolderImages):
            if len(source) >= MANY_FILES:
                say(f"reading the sizes of {len(source)} images of {source.name}")
            shapes.update(_shape_of_file(source, i) for i in range(len(source)))
        else:
            count = min(LOOKED_AT, len(source))
            for index in np.linspace(0, len(source) - 1, count).astype(int):
                shapes[source[int(index)]["image"].shape] += 1
    return shapes


def _shape_of_file(source: FolderImages, index: int) -> tuple[int, int, int]:
    """Return the shape of an image file as `decode_image` gives it, mostly from its header."""
    with contextlib.suppress(*UNREADABLE), Image.open(source.paths[index]) as image:
        channels = 1 if image.mode in ("1", "L", "LA") else 3
        # Only the orientation in EXIF can exchange the sides; Pillow decodes some files to read it.
        if image.mode[0] not in "IF" and (
            image.height == image.width or image.getexif().get(ExifTags.Base.Orientation, 1) < 5
        ):
            return image.height, image.width, channels
    height, width, channels = source[index]["image"].shape  # raises if the image is unreadable
    return height, width, channels


def describe_fit(shapes: Mapping[tuple[int, int, int], int], spec: ImageSpec) -> str:
    """Describe for reports how images are changed to fit a spec; "" if they are not.

    Args:
      shapes: Number of images by shape (H, W, c).
      spec: Size, channels and fitting.
    """
    side = spec.image_size
    sizes = sorted({shape[:2] for shape in shapes}, key=lambda size: (math.prod(size), size))
    parts = []
    if sizes != [(side, side)]:
        least, most = (f"{height} x {width}" for height, width in (sizes[0], sizes[-1]))
        stored = least if len(sizes) == 1 else f"{len(sizes)} sizes from {least} to {most},"
        parts.append(f"{stored} to {side} x {side}, {spec.fit}")
    total = sum(shapes.values())
    grey = sum(count for shape, count in shapes.items() if shape[2] == 1)
    if spec.channels == 1 and grey < total:
        parts.append("colour converted to grey")
    if spec.channels == 3 and 0 < grey < total:
        parts.append(f"{grey} of {total} images are grey and read as RGB")
    return "; ".join(parts)


def _content(source: ImageSource) -> bytes:
    """Return a digest that changes whenever the images of a source change."""
    digest = hashlib.sha256()
    if isinstance(source, ArrayImages):
        digest.update(np.ascontiguousarray(source.images).data)
    elif isinstance(source, FolderImages):
        for path in source.paths:
            stat = os.stat(path)
            digest.update(f"{path} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    else:  # tensorflow-datasets and tar files are not edited in place, so 32 images suffice
        for index in np.linspace(0, len(source) - 1, 32).astype(int):
            digest.update(source[int(index)]["image"].tobytes())
    return digest.digest()


def array_names(path: str | os.PathLike) -> list[str]:
    """Return the names of the arrays in an npz file; [] if it is no archive.

    Raises:
      FileNotFoundError: if the file does not exist.
    """
    try:
        with zipfile.ZipFile(path) as file:
            return [name.removesuffix(".npy") for name in file.namelist()]
    except DAMAGED:
        return []


class NpzImages(ImageSet):
    """Images in `arr_0` of an npz file: uint8 (n, H, W, c), the format of the ADM evaluator.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if the file does not hold such an array.
    """

    KEY = "arr_0"

    def __init__(self, path: str | os.PathLike):
        self._path = Path(path)
        self.name = self._path.name
        stat = self._path.stat()
        self.identity = f"{self._path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
        with self._opened() as (_, shape, dtype):
            pass
        if dtype != np.uint8:
            hint = "convert values in [-1, 1] with round((x + 1) * 127.5)"
            raise ValueError(f"{path}: {self.KEY} is {dtype}, expected uint8 in [0, 255]; {hint}.")
        if len(shape) != 4 or shape[3] not in (1, 3) or not shape[0]:
            raise ValueError(
                f"{path}: {self.KEY} has shape {shape}, expected (n, H, W, 3) or (n, H, W, 1) with "
                "n > 0 and channels last."
            )
        count, height, width, channels = shape
        self.shape = (count, height, width, channels)
        if all(batch.max() <= 1 for batch in self.batches(64)):  # ends at the first larger value
            raise ValueError(
                f"{path}: the images have no value above 1, expected pixels in [0, 255]. Convert "
                "values in [0, 1] with round(x * 255)."
            )

    def labels(self) -> np.ndarray | None:
        """Return the classes (n,) of the images; None if the file has no labels.

        Raises:
          ValueError: if the file does not hold one label per image.
        """
        try:
            with np.load(self._path, allow_pickle=False) as file:
                if "labels" not in file:
                    return None
                labels = file["labels"]
        except (*DAMAGED, ValueError) as error:
            raise ValueError(f"{self._path}: labels cannot be read ({reason_of(error)}).") from None
        if labels.shape != (len(self),):
            raise ValueError(
                f"{self._path}: labels have shape {labels.shape}, expected ({len(self)},), one per "
                "image."
            )
        return labels

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype]]:
        """Yield the array as a stream of bytes after its header, with its shape and dtype."""
        try:
            with zipfile.ZipFile(self._path) as file, file.open(f"{self.KEY}.npy") as stream:
                version = np.lib.format.read_magic(stream)
                read = getattr(np.lib.format, f"read_array_header_{version[0]}_0")
                shape, fortran, dtype = read(stream)
                if fortran:
                    raise ValueError("in Fortran order; save it in C order")
                yield stream, shape, dtype
        except KeyError:
            held = ", ".join(array_names(self._path)) or "no arrays"
            raise ValueError(
                f"{self._path}: images are missing: it holds {held}, expected {self.KEY} of uint8 "
                "(n, H, W, c). A reference may hold mu and sigma of FID instead."
            ) from None
        except (*DAMAGED, ValueError, OSError) as error:
            if isinstance(error, OSError) and error.filename is not None:
                raise  # such as a missing file
            raise ValueError(
                f"{self._path}: not a complete npz file with images in {self.KEY!r} "
                f"({reason_of(error)})."
            ) from None

    def batches(self, size: int, first: int = 0, step: int = 1) -> Iterator[np.ndarray]:
        """Yield every `step`-th batch from batch `first` on; see `ImageSet.batches`."""
        with self._opened() as (stream, shape, _):
            for number, start in enumerate(range(0, len(self), size)):
                count = min(size, len(self) - start)
                data = stream.read(count * math.prod(shape[1:]))
                if number >= first and (number - first) % step == 0:
                    yield np.frombuffer(data, np.uint8).reshape(count, *shape[1:])


class ImageParts:
    """Series of images in parts on disk, written by any number of runs and processes.

    The settings of the series are stored beside the parts, so that a run with other settings cannot
    add to it. A part gets its name only when it is complete.

    Args:
      directory: directory of the parts.
      out: npz file into which `join` writes the parts.
      settings: settings of the series, serializable as JSON.

    Raises:
      ValueError: if the directory or the file holds a series with other or unknown settings.
    """

    def __init__(self, directory: Path, out: Path, settings: dict):
        self._directory = directory
        self._out = out
        directory.mkdir(parents=True, exist_ok=True)
        file = directory / "settings.json"
        text = json.dumps(settings, indent=1, sort_keys=True)
        if file.exists():
            old = read_json(file, dict_of(anything))
            if old != json.loads(text):
                changed = sorted(k for k in old | settings if old.get(k) != settings.get(k))
                raise ValueError(
                    f"{out.parent} holds images with other settings ({short_list(changed)} differ)"
                    "; choose another --out, or delete it."
                )
        elif out.exists():
            raise ValueError(
                f"{out} exists without the settings that it was made with; choose another --out, "
                "or delete it."
            )
        else:
            with replacing(file) as partial:
                partial.write_text(text)

    def _file(self, number: int) -> Path:
        return self._directory / f"{number:06d}.npy"

    def __contains__(self, number: int) -> bool:
        return self._file(number).exists()

    def add(self, number: int, images: np.ndarray) -> None:
        """Write a part, uint8 (b, H, W, c), replacing an existing one."""
        with replacing(self._file(number)) as partial, partial.open("wb") as file:
            np.save(file, images)

    def join(self, count: int, **arrays: np.ndarray) -> None:
        """Join parts 0 to count - 1 into `arr_0` of the npz file, and delete them.

        Args:
          count: number of parts.
          **arrays: further arrays of the npz file, by name.
        """
        # One part at a time: a file handle per part could exceed the limit of open files.
        shapes = [np.load(self._file(i), mmap_mode="r").shape for i in range(count)]
        shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])

        with (
            replacing(self._out) as partial,
            zipfile.ZipFile(partial, "w", allowZip64=True) as archive,
        ):
            with archive.open(f"{NpzImages.KEY}.npy", "w", force_zip64=True) as stream:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(stream, header)
                for i in range(count):
                    stream.write(np.load(self._file(i)).data)
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w") as stream:
                    np.lib.format.write_array(stream, array)
        for i in range(count):
            self._file(i).unlink()
