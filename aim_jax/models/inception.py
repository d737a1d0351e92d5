"""The 2015 Inception network whose features define FID, sFID and the Inception Score.

It differs from the Inception v3 of common model zoos: the average pools exclude the padding, the
last block uses max pooling, and there are 1008 classes (arXiv 1512.00567). The graph is
`classify_image_graph_def.pb` of 2015-12-05, on which arXiv 1706.08500 defines FID.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from aim_jax.ops.reference import with_rank

SIDE = 299
NUM_FEATURES = 2048
NUM_CLASSES = 1008
SPATIAL_CHANNELS = 7
NUM_SPATIAL = 17 * 17 * SPATIAL_CHANNELS


class Features(NamedTuple):
    """Inception features of a batch of images, float32, one row per image.

    Attributes:
      pool: (b, 2048) mean over the last block, for FID, KID, precision and recall.
      spatial: (b, 2023) first 7 channels of the first branch of mixed_6, for sFID.
      logits: (b, 1008) without bias, as the reference evaluators compute the Inception Score; None
        if the weights lack the last layer.
    """

    pool: jax.Array
    spatial: jax.Array
    logits: jax.Array | None


class Conv(NamedTuple):
    """Specification of a convolution with folded batch norm, followed by ReLU."""

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"


def _block_a(pooled: int) -> dict[str, tuple]:
    return {
        "": (Conv(64),),
        "tower": (Conv(48), Conv(64, (5, 5))),
        "tower_1": (Conv(64), Conv(96, (3, 3)), Conv(96, (3, 3))),
        "tower_2": ("mean", Conv(pooled)),
    }


def _block_c(inner: int) -> dict[str, tuple]:
    row, column = (1, 7), (7, 1)
    return {
        "": (Conv(192),),
        "tower": (Conv(inner), Conv(inner, row), Conv(192, column)),
        "tower_1": (
            Conv(inner), Conv(inner, column), Conv(inner, row), Conv(inner, column), Conv(192, row),
        ),
        "tower_2": ("mean", Conv(192)),
    }  # fmt: skip


def _block_e(pool: str) -> dict[str, tuple]:
    split = (Conv(384, (1, 3)), Conv(384, (3, 1)))  # side by side, on the same input
    return {
        "": (Conv(320),),
        "tower": (Conv(384), split),
        "tower_1": (Conv(448), Conv(384, (3, 3)), split),
        "tower_2": (pool, Conv(192)),
    }


def _strided(features: int) -> Conv:
    return Conv(features, (3, 3), 2, "VALID")


STEM = (
    _strided(32), Conv(32, (3, 3), padding="VALID"), Conv(64, (3, 3)), "halve",
    Conv(80), Conv(192, (3, 3), padding="VALID"), "halve",
)  # fmt: skip
# Branches by name, each a sequence; their outputs are concatenated.
BLOCKS = {
    "mixed": _block_a(32),
    "mixed_1": _block_a(64),
    "mixed_2": _block_a(64),
    "mixed_3": {
        "": (_strided(384),),
        "tower": (Conv(64), Conv(96, (3, 3)), _strided(96)),
        "pool": ("halve",),
    },
    "mixed_4": _block_c(128),
    "mixed_5": _block_c(160),
    "mixed_6": _block_c(160),
    "mixed_7": _block_c(192),
    "mixed_8": {
        "tower": (Conv(192), _strided(320)),
        "tower_1": (Conv(192), Conv(192, (1, 7)), Conv(192, (7, 1)), _strided(192)),
        "pool": ("halve",),
    },
    "mixed_9": _block_e("mean"),
    "mixed_10": _block_e("max"),
}


def _halve(x: jax.Array) -> jax.Array:
    """Max-pool 3 x 3 windows with stride 2, without padding."""
    return _over_windows(jnp.maximum, x, stride=2)


def _maximum(x: jax.Array) -> jax.Array:
    """Max-pool 3 x 3 windows with stride 1, keeping height and width."""
    return _over_windows(jnp.maximum, _padded(x, -jnp.inf))


def _mean(x: jax.Array) -> jax.Array:
    """Average-pool 3 x 3 windows with stride 1; pixels outside the image do not count."""
    row, column = (np.convolve(np.ones(size), np.ones(3), "same") for size in x.shape[1:3])
    count = np.outer(row, column)[None, ..., None].astype(np.float32)
    return _over_windows(jnp.add, _padded(x, 0)) / count


def _padded(x: jax.Array, value: float) -> jax.Array:
    return jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=value)


def _over_windows(combine: Callable, x: jax.Array, stride: int = 1) -> jax.Array:
    """Reduce windows of 3 x 3 by rows, then by columns.

    XLA's windowed reductions are several times slower on CPU.
    """
    for axis in (1, 2):
        end = x.shape[axis] - 2
        shifted = (jax.lax.slice_in_dim(x, i, end + i, stride, axis) for i in range(3))
        x = functools.reduce(combine, shifted)
    return x


POOLS = {"halve": _halve, "max": _maximum, "mean": _mean}


class Inception(nn.Module):
    """Inception network that computes `Features` of images from `preprocess`.

    Convolutions are named as in the 2015 graph, with "_" for "/", and have the batch norms folded
    in. `aim_jax.weights.convert.inception` reads the published weight files.

    Attributes:
      with_logits: compute logits, for which the weights must include the last layer.
    """

    with_logits: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> Features:
        """Compute the features of images x, float32 (b, 299, 299, 3)."""
        spatial = x  # replaced at mixed_6
        x = _sequence("", STEM, x)
        for block, branches in BLOCKS.items():
            outputs = [_sequence(f"{block}_{name}", steps, x) for name, steps in branches.items()]
            if block == "mixed_6":
                spatial = outputs[0][..., :SPATIAL_CHANNELS].reshape(len(x), -1)
            x = jnp.concatenate(outputs, axis=-1)
        pool = jnp.mean(x, axis=(1, 2))
        head = nn.Dense(NUM_CLASSES, use_bias=False, name="softmax") if self.with_logits else None
        return Features(pool, spatial, head and head(pool))


def _sequence(prefix: str, steps: tuple, x: jax.Array) -> jax.Array:
    """Apply the steps of one branch; its convolutions are named conv, conv_1, ..."""
    prefix = prefix.strip("_") + "_" if prefix else ""
    number = 0
    for step in steps:
        if isinstance(step, str):
            x = POOLS[step](x)
        elif isinstance(step, Conv):
            x = Convolution(step, name=f"{prefix}conv_{number}".removesuffix("_0"))(x)
            number += 1
        else:
            names = (f"{prefix}mixed_conv", f"{prefix}mixed_conv_1")
            x = jnp.concatenate(
                [Convolution(conv, name=name)(x) for conv, name in zip(step, names, strict=True)],
                axis=-1,
            )
    return x


class Convolution(nn.Module):
    """Convolution and ReLU specified by a `Conv`, in the form that XLA runs fastest on CPU.

    It is up to twice as fast as `nn.Conv`; benchmarks/inception_parity.py measures the network.
    """

    conv: Conv

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Convolve x (b, h, w, c) to (b, h', w', features)."""
        features, (rows, columns), stride, padding = self.conv
        shape = (rows, columns, x.shape[-1], features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (features,), jnp.float32)
        if shape[:2] == (1, 1) or (stride > 1 and x.shape[-1] > 3):
            x = _sum_of_products(x, kernel, stride)
        else:
            # XLA takes a slow path without padding, so the border is cropped afterwards instead.
            cropped = padding == "VALID" and stride == 1
            x = jax.lax.conv_general_dilated(
                x, kernel, (stride, stride), "SAME" if cropped else padding,
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
            )  # fmt: skip
            x = x[:, 1:-1, 1:-1] if cropped else x
        return nn.relu(x + with_rank(bias, x.ndim))


