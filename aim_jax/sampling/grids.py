"""Samples as files: labelled grids, single PNGs, npz files, comparisons and completions."""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from ml_collections import ConfigDict
from PIL import Image

from aim_jax.data import preprocess
from aim_jax.data.preprocessing import image_spec
from aim_jax.models.captions import CaptionFeatures, rows_of
from aim_jax.sampling.conditions import as_condition
from aim_jax.sampling.config import SETTINGS
from aim_jax.sampling.generate import generate
from aim_jax.sampling.images import encode_rows
from aim_jax.utils.checks import check_arguments, shortened
from aim_jax.utils.files import replacing
from aim_jax.utils.images import class_caption, make_grid, save_png, to_rgb, to_uint8
from aim_jax.utils.logging import Progress, reminding
from aim_jax.utils.names import file_name
from aim_jax.weights.pretrained import Pretrained

Label = int | str  # id of a class, or a caption
MOST_LABEL = 48  # characters of a caption beside a row


def class_name(model: Pretrained, label: Label) -> str:
    """Return a caption, or the name of a class; its id as text if the model has no names."""
    if isinstance(label, str):
        return label
    return model.class_names[label] if model.class_names else str(label)


def caption(model: Pretrained, label: Label) -> str:
    """Return the label of a class or a caption in a grid."""
    if isinstance(label, str):
        return shortened(label, MOST_LABEL)
    return class_caption(model.class_names, label)


def generate_many(
    model: Pretrained,
    labels: ArrayLike | Sequence[str] | CaptionFeatures,
    seed: int,
    batch_size: int,
    watch: Callable[[int, np.ndarray], None] | None = None,
    *,
    prefix: np.ndarray | None = None,
    **settings: Any,
) -> Iterable[np.ndarray]:
    """Generate any number of images in equal batches that share one compilation.

    Args:
      model: with an AiM and a tokenizer.
      labels: classes or captions of n images; see `generate`.
      seed: see `generate`.
      batch_size: images per batch.
      watch: called as watch(start, images) after every row of tokens, with the index of the first
        image of the batch and the partial images of the batch.
      prefix: (n, l), the first tokens of the images; see `generate`.
      **settings: see `generate`.

    Yields:
      uint8 (n, H, W, c), n <= batch_size, in the order of the labels.
    """
    condition = as_condition(model, labels)
    count = rows_of(condition)
    batch_size = min(batch_size, count)
    progress = Progress("sampling")
    for start in range(0, count, batch_size):
        # The last batch is padded with extra images, which are dropped.
        part = jax.tree.map(lambda x: _rows_of_batch(x, start, batch_size), condition)  # noqa: B023
        done = min(start + batch_size, count)
        if watch:
            settings["callback"] = lambda samples, start=start, done=done: watch(
                start, np.asarray(samples.images)[: done - start]
            )
        per_image = {k: v for k, v in settings.items() if k in SETTINGS and np.ndim(v)}
        if prefix is not None:
            per_image["prefix"] = prefix
        own = {k: _rows_of_batch(np.asarray(v), start, batch_size) for k, v in per_image.items()}
        with reminding(f"sampling images {start + 1} to {done} of {count}"):
            samples = generate(model, part, seed, first_index=start, **settings | own)
            images = np.asarray(samples.images)
        yield images[: done - start]
        progress(done, count)


def _rows_of_batch(rows: np.ndarray, start: int, size: int) -> np.ndarray:
    """Return `size` rows from `start` on; the last batch is padded with repeated rows."""
    part = rows[start : start + size]
    return np.resize(part, (size, *part.shape[1:]))


class _GrowingGrid:
    """Grid of a series of images, rewritten to a file while the images are generated."""

    def __init__(self, count: int, columns: int, names: list[str], path: Path):
        self._count = count
        self._columns = columns
        self._names = names
        self._path = path
        self._images: np.ndarray | None = None

    def __call__(self, start: int, images: np.ndarray) -> None:
        if self._images is None:
            self._images = np.full((self._count, *images.shape[1:]), 128, np.uint8)
        self._images[start : start + len(images)] = images
        save_png(make_grid(self._images, self._columns, self._names), self._path)


