"""VQ tokenizer of LlamaGen (arXiv 2406.06525, section 2.1): images <-> a raster grid of tokens.

It is a VQGAN encoder and decoder (arXiv 2012.09841) around an l2-normalized codebook of low
dimension (arXiv 2110.04627). Images are NHWC in [-1, 1].

Axes: b batch, t tokens (row-major), v codebook entries, f downsampling factor.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from aim_jax.models.codebook import Quantized, VectorQuantizer
from aim_jax.models.config import NORM_GROUPS, VQConfig
from aim_jax.ops.conv2d import conv_general_dilated


def group_norm(dtype: DTypeLike, name: str) -> nn.GroupNorm:
    """Return a GroupNorm as in LlamaGen's tokenizer."""
    # The fast variance E[x^2] - E[x]^2 loses digits that parity with released weights needs.
    return nn.GroupNorm(NORM_GROUPS, epsilon=1e-6, dtype=dtype, use_fast_variance=False, name=name)


# Modules that tokens depend on; the other modules only decode.
ENCODER = ("encoder", "quant_conv", "quantize")


def encoder_params(params: dict) -> dict:
    """Select the parameters that determine the tokens of an image."""
    return {name: params[name] for name in ENCODER}


def conv3x3(features: int, dtype: DTypeLike, name: str) -> nn.Conv:
    """Return a 3x3 convolution that keeps height and width."""
    return nn.Conv(
        features, (3, 3), padding=1, dtype=dtype, name=name,
        conv_general_dilated=conv_general_dilated,
    )  # fmt: skip


class ResnetBlock(nn.Module):
    """Residual block with a 1x1 shortcut where the width changes.

    Computes x + conv(swish(norm(conv(swish(norm(x)))))).
    """

    features: int
    dropout: float
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map x (b, h, w, c) to (b, h, w, features)."""
        h = conv3x3(self.features, self.dtype, "conv1")(
            nn.swish(group_norm(self.dtype, "norm1")(x))
        )
        h = nn.swish(group_norm(self.dtype, "norm2")(h))
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = conv3x3(self.features, self.dtype, "conv2")(h)
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, dtype=self.dtype, name="nin_shortcut")(x)
        return x + h


class AttnBlock(nn.Module):
    """Residual single-head self-attention over all positions of the feature map."""

    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (b, h, w, c) to the same shape."""
        b, height, width, c = x.shape
        h = group_norm(self.dtype, "norm")(x).reshape(b, height * width, c)
        q, k, v = (nn.Dense(c, dtype=self.dtype, name=name)(h) for name in ("q", "k", "v"))
        scores = jnp.einsum("bqc,bkc->bqk", q, k) / math.sqrt(c)
        weights = nn.softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), axis=-1)
        h = jnp.einsum("bqk,bkc->bqc", weights.astype(v.dtype), v)
        h = nn.Dense(c, dtype=self.dtype, name="proj_out")(h)
        return x + h.reshape(x.shape)


class Downsample(nn.Module):
    """3x3 convolution with stride 2, zero-padded at the bottom and on the right."""

    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (b, 2 h, 2 w, c) to (b, h, w, c)."""
        padding = ((0, 1), (0, 1))
        return nn.Conv(
            x.shape[-1], (3, 3), 2, padding, dtype=self.dtype, name="conv",
            conv_general_dilated=conv_general_dilated,
        )(x)  # fmt: skip


class DoublingConv(nn.Module):
    """Nearest-neighbour 2x upsampling fused with a 3x3 convolution, at 4/9 of the operations.

    Only 2x2 of the 3x3 pixels under the kernel differ. Which ones depends on the parity of the
    output pixel's row and column. The four kinds of output pixels are therefore 2x2 convolutions of
    the smaller image, with sums of the kernel's rows and columns.
    """

    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (b, h, w, c) to (b, 2 h, 2 w, c)."""
        b, h, w, c = x.shape
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, c, c), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (c,), jnp.float32)

        def halves(k: jax.Array) -> jax.Array:
            """Sum kernel rows (3, ...) into those of even and odd outputs (2, 2, ...)."""
            return jnp.stack([jnp.stack([k[0], k[1] + k[2]]), jnp.stack([k[0] + k[1], k[2]])])

        rows = jnp.moveaxis(halves(kernel), 2, 0)  # (3 columns, row parity, row, c, c)
        kernels = halves(rows)  # (column parity, column, row parity, row, c, c)
        kernels = kernels.transpose(3, 1, 4, 2, 0, 5).reshape(2, 2, c, 4 * c)
        y = jax.lax.conv_general_dilated(
            x.astype(self.dtype), kernels.astype(self.dtype), (1, 1), ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        ).reshape(b, h + 1, w + 1, 2, 2, c)  # fmt: skip
        # The windows of even outputs start one pixel before those of odd ones.
        kinds = [[y[:, i : h + i, j : w + j, i, j] for j in (0, 1)] for i in (0, 1)]
        y = jnp.stack([jnp.stack(row, axis=3) for row in kinds], axis=2)
        return y.reshape(b, 2 * h, 2 * w, c) + bias.astype(self.dtype)[None, None, None]