def _sum_of_products(x: jax.Array, kernel: jax.Array, stride: int) -> jax.Array:
    """Convolve without padding, as one matrix product for each position of the kernel."""
    rows, columns, channels, features = kernel.shape
    height = x.shape[1] - rows + 1
    width = x.shape[2] - columns + 1
    terms = []
    for i, j in np.ndindex(rows, columns):
        part = x[:, i : i + height : stride, j : j + width : stride]
        terms.append(part.reshape(-1, channels) @ kernel[i, j])
    return functools.reduce(jnp.add, terms).reshape(*part.shape[:3], features)


def preprocess(images: jax.Array) -> jax.Array:
    """Resize and scale images as the 2015 graph does.

    Resizing is bilinear without antialiasing, and aligns the corners of pixels instead of their
    centres. Values are scaled to (x - 128) / 128.

    Args:
      images: uint8 (b, H, W, 3).

    Returns:
      float32 (b, 299, 299, 3).
    """
    x = images.astype(jnp.float32)
    for axis in (1, 2):
        x = _interpolate(x, axis)
    return (x - 128) / 128


def _interpolate(x: jax.Array, axis: int) -> jax.Array:
    """Interpolate x along `axis` at 299 positions, position i being i * size / 299."""
    size = x.shape[axis]
    position = np.arange(SIDE, dtype=np.float32) * np.float32(size / SIDE)
    low = np.minimum(position.astype(np.int32), size - 1)
    high = np.minimum(low + 1, size - 1)
    shape = [1] * x.ndim
    shape[axis] = SIDE
    fraction = (position - low).astype(np.float32).reshape(shape)
    lower = jnp.take(x, low, axis)
    upper = jnp.take(x, high, axis)
    return lower + (upper - lower) * fraction


def shapes(with_logits: bool) -> dict:
    """Return the shapes and dtypes of the parameters, layers in the order of application."""
    order: list[str] = []

    def record_name(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        if isinstance(context.module, Convolution | nn.Dense):
            order.append(context.module.name)
        return call(*args, **kwargs)

    x = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    with nn.intercept_methods(record_name):
        params = jax.eval_shape(Inception(with_logits).init, jax.random.key(0), x)["params"]
    return {layer: params[layer] for layer in dict.fromkeys(order)}


@jax.jit
def extract(params: dict, images: jax.Array) -> Features:
    """Compute the `Features` of images uint8 (b, H, W, 3), in full float32 precision."""
    with jax.default_matmul_precision("highest"):
        return Inception("softmax" in params).apply({"params": params}, preprocess(images))
