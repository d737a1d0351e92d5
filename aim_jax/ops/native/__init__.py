"""The decode step as fused CPU kernels, written in C++ for XLA's foreign function interface.

They are to a CPU what `aim_jax.ops.triton` is to a GPU, for Mamba-2 alone, on the same arrays:
parameters and caches lead with the layer axis L, are passed whole with the layer as a number, and
caches are updated in place. `linear` is here besides, because XLA's products of few
rows read weights at half the speed of the memory.

XLA calls them on its own threads, inside `jit`, `lax.scan` and `shard_map`; none has a derivative
or a batching rule. They need a C++ compiler at the first call of `register`, which every function
here makes; the library that it makes is kept for later processes. Rows do not influence each other,
to the last bit: a sequence decodes alike in any batch.

L layers, b rows (sequences), h heads, p headdim, e = h p inner channels, n state, g groups, w
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
    "dual_step",
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
    """The kernels take the addresses of caches, whatever their type."""
    for key, array in arrays.items():
        require(array.dtype == jnp.float32, f"{name}: {key} is {array.dtype}, expected float32")


def linear(x, weight):
    """x weight^T for few rows of x, in float32.

    Args:
      x: (b, k), weight: (m, k), both float32 or both bfloat16.

    Returns:
      (b, m) float32.

    Raises:
      ValueError: shapes or types do not fit together.
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
    """`aim_jax.ops.mamba2_step`, which describes it, as one kernel.

    All arrays are float32, but for `state`, which may be bfloat16.
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
    """`aim_jax.ops.dual_step`, which describes it, as one kernel.

    All arrays are float32, but for `inputs` and `B_cache`, which may both be bfloat16.
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
    """`aim_jax.ops.add_norm_modulate`, which describes it, as one kernel; all is float32."""
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
    divided = sum_squares is not None
    x, residual = _call(
        "aim_add_norm_modulate",
        (_like(hidden), _like(residual)),
        (
            hidden,
            residual,
            norm_scale,
            modulation,
            sum_squares if divided else hidden,
            _index(layer),
        ),
        shift=np.int32(shift),
        scale=np.int32(scale),
        gate=np.int32(-1 if gate is None else gate),
        gate_offset=np.int32(gate_offset),
        inner=np.int32(inner if divided else 0),
        eps=np.float32(eps),
        mixer_eps=np.float32(mixer_eps),
    )
    return x, residual


def sample(logits, uniform, cfg_scale, temperature, top_k, top_p, min_p):
    """`aim_jax.sampling.logits.sample`, which describes it, as one kernel."""
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
    room = (b, -(-v // 16) * 16)
    token, *_ = _call(
        "aim_sample",
        (
            jax.ShapeDtypeStruct((b,), jnp.int32),
            jax.ShapeDtypeStruct(room, jnp.int32),
            _float32(*room),
        ),
        (logits, uniform, cfg_scale, temperature, top_k, top_p, min_p),
    )
    return token
