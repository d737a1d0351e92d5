"""Two-dimensional convolution that is fast on small maps too."""

import jax
import jax.numpy as jnp


def conv_general_dilated(x, kernel, strides, padding, **options):
    """`jax.lax.conv_general_dilated` of NHWC maps, for `flax.linen.Conv`.

    Where a map is smaller than the kernel, so that a network has poolings or strides enough, XLA's
    CPU backend falls back to a plain loop. There it is written as one matrix product.

    Args:
      x: (b, H, W, c); kernel: (h, w, c, d).
      strides, padding, options: as of `jax.lax.conv_general_dilated`.

    Returns:
      (b, H', W', d).
    """
    plain = options.get("feature_group_count", 1) == 1 and all(
        set(options.get(name) or (1,)) == {1} for name in ("lhs_dilation", "rhs_dilation")
    )
    (height, width), (h, w) = x.shape[1:3], kernel.shape[:2]
    if not plain or isinstance(padding, str) or (height >= h and width >= w):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, **options)
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
