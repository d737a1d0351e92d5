"""Extraction of the features of a set of images on all devices of all processes."""

import hashlib
import json
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from aim_jax.evaluation.distribution import Moments
from aim_jax.evaluation.feature_sets import FeatureSet, FeatureSums
from aim_jax.evaluation.image_sets import ImageSet
from aim_jax.models import inception
from aim_jax.parallel.sharding import batch_sharding, make_mesh
from aim_jax.utils.images import to_rgb
from aim_jax.utils.logging import Progress

FORMAT = 2
# Images whose features are summed at once: on the host, a sum of float64 outer products
# (2048 x 2048) over 16 rows takes as long as one over 200 rows.
BLOCK = 256
# Seconds between two saves of the running sums of a pass.
SAVE_EVERY = 120.0


class FeatureExtractor:
    """Feature extractor with the Inception network on all devices of all processes.

    Args:
      params: from `aim_jax.weights.convert.inception.load_inception`.
      batch_size: images per batch over all devices of a process. The default is 64 per device, or
        16 in total on CPU, which fill its caches.

    Attributes:
      identity: SHA-256 of the parameters, as hexadecimal digits.
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
        """Compute features of images uint8 (b, H, W, 1 or 3), as NumPy arrays of b rows, b >= 0."""
        size = self._batch_size
        outputs = []
        for start in range(0, max(len(images), 1), size):
            part = to_rgb(images[start : start + size])
            padded = jax.device_put(np.resize(part, (size, *part.shape[1:])), self._sharding)
            outputs.append(inception.extract(self._params, padded))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(images)], *outputs)

    def _block(self, count: int) -> int:
        """Return the block size of a process for a set of `count` images: a multiple of a batch."""
        rows = min(BLOCK, -(-count // jax.process_count()))
        return self._batch_size * max(1, rows // self._batch_size)

    def of(
        self, images: ImageSet, keep: int | None = None, partial: Path | None = None
    ) -> FeatureSet:
        """Compute the features of a set of images.

        All processes must call this, and all get the same result.

        Args:
          images: the set of images.
          keep: number of images whose features are kept; all by default.
          partial: file of this process for the sums of an interrupted pass; the next pass resumes
            from it.

        Raises:
          ValueError: if a feature is not finite.
        """
        count = len(images)
        rank = jax.process_index()
        processes = jax.process_count()
        size = self._block(count)
        keep = count if keep is None else min(keep, count)
        # Evenly spaced, not the first ones: datasets are often sorted by class.
        indices = np.linspace(0, count - 1, keep).astype(int)
        sums = FeatureSums(count, indices, images.class_after_class)
        if partial is not None:
            sums.restore(partial)
        first = rank + sums.blocks * processes
        starts = range(first * size, count, processes * size)
        progress = Progress(f"features of {images.name}", done=sums.pool.count * processes)
        saved = time.monotonic()
        for start, batch in zip(starts, images.batches(size, first, processes), strict=True):
            sums.add(self(batch), start)
            progress(min(sums.pool.count * processes, count), count)
            if partial is not None and time.monotonic() - saved >= SAVE_EVERY:
                sums.save(partial)
                saved = time.monotonic()
        sums.score.sums = sum_over_processes(sums.score.sums)
        return FeatureSet(
            count, over_processes(sums.pool).gaussian(), over_processes(sums.spatial).gaussian(),
            _gather_rows(np.concatenate(sums.kept), indices // size % processes), indices,
            sums.score.result() if self._with_logits else None,
        )  # fmt: skip

    def of_cached(self, images: ImageSet, keep: int, cache: Path) -> FeatureSet | None:
        """Compute features with `of`, cached in a directory; an interrupted pass is resumed.

        All processes must call this. The first process reads and writes the cached features, and
        only it returns them. The other processes store their partial sums in the directory.

        Args:
          images: the set of images.
          keep: number of images whose features are kept.
          cache: the directory.

        Returns:
          The features; None on all processes but the first.
        """
        rank = jax.process_index()
        processes = jax.process_count()
        key = json.dumps([FORMAT, images.identity, self.identity, min(keep, len(images))])
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        file = cache / f"{name}.npz"
        features = FeatureSet.load(file) if rank == 0 else None
        if not sum_over_processes(np.array([features is not None], np.int32))[0]:
            # The images of a process depend on these numbers.
            share = f"{rank}-of-{processes}-by-{self._block(len(images))}"
            partial = cache / f"{name}.{share}.partial"
            computed = self.of(images, keep, partial)
            if rank == 0:
                features = computed
                features.save(file)
        # Including partial sums of runs with other numbers of processes or devices.
        for partial in cache.glob(f"{name}.*.partial"):
            partial.unlink(missing_ok=True)
        return features


def sum_over_processes(values: np.ndarray) -> np.ndarray:
    """Sum arrays over all processes, bit-identical to NumPy's sum; all processes must call this."""
    if jax.process_count() == 1:
        return values
    # Gathered as bytes, because JAX would round float64 to float32.
    local_bytes = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
    gathered = np.ascontiguousarray(multihost_utils.process_allgather(local_bytes))
    return gathered.view(values.dtype).sum(axis=0).reshape(values.shape)


def over_processes(moments: Moments) -> Moments:
    """Sum moments over all processes; all processes must call this."""
    joined = Moments(len(moments.total))
    joined.count = int(sum_over_processes(np.array([moments.count]))[0])
    joined.total = sum_over_processes(moments.total)
    joined.products = sum_over_processes(moments.products)
    return joined


def _gather_rows(local_rows: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Gather the rows of all processes in order; owners (n,) holds the process of each row."""
    if jax.process_count() == 1:
        return local_rows
    counts = np.bincount(owners, minlength=jax.process_count())
    padded = np.pad(local_rows, ((0, counts.max() - len(local_rows)), (0, 0)))
    gathered = multihost_utils.process_allgather(padded)
    rows = np.empty((len(owners), local_rows.shape[1]), local_rows.dtype)
    for process, count in enumerate(counts):
        rows[owners == process] = gathered[process, :count]
    return rows
