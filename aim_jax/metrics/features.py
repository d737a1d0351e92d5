"""Features of a set of images, and what is kept of them for the metrics."""

import hashlib
import json
import zipfile
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from aim_jax.atomic import replacing
from aim_jax.metrics import inception
from aim_jax.metrics.distribution import Gaussian, InceptionScore, Moments
from aim_jax.metrics.image_sets import ImageSet
from aim_jax.monitor import Progress, say
from aim_jax.pictures import to_rgb
from aim_jax.sharding import batch_sharding, make_mesh

FORMAT = 2


class FeatureSet(NamedTuple):
    """What the metrics need of a set of images.

    Attributes:
      count: images.
      pool, spatial: statistics of FID's and sFID's features; spatial may be missing in a reference.
      features: (m, 2048) float32 of some images, for what compares them one by one.
      indices: (m,) which ones, evenly spaced over the set.
      inception_score: mean and standard deviation over splits, or None without the last layer.
    """

    count: int  # type: ignore[assignment]  # tuples have a method of that name
    pool: Gaussian
    spatial: Gaussian | None
    features: np.ndarray
    indices: np.ndarray
    inception_score: tuple[float, float] | None


class FeatureExtractor:
    """The Inception network on all devices; processes divide a set of images among them.

    Args:
      params: from `aim_jax.convert.inception.load_inception`.
      batch_size: images at once, over all devices; by default 64 for each, or 16 on CPU, whose
        caches they fill.
    """

    def __init__(self, params: dict, batch_size: int | None = None):
        mesh = make_mesh(devices=jax.local_devices())
        if batch_size is None:
            batch_size = 16 if jax.default_backend() == "cpu" else 64 * mesh.size
        self._params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        self._sharding = batch_sharding(mesh)
        self._batch_size = -(-batch_size // mesh.size) * mesh.size
        self._with_logits = "softmax" in params
        digest = hashlib.sha256()
        for layer in sorted(params):
            for part in sorted(params[layer]):
                digest.update(np.ascontiguousarray(params[layer][part]).tobytes())
        self.identity = digest.hexdigest()

    def __call__(self, images: np.ndarray) -> inception.Features:
        """uint8 (b, H, W, 1 or 3) -> NumPy arrays of b rows; b may be 0."""
        size, found = self._batch_size, []
        for start in range(0, max(len(images), 1), size):
            part = to_rgb(images[start : start + size])
            filled = jax.device_put(np.resize(part, (size, *part.shape[1:])), self._sharding)
            features = inception.extract(self._params, filled)
            found.append(jax.tree.map(np.asarray, features))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(images)], *found)

    def of(self, images: ImageSet, keep: int | None = None) -> FeatureSet:
        """Goes through a set of images. All processes call this, and all get the same.

        Args:
          keep: how many images' features to keep; all by default.

        Raises:
          ValueError: a feature is not finite.
        """
        count, size = len(images), self._batch_size
        rank, processes = jax.process_index(), jax.process_count()
        pool, spatial = Moments(inception.NUM_FEATURES), Moments(inception.NUM_SPATIAL)
        score = InceptionScore(count, inception.NUM_CLASSES)
        keep = count if keep is None else min(keep, count)
        # Not the first ones: data sets come class after class.
        indices = np.linspace(0, count - 1, keep).astype(int)
        kept: list[np.ndarray] = [np.zeros((0, inception.NUM_FEATURES), np.float32)]
        progress = Progress(f"features of {images.name}")
        starts = range(rank * size, count, processes * size)
        for start, batch in zip(starts, images.batches(size, rank, processes), strict=True):
            found = jax.tree.map(np.asarray, self(batch))
            inside = indices[(indices >= start) & (indices < start + len(batch))]
            kept.append(found.pool[inside - start])
            pool.add(found.pool)
            spatial.add(found.spatial)
            if found.logits is not None:
                score.add(found.logits, start)
            progress(min(pool.count * processes, count), count)
        score.sums = sum_over_processes(score.sums)
        return FeatureSet(
            count, over_processes(pool).gaussian(), over_processes(spatial).gaussian(),
            _gather_rows(np.concatenate(kept), indices // size % processes), indices,
            score.result() if self._with_logits else None,
        )  # fmt: skip

    def of_cached(self, images: ImageSet, keep: int, cache: Path) -> FeatureSet | None:
        """`of`, looked up in a directory first and kept there after.

        All processes call this; it is the first one's directory, and only that process gets the
        features.
        """
        first = jax.process_index() == 0
        key = json.dumps([FORMAT, images.identity, self.identity, min(keep, len(images))])
        file = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
        found = _read(file) if first else None
        if not sum_over_processes(np.array([found is not None], np.int32))[0]:
            made = self.of(images, keep)
            if first:
                found = made
                _write(file, found)
        return found


def sum_over_processes(values: np.ndarray) -> np.ndarray:
    """The sum of what all processes give, bit by bit NumPy's; each of them must call this."""
    if jax.process_count() == 1:
        return values
    # As bytes: JAX would round float64 to float32.
    mine = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
    every = np.ascontiguousarray(multihost_utils.process_allgather(mine))
    return every.view(values.dtype).sum(axis=0).reshape(values.shape)


def over_processes(moments: Moments) -> Moments:
    """The moments of what all processes have added together; each of them must call this."""
    joined = Moments(len(moments.total))
    joined.count = int(sum_over_processes(np.array([moments.count]))[0])
    joined.total = sum_over_processes(moments.total)
    joined.products = sum_over_processes(moments.products)
    return joined


def _gather_rows(mine: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """The rows of all processes in order; owners (n,) says which process has which."""
    if jax.process_count() == 1:
        return mine
    counts = np.bincount(owners, minlength=jax.process_count())
    filled = np.pad(mine, ((0, counts.max() - len(mine)), (0, 0)))
    every = multihost_utils.process_allgather(filled)
    rows = np.empty((len(owners), mine.shape[1]), mine.dtype)
    for process, count in enumerate(counts):
        rows[owners == process] = every[process, :count]
    return rows


def _read(file: Path) -> FeatureSet | None:
    """What `_write` wrote; None where it is missing or damaged."""
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            return _unpack(stored)
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        say(f"{file} is damaged ({error}); it is made anew.")
    return None


def _write(file: Path, found: FeatureSet) -> None:
    with replacing(file) as partial, partial.open("wb") as written:
        np.savez(written, **_pack(found))  # type: ignore[arg-type]


def _pack(found: FeatureSet) -> dict[str, np.ndarray]:
    assert found.spatial is not None  # only references of other evaluators lack it
    return {
        "count": np.asarray(found.count),
        "mu": found.pool.mean,
        "sigma": found.pool.covariance,
        "mu_s": found.spatial.mean,
        "sigma_s": found.spatial.covariance,
        "features": found.features,
        "indices": found.indices,
        "inception_score": np.asarray(found.inception_score or ()),
    }


def _unpack(stored) -> FeatureSet:
    count = int(stored["count"])
    score = tuple(stored["inception_score"].tolist())
    pool, spatial = (Gaussian(stored[f"mu{s}"], stored[f"sigma{s}"], count) for s in ("", "_s"))
    return FeatureSet(count, pool, spatial, stored["features"], stored["indices"], score or None)
