"""Seeded, resumable batches, made with Grain.

Grain supplies the indices and one random generator per batch. A single function then gathers the
batch, so the cost in Python is per batch rather than per example. Batch k is a pure function of
(seed, k): the complete state of an iterator is the number of batches it has returned.

Grain is imported where batches are made, so that models load and sample without it.
"""

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags
from PIL import Image

from aim_jax.data.features import CaptionTable, caption_entries
from aim_jax.data.preprocessing import ImageSpec, preprocess
from aim_jax.data.sources import (
    UNREADABLE,
    ArrayImages,
    FolderImages,
    ImageSource,
    check_labels,
    decode_image,
)
from aim_jax.utils.checks import shown
from aim_jax.utils.logging import Progress

if TYPE_CHECKING:
    import grain

# Name of the order that `EpochOrder` gives to examples; a state of another order cannot be resumed.
ORDER = "philox"

# Image files that a thread checks before it reports.
CHECKED_AT_ONCE = 1024


def check_order(before: str | None, now: str | None = ORDER, run: str = "the run") -> None:
    """Check that a run resumes with the order of examples that it began with.

    Args:
      before: Order that the run began with; None for that of version 0.2.0 and earlier.
      now: Order of this version.
      run: Name of the run in the message.

    Raises:
      ValueError: The orders differ.
    """
    if before != now:
        raise ValueError(
            f"{run} began with another version of aim_jax, which shuffles the examples otherwise "
            f"(order {shown(before)}, here {shown(now)}); finish it with that version, or start a "
            "new run from its weights with --config.init"
        )


def check_images(
    source: ImageSource, spec: ImageSpec | None = None, *, decode_limit: int = 20_000
) -> None:
    """Check images and labels before long work starts.

    The header of every file of a folder is read, and up to `decode_limit` evenly spaced files are
    decoded in full. Labels are checked wherever they are known without decoding; of other sources,
    64 evenly spaced examples are read.

    Args:
      source: An image source from `open_images`.
      spec: Preprocessing that the images must suit; with fit="pad" they must not be too large.
      decode_limit: Number of files of a folder to decode.

    Raises:
      ValueError: There are no images, labels are out of range, or files are damaged or too large
        (up to ten of them are named).
    """
    if not len(source):
        raise ValueError(f"{source.name} has no images in its split {source.split!r}")
    if isinstance(source, FolderImages):
        check_labels(source.labels, len(source.class_names), source.name)
        _check_files(source.paths, spec, decode_limit)
        return
    if isinstance(source, ArrayImages):
        check_labels(source.labels, len(source.class_names), source.name)
        examples = [source[0]]
    else:
        examples = [source[i] for i in range(0, len(source), -(-len(source) // 64))]
        labels = np.array([example["label"] for example in examples])
        check_labels(labels, len(source.class_names), source.name)
    if spec is not None:
        for example in examples:
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
        messages = map(problem, range(start, min(start + CHECKED_AT_ONCE, len(paths))))
        return [text for text in messages if text is not None]

    progress = Progress("checking the images")
    bad = []
    starts = range(0, len(paths), CHECKED_AT_ONCE)
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for start, messages in zip(starts, pool.map(problems, starts), strict=True):
            bad += messages
            if len(starts) > 10:
                progress(min(start + CHECKED_AT_ONCE, len(paths)), len(paths))
    bad.sort()
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(paths)} images cannot be used; repair or remove them:\n  "
            + "\n  ".join(bad[:10] + ["..."] * (len(bad) > 10))
        )


class Prefetched(Iterator):
    """Iterator over a dataset in order; threads or processes prepare the elements ahead of time.

    The state is the number of elements returned so far, independent of how they are prepared.
    Grain's own iterators keep one state per worker, which fits no other number of workers.
    """

    def __init__(
        self, dataset: "grain.MapDataset", threads: int, workers: int = 0, order: str | None = None
    ):
        """Start at the first element.

        Args:
          dataset: The elements.
          threads: Threads of each process that prepare elements.
          workers: Processes that prepare elements; 0 uses threads of this process.
          order: Name of the order of the examples, kept with the position.
        """
        self._dataset = dataset
        self._order = order
        self._threads = threads
        self._workers = workers
        self._next = 0
        self._elements: grain.DatasetIterator | None = None

    def __next__(self) -> Any:
        if self._elements is None:
            with _interrupts_blocked(self._workers > 0):
                self._elements = self._start()
                element = next(self._elements)
        else:
            element = next(self._elements)
        self._next += 1
        return element

    def get_state(self) -> dict[str, Any]:
        """Return the position of the iterator as a JSON value."""
        return {"next_index": self._next} | ({"order": self._order} if self._order else {})

    def set_state(self, state: dict) -> None:
        """Move to the position of an iterator over the same dataset.

        Raises:
          ValueError: The state is that of an iterator with another order of the examples.
        """
        check_order(state.get("order"), self._order)
        self.close()
        self._next = int(state["next_index"])

    def close(self) -> None:
        """Stop threads and processes; the next element starts new ones."""
        if self._elements is not None:
            self._elements.close()
        self._elements = None

    def _start(self) -> "grain.DatasetIterator":
        import grain

        ahead = self._dataset[self._next :].to_iter_dataset(
            grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=self._threads + 1)
        )
        if self._workers:
            # Grain reads its own flags when it starts workers; outside absl.app none are parsed.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            ahead = ahead.mp_prefetch(
                grain.MultiprocessingOptions(num_workers=self._workers), _follow_program
            )
        return iter(ahead)


