"""LPIPS: how different two pictures look, by the features of a VGG (arXiv 1801.03924).

Version 0.1 with VGG16, the one that tokenizers are trained and reported with.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from aim_jax.ops.conv2d import conv_general_dilated

# Widths of the convolutions between one pooling and the next (arXiv 1409.1556, configuration D).
BLOCKS = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
# Mean and deviation of ImageNet's pixels, for pictures in [-1, 1].
SHIFT = np.array([-0.030, -0.088, -0.188], np.float32)
SCALE = np.array([0.458, 0.448, 0.450], np.float32)
MIN_SIDE = 16  # four poolings


class LPIPS(nn.Module):
    """Two batches of pictures -> distances.

    Attributes:
      dtype: of the convolutions; lengths and distances are float32 at least.
    """

    dtype: str = "float32"

    @nn.compact
    def __call__(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """a, b (n, H, W, 1 or 3) in [-1, 1] -> (n,).

        Raises:
          ValueError: pictures smaller than the network's poolings.
        """
        if min(a.shape[1:3]) < MIN_SIDE:
            raise ValueError(
                f"LPIPS: pictures of {a.shape[1]} x {a.shape[2]} are too small; expected "
                f"{MIN_SIDE} pixels or more along both sides."
            )
        x, number = (jnp.concatenate([a, b]) - SHIFT) / SCALE, 0
        distance = jnp.zeros(len(a))
        for i, widths in enumerate(BLOCKS):
            x = nn.max_pool(x, (2, 2), (2, 2)) if i else x
            for width in widths:
                conv = nn.Conv(
                    width, (3, 3), padding=1, dtype=self.dtype, name=f"conv_{number}",
                    conv_general_dilated=conv_general_dilated,
                )  # fmt: skip
                x, number = nn.relu(conv(x)), number + 1
            head = self.param(f"head_{i}", nn.initializers.ones, (widths[-1],))
            ours, theirs = jnp.split(_unit(x), 2)
            distance += jnp.mean(jnp.square(ours - theirs) @ head, axis=(1, 2))
        return distance


def _unit(x: jax.Array) -> jax.Array:
    """x scaled to unit length along the channels; zero, with zero gradient, where all are zero."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    length = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-20)
    return x / (length + 1e-10)


def shapes() -> dict:
    """Shapes and dtypes of the parameters."""
    x = jax.ShapeDtypeStruct((1, MIN_SIDE, MIN_SIDE, 3), jnp.float32)
    return jax.eval_shape(LPIPS().init, jax.random.key(0), x, x)["params"]


def lpips(params: dict, a: jax.Array, b: jax.Array, dtype: str = "float32") -> jax.Array:
    """`LPIPS` with parameters from `aim_jax.weights.convert.lpips.load_lpips`."""
    return LPIPS(dtype).apply({"params": params}, a, b)
