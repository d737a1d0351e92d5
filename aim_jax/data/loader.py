"""Seeded, resumable batches, made with Grain.

Grain draws the indices and one random generator per batch; a single function then gathers the
batch, so the cost in Python is per batch rather than per example. Batch k is a pure function of
(seed, k): the whole state of an iterator is the number of batches it has given out.
"""

import itertools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grain
import numpy as np
from absl import flags
from PIL import Image

from aim_jax.data.preprocessing import ImageSpec, preprocess
from aim_jax.data.sources import (
    UNREADABLE,
    ArrayImages,
    FolderImages,
    ImageSource,
    check_labels,
    decode_image,
)
from aim_jax.utils.logging import Progress

# Between the seeds of sets that are mixed, so that two of one size never follow the same order.
SEED_STEP = 0x9E3779B1

# Picture files that a thread checks before it reports.
CHECKED_AT_ONCE = 1024


def check_images(
    source: ImageSource, spec: ImageSpec | None = None, *, decode_limit: int = 20_000
) -> None:
    """Looks for bad pictures and labels before long work starts.

    Every file of a folder has its header read, and up to `decode_limit` files, evenly spaced, are
    decoded in full. Labels are checked wherever they are known without decoding; of other sources
    64 examples, evenly spaced, are read.

    Args:
      source: What `open_images` returned.
      spec: What the pictures are to become; with fit="pad" they must not be too large for it.
      decode_limit: How many files of a folder to decode.

    Raises:
      ValueError: no pictures; labels out of range; or files that are damaged or too large, of
        which it names up to ten.
    """
    if not len(source):
        raise ValueError(f"{source.name} has no pictures in its split {source.split!r}")
    if isinstance(source, FolderImages):
        check_labels(source.labels, len(source.class_names), source.name)
        _check_files(source.paths, spec, decode_limit)
        return
    if isinstance(source, ArrayImages):
        check_labels(source.labels, len(source.class_names), source.name)
        first = [source[0]]
    else:
        first = [source[i] for i in range(0, len(source), -(-len(source) // 64))]
        labels = np.array([example["label"] for example in first])
        check_labels(labels, len(source.class_names), source.name)
    if spec is not None:
        for example in first:
            preprocess(example["image"], spec)


def _check_files(paths: list[str], spec: ImageSpec | None, decode_limit: int) -> None:
    every = -(-len(paths) // decode_limit)

    def problem(index: int) -> str | None:
        path = paths[index]
        try:
            with Image.open(path) as image:
                width, height = image.size
                if index % every:
                    image.verify()
            if index % every == 0:
                decode_image(path, path)
        except UNREADABLE as error:
            return f"{path}: {error.__cause__ or error}"
        if spec is not None and spec.fit == "pad" and max(width, height) > spec.image_size:
            return f"{path}: {height}x{width} does not fit into {spec.image_size}x{spec.image_size}"
        return None

    def problems(start: int) -> list[str]:
        found = map(problem, range(start, min(start + CHECKED_AT_ONCE, len(paths))))
        return [text for text in found if text is not None]

    progress, bad = Progress("checking the pictures"), []
    starts = range(0, len(paths), CHECKED_AT_ONCE)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start, found in zip(starts, pool.map(problems, starts), strict=True):
            bad += found
            if len(starts) > 10:
                progress(min(start + CHECKED_AT_ONCE, len(paths)), len(paths))
    bad.sort()
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(paths)} pictures cannot be used; repair or remove them:\n  "
            + "\n  ".join(bad[:10] + ["..."] * (len(bad) > 10))
        )


class Prefetched(Iterator):
    """Iterates over a dataset in order; threads, or processes, make the elements ahead of time.

    The state is the number of elements given out, whatever makes them: Grain's own iterators have
    one per worker, which fits no other number of workers.
    """

    def __init__(self, dataset: grain.MapDataset, threads: int, workers: int = 0):
        self._dataset, self._threads, self._workers = dataset, threads, workers
        self._next = 0
        self._elements: grain.DatasetIterator | None = None

    def __next__(self) -> Any:
        if self._elements is None:
            self._elements = self._start()
        element = next(self._elements)
        self._next += 1
        return element

    def get_state(self) -> dict[str, int]:
        """Where the iterator is, as JSON has it."""
        return {"next_index": self._next}

    def set_state(self, state: dict) -> None:
        """Goes to where an iterator over the same dataset was."""
        self.close()
        self._next = int(state["next_index"])

    def close(self) -> None:
        """Ends threads and processes; the next element starts new ones."""
        if self._elements is not None:
            self._elements.close()
        self._elements = None

    def _start(self) -> grain.DatasetIterator:
        ahead = self._dataset[self._next :].to_iter_dataset(
            grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=self._threads + 1)
        )
        if self._workers:
            # Grain reads its own flags when it starts workers; outside absl.app they are unparsed.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            ahead = ahead.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self._workers), _ignore_interrupts
            )
        return iter(ahead)


