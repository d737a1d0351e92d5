"""VQ tokenizer of LlamaGen (arXiv 2406.06525, section 2.1): images <-> a raster grid of tokens.

It is a VQGAN encoder and decoder (arXiv 2012.09841) around an l2-normalized codebook of low
dimension (arXiv 2110.04627). Images are NHWC in [-1, 1].

Axes: b batch, t tokens (row-major), v codebook entries, f downsampling factor.
"""

import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.typing import DTypeLike

from aim_jax.models.codebook import Quantized, VectorQuantizer, init_codebook
from aim_jax.models.config import NORM_GROUPS, VQConfig
from aim_jax.ops.conv2d import convolution, doubling_conv
from aim_jax.ops.group_norm import group_norm
from aim_jax.ops.products import precision_of

# Standard deviation of a normal variable that is truncated at two standard deviations.
TRUNCATED_STD = 0.87962566103423978

# Modules that tokens depend on; the other modules only decode.
ENCODER = ("encoder", "quant_conv", "quantize")


def encoder_params(params: dict) -> dict:
    """Select the parameters that determine the tokens of an image."""
    return {name: params[name] for name in ENCODER}


def conv3x3(
    features: int, dtype: DTypeLike, name: str, implementation: str, **options: Any
) -> nn.Conv:
    """Return a 3x3 convolution, which keeps height and width unless `options` say otherwise."""
    return nn.Conv(
        features, (3, 3), dtype=dtype, name=name,
        conv_general_dilated=convolution(implementation), **({"padding": 1} | options),
    )  # fmt: skip


def dense(features: int, dtype: DTypeLike, name: str | None = None) -> nn.Dense:
    """Return a linear layer over the channels: a 1x1 convolution."""
    return nn.Dense(features, dtype=dtype, precision=precision_of(dtype), name=name)


class GroupNorm(nn.Module):
    """GroupNorm as in LlamaGen's tokenizer, optionally followed by swish."""

    dtype: str
    implementation: str
    swish: bool = True

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (b, h, w, c) to the same shape."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        return group_norm(
            x, scale, bias, NORM_GROUPS, swish=self.swish, dtype=self.dtype,
            implementation=self.implementation,
        )  # fmt: skip


class ResnetBlock(nn.Module):
    """Residual block with a 1x1 shortcut where the width changes.

    Computes x + conv(swish(norm(conv(swish(norm(x)))))).
    """

    features: int
    dropout: float
    dtype: str
    implementation: str

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Map x (b, h, w, c) to (b, h, w, features)."""
        h = GroupNorm(self.dtype, self.implementation, name="norm1")(x)
        h = conv3x3(self.features, self.dtype, "conv1", self.implementation)(h)
        h = GroupNorm(self.dtype, self.implementation, name="norm2")(h)
        h = nn.Dropout(self.dropout, deterministic=not train)(h)
        h = conv3x3(self.features, self.dtype, "conv2", self.implementation)(h)
        if x.shape[-1] != self.features:
            x = dense(self.features, self.dtype, "nin_shortcut")(x)
        return x + h


class AttnBlock(nn.Module):
    """Residual single-head self-attention over all positions of the feature map."""

    dtype: str
    implementation: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (b, h, w, c) to the same shape."""
        b, height, width, c = x.shape
        h = GroupNorm(self.dtype, self.implementation, swish=False, name="norm")(x)
        h = h.reshape(b, height * width, c)
        q, k, v = (dense(c, self.dtype, name)(h) for name in ("q", "k", "v"))
        precision = precision_of(self.dtype)
        scores = jnp.einsum("bqc,bkc->bqk", q, k, precision=precision) / math.sqrt(c)
        weights = nn.softmax(scores.astype(jnp.promote_types(scores.dtype, jnp.float32)), axis=-1)
        h = jnp.einsum("bqk,bkc->bqc", weights.astype(v.dtype), v, precision=precision)
        h = dense(c, self.dtype, "proj_out")(h)
        return x + h.reshape(x.shape)


class Downsample(nn.Module):
    """3x3 convolution with stride 2, zero-padded at the bottom and on the right."""

    dtype: str
    implementation: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (b, 2 h, 2 w, c) to (b, h, w, c)."""
        return conv3x3(
            x.shape[-1], self.dtype, "conv", self.implementation, strides=2,
            padding=((0, 1), (0, 1)),
        )(x)  # fmt: skip


class DoublingConv(nn.Module):
    """Nearest-neighbour 2x upsampling fused with a 3x3 convolution; see `doubling_conv`."""

    dtype: str
    implementation: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (b, h, w, c) to (b, 2 h, 2 w, c)."""
        c = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, c, c), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (c,), jnp.float32)
        y = doubling_conv(x.astype(self.dtype), kernel, self.implementation)
        return y + bias.astype(self.dtype)[None, None, None]