@check_arguments
def sample_to_directory(
    model: Pretrained,
    classes: Sequence[int] | Sequence[str],
    per_class: int,
    out: Path,
    *,
    seed: int = 0,
    batch_size: int = 64,
    pngs: bool = False,
    npz: bool = False,
    progressive: bool = False,
    **settings: Any,
) -> list[Path]:
    """Sample `per_class` images of every class or caption and write a labelled grid.

    Args:
      model: with an AiM and a tokenizer.
      classes: class ids, or captions for a text model.
      per_class: images per class or caption.
      out: directory, created if needed.
      seed: see `generate`.
      batch_size: images sampled at once.
      pngs: also write one PNG per image.
      npz: also write `samples.npz` (arr_0 uint8 NHWC, and labels int32 or captions).
      progressive: rewrite the grid after every row of tokens; missing parts are grey.
      **settings: cfg_scale, temperature, top_k, top_p, ...; see `generate`.

    Returns:
      The paths written, the grid first.
    """
    condition = as_condition(model, classes)
    condition = jax.tree.map(lambda x: np.repeat(x, per_class, axis=0), condition)
    labels = [label for label in classes for _ in range(per_class)]
    names = [caption(model, label) for label in classes]
    out.mkdir(parents=True, exist_ok=True)
    watch = _GrowingGrid(len(labels), per_class, names, out / "grid.png") if progressive else None
    batches = generate_many(model, condition, seed, batch_size, watch, **settings)
    images = np.concatenate(list(batches))
    paths = [save_png(make_grid(images, per_class, names), out / "grid.png")]
    if pngs:
        for i, (image, label) in enumerate(zip(to_rgb(images), labels, strict=True)):
            name = file_name(class_name(model, label))
            path = out / "images" / f"{i:05d}_{name}.png"
            paths.append(save_png(Image.fromarray(image), path))
    if npz:
        with replacing(out / "samples.npz") as partial, partial.open("wb") as file:
            if model.text is None:
                np.savez(file, arr_0=images, labels=np.asarray(labels, np.int32))
            else:
                np.savez(file, arr_0=images, captions=np.asarray(labels))
        paths.append(out / "samples.npz")
    return paths


@check_arguments
def compare_settings(
    model: Pretrained, labels: Sequence[int], setting: str, values: Sequence[float], seed: int = 0
) -> Image.Image:
    """Return a grid with one row per value of a setting; nothing else differs between rows.

    The class of each column is above it.

    Args:
      model: with an AiM and a tokenizer.
      labels: class id of each column.
      setting: a numeric field of `SamplingConfig`; the others are the model's defaults.
      values: value of the setting in each row.
      seed: see `generate`.
    """
    overrides: list[dict[str, Any]] = [{setting: value} for value in values]
    rows = [np.asarray(generate(model, labels, seed, **row).images) for row in overrides]
    names = [caption(model, label) for label in labels]
    return make_grid(
        np.concatenate(rows), len(labels), [f"{setting} {v:g}" for v in values],
        column_labels=names,
    )  # fmt: skip


@check_arguments
def interpolate(
    model: Pretrained, first: int, second: int, steps: int, count: int, seed: int = 0
) -> Image.Image:
    """Return a grid from one class (first row) to another (last row), by mixing embeddings.

    Args:
      model: with an AiM and a tokenizer.
      first: class id of the first row.
      second: class id of the last row.
      steps: number of rows, at least 2.
      count: images per row; those of a column share their randomness.
      seed: see `generate`.

    Raises:
      ValueError: if there are fewer than two steps.
    """
    if steps < 2:
        raise ValueError(f"steps={steps}: expected 2 or more, the first and the last class.")
    shares = np.linspace(0, 1, steps, dtype=np.float32)
    mixed = with_mixed_classes(model, first, second, shares)
    rows = [np.asarray(generate(mixed, [i] * count, seed).images) for i in range(steps)]
    names = [f"{1 - s:.0%} {caption(model, first)}" for s in shares[:-1]]
    return make_grid(np.concatenate(rows), count, [*names, f"100% {caption(model, second)}"])


