"""Fused operations of one decode step, between the matrix products of a layer.

Axes: L layers, b rows (sequences), h heads, p headdim, e = h p inner channels, n state, g groups, w
convolution width, T tokens, d model.

Conventions:

- Parameters and caches have a leading layer axis L. They are passed whole, with the layer as an
  int32 scalar, because XLA would copy a slice.
- Kernels update caches in place: donate the argument and use the returned array. Only the current
  layer's part is read or written.
- Arithmetic is float32. "xla" and "triton" accept float32 or bfloat16 arrays, unless a docstring
  says otherwise. "native" accepts float32, and bfloat16 for states and cached inputs.
- The convolution's cache is a ring buffer of the last w inputs, with the input of position t in
  slot t mod w. It starts as zeros; `aim_jax.ops.conv_ring` makes one from the inputs of a prefix.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from aim_jax.ops.implementation import implementation_of, kernels_of
from aim_jax.ops.products import precision_of, product
from aim_jax.ops.reference import (
    bind_axes,
    bind_mamba2_step,
    require,
    skip_and_gate,
    step_sizes,
)
from aim_jax.ops.selective_scan import selective_scan_step
from aim_jax.ops.ssd import ssd_step
from aim_jax.utils.checks import check_arguments


@check_arguments
def linear(
    x: jax.Array,
    weight: jax.Array,
    *,
    dtype: DTypeLike = jnp.float32,
    implementation: str | None = None,
) -> jax.Array:
    """Compute x weight^T for few rows of x.

    Args:
      x: inputs (b, k).
      weight: weights (m, k), of the same dtype.
      dtype: dtype of the result and of the accumulation.
      implementation: None, "xla", or "native", which reads weights twice as fast on CPUs and
        returns float32 for any `dtype`.

    Returns:
      (b, m).

    Raises:
      ValueError: the shapes or dtypes do not match.
    """
    chosen = implementation_of("linear", implementation, ("xla", "native"))
    if chosen == "native":
        return kernels_of(chosen).linear(x, weight)
    bind_axes("linear", x=(x, "bk"), weight=(weight, "mk"))
    contract = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(
        x, weight, contract, precision=precision_of(x.dtype), preferred_element_type=dtype
    )


@check_arguments
def add_norm_modulate(
    hidden: jax.Array,
    residual: jax.Array,
    norm_scale: jax.Array,
    modulation: jax.Array,
    layer: ArrayLike,
    *,
    sum_squares: jax.Array | None = None,
    inner: int | None = None,
    shift: int = 0,
    scale: int = 1,
    gate: int | None = 2,
    gate_offset: int = -1,
    eps: float = 1e-5,
    mixer_eps: float = 1e-5,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Add a branch to the residual stream and prepare the input of the next branch.

        residual = residual + gate * hidden / sqrt(mean(u^2) + mixer_eps)
        x        = RMSNorm(residual) * norm_scale * (1 + scale) + shift

    The gate and the gated norm's divisor belong to the branch that computed `hidden`, in layer
    `layer + gate_offset`. The first layer has no layer before it. There `hidden` is the input of
    the stack and starts the stream: residual = hidden, and the argument `residual` is ignored.

    Args:
      hidden: output of the last branch, before its gate (b, d).
      residual: residual stream (b, d) float32.
      norm_scale: scales of the norms (L, d).
      modulation: modulation of every layer (L, b, m, d), `Modulation.layers`; constant over the
        tokens of an image.
      layer: int32 (), index of the layer that x is for.
      sum_squares: partial sums of u^2 of that branch's gated norm (b, parts), from `mamba2_step`
        or `dual_step`; None if `hidden` needs no division.
      inner: number of channels e that `sum_squares` covers.
      shift, scale, gate: indices of these parts among the m of the modulation. With gate=None,
        hidden is added without a gate.
      gate_offset: -1 between layers; 0 within a layer, between the mixer and an MLP.
      eps, mixer_eps: added to the mean squares of this norm and of the gated norm.
      dtype: dtype of x, that of the matrix product that follows; None is the dtype of hidden.
        "native" always returns float32.
      implementation: None, "xla", "native" or "triton".

    Returns:
      x (b, d) in `dtype`; residual.

    Raises:
      ValueError: the arguments do not match.
    """
    chosen = implementation_of("add_norm_modulate", implementation, ("xla", "native", "triton"))
    options: dict[str, Any] = dict(
        sum_squares=sum_squares, inner=inner, shift=shift, scale=scale, gate=gate,
        gate_offset=gate_offset, eps=eps, mixer_eps=mixer_eps,
    )  # fmt: skip
    if chosen == "triton":
        options["dtype"] = dtype
    if chosen != "xla":
        function = kernels_of(chosen).add_norm_modulate
        return function(hidden, residual, norm_scale, modulation, layer, **options)
    sizes = bind_axes(
        "add_norm_modulate",
        hidden=(hidden, "bd"),
        residual=(residual, "bd"),
        norm_scale=(norm_scale, "Ld"),
        modulation=(modulation, "Lbmd"),
        sum_squares=(sum_squares, "bs"),
    )
    for name, part in (("shift", shift), ("scale", scale), ("gate", 0 if gate is None else gate)):
        require(
            0 <= part < sizes["m"],
            f"add_norm_modulate: {name}={part}, but modulation has {sizes['m']} parts",
        )
    require(
        sum_squares is None or bool(inner and gate is not None),
        "add_norm_modulate: sum_squares needs `inner`, the number of channels, and a gate",
    )
    update = hidden.astype(jnp.float32)
    new = residual + update
    if gate is not None:
        source = jnp.asarray(layer) + gate_offset
        factor = modulation[jnp.maximum(source, 0), :, gate].astype(jnp.float32)
        if sum_squares is not None and inner is not None:
            mean = jnp.sum(sum_squares, axis=1, keepdims=True) / inner
            factor = factor * jax.lax.rsqrt(mean + mixer_eps)
        new = jnp.where(source >= 0, residual + factor * update, update)
    mean = jnp.mean(new * new, axis=-1, keepdims=True)
    normed = new * jax.lax.rsqrt(mean + eps) * norm_scale[layer].astype(jnp.float32)[None]
    parts = modulation[layer].astype(jnp.float32)
    x = normed * (1 + parts[:, scale]) + parts[:, shift]
    return x.astype(dtype or hidden.dtype), new


