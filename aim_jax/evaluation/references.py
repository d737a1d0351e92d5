"""References of evaluations: datasets, folders, npz files, statistics of other evaluators."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from aim_jax.data import ImageSource, ImageSpec, open_images
from aim_jax.data.datasets import KNOWN
from aim_jax.data.preprocessing import image_spec
from aim_jax.data.sources import FolderImages, images_in
from aim_jax.evaluation.distribution import Gaussian
from aim_jax.evaluation.feature_sets import FeatureSet
from aim_jax.evaluation.features import FeatureExtractor
from aim_jax.evaluation.image_sets import ImageSet, NpzImages, SourceImages
from aim_jax.models.inception import NUM_FEATURES, NUM_SPATIAL
from aim_jax.weights.pretrained import Pretrained


class Reference(NamedTuple):
    """Reference that samples are compared with.

    Attributes:
      name: name for the report.
      features: see `FeatureSet`; None on all processes but the first.
      images: the images of the kept features.
    """

    name: str
    features: FeatureSet | None
    images: ImageSet


def open_set(
    name: str, model: Pretrained | None, config: ConfigDict, like: ImageSet | None = None
) -> ImageSet:
    """Open a set of images: an npz file, a dataset, or a folder.

    Datasets, and folders with one folder per class, are named NAME:SPLIT. The default split is
    "train"; "train+validation" joins two splits. A folder without a split stands for all images in
    it, and needs no class folders.

    Images are preprocessed as for the model, or to the size in the configuration. Without a model
    and such a size, they are cropped to the size of `like` or, without `like`, of the first image.

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
    sources = _open_sources(name, split, config.data.dir or None)
    return SourceImages(sources, _spec(name, sources[0], model, config, like))


def _open_sources(name: str, split: str, directory: str | None) -> list[ImageSource]:
    # A known dataset takes precedence over a local directory of the same name.
    if name not in KNOWN and Path(name).is_dir():
        if not split:
            files = images_in(Path(name))
            if not files:
                raise ValueError(f"{name}: this folder contains no images.")
            return [FolderImages(Path(name).name, "all", ("",), files, [0] * len(files))]
        directory = name
        name = "folder"
    return [open_images(name, part, directory) for part in (split or "train").split("+")]


def _spec(
    name: str,
    source: ImageSource,
    model: Pretrained | None,
    config: ConfigDict,
    like: ImageSet | None,
) -> ImageSpec:
    """Return the preprocessing of the images of a set."""
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
    height, width, channels = source[0]["image"].shape
    if like is not None:
        size = like.shape[1]
        if min(height, width) < size:
            raise ValueError(
                f"the images of {name!r} have {height} x {width} pixels, fewer than {like.name}; "
                f"enlarge them with --config.data.image_size={size} and --config.data.fit=pad or "
                "--config.data.fit=resize."
            )
        return ImageSpec(size, like.shape[3])
    if height != width:
        raise ValueError(
            f"the first image of {name!r} has {height} x {width} pixels, expected a square; set "
            "--config.data.image_size, the side of the squares to crop from the images."
        )
    return ImageSpec(height, channels)


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
    images = open_set(name, model, config, like)
    features = extract.of_cached(images, config.neighbour_images, cache)
    if statistics and features is not None:
        spatial = None
        if {"mu_s", "sigma_s"} <= set(statistics):
            spatial = Gaussian(statistics["mu_s"], statistics["sigma_s"])
        pool = Gaussian(statistics["mu"], statistics["sigma"])
        features = features._replace(count=0, pool=pool, spatial=spatial)
    return Reference(images.name, features, images)


def stored_statistics(name: str) -> dict[str, np.ndarray]:
    """Load means and covariances from a reference file of the ADM evaluator.

    Returns:
      The arrays by name; {} for a reference without stored statistics.

    Raises:
      ValueError: if they have the wrong shapes, are incomplete, or are not finite.
    """
    if not name.endswith(".npz"):
        return {}
    with np.load(name, allow_pickle=False) as file:
        statistics = {k: file[k] for k in ("mu", "sigma", "mu_s", "sigma_s") if k in file}
    if not statistics:
        return {}
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
