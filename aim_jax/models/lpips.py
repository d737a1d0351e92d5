"""LPIPS: perceptual distance between images, from features of a VGG network (arXiv 1801.03924).

This is version 0.1 with VGG16, the one that tokenizers are trained and evaluated with.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from aim_jax.ops.conv2d import conv_general_dilated
from aim_jax.ops.products import product
from aim_jax.ops.reference import with_rank

# Widths of the convolutions between poolings (arXiv 1409.1556, configuration D).
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Mean and standard deviation of ImageNet's pixels, for images in [-1, 1].
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)
MIN_SIDE = 16  # pixels; the network pools four times


class LPIPS(nn.Module):
    """Perceptual distance between two batches of images.

    Attributes:
      dtype: dtype of the convolutions; norms and distances are at least float32.
    """

    dtype: str = "float32"

    @nn.compact
    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """Compute the distances between the images of two batches.

        Args:
          a, b: (n, H, W, 1 or 3) in [-1, 1].

        Returns:
          Distances (n,).

        Raises:
          ValueError: the images are smaller than 16 pixels along a side.
        """
        if min(a.shape[1:3]) < MIN_SIDE:
            raise ValueError(
                f"LPIPS: images of {a.shape[1]} x {a.shape[2]} are too small; expected at least "
                f"{MIN_SIDE} pixels along both sides."
            )
        x = (jnp.concatenate([a, b]) - with_rank(SHIFT, 4)) / with_rank(SCALE, 4)
        number = 0
        distance = jnp.zeros(len(a), jnp.float32)
        for i, widths in enumerate(BLOCKS):
            x = nn.max_pool(x, (2, 2), (2, 2)) if i else x
            for width in widths:
                conv = nn.Conv(
                    width, (3, 3), padding=1, dtype=self.dtype, name=f"conv_{number}",
                    conv_general_dilated=conv_general_dilated,
                )  # fmt: skip
                x = nn.relu(conv(x))
                number += 1
            head = self.param(f"head_{i}", nn.initializers.ones, (widths[-1],), jnp.float32)
            ours, theirs = jnp.split(_unit(x), 2)
            squares = jnp.square(ours - theirs)
            distance += jnp.mean(product("nhwc,c->nhw", squares, head), axis=(1, 2))
        return distance


def _unit(x: jax.Array) -> jax.Array:
    """Scale x to unit length along the channels; zero vectors stay zero, with zero gradient."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    length = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-20)
    return x / (length + 1e-10)


def shapes() -> dict:
    """Return the shapes and dtypes of the parameters."""
    x = jax.ShapeDtypeStruct((1, MIN_SIDE, MIN_SIDE, 3), jnp.float32)
    return jax.eval_shape(LPIPS().init, jax.random.key(0), x, x)["params"]


def lpips(params: dict, a: jax.Array, b: jax.Array, dtype: str = "float32") -> jax.Array:
    """Apply `LPIPS` with parameters from `aim_jax.weights.convert.lpips.load_lpips`."""
    return LPIPS(dtype).apply({"params": params}, a, b)
