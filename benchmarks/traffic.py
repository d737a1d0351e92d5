"""What decoding has to move through memory, and the plot of rates beside that floor."""

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
    """Bytes of all arrays of a tree."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@functools.cache  # tables of floors ask for every engine and batch
def weights_per_step(config: AiMConfig) -> int:
    """Bytes of the parameters that a step reads, in the compute dtype.

    The class modulation is computed once per image, and of the other tables a step reads one row.
    """
    params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    kept = {k: params[k] for k in ("layers", "norm_f", "final_layer", "token_embedding")}
    return size(kept) * np.dtype(config.compute_dtype).itemsize // 4


def bytes_per_step(config: AiMConfig, images: int, engine: Engine) -> float:
    """Least traffic of a decode step with guidance, on average over an image.

    The weights and the logits; per row the convolution's ring of inputs read and written; in the
    recurrent form the state read and written, in the dual form the rows of the tokens before read,
    half of them on average, and one row written.

    Args:
      engine: with its form resolved; its cache_dtype is that of states, or of inputs and B.
    """
    rows, kept = 2 * images * config.n_layer, np.dtype(engine.cache_dtype).itemsize
    computed = np.dtype(config.compute_dtype).itemsize
    cache = jax.eval_shape(lambda: init_cache(config, 2 * images))
    channels = sum(x.shape[-1] for x in cache._replace(ssm_state=None) if x is not None)
    if engine.form == "recurrent":
        past = 2 * cache.ssm_state.size * kept / rows
    else:  # position t reads t rows and writes one
        row = (config.d_inner + config.ngroups * config.d_state) * kept + 4 * config.n_heads
        past = row * (config.num_tokens + 1) / 2
    ring = 2 * config.d_conv * channels * computed
    logits = 2 * images * config.vocab_size * 2 * 4
    return weights_per_step(config) + rows * (past + ring) + logits


def plot(
    path: Path,
    title: str,
    measured: Mapping[str, Mapping[int, float]],
    floors: Mapping[str, Mapping[int, float]],
) -> None:
    """Draws images/s against the batch: measured points, and dashed what memory allows.

    Args:
      measured, floors: by engine, images/s by number of images at once; an engine has one colour.
    """
    plt = pyplot()  # before anything else of matplotlib: its error says what to install
    from matplotlib.ticker import LogLocator, ScalarFormatter

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for number, (name, rates) in enumerate(measured.items()):
        color = f"C{number}"
        axes.plot(*zip(*sorted(rates.items()), strict=True), "o-", color=color, label=name)
        if floors.get(name):
            points = zip(*sorted(floors[name].items()), strict=True)
            axes.plot(*points, "--", color=color, label=f"{name}: what memory allows")
    axes.set(xscale="log", yscale="log", xlabel="images at once", ylabel="images/s", title=title)
    ticks = sorted({images for rates in measured.values() for images in rates})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
