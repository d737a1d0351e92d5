"""CPU kernels in C++ for XLA's foreign function interface.

Those of the decode step are the CPU counterpart of `aim_jax.ops.triton`, for Mamba-2 only, and work
on the same arrays: parameters and caches have a leading layer axis L and are passed whole with the
layer as an int32 scalar, and caches are updated in place. `linear` is included because XLA's
products of few rows read weights at half the speed of the memory. The others are for training
tokenizers; see `aim_jax.ops.conv2d` and `aim_jax.ops.group_norm`.

XLA calls the kernels on its own threads, inside `jit`, `lax.scan` and `shard_map`. None is
differentiable or has a batching rule. Every function here calls `register`, which needs a C++
compiler the first time and caches the compiled library for later processes. Rows are independent to
the last bit: a sequence decodes to the same result in any batch.

Axes: L layers, b rows (sequences), h heads, p headdim, e = h p inner channels, n state, g groups, w
convolution width, T tokens, d model.
"""

import jax
import jax.numpy as jnp
import numpy as np

from aim_jax.ops.native.build import BuildError, register
from aim_jax.ops.reference import bind_axes, bind_mamba2_step, require

__all__ = [
    "BuildError",
    "add_norm_modulate",
    "conv2d",
    "conv2d_kernel_gradient",
    "dual_step",
    "group_norm",
    "group_norm_gradient",
    "linear",
    "mamba2_step",
    "register",
    "sample",
]


def _call(target, outputs, arrays, aliases=(), **attributes):
    register()
    call = jax.ffi.ffi_call(target, outputs, input_output_aliases=dict(aliases))
    return call(*arrays, **attributes)


def _like(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype)


