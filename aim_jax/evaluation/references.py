"""References of evaluations: datasets, folders, npz files, statistics of other evaluators."""

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from aim_jax.data import ImageSource, ImageSpec, open_images
from aim_jax.data.captioned_folders import is_captioned
from aim_jax.data.captions import NAME as CAPTIONED
from aim_jax.data.datasets import KNOWN
from aim_jax.data.preprocessing import image_spec
from aim_jax.data.sources import FolderImages, images_in
from aim_jax.evaluation.distribution import Gaussian
from aim_jax.evaluation.feature_sets import FeatureSet
from aim_jax.evaluation.features import FeatureExtractor
from aim_jax.evaluation.image_sets import (
    DAMAGED,
    ImageSet,
    NpzImages,
    SourceImages,
    array_names,
    stored_shapes,
)
from aim_jax.models.inception import NUM_FEATURES, NUM_SPATIAL
from aim_jax.utils.names import reason_of
from aim_jax.weights.pretrained import Pretrained


class Reference(NamedTuple):
    """Reference that samples are compared with.

    Attributes:
      name: name for the report.
      identity: changes whenever the reference changes.
      features: see `FeatureSet`; None on all processes but the first.
      images: the images of the kept features; None for a file of statistics alone.
    """

    name: str
    identity: str
    features: FeatureSet | None
    images: ImageSet | None


def open_set(
    name: str, model: Pretrained | None, config: ConfigDict, like: ImageSet | None = None
) -> ImageSet:
    """Open a set of images: an npz file, a dataset, or a folder.

    Datasets, and folders with one folder per class, are named NAME:SPLIT. The default split is
    "train"; "train+validation" joins two splits. A folder without a split stands for all images in
    it, and needs no class folders.

    Images are preprocessed as for the model, or to the size in the configuration. Without a model
    and such a size, they are read as RGB, and cropped to the size of `like`; without `like`, all of
    them must be squares of one size.

    Args:
      name: see above.
      model: its preprocessing is used if it records one.
      config: `config.data` holds the image size and the directory of the dataset.
      like: a set of images that the new set is compared with.

    Raises:
      ValueError: if the dataset is unknown, or its preprocessing cannot be determined.
      FileNotFoundError: if a file is missing.
    """
    if name.endswith(".npz"):
        return NpzImages(name)
    name, _, split = name.partition(":")
    sources = open_sources(name, split, config.data.dir or None)
    shapes = stored_shapes(sources)
    return SourceImages(sources, _spec(name, shapes, model, config, like), shapes)


def open_sources(name: str, split: str, directory: str | None) -> list[ImageSource]:
    """Open the parts of a dataset or a folder; see `open_set`."""
    # A known dataset takes precedence over a local directory of the same name.
    if name not in KNOWN and Path(name).is_dir():
        if not split:
            files = images_in(Path(name))
            if not files:
                raise ValueError(f"{name}: this folder contains no images.")
            return [FolderImages(Path(name).name, "all", ("",), files, [0] * len(files))]
        directory = name
        name = CAPTIONED if is_captioned(Path(name)) else "folder"
    return [open_images(name, part, directory) for part in (split or "train").split("+")]


def _spec(
    name: str,
    shapes: Counter[tuple[int, int, int]],
    model: Pretrained | None,
    config: ConfigDict,
    like: ImageSet | None,
) -> ImageSpec:
    """Return the preprocessing of the images of a set, from the shapes (H, W, c) of all of them."""
    if model is not None and "data" in model.info:
        spec = image_spec(ConfigDict(model.info["data"]))
        if config.data.image_size not in (0, spec.image_size):
            raise ValueError(
                f"config.data.image_size={config.data.image_size}, but {model.name} was trained on "
                f"images of {spec.image_size} pixels; leave it out."
            )
        return spec
    if config.data.image_size:
        return image_spec(config.data)
    if model is not None:
        raise ValueError(
            f"{model.name} does not record the size of its training images; set "
            f"--config.data.image_size for the images of {name!r}."
        )
    sizes = sorted({shape[:2] for shape in shapes})
    if like is not None:
        size = like.shape[1]
        height, width = min(sizes, key=min)
        if min(height, width) < size:
            small = sum(count for shape, count in shapes.items() if min(shape[:2]) < size)
            which = "the images" if small == shapes.total() else f"{small} images"
            raise ValueError(
                f"{which} of {name!r} have {height} x {width} pixels, fewer than {like.name}; "
                f"enlarge them with --config.data.image_size={size} and --config.data.fit=pad or "
                "--config.data.fit=resize."
            )
        return ImageSpec(size)
    height, width = sizes[0]
    if len(sizes) > 1:
        raise ValueError(
            f"the images of {name!r} have {len(sizes)} sizes, such as {height} x {width} and "
            f"{sizes[-1][0]} x {sizes[-1][1]} pixels, expected one; set --config.data.image_size, "
            "the side of the squares to crop from the images."
        )
    if height != width:
        raise ValueError(
            f"the images of {name!r} have {height} x {width} pixels, expected squares; set "
            "--config.data.image_size, the side of the squares to crop from the images."
        )
    return ImageSpec(height)