class Upsample(nn.Module):
    """Nearest-neighbour 2x upsampling, then a 3x3 convolution."""

    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (b, h, w, c) to (b, 2 h, 2 w, c)."""
        return DoublingConv(self.dtype, name="conv")(x)


class Encoder(nn.Module):
    """VQGAN encoder."""

    config: VQConfig

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Encode images (b, H, W, in_channels) as features (b, H/f, W/f, z_channels)."""
        cfg = self.config
        dtype = cfg.compute_dtype
        last = len(cfg.ch_mult) - 1
        h = conv3x3(cfg.ch, dtype, "conv_in")(x)
        for i, mult in enumerate(cfg.ch_mult):
            for j in range(cfg.num_res_blocks):
                name = f"conv_blocks_{i}_res_{j}"
                h = ResnetBlock(cfg.ch * mult, cfg.dropout, dtype, name=name)(h, train)
                if i == last:
                    h = AttnBlock(dtype, name=f"conv_blocks_{i}_attn_{j}")(h)
            if i != last:
                h = Downsample(dtype, name=f"conv_blocks_{i}_downsample")(h)
        h = ResnetBlock(h.shape[-1], cfg.dropout, dtype, name="mid_0")(h, train)
        h = AttnBlock(dtype, name="mid_1")(h)
        h = ResnetBlock(h.shape[-1], cfg.dropout, dtype, name="mid_2")(h, train)
        h = nn.swish(group_norm(dtype, "norm_out")(h))
        return conv3x3(cfg.z_channels, dtype, "conv_out")(h)


class Decoder(nn.Module):
    """VQGAN decoder."""

    config: VQConfig

    @nn.compact
    def __call__(self, z: jax.Array, train: bool = False) -> jax.Array:
        """Decode features (b, h, w, z_channels) to unclipped images (b, h f, w f, out_channels)."""
        cfg = self.config
        dtype = cfg.compute_dtype
        last = len(cfg.ch_mult) - 1
        h = conv3x3(cfg.ch * cfg.ch_mult[-1], dtype, "conv_in")(z)
        h = ResnetBlock(h.shape[-1], cfg.dropout, dtype, name="mid_0")(h, train)
        h = AttnBlock(dtype, name="mid_1")(h)
        h = ResnetBlock(h.shape[-1], cfg.dropout, dtype, name="mid_2")(h, train)
        for i, mult in enumerate(reversed(cfg.ch_mult)):
            for j in range(cfg.num_res_blocks + 1):
                name = f"conv_blocks_{i}_res_{j}"
                h = ResnetBlock(cfg.ch * mult, cfg.dropout, dtype, name=name)(h, train)
                if i == 0:
                    h = AttnBlock(dtype, name=f"conv_blocks_{i}_attn_{j}")(h)
            if i != last:
                h = Upsample(dtype, name=f"conv_blocks_{i}_upsample")(h)
        h = nn.swish(group_norm(dtype, "norm_out")(h))
        return conv3x3(cfg.out_channels, dtype, "conv_out")(h)


class VQModel(nn.Module):
    """VQ tokenizer; `encode_to_tokens` and `decode_tokens` convert between images and tokens."""

    config: VQConfig

    def setup(self) -> None:
        """Create the submodules."""
        cfg = self.config
        self.encoder = Encoder(cfg)
        self.quant_conv = nn.Dense(cfg.embed_dim)
        self.quantize = VectorQuantizer(cfg)
        self.post_quant_conv = nn.Dense(cfg.z_channels)
        self.decoder = Decoder(cfg)

    def __call__(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, Quantized]:
        """Reconstruct images (b, H, W, c) in [-1, 1]; return (reconstructions, `Quantized`)."""
        quantized = self.encode(images, train)
        return self.decode(quantized.quant, train), quantized

    def prequant(self, images: jax.Array, train: bool = False) -> jax.Array:
        """Encode images (b, H, W, c) as vectors (b, H/f, W/f, embed_dim) before quantization.

        Raises:
          ValueError: the images have another shape, or a size that is not a multiple of f.
        """
        f = self.config.downsampling
        if images.ndim != 4 or images.shape[-1] != self.config.in_channels:
            raise ValueError(
                f"VQModel: images have shape {images.shape}; expected (batch, height, width, "
                f"{self.config.in_channels})."
            )
        if images.shape[1] % f or images.shape[2] % f:
            raise ValueError(
                f"VQModel: image size {images.shape[1]}x{images.shape[2]} is not a multiple of the "
                f"downsampling factor {f}; resize or pad the images."
            )
        return self.quant_conv(self.encoder(images, train).astype(jnp.float32))

    def encode(self, images: jax.Array, train: bool = False) -> Quantized:
        """Encode and quantize images (b, H, W, c) in [-1, 1]."""
        return self.quantize(self.prequant(images, train))

    def decode(self, quant: jax.Array, train: bool = False) -> jax.Array:
        """Decode codebook vectors (b, h, w, embed_dim) to unclipped images (b, h f, w f, c)."""
        return self.decoder(self.post_quant_conv(quant), train).astype(jnp.float32)

    def encode_to_tokens(self, images: jax.Array) -> jax.Array:
        """Encode images (b, H, W, c) in [-1, 1] as tokens (b, t) int32 in raster order."""
        return self.encode(images).indices

    def decode_tokens(self, tokens: jax.Array, grid: tuple[int, int] | None = None) -> jax.Array:
        """Decode tokens to images.

        Args:
          tokens: int (b, t), in raster order.
          grid: (rows, columns) of the token grid; None means a square grid.

        Returns:
          Images (b, H, W, c), not clipped.

        Raises:
          ValueError: the tokens do not fill the grid.
        """
        side = math.isqrt(tokens.shape[1])
        rows, columns = grid or (side, side)
        if rows * columns != tokens.shape[1]:
            raise ValueError(
                f"decode_tokens: {tokens.shape[1]} tokens do not fill a {rows}x{columns} grid; "
                "pass grid=(rows, columns)."
            )
        return self.decode(self.quantize.lookup(tokens.reshape(-1, rows, columns)))


def init_params(config: VQConfig, key: jax.Array) -> dict:
    """Initialize float32 parameters."""
    side = config.downsampling
    images = jnp.zeros((1, side, side, config.in_channels), jnp.float32)
    return VQModel(config).init(key, images)["params"]
