"""What samples are compared with: data sets, folders, npz files, statistics of other evaluators."""

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
    """What samples are compared with.

    Attributes:
      name: for the report. features: see `FeatureSet`; None on all processes but the first.
      images: where the kept features come from.
    """

    name: str
    features: FeatureSet | None
    images: ImageSet


def open_set(
    name: str, model: Pretrained | None, config: ConfigDict, like: ImageSet | None = None
) -> ImageSet:
    """An npz file of images, or NAME:SPLIT of a data set or of a folder of class folders.

    The split is "train" by default; "train+validation" is both of them. Of a folder without a split
    all pictures are taken, and it may be one without class folders.

    Pictures are fitted to what the model takes, or to the size in the configuration; without a
    model also to the size of `like`, or of the first one.

    Raises:
      ValueError: no such data set, or nothing says how its pictures are to be fitted.
      FileNotFoundError: no such file.
    """
    if name.endswith(".npz"):
        return NpzImages(name)
    name, _, split = name.partition(":")
    sources = _open_sources(name, split, config.data.dir or None)
    return SourceImages(sources, _spec(name, sources[0], model, config, like))


def _open_sources(name: str, split: str, where: str | None) -> list[ImageSource]:
    # A directory that happens to lie here does not stand for a data set of its name.
    if name not in KNOWN and Path(name).is_dir():
        if not split:
            files = images_in(Path(name))
            if not files:
                raise ValueError(f"{name}: no pictures in this folder.")
            return [FolderImages(Path(name).name, "all", ("",), files, [0] * len(files))]
        name, where = "folder", name
    return [open_images(name, part, where) for part in (split or "train").split("+")]


def _spec(
    name: str,
    source: ImageSource,
    model: Pretrained | None,
    config: ConfigDict,
    like: ImageSet | None,
) -> ImageSpec:
    """How the pictures of a set are fitted."""
    if model is not None and "data" in model.info:
        spec = image_spec(ConfigDict(model.info["data"]))
        if config.data.image_size not in (0, spec.image_size):
            raise ValueError(
                f"config.data.image_size={config.data.image_size}, but the pictures of "
                f"{model.name} have {spec.image_size} pixels; leave it out."
            )
        return spec
    if config.data.image_size:
        return image_spec(config.data)
    if model is not None:
        raise ValueError(
            f"{model.name} does not say which size the pictures of {name!r} are to have; give "
            "--config.data.image_size."
        )
    height, width, channels = source[0]["image"].shape
    if like is not None:
        size = like.shape[1]
        if min(height, width) < size:
            raise ValueError(
                f"the pictures of {name!r} have {height} x {width} pixels, fewer than {like.name}; "
                f"say how they become larger: --config.data.image_size={size} with "
                "--config.data.fit=pad or --config.data.fit=resize."
            )
        return ImageSpec(size, like.shape[3])
    if height != width:
        raise ValueError(
            f"the first picture of {name!r} has {height} x {width} pixels; give "
            "--config.data.image_size, the size of the squares that are cut out of the pictures."
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
    """Statistics of a reference, computed once and then read from `cache`.

    Args:
      name: see `open_set`; or a reference file of the ADM evaluator, whose statistics (`mu`,
        `sigma`, `mu_s`, `sigma_s`) are taken as they are, and images (`arr_0`) for the rest.
      only_images: computes them of the file's images all the same: they may be fewer.

    Raises:
      ValueError: see `open_set` and `stored_statistics`.
    """
    statistics = {} if only_images else stored_statistics(name)
    images = open_set(name, model, config, like)
    found = extract.of_cached(images, config.neighbour_images, cache)
    if statistics and found is not None:
        spatial = None
        if {"mu_s", "sigma_s"} <= set(statistics):
            spatial = Gaussian(statistics["mu_s"], statistics["sigma_s"])
        pool = Gaussian(statistics["mu"], statistics["sigma"])
        found = found._replace(count=0, pool=pool, spatial=spatial)
    return Reference(images.name, found, images)


def stored_statistics(name: str) -> dict[str, np.ndarray]:
    """Means and covariances in a reference file of the ADM evaluator; {} of any other reference.

    Raises:
      ValueError: they are not of the two kinds of features, or not finite.
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
    wrong = {k: v.shape for k, v in statistics.items() if v.shape != expected[k]}
    if wrong or not {"mu", "sigma"} <= set(statistics):
        raise ValueError(
            f"{name}: expected mu ({NUM_FEATURES},) and sigma of the features of the Inception of "
            f"2015, found { {k: v.shape for k, v in statistics.items()} }."
        )
    broken = [k for k, v in statistics.items() if not np.all(np.isfinite(v))]
    if broken:
        raise ValueError(f"{name}: {', '.join(broken)} are not finite; the file is damaged.")
    return statistics


def check_alike(name: str, size: tuple[int, int], reference: ImageSet) -> None:
    """Raises ValueError where images of a height and width are not of the reference's."""
    if size != reference.shape[1:3]:
        raise ValueError(
            f"{name} has images of {size[0]} x {size[1]}, the reference "
            f"{reference.name} of {reference.shape[1]} x {reference.shape[2]}; features of other "
            "sizes are not comparable. Give a reference of the same size."
        )