class Upsample(nn.Module):
    """Nearest-neighbour 2x upsampling, then a 3x3 convolution."""

    dtype: str
    implementation: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map x (b, h, w, c) to (b, 2 h, 2 w, c)."""
        return DoublingConv(self.dtype, self.implementation, name="conv")(x)


class Encoder(nn.Module):
    """VQGAN encoder."""

    config: VQConfig
    implementation: str = "xla"

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Encode images (b, H, W, in_channels) as features (b, H/f, W/f, z_channels)."""
        cfg = self.config
        dtype = cfg.compute_dtype
        how = self.implementation
        last = len(cfg.ch_mult) - 1
        h = conv3x3(cfg.ch, dtype, "conv_in", how)(x)
        for i, mult in enumerate(cfg.ch_mult):
            for j in range(cfg.num_res_blocks):
                name = f"conv_blocks_{i}_res_{j}"
                h = ResnetBlock(cfg.ch * mult, cfg.dropout, dtype, how, name=name)(h, train)
                if i == last:
                    h = AttnBlock(dtype, how, name=f"conv_blocks_{i}_attn_{j}")(h)
            if i != last:
                h = Downsample(dtype, how, name=f"conv_blocks_{i}_downsample")(h)
        h = ResnetBlock(h.shape[-1], cfg.dropout, dtype, how, name="mid_0")(h, train)
        h = AttnBlock(dtype, how, name="mid_1")(h)
        h = ResnetBlock(h.shape[-1], cfg.dropout, dtype, how, name="mid_2")(h, train)
        h = GroupNorm(dtype, how, name="norm_out")(h)
        return conv3x3(cfg.z_channels, dtype, "conv_out", how)(h)


class Decoder(nn.Module):
    """VQGAN decoder."""

    config: VQConfig
    implementation: str = "xla"

    @nn.compact
    def __call__(self, z: jax.Array, train: bool = False) -> jax.Array:
        """Decode features (b, h, w, z_channels) to unclipped images (b, h f, w f, out_channels)."""
        cfg = self.config
        dtype = cfg.compute_dtype
        how = self.implementation
        last = len(cfg.ch_mult) - 1
        h = conv3x3(cfg.ch * cfg.ch_mult[-1], dtype, "conv_in", how)(z)
        h = ResnetBlock(h.shape[-1], cfg.dropout, dtype, how, name="mid_0")(h, train)
        h = AttnBlock(dtype, how, name="mid_1")(h)
        h = ResnetBlock(h.shape[-1], cfg.dropout, dtype, how, name="mid_2")(h, train)
        for i, mult in enumerate(reversed(cfg.ch_mult)):
            for j in range(cfg.num_res_blocks + 1):
                name = f"conv_blocks_{i}_res_{j}"
                h = ResnetBlock(cfg.ch * mult, cfg.dropout, dtype, how, name=name)(h, train)
                if i == 0:
                    h = AttnBlock(dtype, how, name=f"conv_blocks_{i}_attn_{j}")(h)
            if i != last:
                h = Upsample(dtype, how, name=f"conv_blocks_{i}_upsample")(h)
        h = GroupNorm(dtype, how, name="norm_out")(h)
        return conv3x3(cfg.out_channels, dtype, "conv_out", how)(h)


class VQModel(nn.Module):
    """VQ tokenizer; `encode_to_tokens` and `decode_tokens` convert between images and tokens.

    Attributes:
      config: sizes of the tokenizer.
      implementation: of group norms and of the gradients of convolutions, "xla" or "native".
    """

    config: VQConfig
    implementation: str = "xla"

    def setup(self) -> None:
        """Create the submodules."""
        cfg = self.config
        self.encoder = Encoder(cfg, self.implementation)
        self.quant_conv = dense(cfg.embed_dim, "float32")
        self.quantize = VectorQuantizer(cfg)
        self.post_quant_conv = dense(cfg.z_channels, "float32")
        self.decoder = Decoder(cfg, self.implementation)

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


@functools.lru_cache(maxsize=32)
def param_shapes(config: VQConfig) -> dict:
    """Return shapes and dtypes of the parameters; do not change the result.

    Tracing the model takes about a second, hence the cache.
    """
    side = config.downsampling
    images = jax.ShapeDtypeStruct((1, side, side, config.in_channels), jnp.float32)
    return jax.eval_shape(VQModel(config).init, jax.random.key(0), images)["params"]


def init_params(config: VQConfig, key: jax.Array) -> dict:
    """Initialize float32 parameters.

    Kernels are LeCun-normal (truncated at two standard deviations), as Flax initializes them, but
    parts of a single draw: XLA takes long to compile a draw for each of them.
    """
    shapes = param_shapes(config)
    kernels = [
        leaf.size for path, leaf in jax.tree.leaves_with_path(shapes) if path[-1].key == "kernel"
    ]
    drawn = jax.random.fold_in(key, 0)
    draws = jax.random.truncated_normal(drawn, -2, 2, (sum(kernels),), jnp.float32)
    parts = iter(jnp.split(draws, list(itertools.accumulate(kernels))[:-1]))

    def init(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        name = path[-1].key
        if name == "kernel":
            fan_in = math.prod(leaf.shape[:-1])
            return next(parts).reshape(leaf.shape) / (TRUNCATED_STD * math.sqrt(fan_in))
        if name == "embedding":
            return init_codebook(jax.random.fold_in(key, 1), leaf.shape, config)
        return {"scale": jnp.ones, "bias": jnp.zeros}[name](leaf.shape, jnp.float32)

    return jax.tree.map_with_path(init, shapes)
