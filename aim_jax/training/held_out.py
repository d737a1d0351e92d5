"""Evaluation of a tokenizer on held-out images: mean metrics, rFID, and a grid of examples."""

import functools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import metrics
from jax.sharding import Mesh
from ml_collections import ConfigDict

from aim_jax.evaluation.distribution import Gaussian, Moments, frechet_distance
from aim_jax.evaluation.features import FeatureExtractor, over_processes
from aim_jax.evaluation.reconstruction import codebook_use, psnr
from aim_jax.models.config import VQConfig
from aim_jax.models.inception import NUM_FEATURES
from aim_jax.models.lpips import lpips
from aim_jax.models.vq import VQModel
from aim_jax.parallel.sharding import (
    batch_sharding,
    batch_share,
    joined,
    local_rows,
    micro_batches,
    shard_batch,
    summed,
    to_host,
)
from aim_jax.training import loop
from aim_jax.utils.images import make_grid, save_png, to_uint8
from aim_jax.utils.logging import Progress


def eval_step(
    params: dict, batch: dict, lpips_params: dict | None, *, config: VQConfig, accumulate: int = 1
) -> metrics.Collection:
    """Return metrics of the real examples of a padded batch.

    They are the squared error, the PSNR of the 8-bit images in dB per image, LPIPS (only if its
    weights are given), and `codes`, the mean number of times each codebook entry occurs in an
    image.
    """
    return summed(lambda part: _measure(params, part, lpips_params, config), batch, accumulate)


def _measure(
    params: dict, batch: dict, lpips_params: dict | None, config: VQConfig
) -> metrics.Collection:
    images = batch["images"]
    weights = batch["weights"]
    recon, quantized = VQModel(config).apply({"params": params}, images)
    per_image = {}
    if lpips_params is not None:
        per_image["val_lpips"] = lpips(lpips_params, jnp.clip(recon, -1, 1), images)
    per_image["val_rec_l2"] = jnp.mean(jnp.square(recon - images), axis=(1, 2, 3))
    per_image["val_psnr"] = psnr(to_uint8(recon), to_uint8(images))
    averages = {
        name: metrics.Average.from_model_output(values, mask=weights)
        for name, values in per_image.items()
    }
    ones = jnp.broadcast_to(weights[:, None], quantized.indices.shape)
    counts = jnp.zeros(config.n_embed, jnp.float32).at[quantized.indices].add(ones)
    codes = metrics.Average(total=counts, count=jnp.sum(weights))
    return metrics.Collection.create_collection(**averages, codes=codes)


class HeldOut:
    """Evaluator of a tokenizer on held-out images.

    Args:
      config: Configuration of the run; see `aim_jax.configs.defaults.vq_defaults`.
      model, mesh: Tokenizer and mesh of the run.
      batches: (part) -> one pass over this part of every batch; by default this process's own part.
      count: Total number of images.
      lpips_params: Weights of LPIPS, which is left out if they are None.
      extract: Feature extractor for rFID, which is left out if it is None.
    """

    def __init__(
        self,
        config: ConfigDict,
        model: VQConfig,
        mesh: Mesh,
        batches: Callable[..., Iterable[dict[str, Any]]],
        count: int,
        lpips_params: dict | None,
        extract: FeatureExtractor | None,
    ):
        self._batches = batches
        self._count = count
        self._mesh = mesh
        self._lpips = lpips_params
        self._extract = extract
        self._parts = batch_share(mesh)[1]
        self._size = config.batch_size // self._parts
        accumulate = config.accumulate
        self._measure = jax.jit(functools.partial(eval_step, config=model, accumulate=accumulate))

        def decoded(params: dict, images: jax.Array) -> jax.Array:
            return to_uint8(VQModel(model).apply({"params": params}, images)[0])

        def decoded_in_parts(params: dict, images: jax.Array) -> jax.Array:
            parts = micro_batches(images, accumulate)
            return joined(jax.lax.map(functools.partial(decoded, params), parts))

        self._decoded = jax.jit(decoded)
        self._batch_decoded = jax.jit(decoded_in_parts, out_shardings=batch_sharding(mesh))
        # Every process takes the first part: a program over all devices needs equal inputs.
        self._examples = next(iter(batches(part=0)))["images"][: config.sample.images]
        self._real: Gaussian | None = None

    def measure(self, params: dict) -> dict[str, float]:
        """Return the means of `eval_step`, the codebook usage, and val_rfid."""
        measure = lambda batch: self._measure(params, batch, self._lpips)  # noqa: E731
        means = loop.weighted_means(measure, self._batches(), self._size, self._mesh)
        usage = codebook_use(means.pop("codes"))
        means |= {f"val_{name}": value for name, value in usage.items()}
        if self._extract is not None:
            generated = self._gaussian(self._extract, self._reconstructions(params))
            if self._real is None:
                images = (to_uint8(batch["images"]) for batch in self._batches())
                self._real = self._gaussian(self._extract, images)
            means["val_rfid"] = frechet_distance(self._real, generated)
        return means

    def draw(self, params: dict, path: Path) -> None:
        """Write a grid of original images above their reconstructions."""
        examples = self._examples
        decoded = to_host(self._decoded(params, examples))
        if jax.process_index() == 0:
            pairs = np.concatenate([np.asarray(to_uint8(examples)), decoded])
            save_png(make_grid(pairs, len(examples), ["original", "decoded"]), path)

    def _reconstructions(self, params: dict) -> Iterator[np.ndarray]:
        for batch in self._batches():
            images = shard_batch(loop.pad_batch(batch, self._size), self._mesh)["images"]
            yield local_rows(self._batch_decoded(params, images))[: len(batch["labels"])]

    def _gaussian(
        self, extract: FeatureExtractor, batches: Iterable[jax.Array | np.ndarray]
    ) -> Gaussian:
        moments = Moments(NUM_FEATURES)
        progress = Progress("features for rFID")
        for images in batches:
            moments.add(np.asarray(extract(np.asarray(images)).pool))
            progress(min(moments.count * self._parts, self._count), self._count)
        return over_processes(moments).gaussian()