def _float32(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _index(i):
    return jnp.asarray(i, jnp.int32)


def _check_float32(name, **arrays):
    """Raise ValueError unless all arrays are float32; the kernels do not check cache dtypes."""
    for key, array in arrays.items():
        require(array.dtype == jnp.float32, f"{name}: {key} is {array.dtype}, expected float32")


def linear(x, weight):
    """Compute x weight^T for few rows of x, in float32.

    Args:
      x: inputs (b, k), float32 or bfloat16.
      weight: weights (m, k), of the same dtype.

    Returns:
      (b, m) float32.

    Raises:
      ValueError: the shapes or dtypes do not match.
    """
    sizes = bind_axes("linear", x=(x, "bk"), weight=(weight, "mk"))
    require(
        x.dtype == weight.dtype and x.dtype.name in ("float32", "bfloat16"),
        f"linear: rows are {x.dtype} and weights {weight.dtype}, expected both float32 or bfloat16",
    )
    return _call("aim_linear", _float32(sizes["b"], sizes["m"]), (x, weight))


def mamba2_step(
    projected,
    conv_cache,
    state,
    layer,
    position,
    *,
    conv_weight,
    conv_bias,
    dt_bias,
    A,
    D,
    norm_scale,
):
    """Run `aim_jax.ops.mamba2_step` as one kernel; see there for arguments and results.

    All arrays are float32, except that `state` may be bfloat16.
    """
    parameters = dict(
        conv_weight=conv_weight, conv_bias=conv_bias, dt_bias=dt_bias, A=A, D=D,
        norm_scale=norm_scale,
    )  # fmt: skip
    sizes = bind_mamba2_step(
        "mamba2_step", projected, conv_cache, {"state": (state, "Lbhpn")}, **parameters
    )
    _check_float32("mamba2_step", conv_cache=conv_cache)
    b, h, e = sizes["b"], sizes["h"], sizes["e"]
    y, sum_squares, conv_cache, state, _ = _call(
        "aim_mamba2_step",
        (_float32(b, e), _float32(b, h), _like(conv_cache), _like(state), _float32(b, sizes["c"])),
        (projected, *parameters.values(), _index(layer), _index(position), conv_cache, state),
        aliases=((9, 2), (10, 3)),
    )
    return y, sum_squares, conv_cache, state


def dual_step(
    projected,
    conv_cache,
    inputs,
    B_cache,
    log_decay,
    layer,
    position,
    *,
    conv_weight,
    conv_bias,
    dt_bias,
    A,
    D,
    norm_scale,
):
    """Run `aim_jax.ops.dual_step` as one kernel; see there for arguments and results.

    All arrays are float32, except that `inputs` and `B_cache` may both be bfloat16.
    """
    parameters = dict(
        conv_weight=conv_weight, conv_bias=conv_bias, dt_bias=dt_bias, A=A, D=D,
        norm_scale=norm_scale,
    )  # fmt: skip
    sizes = bind_mamba2_step(
        "dual_step",
        projected,
        conv_cache,
        {
            "inputs": (inputs, "LbThp"),
            "B_cache": (B_cache, "LbTgn"),
            "log_decay": (log_decay, "LbTh"),
        },
        **parameters,
    )
    require(
        inputs.dtype == B_cache.dtype,
        f"dual_step: inputs are {inputs.dtype} and B_cache {B_cache.dtype}, expected the same",
    )
    b, h, e = sizes["b"], sizes["h"], sizes["e"]
    _check_float32("dual_step", conv_cache=conv_cache, log_decay=log_decay)
    caches = (conv_cache, inputs, B_cache, log_decay)
    y, sum_squares, *caches, _ = _call(
        "aim_dual_step",
        (_float32(b, e), _float32(b, h), *map(_like, caches), _float32(b, sizes["c"])),
        (projected, *parameters.values(), _index(layer), _index(position), *caches),
        aliases=((9, 2), (10, 3), (11, 4), (12, 5)),
    )
    return y, sum_squares, *caches


def add_norm_modulate(
    hidden,
    residual,
    norm_scale,
    modulation,
    layer,
    *,
    sum_squares=None,
    inner=None,
    shift=0,
    scale=1,
    gate=2,
    gate_offset=-1,
    eps=1e-5,
    mixer_eps=1e-5,
):
    """Run `aim_jax.ops.add_norm_modulate` as one kernel; see there. All arrays are float32."""
    sizes = bind_axes(
        "add_norm_modulate",
        hidden=(hidden, "bd"),
        residual=(residual, "bd"),
        norm_scale=(norm_scale, "Ld"),
        modulation=(modulation, "Lbmd"),
        sum_squares=(sum_squares, "bs"),
    )
    require(
        sum_squares is None or (inner and gate is not None),
        "add_norm_modulate: sum_squares needs `inner`, the number of channels, and a gate",
    )
    parts = {"shift": shift, "scale": scale, "gate": gate}
    for name, part in parts.items():
        require(
            (part is None and name == "gate") or 0 <= part < sizes["m"],
            f"add_norm_modulate: {name}={part}, but modulation has {sizes['m']} parts",
        )
    has_squares = sum_squares is not None
    x, residual = _call(
        "aim_add_norm_modulate",
        (_like(hidden), _like(residual)),
        (
            hidden,
            residual,
            norm_scale,
            modulation,
            sum_squares if has_squares else hidden,
            _index(layer),
        ),
        shift=np.int32(shift),
        scale=np.int32(scale),
        gate=np.int32(-1 if gate is None else gate),
        gate_offset=np.int32(gate_offset),
        inner=np.int32(inner if has_squares else 0),
        eps=np.float32(eps),
        mixer_eps=np.float32(mixer_eps),
    )
    return x, residual


def sample(logits, uniform, cfg_scale, temperature, top_k, top_p, min_p):
    """Run `aim_jax.sampling.logits.sample` as one kernel; see there for arguments and results."""
    sizes = bind_axes(
        "sample",
        uniform=(uniform, "b"),
        logits=(logits, "rv"),
        cfg_scale=(cfg_scale, "b"),
        temperature=(temperature, "b"),
        top_k=(top_k, "b"),
        top_p=(top_p, "b"),
        min_p=(min_p, "b"),
    )
    b, r, v = (sizes[axis] for axis in "brv")
    require(r in (b, 2 * b), f"sample: {r} rows of logits for {b} images, expected {b} or {2 * b}")
    padded = (b, -(-v // 16) * 16)
    token, *_ = _call(
        "aim_sample",
        (
            jax.ShapeDtypeStruct((b,), jnp.int32),
            jax.ShapeDtypeStruct(padded, jnp.int32),
            _float32(*padded),
        ),
        (logits, uniform, cfg_scale, temperature, top_k, top_p, min_p),
    )
    return token


def conv2d(x, kernel, strides, padding):
    """Convolve NHWC maps.

    Args:
      x: inputs (b, H, W, c), float32.
      kernel: filters (h, w, c, d), float32.
      strides: vertical and horizontal stride.
      padding: zeros (above, below) and (left, right), 0 or more each.

    Returns:
      (b, H', W', d) float32.
    """
    _check_float32("conv2d", x=x, kernel=kernel)
    sizes = bind_axes("conv2d", x=(x, "bHWc"), kernel=(kernel, "hwcd"))
    out = [
        (sizes[outer] + sum(pad) - sizes[inner]) // stride + 1
        for outer, inner, pad, stride in zip("HW", "hw", padding, strides, strict=True)
    ]
    require(
        min(out) >= 1,
        f"conv2d: maps of {x.shape[1:3]} with padding {padding} are smaller than the kernel",
    )
    before = tuple(pad[0] for pad in padding)
    attributes = _window("conv2d", strides, before)
    outputs = _float32(sizes["b"], *out, sizes["d"])
    return _call("aim_conv2d", outputs, (x, kernel), **attributes)


def conv2d_kernel_gradient(x, g, size, strides, padding):
    """Compute the gradient of a convolution of NHWC maps with respect to its kernel.

    Args:
      x: inputs (b, H, W, c), float32.
      g: gradient with respect to the outputs (b, H', W', d), float32.
      size: height and width of the kernel.
      strides: vertical and horizontal stride.
      padding: zeros above and to the left, 0 or more. Those at the other edges follow from the
        shapes.

    Returns:
      (*size, c, d) float32.
    """
    _check_float32("conv2d_kernel_gradient", x=x, g=g)
    sizes = bind_axes("conv2d_kernel_gradient", x=(x, "bHWc"), g=(g, "bhwd"))
    attributes = _window("conv2d_kernel_gradient", strides, padding)
    outputs = _float32(*size, sizes["c"], sizes["d"])
    return _call("aim_conv2d_kernel_gradient", outputs, (x, g), **attributes)


def _window(name, strides, padding):
    """Return strides and padding as attributes."""
    numbers = (*strides, *padding)
    require(min(numbers) >= 0, f"{name}: padding is {padding}, expected no negative number")
    names = ("stride_y", "stride_x", "pad_y", "pad_x")
    return {name: np.int32(number) for name, number in zip(names, numbers, strict=True)}


def group_norm(x, scale, bias, groups, eps, swish):
    """Normalize groups of channels, then apply scale, bias and, if `swish`, that activation.

    Args:
      x: inputs (b, pixels, c), float32.
      scale, bias: (c,) float32.
      groups: number of groups.
      eps: added to the variance.
      swish: whether to apply x sigmoid(x) to the result.

    Returns:
      (b, pixels, c) float32.
    """
    _check_group_norm("group_norm", groups, x=(x, "bnc"), scale=(scale, "c"), bias=(bias, "c"))
    attributes = dict(groups=np.int32(groups), eps=np.float32(eps), swish=np.int32(swish))
    return _call("aim_group_norm", _like(x), (x, scale, bias), **attributes)


def group_norm_gradient(x, scale, bias, g, groups, eps, swish):
    """Compute the gradients of `group_norm` with respect to x, scale and bias.

    Args:
      g: gradient with respect to the outputs (b, pixels, c), float32.
      x, scale, bias, groups, eps, swish: see `group_norm`.
    """
    sizes = _check_group_norm(
        "group_norm_gradient", groups,
        x=(x, "bnc"), scale=(scale, "c"), bias=(bias, "c"), g=(g, "bnc"),
    )  # fmt: skip
    attributes = dict(groups=np.int32(groups), eps=np.float32(eps), swish=np.int32(swish))
    rows = _float32(sizes["b"], sizes["c"])
    dx, dscale, dbias = _call(
        "aim_group_norm_gradient", (_like(x), rows, rows), (x, scale, bias, g), **attributes
    )
    return dx, dscale.sum(axis=0), dbias.sum(axis=0)


def _check_group_norm(name, groups, **arrays):
    """Check shapes and dtypes; return the sizes of the axes."""
    _check_float32(name, **{key: array for key, (array, _) in arrays.items()})
    sizes = bind_axes(name, **arrays)
    require(
        sizes["c"] % groups == 0,
        f"{name}: {sizes['c']} channels, expected a multiple of groups={groups}",
    )
    return sizes
