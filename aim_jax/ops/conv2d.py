"""Two-dimensional convolution that is also fast on small feature maps."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def conv_general_dilated(x, kernel, strides, padding, **options):
    """Convolve NHWC maps like `jax.lax.conv_general_dilated`; for use with `flax.linen.Conv`.

    XLA's CPU backend falls back to a plain loop if the input map or, for the gradient, the output
    map is smaller than the kernel, as after many poolings or strides. Such convolutions are
    computed as one matrix product instead.

    Args:
      x: inputs (b, H, W, c).
      kernel: filters (h, w, c, d).
      strides, padding, options: see `jax.lax.conv_general_dilated`.

    Returns:
      (b, H', W', d).
    """
    is_plain = options.get("feature_group_count", 1) == 1 and all(
        set(options.get(name) or (1,)) == {1} for name in ("lhs_dilation", "rhs_dilation")
    )
    if not is_plain or isinstance(padding, str) or not _is_small(x.shape, kernel, strides, padding):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
    h, w = kernel.shape[:2]
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows = x.shape[1] - h + 1
    columns = x.shape[2] - w + 1
    windows = [
        x[:, i : i + rows : strides[0], j : j + columns : strides[1]]
        for i in range(h)
        for j in range(w)
    ]
    kernel = kernel.reshape(-1, kernel.shape[-1])
    return jnp.matmul(jnp.concatenate(windows, -1), kernel, precision=options.get("precision"))


def _is_small(
    shape: Sequence[int],
    kernel: jax.Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
) -> bool:
    """Return True if the input map or the output map is smaller than the kernel."""
    for size, k, stride, pad in zip(shape[1:3], kernel.shape, strides, padding, strict=False):
        out = (size + sum(pad) - k) // stride + 1
        if min(size, out) < k:
            return True
    return False