def with_mixed_classes(
    model: Pretrained, first: int, second: int, shares: np.ndarray
) -> Pretrained:
    """Return the model with class i mixed as (1 - shares[i]) * `first` + shares[i] * `second`."""
    weights = jnp.asarray(shares, jnp.float32)[:, None]

    aim_config, aim_params = model.aim()
    if aim_config.is_text:
        raise ValueError(f"{model.name} generates from captions; it has no classes to mix.")

    def mix(table: jax.Array) -> jax.Array:
        rows = (1 - weights) * table[first][None] + weights * table[second][None]
        return jnp.concatenate([rows, table[-1:]]).astype(table.dtype)  # last row: null class

    mixed = jax.tree.map(mix, aim_params["class_embedding"])
    return dataclasses.replace(
        model,
        aim_config=dataclasses.replace(aim_config, num_classes=len(shares)),
        aim_params=aim_params | {"class_embedding": mixed},
        class_names=(),
    )


def fitted(model: Pretrained, picture: np.ndarray) -> np.ndarray:
    """Preprocess an image uint8 (H, W, C) of any size as in the training of the model, to float32.

    If training images were padded and this one is too large for padding, it is resized.

    Raises:
      ValueError: if the model does not record how its training images were preprocessed.
    """
    if "data" not in model.info:
        raise ValueError(f"{model.name} does not record how its training images were preprocessed.")
    spec = image_spec(ConfigDict(model.info["data"]))
    if spec.fit == "pad" and max(picture.shape[:2]) > spec.image_size:
        spec = dataclasses.replace(spec, fit="resize")
    return preprocess(picture, spec)


@check_arguments
def complete(
    model: Pretrained,
    images: Sequence[np.ndarray],
    classes: Sequence[int] | Sequence[str],
    count: int,
    *,
    rows: int | None = None,
    seed: int = 0,
    min_side: int = 64,
    batch_size: int = 64,
    **settings: Any,
) -> Image.Image:
    """Return a grid with one row per image: the image, its kept part and `count` completions.

    Args:
      model: with an AiM and a tokenizer.
      images: images uint8 (H, W, C) of any size; see `fitted`.
      classes: class id or caption of each image.
      count: completions per image.
      rows: rows of tokens to keep; half of them by default.
      seed: see `generate`.
      min_side: see `make_grid`.
      batch_size: completions sampled at once.
      **settings: see `generate`.

    Raises:
      ValueError: if the numbers of classes and images differ, the model lacks a part, or `fitted`
        raises.
    """
    if model.aim_params is None or model.vq_params is None or model.vq_config is None:
        raise ValueError(f"{model.name}: completing images requires an AiM and a tokenizer.")
    if len(images) != len(classes):
        raise ValueError(
            f"{len(classes)} classes or captions for {len(images)} images; expected one per image."
        )
    pixels = np.stack([fitted(model, image) for image in images])
    if rows is None:
        rows = pixels.shape[1] // model.vq_config.downsampling // 2
    prefix = encode_rows(model, pixels, rows)
    completions = generate_many(
        model, [label for label in classes for _ in range(count)], seed, batch_size,  # type: ignore[misc]
        prefix=np.repeat(prefix, count, axis=0), **settings,
    )  # fmt: skip
    originals = np.asarray(to_uint8(jnp.asarray(pixels)))
    kept = originals.copy()
    kept[:, rows * model.vq_config.downsampling :] = 127
    completed = np.concatenate(list(completions))
    completed = completed.reshape(len(originals), count, *originals.shape[1:])
    table = np.concatenate([originals[:, None], kept[:, None], completed], axis=1)
    names = [caption(model, label) for label in classes]
    return make_grid(table.reshape(-1, *originals.shape[1:]), count + 2, names, min_side=min_side)