def _ignore_interrupts(worker: int, workers: int) -> None:
    """A terminal's Ctrl-C goes to workers too; they end with their program, after it has saved."""
    del worker, workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def image_batches(
    source: ImageSource,
    spec: ImageSpec,
    batch_size: int,
    *,
    seed: int = 0,
    train: bool,
    shard_index: int = 0,
    shard_count: int = 1,
    workers: int = 0,
) -> Prefetched:
    """Iterates over batches of pictures.

    In training the examples are shuffled anew each epoch, without end, batches run across the
    boundary of epochs, and `spec`'s augmentation applies. Otherwise it is one pass in order,
    without augmentation, whose last batch may be short.

    Args:
      source: The pictures.
      spec: How they become inputs.
      batch_size: Examples per whole batch; a multiple of `shard_count`.
      seed: Of order and augmentation, in [0, 2**32).
      train: See above.
      shard_index: Which part of every batch to take, for processes that share them: the parts
        together are the whole batches, in order and augmentation too. Outside training a part of
        the last one may be empty.
      shard_count: Number of parts.
      workers: Processes that decode and augment; 0 uses threads of this one.

    Returns:
      An iterator of `{"images": float32 (b, S, S, C), "labels": int32 (b,)}`, where b is
      `batch_size / shard_count`, with `get_state` and `set_state` for an exact resume.

    Raises:
      ValueError: bad sizes, or the first picture does not suit `spec`.
    """
    if len(source):
        preprocess(source[0]["image"], spec)

    def gather(indices: np.ndarray, seeds: np.ndarray | None) -> dict[str, np.ndarray]:
        images = np.empty((len(indices), *2 * (spec.image_size,), spec.channels), np.float32)
        labels = np.empty(len(indices), np.int32)
        for row, index in enumerate(indices):
            example = source[int(index)]
            rng = None if seeds is None else np.random.default_rng(int(seeds[row]))
            images[row] = preprocess(example["image"], spec, rng)
            labels[row] = example["label"]
        return {"images": images, "labels": labels}

    in_memory = isinstance(source, ArrayImages)
    return index_batches(
        [len(source)],
        gather,
        batch_size,
        seed=seed,
        train=train,
        shard_index=shard_index,
        shard_count=shard_count,
        threads=1 if in_memory else min(8, os.cpu_count() or 1),
        workers=workers,
    )


def index_batches(
    sizes: Sequence[int],
    gather: Callable[[np.ndarray, np.ndarray | None], Any],
    batch_size: int,
    *,
    seed: int,
    train: bool,
    shard_index: int = 0,
    shard_count: int = 1,
    weights: Sequence[float] | None = None,
    threads: int = 1,
    workers: int = 0,
) -> Prefetched:
    """Iterates over `gather(indices, seeds)` for batches of indices into sets of examples.

    The order, the parts and the end are those of `image_batches`. In training, several sets are
    shuffled and repeated each by itself, and dealt out in fixed proportions.

    Args:
      sizes: Examples of each set; an index counts through all of them.
      gather: Makes a batch of indices and seeds. The seeds, one per example in [0, 2**63), are for
        its augmentation; None outside training.
      weights: How often an example of each set is drawn, relative to the others (to a hundredth of
        the smallest set's share); equally often by default.

    Raises:
      ValueError: no examples, or sizes that do not fit together.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError("there are no examples to make batches of")
    if weights is not None and (len(weights) != len(sizes) or min(weights) <= 0):
        raise ValueError(f"expected {len(sizes)} positive weights, got {weights}")
    if not 0 <= shard_index < shard_count:
        raise ValueError(f"shard_index {shard_index} is not in [0, {shard_count})")
    if batch_size < 1 or batch_size % shard_count:
        raise ValueError(
            f"batch_size {batch_size} is not a positive multiple of shard_count {shard_count}"
        )
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {seed}")

    share = batch_size // shard_count
    rows = slice(shard_index * share, (shard_index + 1) * share)

    def draw(batch: np.ndarray, rng: np.random.Generator) -> Any:
        # Drawn for the whole batch, so that it does not matter how many processes share it.
        return gather(batch[rows], rng.integers(2**63, size=len(batch))[rows])

    if train:
        starts = np.cumsum([0, *sizes]).tolist()
        endless = [
            grain.MapDataset.range(*ends).shuffle(seed=(seed + i * SEED_STEP) % 2**32).repeat()
            for i, ends in enumerate(itertools.pairwise(starts))
        ]
        shares = np.multiply(sizes, weights or 1).tolist()
        indices = endless[0] if len(sizes) == 1 else grain.MapDataset.mix(endless, shares)
        batches = indices.batch(batch_size, batch_fn=np.array).random_map(draw, seed=seed)
    else:
        indices = grain.MapDataset.range(sum(sizes))
        batches = indices.batch(batch_size, batch_fn=np.array).map(
            lambda batch: gather(batch[rows], None)
        )
    return Prefetched(batches, threads, workers)
