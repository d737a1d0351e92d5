"""Metrics of a tokenizer: reconstruction quality and codebook usage."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

WINDOW = 7


@jax.jit
def psnr(a: jax.Array, b: jax.Array) -> jax.Array:
    """Compute the peak signal-to-noise ratio in dB of images uint8 (b, H, W, c), as (b,).

    The mean squared error is at least 1e-8, as if equal images differed by 1e-4, so that means over
    images stay finite.
    """
    difference = a.astype(jnp.float32) - b.astype(jnp.float32)
    error = jnp.mean(jnp.square(difference), axis=(1, 2, 3))
    return 10 * jnp.log10(255.0**2 / jnp.maximum(error, 1e-8))


@jax.jit
def ssim(a: jax.Array, b: jax.Array) -> jax.Array:
    """Compute the structural similarity of images uint8 (b, H, W, c), as (b,).

    SSIM of Wang et al. 2004 in the form in which tokenizers are reported: uniform windows of 7 x 7
    pixels, sample covariances, and the mean over channels and over all windows inside the image.
    """
    x, y = (t.astype(jnp.float32) - 127.5 for t in (a, b))  # smaller numbers, the same variances

    def window_mean(t: jax.Array) -> jax.Array:
        return nn.avg_pool(t, (WINDOW, WINDOW))

    mean_x = window_mean(x)
    mean_y = window_mean(y)
    sample = WINDOW**2 / (WINDOW**2 - 1)
    var_x = sample * (window_mean(x * x) - mean_x**2)
    var_y = sample * (window_mean(y * y) - mean_y**2)
    covariance = sample * (window_mean(x * y) - mean_x * mean_y)
    mean_x = mean_x + 127.5
    mean_y = mean_y + 127.5
    c1 = (0.01 * 255) ** 2
    c2 = (0.03 * 255) ** 2
    score = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    score /= (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return score.mean(axis=(1, 2, 3))


def codebook_use(counts: np.ndarray) -> dict[str, float]:
    """Compute codebook usage from the number of occurrences of each codebook entry.

    Args:
      counts: int (codebook entries,).

    Returns:
      usage, the fraction of entries that occur, and perplexity, exp of the entropy of their
      frequencies, which equals the number of entries if all are equally frequent.
    """
    share = counts[counts > 0] / counts.sum()
    return {
        "usage": float(np.mean(counts > 0)),
        "perplexity": float(np.exp(-(share * np.log(share)).sum())),
    }
