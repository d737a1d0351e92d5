"""Datasets by name: plain files, class folders and TensorFlow Datasets."""

import functools
import gzip
import math
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aim_jax.data import captions as texts
from aim_jax.data import class_folders, imagenet
from aim_jax.data.captioned_folders import open_captioned
from aim_jax.data.sources import ArrayImages, ImageSource, TfdsImages, check_labels, folders
from aim_jax.utils.cache import default_or_cached
from aim_jax.utils.checks import check_arguments
from aim_jax.utils.logging import Progress
from aim_jax.utils.names import short_list

SPLITS = ("train", "validation", "test")
KNOWN = ("fashion_mnist", "cifar10", imagenet.NAME)

# Share of "train" that is held out for datasets without a validation split.
TAIL_FRACTION = 0.02

FASHION_MNIST_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)

# A label byte, then the red, green and blue planes of 32 x 32 pixels.
CIFAR10_RECORD = 1 + 3 * 32 * 32


@check_arguments
def open_images(
    name: str, split: str = "train", data_dir: str | os.PathLike | None = None
) -> ImageSource:
    """Open a split of a dataset of labelled images.

    Without `data_dir`, the dataset comes from TensorFlow Datasets. It is downloaded and prepared as
    array_record on first use; TensorFlow itself is not needed. With `data_dir`, one of these
    layouts is recognised by its content:

    * Fashion-MNIST's four `*-ubyte.gz` files (name "fashion_mnist");
    * CIFAR-10's binary batches, `data_batch_1.bin` ... `test_batch.bin` (name "cifar10");
    * a prepared array_record dataset: its version folder, or a tfds `data_dir` that holds
      `name/version`;
    * ImageNet's tar files or folders (name "imagenet2012"; see `imagenet.open_imagenet`);
    * class folders: `train/CLASS/*`, `validation/CLASS/*` (or `val/`), `test/CLASS/*` in their
      common spellings, or just `CLASS/*` (any name; see `class_folders.recognise`);
    * captioned images: metadata files, text files beside the images, or tar files of WebDataset
      (name "captions"; see `captioned_folders.open_captioned`).

    A colon and the name of a field behind a name choose the captions: "captions:prompt". A tfds
    dataset has captions if a field is chosen ("coco_captions/2014:captions/text"), or if it has
    text instead of labels.

    A dataset without a validation split gets one taken from "train", the same on every run: the
    last 2 % of its examples, or 5 % of each class for class folders (chosen by file name). The
    official "test" split is never used for this.

    Args:
      name: "fashion_mnist", "cifar10", "imagenet2012", another tfds name, "folder" or "captions".
      split: "train", "validation" or "test".
      data_dir: Directory of the images, in one of the layouts above.

    Returns:
      An `ImageSource`.

    Raises:
      ValueError: The split or dataset is unknown, or class folders or captions are missing.
      FileNotFoundError: `data_dir` or a file of its layout is missing.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    full_name = name
    name, field = _split_name(name)
    if data_dir is None:
        if name == "folder":
            raise ValueError(
                "dataset 'folder' needs its directory, with one folder per class (--data DIR)"
            )
        if name == texts.NAME:
            raise ValueError("dataset 'captions' needs its directory (--data DIR)")
        return _open_tfds(full_name, split, _tfds_builder(name, None), field)
    root = Path(data_dir).expanduser()
    if not root.is_dir():
        raise FileNotFoundError(f"the data directory {root} does not exist")
    if name == texts.NAME:
        return open_captioned(full_name, root, split, field)
    if name == "fashion_mnist" and list(root.glob("*-ubyte.gz")):
        return _open_fashion_mnist(root, split)
    if name == "cifar10" and list(root.glob("*_batch*.bin")):
        return _open_cifar10(root, split)
    if (root / "dataset_info.json").is_file() or list(root.glob(f"{name}/**/dataset_info.json")):
        return _open_tfds(full_name, split, _tfds_builder(name, root), field)
    if field:
        raise ValueError(
            f"{full_name!r} chooses captions, which {root} has none of: expected a prepared "
            f"array_record dataset of TensorFlow Datasets, or the name {texts.NAME}:{field}"
        )
    if name == imagenet.NAME:
        return imagenet.open_imagenet(root, split)
    if name == "folder" or _is_class_root(root):
        return class_folders.open_folder(name, root, split)
    raise FileNotFoundError(
        f"{root} holds no known layout for {name!r}: expected Fashion-MNIST's .gz files, "
        "CIFAR-10's binary batches, a prepared array_record dataset of TensorFlow Datasets, or "
        "one folder of images per class"
    )


def _split_name(name: str) -> tuple[str, str]:
    """Split "captions:prompt" into name and field; the version "cifar10:3.0.2" is no field."""
    before, _, field = name.rpartition(":")
    is_field = before and field and not (field[0].isdigit() or field[0] == "*")
    return (before, field) if is_field else (name, "")


def _open_fashion_mnist(root: Path, split: str) -> ImageSource:
    files = [root / name for name in _fashion_mnist_files("t10k" if split == "test" else "train")]
    _require(files, root)
    images, labels = (_read_idx(path) for path in files)
    return _tail_split("fashion_mnist", split, FASHION_MNIST_CLASSES, images[..., None], labels)


def _fashion_mnist_files(prefix: str) -> list[str]:
    return [f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz"]


def _read_idx(path: Path) -> np.ndarray:
    """Read a gzipped idx file of unsigned bytes: 0, 0, 8, rank, big-endian sizes, data."""
    try:
        with gzip.open(path) as file:
            data = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"cannot unpack {path}: {error}") from error
    rank = data[3] if data[:3] == b"\x00\x00\x08" else 0
    shape = tuple(np.frombuffer(data, ">i4", rank, 4).tolist())
    if not rank or len(data) != 4 + 4 * rank + math.prod(shape):
        raise ValueError(f"{path} is not a complete idx file of unsigned bytes")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _open_cifar10(root: Path, split: str) -> ImageSource:
    files = [root / name for name in _cifar10_files(split)]
    _require(files, root)
    for path in files:
        size = path.stat().st_size
        if size == 0 or size % CIFAR10_RECORD:
            raise ValueError(
                f"{path} is damaged: its size of {size} bytes is not a multiple of {CIFAR10_RECORD}"
            )
    images, labels = _parse_cifar10([np.fromfile(path, np.uint8) for path in files])
    return _tail_split("cifar10", split, CIFAR10_CLASSES, images, labels)


def _cifar10_files(split: str) -> list[str]:
    return ["test_batch.bin"] if split == "test" else [f"data_batch_{i}.bin" for i in range(1, 6)]


def _parse_cifar10(batches: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    records = np.concatenate(batches).reshape(-1, CIFAR10_RECORD)
    planes = records[:, 1:].reshape(-1, 3, 32, 32)
    return np.ascontiguousarray(planes.transpose(0, 2, 3, 1)), records[:, 0]


def _require(files: list[Path], root: Path) -> None:
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"{root} is missing {', '.join(missing)}")


def _tail_split(
    name: str, split: str, class_names: tuple[str, ...], images: np.ndarray, labels: np.ndarray
) -> ImageSource:
    check_labels(labels, len(class_names), name)
    keep = slice(None)
    if split != "test":
        cut = _tail_start(len(images))
        keep = slice(cut) if split == "train" else slice(cut, None)
    return ArrayImages(name, split, class_names, images[keep], labels[keep])


def _tail_start(size: int) -> int:
    return size - max(1, round(TAIL_FRACTION * size))


def _is_class_root(root: Path) -> bool:
    return any(map(class_folders.holds_images, folders(root)))


def _tfds_builder(name: str, root: Path | None) -> Any:
    """Return a tfds builder whose dataset is on disk as array_record."""
    import tensorflow_datasets as tfds

    if root is not None:
        prepared = root
        if not (root / "dataset_info.json").is_file():
            prepared = sorted(root.glob(f"{name}/**/dataset_info.json"))[-1].parent
        builder = tfds.builder_from_directory(prepared)
        if builder.name != name.partition("/")[0]:
            raise ValueError(f"{prepared} holds the dataset {builder.name!r}, not {name!r}")
    else:
        default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
        elsewhere = default_or_cached(default, "datasets")
        options = {} if elsewhere is None else {"data_dir": elsewhere}
        try:
            builder = tfds.builder(name, file_format="array_record", **options)
        except ValueError as error:  # not in the catalog, or not a valid name
            raise ValueError(
                f"unknown dataset {name!r}: it is neither a folder nor a name in the TensorFlow "
                "Datasets catalog such as 'fashion_mnist', 'cifar10' or 'imagenet2012' "
                f"({str(error).strip().splitlines()[0]})"
            ) from error
        _prepare(name, builder)
    if builder.info.file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"{builder.data_dir} is stored as {builder.info.file_format.value}, which has no "
            "random access: prepare it again with file_format='array_record'"
        )
    return builder


def _prepare(name: str, builder: Any) -> None:
    """Download and prepare a tfds dataset unless that is done already."""
    # For these two datasets, tfds itself would unpack, read and encode the images with TensorFlow.
    if name == "fashion_mnist":
        builder._split_generators = functools.partial(_fashion_mnist_examples, builder)
    elif name == "cifar10":
        builder._split_generators = functools.partial(_cifar10_examples, builder)
    try:
        builder.download_and_prepare()
    except Exception as error:
        raise FileNotFoundError(
            f"{name!r} is not in {builder.data_dir}, and tfds could not download and prepare it: "
            f"{error}\nPass a data_dir that holds it. If TensorFlow is missing, prepare the "
            f"dataset once where it is installed (tfds build {name} --file_format=array_record); "
            "reading needs no TensorFlow"
        ) from error


def _fashion_mnist_examples(builder: Any, dl_manager: Any) -> dict[str, Iterator]:
    def examples(images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict]]:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            yield index, {"image": Image.fromarray(image), "label": int(label)}

    parts = {"train": "train", "test": "t10k"}
    files = {
        split: [builder.URL + file for file in _fashion_mnist_files(prefix)]
        for split, prefix in parts.items()
    }
    return {
        split: examples(*(_read_idx(path) for path in paths))
        for split, paths in dl_manager.download(files).items()
    }


def _cifar10_examples(builder: Any, dl_manager: Any) -> dict[str, Iterator]:
    def examples(split: str, images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict]]:
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            record_id = f"{split}_{index:05d}"
            yield index, {"id": record_id, "image": Image.fromarray(image), "label": int(label)}

    builder.info.features["label"].names = list(CIFAR10_CLASSES)
    with tarfile.open(dl_manager.download(builder._cifar_info.url)) as archive:
        batches = {
            Path(member.name).name: np.frombuffer(file.read(), np.uint8)
            for member in archive
            if member.name.endswith(".bin") and (file := archive.extractfile(member))
        }
    return {
        split: examples(split, *_parse_cifar10([batches[file] for file in _cifar10_files(split)]))
        for split in ("train", "test")
    }


def _open_tfds(name: str, split: str, builder: Any, field: str = "") -> ImageSource:
    import tensorflow_datasets as tfds

    features = builder.info.features
    splits = builder.info.splits
    has_classes = "label" in features and hasattr(features["label"], "names")
    if "image" not in features or not (has_classes or field or _text_paths(features)):
        raise ValueError(f"dataset {name!r} has no 'image' and class 'label' or text features")
    tfds_split = split
    if split != "test" and "validation" not in splits:
        cut = _tail_start(splits["train"].num_examples)
        tfds_split = f"train[:{cut}]" if split == "train" else f"train[{cut}:]"
    elif split not in splits:
        raise ValueError(f"dataset {name!r} has no split {split!r}: it has {sorted(splits)}")
    # Images are decoded by this package, so that all sources decode the same file identically.
    undecoded = {"image": tfds.decode.SkipDecoding()}
    data_source = builder.as_data_source(split=tfds_split, decoders=undecoded)
    class_names = tuple(features["label"].names) if has_classes else texts.CLASS_NAMES
    shape = features["image"].shape
    if class_names == imagenet.wordnet_ids():
        class_names = imagenet.imagenet_classes()
    version = str(builder.version)
    if has_classes and not field:
        return TfdsImages(name, split, class_names, data_source, shape, version)
    path = _choose_text(name, _text_paths(features), field)
    problems = texts.Problems()
    captions = _tfds_captions(data_source, path, name, problems)
    if not captions:
        raise ValueError(f"dataset {name!r} has no captions: {'; '.join(problems.lines())}")
    summary = f"{split}: {len(captions)} images of {name} with captions in {'/'.join(path)}"
    return TfdsImages(
        name, split, class_names, data_source, shape, version, list(captions.values()),
        list(captions), texts.summary_of(summary, problems),
    )  # fmt: skip


def _text_paths(features: Any) -> list[tuple[str, ...]]:
    """Return the paths of the text features of a tfds dataset, also of lists of them."""
    import tensorflow_datasets as tfds

    paths: list[tuple[str, ...]] = []
    for key, feature in sorted(features.items()):  # their order changes when they are read
        inner = feature.feature if isinstance(feature, tfds.features.Sequence) else feature
        if isinstance(inner, tfds.features.Text):
            paths.append((key,))
        elif isinstance(inner, tfds.features.FeaturesDict):
            paths += [(key, *path) for path in _text_paths(inner)]
    return paths


def _choose_text(name: str, paths: list[tuple[str, ...]], field: str) -> tuple[str, ...]:
    """Return the path of the feature that holds the captions."""
    chosen = [path for path in paths if "/".join(path) == field or not field]
    preferred = [path for path in chosen if path[-1] in texts.FIELDS]
    for candidates in (preferred, chosen):
        if len(candidates) == 1:
            return candidates[0]
    listed = short_list(["/".join(path) for path in paths]) or "none"
    raise ValueError(
        f"dataset {name!r}: choose one of its text features with NAME:FEATURE; it has {listed}"
    )


def _tfds_captions(
    data_source: Sequence[Any], path: tuple[str, ...], name: str, problems: texts.Problems
) -> dict[int, str]:
    """Return the captions of a tfds data source by the number of the record."""
    captions = {}
    progress = Progress(f"reading the captions of {name}")
    for index in range(len(data_source)):
        value: Any = data_source[index]
        for key in path:
            value = value[key]
        several = [value] if isinstance(value, bytes | str) else list(value)
        shown = f"number {index}"
        for _ in several[1:]:
            problems.add(texts.SEVERAL, shown)
        written = several[0] if several else None
        if isinstance(written, bytes):
            written = texts.decoded(written, shown, problems)
        caption = None if written is None else texts.clean(written, shown, problems)
        if caption is None:
            problems.add(texts.MISSING, shown)
        else:
            captions[index] = caption
        if len(data_source) > 10_000:
            progress(index + 1, len(data_source))
    return captions
