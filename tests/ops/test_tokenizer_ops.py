"""Convolutions and group norm of the tokenizer against plain JAX, with their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from aim_jax.ops import conv2d, native
from aim_jax.ops.group_norm import group_norm
from aim_jax.sampling import engine

native_only = pytest.mark.skipif(
    not engine.native_kernels(), reason="needs a C++ compiler (CXX, c++, g++ or clang++)"
)
NHWC = ("NHWC", "HWIO", "NHWC")


@pytest.fixture(params=["xla", pytest.param("native", marks=native_only)])
def implementation(request):
    return request.param


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def assert_close(actual, expected):
    """To 1e-5 of the largest value."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for a, e in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, e, rtol=0, atol=1e-5 * np.abs(e).max())


def with_gradients(f, g, *arguments):
    """The outputs of f, and its gradients for the cotangent g."""

    def run(*arguments):
        y, backward = jax.vjp(f, *arguments)
        return y, backward(g)

    return jax.jit(run)(*arguments)


# (inputs, kernel, strides, padding): odd sizes, one channel, whole and partial blocks of channels,
# a map of one pixel, rows and columns that no window reaches.
CONVOLUTIONS = [
    ((2, 9, 7, 5), (3, 3, 5, 37), (1, 1), ((1, 1), (1, 1))),
    ((3, 8, 8, 16), (3, 3, 16, 16), (2, 2), ((0, 1), (0, 1))),
    ((1, 11, 6, 1), (4, 2, 1, 3), (2, 3), ((1, 1), (0, 1))),
    ((2, 1, 1, 33), (3, 3, 33, 17), (1, 1), ((1, 1), (1, 1))),
    ((2, 5, 150, 3), (1, 5, 3, 32), (1, 1), ((0, 0), (2, 2))),
]


@pytest.mark.parametrize(("x", "kernel", "strides", "padding"), CONVOLUTIONS)
def test_convolution(implementation, x, kernel, strides, padding):
    x, kernel = normal(0, *x), normal(1, *kernel)

    def plain(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=NHWC)

    ours = lambda x, kernel: conv2d.convolution(implementation)(  # noqa: E731
        x, kernel, strides, padding, dimension_numbers=NHWC
    )
    g = normal(2, *jax.eval_shape(plain, x, kernel).shape)
    assert_close(with_gradients(ours, g, x, kernel), with_gradients(plain, g, x, kernel))


@pytest.mark.parametrize(("x", "d"), [((2, 3, 5, 7), 9), ((1, 1, 1, 4), 16), ((2, 8, 4, 16), 33)])
def test_doubling_convolution(implementation, x, d):
    x = normal(0, *x)
    kernel = normal(1, 3, 3, x.shape[-1], d)

    def plain(x, kernel):
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=NHWC)

    ours = lambda x, kernel: conv2d.doubling_conv(x, kernel, implementation)  # noqa: E731
    g = normal(2, *jax.eval_shape(plain, x, kernel).shape)
    assert_close(with_gradients(ours, g, x, kernel), with_gradients(plain, g, x, kernel))


@pytest.mark.parametrize("swish", [True, False])
@pytest.mark.parametrize(
    ("x", "groups"), [((2, 5, 7, 12), 4), ((1, 1, 1, 8), 2), ((3, 9, 9, 48), 1), ((2, 17, 96), 32)]
)
def test_group_norm(implementation, x, groups, swish):
    c = x[-1]
    x = 3 * normal(0, *x) + 10  # a mean that a sum of squares would lose digits to
    scale, bias, g = 1 + 0.3 * normal(1, c), normal(2, c), normal(3, *x.shape)

    def plain(x, scale, bias):
        grouped = x.reshape(x.shape[0], -1, groups, c // groups)
        mean = grouped.mean((1, 3), keepdims=True)
        variance = jnp.square(grouped - mean).mean((1, 3), keepdims=True)
        y = ((grouped - mean) / jnp.sqrt(variance + 1e-6)).reshape(x.shape) * scale + bias
        return nn.swish(y) if swish else y

    ours = lambda *a: group_norm(*a, groups, swish=swish, implementation=implementation)  # noqa: E731
    arguments = (x, scale, bias)
    with jax.enable_x64(True):
        wide = [a.astype(np.float64) for a in (g, *arguments)]
        expected = jax.tree.map(np.asarray, with_gradients(plain, *wide))
    assert_close(with_gradients(ours, g, *arguments), expected)


@native_only
def test_wrong_arguments_are_named():
    x = normal(0, 1, 4, 4, 6)
    with pytest.raises(ValueError, match="x is bfloat16, expected float32"):
        narrow = jnp.asarray(x, jnp.bfloat16)
        native.conv2d_kernel_gradient(narrow, x, (3, 3), (1, 1), (1, 1))
    with pytest.raises(ValueError, match="6 channels, expected a multiple of groups=4"):
        group_norm(x, x[0, 0, 0], x[0, 0, 0], 4, implementation="native")
    with pytest.raises(ValueError, match="no dilation, groups or named padding"):
        conv2d.convolution("native")(x, normal(1, 3, 3, 6, 6), (1, 1), "SAME")
    with pytest.raises(ValueError, match="convolution: implementation='triton'"):
        conv2d.convolution("triton")


@native_only
def test_long_sums_keep_their_digits():
    """Of half a million positive terms; activations after swish have few of another sign."""
    rng = np.random.default_rng(0)
    x, g = (rng.uniform(size=(32, 128, 128, 2)).astype(np.float32) for _ in range(2))
    gradient = native.conv2d_kernel_gradient(x, g, (1, 1), (1, 1), (0, 0))
    expected = np.einsum("bhwc,bhwd->cd", x, g, dtype=np.float64)
    np.testing.assert_allclose(gradient[0, 0], expected, rtol=5e-6)


def test_gradients_can_be_differentiated_forwards():
    x, kernel = normal(0, 1, 3, 3, 2), normal(1, 3, 3, 2, 2)

    def slope(kernel):
        return jax.grad(lambda x: jnp.sum(conv2d.doubling_conv(x, kernel) ** 2))(x)

    (dx,) = jax.jvp(slope, (kernel,), (kernel,))[1:]
    np.testing.assert_allclose(dx, 2 * slope(kernel), rtol=1e-5)  # slope is quadratic in the kernel
