"""Memory traffic of decoding, and the plot of measured rates beside the limit that it sets."""

import functools
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np

from aim_jax.models import AiMConfig, init_cache
from aim_jax.models.aim import init_params
from aim_jax.sampling.engine import Engine
from aim_jax.utils.plots import pyplot


def size(tree) -> int:
    """Return the bytes of all arrays of a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@functools.cache  # tables of limits call it for every engine and batch
def weights_per_step(config: AiMConfig) -> int:
    """Return the bytes of the parameters that a step reads, in the compute dtype.

    Class modulation is computed once per image, and a step reads only one row of the other tables.
    """
    params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    step_params = {k: params[k] for k in ("layers", "norm_f", "final_layer", "token_embedding")}
    return size(step_params) * np.dtype(config.compute_dtype).itemsize // 4


def bytes_per_step(config: AiMConfig, images: int, engine: Engine) -> float:
    """Return the minimum bytes moved by a decode step with guidance, averaged over an image.

    A step moves the weights and the logits, and per row the ring of convolution inputs, read and
    written. In the recurrent form it also reads and writes the state. In the dual form it reads the
    rows of past tokens, half of them on average, and writes one row.

    Args:
      config: configuration of the model.
      images: images per batch.
      engine: with its form resolved; `cache_dtype` is the dtype of states, or of inputs and B.
    """
    rows = 2 * images * config.n_layer
    cache_bytes = np.dtype(engine.cache_dtype).itemsize
    compute_bytes = np.dtype(config.compute_dtype).itemsize
    cache = jax.eval_shape(lambda: init_cache(config, 2 * images))
    channels = sum(x.shape[-1] for x in cache._replace(ssm_state=None) if x is not None)
    if engine.form == "recurrent":
        past = 2 * cache.ssm_state.size * cache_bytes / rows
    else:  # position t reads t rows and writes one
        row = (config.d_inner + config.ngroups * config.d_state) * cache_bytes + 4 * config.n_heads
        past = row * (config.num_tokens + 1) / 2
    ring = 2 * config.d_conv * channels * compute_bytes
    logits = 2 * images * config.vocab_size * 2 * 4
    return weights_per_step(config) + rows * (past + ring) + logits


def plot(
    path: Path,
    title: str,
    measured: Mapping[str, Mapping[int, float]],
    floors: Mapping[str, Mapping[int, float]],
) -> None:
    """Plot images/s against the batch size: measured points, and dashed lines for the limits.

    Args:
      path: file to write.
      title: title of the plot.
      measured: by engine, measured images/s by batch size.
      floors: by engine, images/s by batch size at the memory limit; same colour as `measured`.
    """
    plt = pyplot()  # before other imports of matplotlib: its error says what to install
    from matplotlib.ticker import LogLocator, ScalarFormatter

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for number, (name, rates) in enumerate(measured.items()):
        color = f"C{number}"
        axes.plot(*zip(*sorted(rates.items()), strict=True), "o-", color=color, label=name)
        if floors.get(name):
            points = zip(*sorted(floors[name].items()), strict=True)
            axes.plot(*points, "--", color=color, label=f"{name}: memory limit")
    axes.set(xscale="log", yscale="log", xlabel="batch size", ylabel="images/s", title=title)
    ticks = sorted({images for rates in measured.values() for images in rates})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