def open_target(
    name: str, model: Pretrained | None, config: ConfigDict, like: ImageSet | None = None
) -> ImageSet | None:
    """Open the images of a reference, as `open_set`; return None for statistics alone."""
    return None if statistics_alone(name) else open_set(name, model, config, like)


def statistics_alone(name: str) -> bool:
    """Return whether a reference is an npz file of mu and sigma without images.

    Files of this kind come from pytorch-fid, clean-fid and TTUR.
    """
    if not name.endswith(".npz"):
        return False
    names = set(array_names(name))
    return {"mu", "sigma"} <= names and NpzImages.KEY not in names


def open_reference(
    name: str,
    extract: FeatureExtractor,
    model: Pretrained | None,
    config: ConfigDict,
    cache: Path,
    like: ImageSet | None = None,
    only_images: bool = False,
) -> Reference:
    """Open a reference; its statistics are computed once and then read from `cache`.

    Args:
      name: see `open_set`. For a reference file of the ADM evaluator, the stored statistics (`mu`,
        `sigma`, `mu_s`, `sigma_s`) are used unchanged, and the images (`arr_0`) for other metrics.
        A file of statistics alone (`mu`, `sigma`) has features of no images.
      extract: the feature extractor.
      model: see `open_set`.
      config: see `open_set`; `config.neighbour_images` is the number of kept features.
      cache: directory of the cached features.
      like: see `open_set`.
      only_images: ignore stored statistics and compute them from the images of the file, which may
        be fewer.

    Raises:
      ValueError: see `open_set` and `stored_statistics`.
    """
    statistics = {} if only_images else stored_statistics(name)
    if statistics_alone(name):
        if only_images:
            raise ValueError(f"{name} holds statistics alone; expected a reference with images.")
        stat = os.stat(name)
        identity = f"{Path(name).resolve()} {stat.st_size} {stat.st_mtime_ns}"
        none = np.zeros((0, NUM_FEATURES), np.float32)
        alone = FeatureSet(0, *_gaussians(statistics), none, np.zeros(0, int), None)
        first = jax.process_index() == 0
        return Reference(Path(name).name, identity, alone if first else None, None)
    images = open_set(name, model, config, like)
    features = extract.of_cached(images, config.neighbour_images, cache)
    if statistics and features is not None:
        pool, spatial = _gaussians(statistics)
        features = features._replace(count=0, pool=pool, spatial=spatial)
    return Reference(images.name, images.identity, features, images)


def _gaussians(statistics: dict[str, np.ndarray]) -> tuple[Gaussian, Gaussian | None]:
    """Return stored statistics for FID, and for sFID if the file has them."""
    pool = Gaussian(statistics["mu"], statistics["sigma"])
    if not {"mu_s", "sigma_s"} <= set(statistics):
        return pool, None
    return pool, Gaussian(statistics["mu_s"], statistics["sigma_s"])


def stored_statistics(name: str) -> dict[str, np.ndarray]:
    """Load means and covariances from a reference file.

    Such files come from the ADM evaluator, and without images from pytorch-fid, clean-fid and TTUR.

    Returns:
      The arrays by name, as float64; {} for a reference without stored statistics.

    Raises:
      ValueError: if the arrays cannot be read, have the wrong shapes, are incomplete, or are not
        finite.
    """
    if not name.endswith(".npz"):
        return {}
    names = [k for k in ("mu", "sigma", "mu_s", "sigma_s") if k in array_names(name)]
    if not names:
        return {}
    try:
        with np.load(name, allow_pickle=False) as file:
            statistics: dict[str, np.ndarray] = {k: np.asarray(file[k], np.float64) for k in names}
    except (*DAMAGED, ValueError) as error:
        raise ValueError(
            f"{name}: {', '.join(names)} cannot be read ({reason_of(error)})."
        ) from None
    sizes = {"": NUM_FEATURES, "_s": NUM_SPATIAL}
    expected: dict[str, tuple[int, ...]] = {f"mu{s}": (n,) for s, n in sizes.items()}
    expected |= {f"sigma{s}": (n, n) for s, n in sizes.items()}
    mismatched = {k: v.shape for k, v in statistics.items() if v.shape != expected[k]}
    if mismatched or not {"mu", "sigma"} <= set(statistics):
        raise ValueError(
            f"{name}: expected mu ({NUM_FEATURES},) and sigma ({NUM_FEATURES}, {NUM_FEATURES}) of "
            "the 2015 Inception network, found "
            f"{ {k: v.shape for k, v in statistics.items()} }."
        )
    not_finite = [k for k, v in statistics.items() if not np.all(np.isfinite(v))]
    if not_finite:
        raise ValueError(
            f"{name}: non-finite values in {', '.join(not_finite)}; the file is damaged."
        )
    return statistics


def check_alike(name: str, size: tuple[int, int], reference: ImageSet) -> None:
    """Check that images have the height and width of the reference.

    Args:
      name: name of the images, for the message.
      size: height and width of the images.
      reference: the images of the reference.

    Raises:
      ValueError: if the sizes differ.
    """
    if size != reference.shape[1:3]:
        raise ValueError(
            f"{name} has images of {size[0]} x {size[1]}, the reference "
            f"{reference.name} of {reference.shape[1]} x {reference.shape[2]}; features of "
            "different image sizes are not comparable. Choose a reference of the same size."
        )
