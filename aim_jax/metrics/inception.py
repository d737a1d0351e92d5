"""The Inception network of 2015 whose features FID, sFID and the Inception Score are defined on.

It is not the Inception v3 of today's model zoos: the average pools leave the padding out of their
mean, the last block pools by maximum, and there are 1008 classes (arXiv 1512.00567; the graph
`classify_image_graph_def.pb` of 2015-12-05, which arXiv 1706.08500 defines FID on).
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

SIDE = 299
NUM_FEATURES = 2048
NUM_CLASSES = 1008
SPATIAL_CHANNELS = 7
NUM_SPATIAL = 17 * 17 * SPATIAL_CHANNELS


class Features(NamedTuple):
    """What the metrics are made of, one row per image, float32.

    Attributes:
      pool: (b, 2048), the mean of the last block: FID, KID, precision, recall.
      spatial: (b, 2023), the first 7 channels of the first branch of mixed_6: sFID.
      logits: (b, 1008) without their bias, as the Inception Score is computed by the evaluators of
        record; None where the weights lack the last layer.
    """

    pool: jax.Array
    spatial: jax.Array
    logits: jax.Array | None


class Conv(NamedTuple):
    """A convolution with the batch norm folded in, and ReLU."""

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
POOLS = {
    "halve": functools.partial(nn.max_pool, window_shape=(3, 3), strides=(2, 2)),
    "max": functools.partial(nn.max_pool, window_shape=(3, 3), padding="SAME"),
    "mean": functools.partial(
        nn.avg_pool, window_shape=(3, 3), padding="SAME", count_include_pad=False
    ),
}


class Inception(nn.Module):
    """Images as `preprocess` returns them -> `Features`.

    Convolutions have the names of the graph of 2015, with "_" for "/", and the batch norms folded
    into them: `aim_jax.convert.inception` reads the files that people have.

    Attributes:
      with_logits: whether the weights have the last layer.
    """

    with_logits: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> Features:
        """x float32 (b, 299, 299, 3)."""
        x, spatial = _sequence("", STEM, x), None
        for block, branches in BLOCKS.items():
            outputs = [_sequence(f"{block}_{name}", steps, x) for name, steps in branches.items()]
            if block == "mixed_6":
                spatial = outputs[0][..., :SPATIAL_CHANNELS].reshape(len(x), -1)
            x = jnp.concatenate(outputs, axis=-1)
        pool = jnp.mean(x, axis=(1, 2))
        last = nn.Dense(NUM_CLASSES, use_bias=False, name="softmax") if self.with_logits else None
        return Features(pool, spatial, last and last(pool))


def _sequence(prefix: str, steps: tuple, x: jax.Array) -> jax.Array:
    """Applies the steps of one branch; its convolutions are called conv, conv_1, ..."""
    prefix = prefix.strip("_") + "_" if prefix else ""
    number = 0
    for step in steps:
        if isinstance(step, str):
            x = POOLS[step](x)
        elif isinstance(step, Conv):
            x = _convolve(step, f"{prefix}conv_{number}".removesuffix("_0"), x)
            number += 1
        else:
            names = (f"{prefix}mixed_conv", f"{prefix}mixed_conv_1")
            x = jnp.concatenate(
                [_convolve(*pair, x) for pair in zip(step, names, strict=True)], axis=-1
            )
    return x


def _convolve(conv: Conv, name: str, x: jax.Array) -> jax.Array:
    cropped = conv.padding == "VALID" and conv.stride == 1
    padding = "SAME" if cropped else conv.padding
    strides = (conv.stride, conv.stride)
    x = nn.Conv(conv.features, conv.kernel, strides, padding, name=name)(x)
    if cropped:  # the same values; XLA is several times faster on CPU with padding
        x = x[:, 1:-1, 1:-1]
    return nn.relu(x)


def preprocess(images: jax.Array) -> jax.Array:
    """Pictures uint8 (b, H, W, 3) -> float32 (b, 299, 299, 3), as the graph of 2015 does it.

    Bilinear, with the corners of pixels aligned and not their centres, without smoothing first;
    then (x - 128) / 128.
    """
    x = images.astype(jnp.float32)
    for axis in (1, 2):
        x = _interpolate(x, axis)
    return (x - 128) / 128


def _interpolate(x: jax.Array, axis: int) -> jax.Array:
    """`axis` of x at 299 places, place i at i * size / 299."""
    size = x.shape[axis]
    place = np.arange(SIDE, dtype=np.float32) * np.float32(size / SIDE)
    low = np.minimum(place.astype(np.int32), size - 1)
    high = np.minimum(low + 1, size - 1)
    shape = [1] * x.ndim
    shape[axis] = SIDE
    share = (place - low).reshape(shape)
    lower, upper = jnp.take(x, low, axis), jnp.take(x, high, axis)
    return lower + (upper - lower) * share


def shapes(with_logits: bool) -> dict:
    """Shapes and types of the parameters, layers in the order in which they are applied."""
    order = []

    def note(call, args, kwargs, context):
        if isinstance(context.module, nn.Conv | nn.Dense):
            order.append(context.module.name)
        return call(*args, **kwargs)

    x = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    with nn.intercept_methods(note):
        found = jax.eval_shape(Inception(with_logits).init, jax.random.key(0), x)["params"]
    return {layer: found[layer] for layer in dict.fromkeys(order)}


@jax.jit
def extract(params: dict, images: jax.Array) -> Features:
    """Pictures uint8 (b, H, W, 3) -> `Features`; the precision is float32's own."""
    with jax.default_matmul_precision("highest"):
        return Inception("softmax" in params).apply({"params": params}, preprocess(images))
