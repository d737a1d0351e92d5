"""Features of a set of images, by all devices of all processes."""

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
# Images whose features are summed up at once: sums of outer products (2048 x 2048, float64, on the
# host) of 16 rows take as long as those of 200.
BLOCK = 256
# Seconds between two saves of the sums of a pass.
SAVE_EVERY = 120.0


class FeatureExtractor:
    """The Inception network on all devices; processes divide a set of images among them.

    Args:
      params: from `aim_jax.weights.convert.inception.load_inception`.
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
            found.append(inception.extract(self._params, filled))
        return jax.tree.map(lambda *parts: np.concatenate(parts)[: len(images)], *found)

    def _block(self, count: int) -> int:
        """Images of a set of `count` that a process takes at once: whole batches."""
        rows = min(BLOCK, -(-count // jax.process_count()))
        return self._batch_size * max(1, rows // self._batch_size)

    def of(
        self, images: ImageSet, keep: int | None = None, partial: Path | None = None
    ) -> FeatureSet:
        """Goes through a set of images. All processes call this, and all get the same.

        Args:
          keep: how many images' features to keep; all by default.
          partial: a file of this process alone, for what a pass that is cut short has summed up;
            the next one goes on from there.

        Raises:
          ValueError: a feature is not finite.
        """
        count, rank, processes = len(images), jax.process_index(), jax.process_count()
        size = self._block(count)
        keep = count if keep is None else min(keep, count)
        # Not the first ones: data sets come class after class.
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
        """`of`, looked up in a directory first and kept there after; a pass cut short goes on.

        All processes call this; it is the first one's directory, and only that process gets the
        features. The others keep there what they have summed up.
        """
        rank, processes = jax.process_index(), jax.process_count()
        key = json.dumps([FORMAT, images.identity, self.identity, min(keep, len(images))])
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        file = cache / f"{name}.npz"
        found = FeatureSet.load(file) if rank == 0 else None
        if not sum_over_processes(np.array([found is not None], np.int32))[0]:
            # Which images a process gets depends on these.
            share = f"{rank}-of-{processes}-by-{self._block(len(images))}"
            partial = cache / f"{name}.{share}.partial"
            made = self.of(images, keep, partial)
            if rank == 0:
                found = made
                found.save(file)
        # Those of other numbers of processes or devices as well: nobody needs them any more.
        for partial in cache.glob(f"{name}.*.partial"):
            partial.unlink(missing_ok=True)
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
