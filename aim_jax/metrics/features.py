"""Features of a set of images, and what is kept of them for the metrics."""

import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

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
    """The Inception network on all devices of this process.

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
        digest = hashlib.sha256()
        for layer in sorted(params):
            for part in sorted(params[layer]):
                digest.update(np.ascontiguousarray(params[layer][part]).tobytes())
        self.identity = digest.hexdigest()

    def __call__(self, images: np.ndarray) -> inception.Features:
        """uint8 (b, H, W, 1 or 3) -> NumPy arrays of b rows."""
        size, found = self._batch_size, []
        for start in range(0, len(images), size):
            part = to_rgb(images[start : start + size])
            filled = jax.device_put(np.resize(part, (size, *part.shape[1:])), self._sharding)
            features = inception.extract(self._params, filled)
            found.append(jax.tree.map(np.asarray, features))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(images)], *found)

    def of(self, images: ImageSet, keep: int | None = None) -> FeatureSet:
        """Goes through a set of images.

        Args:
          keep: how many images' features to keep; all by default.

        Raises:
          ValueError: a feature is not finite.
        """
        pool, spatial, score, kept = Moments(), Moments(), InceptionScore(), []
        keep = len(images) if keep is None else min(keep, len(images))
        # Not the first ones: data sets come class after class.
        indices = np.linspace(0, len(images) - 1, keep).astype(int)
        progress, scored = Progress(f"features of {images.name}"), False
        for batch in images.batches(self._batch_size):
            found = jax.tree.map(np.asarray, self(batch))
            inside = (indices >= pool.count) & (indices < pool.count + len(batch))
            kept.append(found.pool[indices[inside] - pool.count])
            pool.add(found.pool)
            spatial.add(found.spatial)
            if found.logits is not None:
                score.add(found.logits)
                scored = True
            progress(pool.count, len(images))
        return FeatureSet(
            pool.count, pool.gaussian(), spatial.gaussian(), np.concatenate(kept), indices,
            score.result() if scored else None,
        )  # fmt: skip

    def of_cached(self, images: ImageSet, keep: int, cache: Path) -> FeatureSet:
        """`of`, looked up in a directory first and kept there after."""
        key = json.dumps([FORMAT, images.identity, self.identity, min(keep, len(images))])
        file = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
        try:
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
                return _unpack(stored)
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, zipfile.BadZipFile) as error:
            say(f"{file} is damaged ({error}); it is made anew.")
        found = self.of(images, keep)
        cache.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
        with partial.open("wb") as written:
            np.savez(written, **_pack(found))  # type: ignore[arg-type]
        os.replace(partial, file)
        return found


def over_processes(moments: Moments) -> Moments:
    """The moments of what all processes have added together; each of them must call this."""
    if jax.process_count() == 1:
        return moments
    # As bytes: JAX would round float64 to float32.
    mine = np.concatenate([[moments.count], moments.total, moments.products.ravel()])
    every = multihost_utils.process_allgather(mine.view(np.uint8)).view(np.float64).sum(axis=0)
    joined, d = Moments(), len(moments.total)
    joined.count, joined.total = round(every[0]), every[1 : 1 + d]
    joined.products = every[1 + d :].reshape(d, d)
    return joined


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
