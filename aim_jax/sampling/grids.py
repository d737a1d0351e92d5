"""Samples for people: labelled grids, single PNGs and npz files, comparisons, completions."""

import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from aim_jax.data import preprocess
from aim_jax.data.preprocessing import image_spec
from aim_jax.sampling.generate import encode_rows, generate
from aim_jax.utils.files import replacing
from aim_jax.utils.images import make_grid, save_png, to_rgb, to_uint8
from aim_jax.utils.logging import Progress
from aim_jax.weights.pretrained import Pretrained


def class_name(model: Pretrained, label: int) -> str:
    """The name of a class, or its number where the model has no names."""
    return model.class_names[label] if model.class_names else str(label)


def generate_many(
    model: Pretrained,
    labels: np.ndarray,
    seed: int,
    batch_size: int,
    watch: Callable[[int, np.ndarray], None] | None = None,
    **settings: Any,
) -> Iterable[np.ndarray]:
    """Generates any number of images in equal batches, so that one compilation serves all.

    Args:
      watch: watch(start, images) is called after every row of codes, with the number of the batch's
        first image and its images as far as they are drawn.
      **settings: see `generate`.

    Yields:
      uint8 (n, H, W, c), n <= batch_size, in the order of the labels.
    """
    batch_size = min(batch_size, len(labels))
    progress = Progress("sampling")
    for start in range(0, len(labels), batch_size):
        # The last batch is filled up with images beyond the series, which are dropped.
        part = np.resize(labels[start : start + batch_size], batch_size)
        done = min(start + batch_size, len(labels))
        if watch:
            settings["callback"] = lambda samples, start=start, done=done: watch(
                start, np.asarray(samples.images)[: done - start]
            )
        images = generate(model, part, seed, first_index=start, **settings).images
        yield np.asarray(images)[: done - start]
        progress(done, len(labels))


class _GrowingGrid:
    """Writes the grid of a series of images while they are drawn."""

    def __init__(self, count: int, columns: int, names: list[str], path: Path):
        self._count, self._columns, self._names, self._path = count, columns, names, path
        self._images: np.ndarray | None = None

    def __call__(self, start: int, images: np.ndarray) -> None:
        if self._images is None:
            self._images = np.full((self._count, *images.shape[1:]), 128, np.uint8)
        self._images[start : start + len(images)] = images
        save_png(make_grid(self._images, self._columns, self._names), self._path)


