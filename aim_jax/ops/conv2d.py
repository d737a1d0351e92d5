"""Two-dimensional convolutions that are also fast on CPUs: of small maps, doubling, gradients.

With implementation="native", convolutions and their gradients are computed by C++ kernels in
float32, because XLA's CPU backend reaches about half of the speed of matrix products in them, and a
sixth in kernel gradients.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from aim_jax.ops.implementation import implementation_of, kernels_of
from aim_jax.ops.products import precision_of

IMPLEMENTATIONS = ("xla", "native")
NHWC = ("NHWC", "HWIO", "NHWC")


def convolution(implementation: str | None = None) -> Callable[..., jax.Array]:
    """Return `conv_general_dilated` of an implementation."""
    chosen = implementation_of("convolution", implementation, IMPLEMENTATIONS)
    return _conv_native if chosen == "native" else conv_general_dilated


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
    options["precision"] = options.get("precision") or precision_of(x.dtype)
    if (
        not _is_plain(options)
        or isinstance(padding, str)
        or not _is_small(x.shape, kernel, strides, padding)
    ):
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
    return jnp.matmul(jnp.concatenate(windows, -1), kernel, precision=options["precision"])


def _is_plain(options: dict) -> bool:
    """Return True without groups and dilation."""
    return options.get("feature_group_count", 1) == 1 and all(
        set(options.get(name) or (1,)) == {1} for name in ("lhs_dilation", "rhs_dilation")
    )


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


def _conv_native(x, kernel, strides, padding, **options):
    """Convolve like `conv_general_dilated`, for plain float32."""
    if not _is_plain(options) or isinstance(padding, str):
        raise ValueError(
            "convolution: implementation='native' supports no dilation, groups or named padding."
        )
    padding = tuple(map(tuple, padding))
    return _plain_native(x, kernel, tuple(strides), padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _plain_native(x, kernel, strides, padding):
    return kernels_of("native").conv2d(x, kernel, strides, padding)


def _plain(x, kernel, strides, padding):
    return conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NHWC)


def _plain_native_forward(x, kernel, strides, padding):
    return kernels_of("native").conv2d(x, kernel, strides, padding), (x, kernel)


def _plain_native_backward(strides, padding, saved, g):
    x, kernel = saved
    native = kernels_of("native")
    above_left = tuple(before for before, _ in padding)
    kernel_gradient = native.conv2d_kernel_gradient(x, g, kernel.shape[:2], strides, above_left)
    return _input_gradient(x, kernel, strides, padding, g), kernel_gradient


def _input_gradient(x, kernel, strides, padding, g):
    """Return the gradient of `_plain` with respect to x: of stride 1, it is a convolution too."""
    opposite = tuple(
        (k - 1 - before, k - 1 - after)
        for k, (before, after) in zip(kernel.shape, padding, strict=False)
    )
    if strides == (1, 1) and min(min(pair) for pair in opposite) >= 0:
        turned = kernel[::-1, ::-1].swapaxes(2, 3)
        return kernels_of("native").conv2d(g, turned, strides, opposite)
    return jax.vjp(lambda x: _plain(x, kernel, strides, padding), x)[1](g)[0]


_plain_native.defvjp(_plain_native_forward, _plain_native_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def doubling_conv(x: jax.Array, kernel: jax.Array, implementation: str = "xla") -> jax.Array:
    """Double maps by nearest neighbours and convolve them, at 4/9 of the operations.

    Only 2x2 of the 3x3 pixels under the kernel differ. Which ones depends on the parity of the
    output pixel's row and column. The four kinds of output pixels are therefore 2x2 convolutions of
    the smaller map, with sums of the kernel's rows and columns.

    The gradient is a convolution of the output's gradient by 4x4 such sums, with stride 2: an input
    pixel reaches 4x4 output pixels. As any function with a gradient of its own, it has no forward
    mode; in `jax.shard_map` over the batch, pass the kernel as varying (`jax.lax.pcast`).

    Args:
      x: inputs (b, h, w, c).
      kernel: filters (3, 3, c, d). Its sums are rounded to the dtype of x.
      implementation: "xla" or "native".

    Returns:
      (b, 2 h, 2 w, d).
    """
    return _doubled(x, kernel, implementation)


def _doubled(x: jax.Array, kernel: jax.Array, implementation: str) -> jax.Array:
    b, h, w, c = x.shape
    d = kernel.shape[-1]
    kernels = _both_axes(_halves, kernel)  # (row parity 2, row 2, column parity 2, column 2, c, d)
    kernels = kernels.transpose(1, 3, 4, 0, 2, 5).reshape(2, 2, c, 4 * d)
    y = _convolved(x, kernels.astype(x.dtype), (1, 1), implementation)
    y = y.reshape(b, h + 1, w + 1, 2, 2, d)
    # The windows of even outputs start one pixel before those of odd ones.
    kinds = [[y[:, i : h + i, j : w + j, i, j] for j in (0, 1)] for i in (0, 1)]
    y = jnp.stack([jnp.stack(row, axis=3) for row in kinds], axis=2)
    return y.reshape(b, 2 * h, 2 * w, d)


def _convolved(x, kernel, strides, implementation):
    """Convolve with one pixel of padding."""
    padding = ((1, 1), (1, 1))
    if implementation == "native":
        return kernels_of("native").conv2d(x, kernel, strides, padding)
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=NHWC, precision=precision_of(x.dtype)
    )


def _both_axes(sums: Callable[[jax.Array], jax.Array], kernel: jax.Array) -> jax.Array:
    """Apply sums of rows to the rows of a kernel (h, w, ...), then to its columns."""
    rows = sums(kernel)
    extra = rows.ndim - kernel.ndim
    columns = sums(jnp.moveaxis(rows, 1 + extra, 0))
    return jnp.moveaxis(columns, range(1 + extra), range(1 + extra, 2 + 2 * extra))


def _halves(k: jax.Array) -> jax.Array:
    """Sum kernel rows (3, ...) into those of even and odd outputs (2, 2, ...)."""
    return jnp.stack([jnp.stack([k[0], k[1] + k[2]]), jnp.stack([k[0] + k[1], k[2]])])


def _reached(k: jax.Array) -> jax.Array:
    """Sum kernel rows (3, ...) into those of the output rows that an input row reaches (4, ...)."""
    return jnp.stack([k[2], k[1] + k[2], k[0] + k[1], k[0]])


def _doubling_forward(x, kernel, implementation):
    return _doubled(x, kernel, implementation), (x, kernel)


def _doubling_backward(implementation, saved, g):
    x, kernel = saved
    reached, spread = jax.vjp(functools.partial(_both_axes, _reached), kernel)
    dx = _convolved(g, reached.swapaxes(2, 3).astype(g.dtype), (2, 2), implementation)
    if implementation == "native":
        gradient = kernels_of("native").conv2d_kernel_gradient(g, x, (4, 4), (2, 2), (1, 1))
        gradient = gradient.swapaxes(2, 3)
    else:
        gradient = _reached_gradient(x, g)
    return dx, *spread(gradient.astype(kernel.dtype))


def _reached_gradient(x: jax.Array, g: jax.Array) -> jax.Array:
    """Return the gradient (4, 4, c, d) of the 4x4 sums of a doubling convolution's kernel.

    It is four matrix products, with the output pixels at odd and even places as channels.

    Args:
      x: inputs (b, h, w, c).
      g: gradient with respect to the outputs (b, 2 h, 2 w, d).
    """
    b, h, w, c = x.shape
    d = g.shape[-1]
    g = jnp.pad(g, ((0, 0), (1, 1), (1, 1), (0, 0))).reshape(b, h + 1, 2, w + 1, 2, d)
    g = g.swapaxes(2, 3)
    parts = [[g[:, i : i + h, j : j + w] for j in (0, 1)] for i in (0, 1)]
    product = functools.partial(jnp.einsum, "bhwc,bhwpqd->pqcd", x, precision=precision_of(x.dtype))
    products = [[product(part) for part in row] for row in parts]
    gradient = jnp.stack([jnp.stack(row) for row in products])  # (2, 2, 2, 2, c, d)
    return gradient.swapaxes(1, 2).reshape(4, 4, c, d)


doubling_conv.defvjp(_doubling_forward, _doubling_backward)