@check_arguments
def conv_step(
    projected: jax.Array,
    conv_cache: jax.Array,
    layer: ArrayLike,
    position: ArrayLike,
    *,
    conv_weight: jax.Array,
    conv_bias: jax.Array,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Advance the causal convolution of one layer by one token.

        y = silu(bias + sum_k weight_k x_{t - (w - 1) + k})

    Args:
      projected: inputs in the first c of at least c columns (b, >= c), such as x and z of in_proj.
      conv_cache: ring buffers of the last w inputs (L, b, w, c).
      layer, position: int32 (), indices of the layer and of the token.
      conv_weight: filters (L, w, c); the last tap weighs the current input.
      conv_bias: (L, c).
      implementation: None, "xla" or "triton".

    Returns:
      y (b, c) like `projected`; conv_cache.

    Raises:
      ValueError: the shapes do not match.
    """
    chosen = implementation_of("conv_step", implementation, ("xla", "triton"))
    if chosen != "xla":
        return kernels_of(chosen).conv_step(
            projected, conv_cache, layer, position, conv_weight=conv_weight, conv_bias=conv_bias
        )
    sizes = bind_axes(
        "conv_step",
        conv_weight=(conv_weight, "Lwc"),
        conv_bias=(conv_bias, "Lc"),
        conv_cache=(conv_cache, "Lbwc"),
        projected=(projected, "bq"),
    )
    c = sizes["c"]
    require(
        sizes["q"] >= c,
        f"conv_step: projected has {sizes['q']} columns, expected at least c = {c}",
    )
    y, conv_cache = _convolve(projected[:, :c], conv_cache, layer, position, conv_weight, conv_bias)
    return y.astype(projected.dtype), conv_cache


@check_arguments
def mamba1_step(
    x: jax.Array,
    dt: jax.Array,
    BC: jax.Array,
    projected: jax.Array,
    state: jax.Array,
    layer: ArrayLike,
    *,
    dt_bias: jax.Array,
    A: jax.Array,
    D: jax.Array,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Advance the state of one Mamba-1 layer by one token, between dt_proj and out_proj.

        dt = softplus(dt + dt_bias)
        h  = exp(dt A) h + dt B x          for every channel and state
        y  = (C . h + D x) silu(z)

    (Gu and Dao 2023, algorithm 2.)

    Args:
      x: output of `conv_step` (b, e).
      dt: output of dt_proj (b, e).
      BC: output of x_proj (b, >= 2 n); the last 2 n columns are B and C.
      projected: output of in_proj (b, >= e); the last e columns are z.
      state: SSM states (L, b, e, n), float32 or bfloat16.
      layer: int32 (), index of the layer.
      dt_bias, D: (L, e) float32.
      A: decay rates (L, e, n) float32, negative.
      implementation: None, "xla" or "triton".

    Returns:
      y (b, e) like x; state.

    Raises:
      ValueError: the shapes do not match.
    """
    chosen = implementation_of("mamba1_step", implementation, ("xla", "triton"))
    if chosen != "xla":
        return kernels_of(chosen).mamba1_step(
            x, dt, BC, projected, state, layer, dt_bias=dt_bias, A=A, D=D
        )
    sizes = bind_axes(
        "mamba1_step",
        state=(state, "Lben"),
        x=(x, "be"),
        dt=(dt, "be"),
        BC=(BC, "bk"),
        projected=(projected, "bq"),
        dt_bias=(dt_bias, "Le"),
        A=(A, "Len"),
        D=(D, "Le"),
    )
    e, n = sizes["e"], sizes["n"]
    require(
        sizes["k"] >= 2 * n,
        f"mamba1_step: BC has {sizes['k']} columns, expected at least 2 n = {2 * n}",
    )
    require(
        sizes["q"] >= e,
        f"mamba1_step: projected has {sizes['q']} columns, expected at least e = {e}",
    )
    y, new = selective_scan_step(
        state[layer], x.astype(jnp.float32), dt, A[layer], BC[:, -2 * n : -n], BC[:, -n:],
        D=D[layer], z=projected[:, -e:], dt_bias=dt_bias[layer],
    )  # fmt: skip
    return y.astype(x.dtype), _put(state, new, layer)


@check_arguments
def mamba2_step(
    projected: jax.Array,
    conv_cache: jax.Array,
    state: jax.Array,
    layer: ArrayLike,
    position: ArrayLike,
    *,
    conv_weight: jax.Array,
    conv_bias: jax.Array,
    dt_bias: jax.Array,
    A: jax.Array,
    D: jax.Array,
    norm_scale: jax.Array,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Advance one Mamba-2 layer by one token, from the output of in_proj to the input of out_proj.

        x, B, C = silu(conv(x, B, C))
        dt      = softplus(dt + dt_bias)
        h       = exp(dt A) h + dt x B^T
        u       = (h C + D x) silu(z)
        y       = u norm_scale,   sum_squares = sums of u^2 over blocks of channels

    (Dao and Gu 2024, equation 1 and section 7.) The gated norm is RMSNorm(u) = y / sqrt(mean(u^2) +
    eps). With one group the division is a factor per row that commutes with out_proj, so
    `add_norm_modulate` applies it to the output of out_proj. With g groups the caller divides y
    before out_proj; the groups' mean squares are
    `sum_squares.reshape(b, g, -1).sum(-1) / (e / g)`.

    Args:
      projected: output of in_proj (b, e + c + h) in the order z, x, B, C, dt, with c = e + 2 g n.
      conv_cache: ring buffers of the last w inputs of x, B and C (L, b, w, c).
      state: SSM states (L, b, h, p, n), float32 or bfloat16.
      layer: int32 (), index of the layer.
      position: int32 (), index of the token; the same in every row.
      conv_weight: filters (L, w, c); the last tap weighs the current input.
      conv_bias: (L, c).
      dt_bias, A, D: (L, h) float32; A is negative.
      norm_scale: scale of the gated norm (L, e) float32.
      implementation: None, "xla", "native" or "triton".

    Returns:
      y (b, e) like `projected`; sum_squares (b, parts) float32; conv_cache; state.

    Raises:
      ValueError: the shapes do not match.
    """
    parameters = dict(
        conv_weight=conv_weight, conv_bias=conv_bias, dt_bias=dt_bias, A=A, D=D,
        norm_scale=norm_scale,
    )  # fmt: skip
    chosen = implementation_of("mamba2_step", implementation, ("xla", "native", "triton"))
    if chosen != "xla":
        function = kernels_of(chosen).mamba2_step
        return function(projected, conv_cache, state, layer, position, **parameters)
    sizes = bind_mamba2_step(
        "mamba2_step", projected, conv_cache, {"state": (state, "Lbhpn")}, **parameters
    )
    (x, B, C, z, dt), conv_cache = _mixer_inputs(
        projected, conv_cache, layer, position, conv_weight, conv_bias, sizes
    )
    u, new = ssd_step(state[layer], x, dt, A[layer], B, C, D=D[layer], z=z, dt_bias=dt_bias[layer])
    y, sum_squares = _scaled_with_squares(u, norm_scale[layer])
    return y.astype(projected.dtype), sum_squares, conv_cache, _put(state, new, layer)


@check_arguments
def dual_step(
    projected: jax.Array,
    conv_cache: jax.Array,
    inputs: jax.Array,
    B_cache: jax.Array,
    log_decay: jax.Array,
    layer: ArrayLike,
    position: ArrayLike,
    *,
    conv_weight: jax.Array,
    conv_bias: jax.Array,
    dt_bias: jax.Array,
    A: jax.Array,
    D: jax.Array,
    norm_scale: jax.Array,
    room: int | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """Advance one Mamba-2 layer by one token in the dual form, from a cache of the past inputs.

    With a_s the sum of dt A after position s up to position t, unrolling the recurrence of
    `mamba2_step` from a zero state gives

        u_t = (sum_{s <= t} (C_t . B_s) exp(a_s) dt_s x_s + D x_t) silu(z_t)

    This is the quadratic form of Dao and Gu 2024, sections 5 and 6, one row at a time. The step
    reads the rows before t of three caches, e + g n + h values per position. It adds dt_t A to the
    sums a, h values per position, and writes one row of the other caches. The recurrent form reads
    and writes e n values. The dual form therefore moves less memory up to t near 2 n, on average
    half as much over the first 2 n tokens.

    Args:
      projected: output of in_proj (b, e + c + h) in the order z, x, B, C, dt, with c = e + 2 g n.
      conv_cache: ring buffers of the last w inputs of x, B and C (L, b, w, c).
      inputs: dt x of every token (L, b, T, h, p), float32 or bfloat16.
      B_cache: B of every token (L, b, T, g, n), of the dtype of `inputs`.
      log_decay: a of every token (L, b, T, h) float32, as of the token before. Rows of tokens not
        yet decoded may hold any finite numbers.
      layer, position: int32 (), indices of the layer and of the token; position < T.
      room: number of rows of the caches that "xla" reads, more than `position`; None is T. Kernels
        read no more rows than they need.
      conv_weight, conv_bias, dt_bias, A, D, norm_scale: see `mamba2_step`.
      implementation: None, "xla", "native" or "triton".

    Returns:
      y (b, e) like `projected`; sum_squares (b, parts) float32; conv_cache; inputs; B_cache;
      log_decay.

    Raises:
      ValueError: the shapes do not match.
    """
    parameters = dict(
        conv_weight=conv_weight, conv_bias=conv_bias, dt_bias=dt_bias, A=A, D=D,
        norm_scale=norm_scale,
    )  # fmt: skip
    caches = (inputs, B_cache, log_decay)
    chosen = implementation_of("dual_step", implementation, ("xla", "native", "triton"))
    if chosen != "xla":
        function = kernels_of(chosen).dual_step
        return function(projected, conv_cache, *caches, layer, position, **parameters)
    shapes = {
        "inputs": (inputs, "LbThp"),
        "B_cache": (B_cache, "LbTgn"),
        "log_decay": (log_decay, "LbTh"),
    }
    sizes = bind_mamba2_step("dual_step", projected, conv_cache, shapes, **parameters)
    (x, B, C, z, dt), conv_cache = _mixer_inputs(
        projected, conv_cache, layer, position, conv_weight, conv_bias, sizes
    )
    room = room or inputs.shape[2]
    layer, position, first = (jnp.asarray(i, jnp.int32) for i in (layer, position, 0))

    def read(cache: jax.Array) -> jax.Array:
        """Return the rows of a layer, which XLA reads where they lie."""
        sizes = (1, cache.shape[1], room, *cache.shape[3:])
        return jax.lax.dynamic_slice(cache, (layer, *[first] * (cache.ndim - 1)), sizes)[0]

    dt = step_sizes(dt, dt_bias[layer], True, jnp.float32)
    rows = (dt[..., None] * x).astype(inputs.dtype)
    B_rows = B.astype(B_cache.dtype)
    token = jnp.arange(room, dtype=jnp.int32)[None, :, None]
    old_decays = read(log_decay)
    decays = old_decays + (dt * A[layer][None])[:, None]
    # Only weights are masked. XLA would copy the cached rows to mask them.
    scores = product("btgn,bgn->btg", read(B_cache).astype(jnp.float32), C)
    weights = jnp.repeat(scores, sizes["h"] // sizes["g"], axis=-1) * jnp.exp(decays)
    weights = jnp.where(token < position, weights, 0)
    past = jnp.sum(weights[..., None] * read(inputs).astype(jnp.float32), axis=1)
    score = jnp.sum(B_rows.astype(jnp.float32) * C, axis=-1)
    score = jnp.repeat(score, sizes["h"] // sizes["g"], axis=-1)
    y = past + score[..., None] * rows.astype(jnp.float32)
    u = skip_and_gate(y, x, D[layer][:, None], z)
    y, sum_squares = _scaled_with_squares(u, norm_scale[layer])

    def put_row(old: jax.Array, row: jax.Array) -> jax.Array:
        start = (layer, first, position, *[first] * (old.ndim - 3))
        return jax.lax.dynamic_update_slice(old, row[None, :, None], start)

    inputs = put_row(inputs, rows)
    B_cache = put_row(B_cache, B_rows)
    decays = jnp.where(token < position, decays, jnp.where(token == position, 0, old_decays))
    log_decay = jax.lax.dynamic_update_slice(log_decay, decays[None], (layer, *[first] * 3))
    return y.astype(projected.dtype), sum_squares, conv_cache, inputs, B_cache, log_decay


def _put(stacked: jax.Array, new: jax.Array, layer: ArrayLike) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stacked, new.astype(stacked.dtype), layer, 0)


def _convolve(inputs, conv_cache, layer, position, weight, bias):
    """Return silu of the causal convolution (b, c) float32, and the updated cache."""
    width = weight.shape[1]
    ring = conv_cache[layer].at[:, position % width].set(inputs.astype(conv_cache.dtype))
    window = jnp.roll(ring, -(position + 1), axis=1).astype(jnp.float32)
    y = jnp.einsum("bwc,wc->bc", window, weight[layer].astype(jnp.float32), precision="highest")
    return jax.nn.silu(y + bias[layer].astype(jnp.float32)[None]), _put(conv_cache, ring, layer)


def _mixer_inputs(projected, conv_cache, layer, position, conv_weight, conv_bias, sizes):
    """Split and convolve the output of in_proj.

    Returns:
      x (b, h, p), B and C (b, g, n), z (b, h, p) and dt (b, h) in float32, and the updated
      conv_cache.
    """
    b, h, p, g, n, e, c = (sizes[axis] for axis in "bhpgnec")
    z, inputs, dt = jnp.split(projected.astype(jnp.float32), [e, e + c], axis=-1)
    xBC, conv_cache = _convolve(inputs, conv_cache, layer, position, conv_weight, conv_bias)
    x, B, C = jnp.split(xBC, [e, e + g * n], axis=-1)
    heads = (b, h, p)
    parts = (x.reshape(heads), B.reshape(b, g, n), C.reshape(b, g, n), z.reshape(heads), dt)
    return parts, conv_cache


def _scaled_with_squares(u: jax.Array, scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return u (b, h, p) times the norm's scale as (b, e), and the sums of u^2 per head (b, h)."""
    return u.reshape(u.shape[0], -1) * scale[None], jnp.sum(u * u, axis=-1)