def sample_to_directory(
    model: Pretrained,
    classes: Sequence[int],
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
    """Samples `per_class` images of every class and writes a labelled grid.

    Args:
      model: with tokenizer. classes: ids. out: directory, made if needed.
      pngs: also one PNG per image. npz: also `samples.npz` (arr_0 uint8 NHWC, labels int32).
      progressive: writes the grid after every row of codes; what is not drawn yet is grey.
      **settings: cfg_scale, temperature, top_k, top_p, ...; see `generate`.

    Returns:
      The paths written; the grid first.
    """
    labels = np.repeat(np.asarray(classes, np.int32), per_class)
    names = [class_name(model, label) for label in classes]
    out.mkdir(parents=True, exist_ok=True)
    watch = _GrowingGrid(len(labels), per_class, names, out / "grid.png") if progressive else None
    batches = generate_many(model, labels, seed, batch_size, watch, **settings)
    images = np.concatenate(list(batches))
    paths = [save_png(make_grid(images, per_class, names), out / "grid.png")]
    if pngs:
        for i, (image, label) in enumerate(zip(to_rgb(images), labels, strict=True)):
            name = class_name(model, int(label)).replace(os.sep, "_").replace(" ", "_")
            path = out / "images" / f"{i:05d}_{name}.png"
            paths.append(save_png(Image.fromarray(image), path))
    if npz:
        with replacing(out / "samples.npz") as partial, partial.open("wb") as file:
            np.savez(file, arr_0=images, labels=labels)
        paths.append(out / "samples.npz")
    return paths


def compare_settings(
    model: Pretrained, labels: Sequence[int], setting: str, values: Sequence[float], seed: int = 0
) -> Image.Image:
    """A grid with a row per value of a setting, in which only that setting differs.

    Above each column is its class.

    Args:
      model: with tokenizer. labels: class of each column.
      setting: a numeric field of `SamplingConfig`; the others are the model's defaults.
      seed: see `generate`.
    """
    given: list[dict[str, Any]] = [{setting: value} for value in values]
    rows = [np.asarray(generate(model, labels, seed, **one).images) for one in given]
    names = [class_name(model, label) for label in labels]
    return make_grid(
        np.concatenate(rows), len(labels), [f"{setting} {v:g}" for v in values],
        column_labels=names,
    )  # fmt: skip


def interpolate(
    model: Pretrained, first: int, second: int, steps: int, count: int, seed: int = 0
) -> Image.Image:
    """A grid from one class (first row) to another (last), by mixing their embeddings.

    Args:
      model: with tokenizer. first, second: class ids. steps: rows, 2 or more.
      count: pictures per row; those of a column share their randomness.
      seed: see `generate`.
    """
    if steps < 2:
        raise ValueError(f"{steps} steps from a class to another; expected 2 or more.")
    shares = np.linspace(0, 1, steps, dtype=np.float32)
    mixed = with_mixed_classes(model, first, second, shares)
    rows = [np.asarray(generate(mixed, [i] * count, seed).images) for i in range(steps)]
    names = [f"{1 - s:.0%} {class_name(model, first)}" for s in shares[:-1]]
    return make_grid(np.concatenate(rows), count, [*names, f"100% {class_name(model, second)}"])


def with_mixed_classes(
    model: Pretrained, first: int, second: int, shares: np.ndarray
) -> Pretrained:
    """The model whose class i is (1 - shares[i]) of class `first` and shares[i] of `second`."""
    weights = jnp.asarray(shares)[:, None]

    aim_config, aim_params = model.aim()

    def mix(table: jax.Array) -> jax.Array:
        rows = (1 - weights) * table[first] + weights * table[second]
        return jnp.concatenate([rows, table[-1:]]).astype(table.dtype)  # the last is the null class

    mixed = jax.tree.map(mix, aim_params["class_embedding"])
    return dataclasses.replace(
        model,
        aim_config=dataclasses.replace(aim_config, num_classes=len(shares)),
        aim_params=aim_params | {"class_embedding": mixed},
        class_names=(),
    )


def fitted(model: Pretrained, picture: np.ndarray) -> np.ndarray:
    """A picture uint8 (H, W, C) of any size as the model's pictures were fitted, float32.

    Where those were padded and this one is too large for that, it is scaled.

    Raises:
      ValueError: a model that does not say how its pictures were fitted.
    """
    if "data" not in model.info:
        raise ValueError(f"{model.name} does not say how its pictures were fitted.")
    spec = image_spec(ConfigDict(model.info["data"]))
    if spec.fit == "pad" and max(picture.shape[:2]) > spec.image_size:
        spec = dataclasses.replace(spec, fit="resize")
    return preprocess(picture, spec)


def complete(
    model: Pretrained,
    pictures: Sequence[np.ndarray],
    classes: Sequence[int],
    count: int,
    *,
    rows: int | None = None,
    seed: int = 0,
    min_side: int = 64,
    **settings: Any,
) -> Image.Image:
    """A grid with a row per picture: the picture, what is kept of it, and `count` completions.

    Args:
      model: with tokenizer. pictures: uint8 (H, W, C), of any size; see `fitted`.
      classes: the class id of each. rows: rows of codes to keep; half of them by default.
      seed, **settings: see `generate`. min_side: see `make_grid`.

    Raises:
      ValueError: another number of classes than of pictures, or the model lacks a part; see
        `fitted`.
    """
    if model.aim_params is None or model.vq_params is None or model.vq_config is None:
        raise ValueError(f"{model.name}: completions need both an AiM and a tokenizer.")
    if len(pictures) != len(classes):
        raise ValueError(f"{len(classes)} classes for {len(pictures)} pictures; expected one each.")
    pixels = np.stack([fitted(model, picture) for picture in pictures])
    if rows is None:
        rows = pixels.shape[1] // model.vq_config.downsampling // 2
    prefix = encode_rows(model, pixels, rows)
    drawn = generate(
        model, np.repeat(classes, count), seed, prefix=np.repeat(prefix, count, axis=0), **settings
    )
    whole = np.asarray(to_uint8(jnp.asarray(pixels)))
    kept = whole.copy()
    kept[:, rows * model.vq_config.downsampling :] = 127
    completed = np.asarray(drawn.images).reshape(len(whole), count, *whole.shape[1:])
    table = np.concatenate([whole[:, None], kept[:, None], completed], axis=1)
    names = [class_name(model, label) for label in classes]
    return make_grid(table.reshape(-1, *whole.shape[1:]), count + 2, names, min_side=min_side)