@contextlib.contextmanager
def _interrupts_blocked(blocked: bool) -> Iterator[None]:
    """Block Ctrl-C in the threads and processes that the block starts, from their first moment."""
    if not blocked:
        yield
        return
    _start_tracker()  # Python would start it beside the first worker, and unblock Ctrl-C then
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_tracker() -> None:
    """Start the process that frees the semaphores of a program that was killed, without a word."""
    quiet = "ignore:resource_tracker:UserWarning"
    sys.warnoptions.append(quiet)  # processes inherit them
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.remove(quiet)


def _follow_program(worker: int, workers: int) -> None:
    """Let a worker ignore a terminal's Ctrl-C, and end with its program, however that ends."""
    del worker, workers
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_program, name="aim_jax program", daemon=True).start()


def _end_with_program() -> None:
    program = multiprocessing.parent_process()
    if program is not None:
        program.join()
        os._exit(1)


class EpochOrder:
    """Order of the examples of a set, epoch after epoch: a new random permutation in each.

    A permutation sorts the examples by 64 random bits each. Philox and SeedSequence are fixed by
    NumPy for all of its versions, unlike its shuffles. The last two permutations are kept, int32;
    of ImageNet's 1.28 million images each takes 5 MB, and 0.3 s to make.

    Args:
      first: Index of the first example of the set.
      size: Number of examples.
      seed: Integers that determine the order; any two sequences give unrelated orders.
    """

    def __init__(self, first: int, size: int, seed: Sequence[int]):
        self._arguments = first, size, tuple(seed)
        self._permutation = functools.lru_cache(maxsize=2)(self._make_permutation)

    def __call__(self, position: int) -> int:
        """Return the index of the example at a position, counted from the start of epoch 0."""
        first, size, _ = self._arguments
        epoch, index = divmod(position, size)
        return first + int(self._permutation(epoch)[index])

    def __reduce__(self) -> tuple:
        return EpochOrder, self._arguments

    def _make_permutation(self, epoch: int) -> np.ndarray:
        _, size, seed = self._arguments
        bits = np.random.Philox(np.random.SeedSequence([*seed, epoch])).random_raw(size)
        return np.argsort(bits, kind="stable").astype(np.int32)


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
    captions: CaptionTable | None = None,
) -> Prefetched:
    """Return an iterator over batches of images.

    In training the examples are reshuffled in each epoch without end, batches cross the boundary of
    epochs, and the augmentation of `spec` applies. Otherwise the iterator makes one pass in order,
    without augmentation, and the last batch may be short.

    Args:
      source: The images.
      spec: Preprocessing of the images.
      batch_size: Examples per batch of all parts; a multiple of `shard_count`.
      seed: Seed of order and augmentation, in [0, 2**32).
      train: Shuffle, repeat and augment, or make one pass in order.
      shard_index: The part of every batch to return, for processes that share the batches. The
        parts together are the batches of a single process, in order and augmentation too. Outside
        training, a part of the last batch may be empty.
      shard_count: Number of parts.
      workers: Processes that decode and augment; 0 uses threads of this process.
      captions: Captions of the examples, to add to the batches.

    Returns:
      An iterator of `{"images": float32 (b, S, S, C), "labels": int32 (b,)}`, where b is
      `batch_size / shard_count`, with `get_state` and `set_state` for an exact resume. With
      `captions`, also the entries of `caption_entries`.

    Raises:
      ValueError: The sizes are invalid, or the first image does not suit `spec`.
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
        batch = {"images": images, "labels": labels}
        return batch if captions is None else batch | caption_entries(captions, indices)

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
    """Return an iterator over `gather(indices, seeds)` for batches of indices into example sets.

    Order, parts and end are as in `image_batches`. In training, several sets are each shuffled
    and repeated separately, and mixed in fixed proportions.

    Args:
      sizes: Examples of each set; an index counts through all sets.
      gather: Makes a batch of indices and seeds. The seeds, one per example in [0, 2**63), are for
        augmentation; they are None outside training.
      weights: Relative frequency of an example of each set (precise to a hundredth of the smallest
        set's share); equal by default.

    Raises:
      ValueError: There are no examples, or the sizes do not fit together.
    """
    import grain

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

    def gather_with_seeds(batch: np.ndarray, rng: np.random.Generator) -> Any:
        # Seeds are sampled for the full batch, so they do not depend on the number of processes.
        return gather(batch[rows], rng.integers(2**63, size=len(batch))[rows])

    if train:
        firsts = np.cumsum([0, *sizes[:-1]]).tolist()
        endless = [
            grain.MapDataset.range(sys.maxsize).map(EpochOrder(first, size, (seed, index)))
            for index, (first, size) in enumerate(zip(firsts, sizes, strict=True))
        ]
        shares = np.multiply(sizes, weights or 1).tolist()
        indices = endless[0] if len(sizes) == 1 else grain.MapDataset.mix(endless, shares)
        batches = indices.batch(batch_size, batch_fn=np.array).random_map(
            gather_with_seeds, seed=seed
        )
    else:
        indices = grain.MapDataset.range(sum(sizes))
        batches = indices.batch(batch_size, batch_fn=np.array).map(
            lambda batch: gather(batch[rows], None)
        )
    return Prefetched(batches, threads, workers, ORDER if train else None)
