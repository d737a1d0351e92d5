"""PatchGAN, the discriminator of tokenizer training (arXiv 1611.07004)."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from aim_jax.ops.conv2d import convolution
from aim_jax.ops.reference import with_rank

_normal = nn.initializers.normal(0.02)


class PatchGAN(nn.Module):
    """Discriminator that classifies overlapping patches of an image as real or reconstructed.

    Attributes:
      ch: width of the first convolution; later ones double it, up to 8 ch.
      depth: number of convolutions with stride 2.
      implementation: of the gradients of convolutions, "xla" or "native".
    """

    ch: int = 64
    depth: int = 3
    implementation: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Compute patch logits (b, h, w) of images (b, H, W, c), large for real images.

        Raises:
          ValueError: the images are too small for the depth.
        """
        if min(x.shape[1:3]) < self.min_side:
            raise ValueError(
                f"PatchGAN: images of {x.shape[1]} x {x.shape[2]} are too small for depth "
                f"{self.depth}, which needs {self.min_side} pixels; lower "
                "config.discriminator.depth."
            )
        x = nn.leaky_relu(self._conv(self.ch, 2, "conv_0")(x), 0.2)
        for i in range(1, self.depth + 1):
            stride = 2 if i < self.depth else 1
            x = self._conv(self.ch * min(2**i, 8), stride, f"conv_{i}", use_bias=False)(x)
            x = nn.leaky_relu(BatchNorm(name=f"norm_{i}")(x), 0.2)
        return self._conv(1, 1, "logits")(x)[..., 0]

    @property
    def min_side(self) -> int:
        """Smallest height and width of images; the last two convolutions trim one pixel each."""
        return 3 * 2**self.depth

    def _conv(self, features: int, stride: int, name: str, **options: Any) -> nn.Conv:
        return nn.Conv(
            features, (4, 4), stride, padding=1, kernel_init=_normal, name=name,
            conv_general_dilated=convolution(self.implementation), **options,
        )  # fmt: skip


class BatchNorm(nn.Module):
    """Normalization by the mean and variance of the current batch, over all devices.

    There are no running averages, because the discriminator only sees the batch it trains on.
    """

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalize x (b, h, w, c) per channel."""
        scale = self.param(
            "scale", lambda key, shape: 1 + _normal(key, shape, jnp.float32), x.shape[-1:]
        )
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        mean = jnp.mean(x, axis=(0, 1, 2), keepdims=True)
        variance = jnp.mean(jnp.square(x - mean), axis=(0, 1, 2), keepdims=True)
        scale = with_rank(scale, x.ndim)
        bias = with_rank(bias, x.ndim)
        return (x - mean) * jax.lax.rsqrt(variance + self.epsilon) * scale + bias
