"""Sequential reference implementation of both mixers, and helpers that the scans share."""

import jax
import jax.numpy as jnp

from aim_jax.utils.checks import check_arguments


def compute_dtype(x):
    """Return the dtype of states and decays for an input x: at least float32."""
    return jnp.promote_types(x.dtype, jnp.float32)


def with_rank(t, ndim):
    """Prepend axes of size one until t has `ndim` axes.

    NumPy's rules do so by themselves, unless jax_numpy_rank_promotion forbids it.
    """
    return t.reshape((1,) * (ndim - t.ndim) + t.shape)


def bind_axes(op, **arrays):
    """Read axis sizes from the shapes of arrays, and check that the arrays agree on them.

    Args:
      op: name of the calling function, for the error message.
      **arrays: (array or None, axis letters) by argument name, e.g. x=(x, "blhp"). The first array
        with a letter sets its size. Heads h must be a multiple of groups g.

    Returns:
      The size of every axis, by letter.

    Raises:
      ValueError: the rank or size of an array does not match its letters, or an axis is empty.
    """
    sizes = {}
    for name, (array, axes) in arrays.items():
        if array is None:
            continue
        expected = ", ".join(f"{a} = {sizes[a]}" if a in sizes else a for a in axes)
        if array.ndim == len(axes):
            for axis, size in zip(axes, array.shape, strict=True):
                sizes.setdefault(axis, size)
        if 0 in array.shape or tuple(array.shape) != tuple(sizes.get(a) for a in axes):
            raise ValueError(
                f"{op}: {name} has shape {tuple(array.shape)}, expected non-empty ({expected})"
            )
    if sizes.get("h", 0) % sizes.get("g", 1):
        raise ValueError(f"{op}: {sizes['h']} heads cannot share {sizes['g']} B/C groups evenly")
    return sizes


def bind_selective_scan(op, x, dt, A, B, C, D, z, dt_bias, initial_state):
    """Call `bind_axes` for the arguments of a Mamba-1 scan over a sequence."""
    return bind_axes(
        op,
        x=(x, "ble"),
        dt=(dt, "ble"),
        A=(A, "en"),
        B=(B, "bln"),
        C=(C, "bln"),
        D=(D, "e"),
        z=(z, "ble"),
        dt_bias=(dt_bias, "e"),
        initial_state=(initial_state, "ben"),
    )


def bind_ssd(op, x, dt, A, B, C, D, z, dt_bias, initial_state):
    """Call `bind_axes` for the arguments of a Mamba-2 scan over a sequence."""
    return bind_axes(
        op,
        x=(x, "blhp"),
        dt=(dt, "blh"),
        A=(A, "h"),
        B=(B, "blgn"),
        C=(C, "blgn"),
        D=(D, "h"),
        z=(z, "blhp"),
        dt_bias=(dt_bias, "h"),
        initial_state=(initial_state, "bhpn"),
    )


def require_floats(op, **arrays):
    """Raise ValueError unless all arrays are floats; results in their dtype would be truncated."""
    for name, array in arrays.items():
        require(
            jnp.issubdtype(array.dtype, jnp.floating),
            f"{op}: {name} is {array.dtype}, expected floats",
        )


def require(ok, message):
    """Raise ValueError(message) unless `ok`."""
    if not ok:
        raise ValueError(message)


def bind_mamba2_step(
    op, projected, conv_cache, caches, *, conv_weight, conv_bias, dt_bias, A, D, norm_scale
):
    """Call `bind_axes` for the arguments of a fused Mamba-2 step, recurrent or dual.

    Args:
      op: name of the calling function, for error messages.
      projected, conv_cache: see `aim_jax.ops.mamba2_step`.
      caches: (array, axes) by name, which set h, p and n: the state, or the dual form's caches.
      conv_weight, conv_bias, dt_bias, A, D, norm_scale: see `aim_jax.ops.mamba2_step`.

    Returns:
      The size of every axis, by letter.

    Raises:
      ValueError: the shapes do not match.
    """
    sizes = bind_axes(
        op,
        **caches,
        conv_weight=(conv_weight, "Lwc"),
        conv_cache=(conv_cache, "Lbwc"),
        projected=(projected, "bq"),
    )
    e = sizes["e"] = sizes["h"] * sizes["p"]
    c, n, h = sizes["c"], sizes["n"], sizes["h"]
    g = sizes["g"] = (c - e) // (2 * n)
    require(
        g > 0 and c == e + 2 * g * n and h % g == 0,
        f"{op}: conv_weight has {c} channels, expected h p + 2 g n = {e} + 2 g {n} with g dividing "
        f"h = {h}",
    )
    require(
        sizes["q"] == e + c + h,
        f"{op}: projected has {sizes['q']} columns, expected z, x, B, C, dt: {e} + {c} + {h}",
    )
    for name, array, axes in (
        ("conv_bias", conv_bias, "Lc"),
        ("dt_bias", dt_bias, "Lh"),
        ("A", A, "Lh"),
        ("D", D, "Lh"),
        ("norm_scale", norm_scale, "Le"),
    ):
        expected = tuple(sizes[axis] for axis in axes)
        require(
            array.shape == expected, f"{op}: {name} has shape {array.shape}, expected {expected}"
        )
    return sizes


def step_sizes(dt, dt_bias, dt_softplus, dtype):
    """Compute the step sizes softplus(dt + dt_bias) in `dtype`; both operations are optional."""
    dt = dt.astype(dtype)
    if dt_bias is not None:
        dt = dt + with_rank(dt_bias.astype(dtype), dt.ndim)
    return jax.nn.softplus(dt) if dt_softplus else dt


def skip_and_gate(y, x, D, z):
    """Compute (y + D x) silu(z) in the dtype of y, and cast the result to the dtype of x.

    D broadcasts against x. None for D or z omits that operation.
    """
    if D is not None:
        y = y + with_rank(D.astype(y.dtype), y.ndim) * x.astype(y.dtype)
    if z is not None:
        y = y * jax.nn.silu(z.astype(y.dtype))
    return y.astype(x.dtype)


def split_length(length, chunk_size):
    """Return (number, length) of the fewest equal chunks of at most `chunk_size` positions."""
    if chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1")
    num_chunks = -(-length // chunk_size)
    return num_chunks, -(-length // num_chunks)


def pad_length(t, length):
    """Pad axis 1 of t with zeros to `length`."""
    return jnp.pad(t, [(0, 0), (0, length - t.shape[1])] + [(0, 0)] * (t.ndim - 2))


def compose(first, then):
    """Compose two maps h -> a h + s: (a, s) o (a', s') = (a a', a' s + s')."""
    (a, s), (a_then, s_then) = first, then
    return a * a_then, a_then * s + s_then


@check_arguments
def recurrence(
    x: jax.Array,
    dt: jax.Array,
    A: jax.Array,
    B: jax.Array,
    C: jax.Array,
    *,
    D: jax.Array | None = None,
    z: jax.Array | None = None,
    dt_bias: jax.Array | None = None,
    dt_softplus: bool = True,
    initial_state: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Run the selective state-space recurrence one position at a time.

        dt_t = softplus(dt_t + dt_bias)
        h_t  = exp(dt_t A) h_{t-1} + dt_t B_t x_t
        y_t  = (C_t . h_t + D x_t) silu(z_t)

    Mamba-2 has one decay per head, A of shape (h, 1, 1) (Dao and Gu 2024, equation 1 and section
    5). Mamba-1 is the case of heads of size one, A of shape (e, 1, n) (Gu and Dao 2023, algorithm
    2). This is the reference implementation that the parallel scans are tested against.

    Args:
      x: inputs (b, l, h, p).
      dt: step sizes before bias and softplus (b, l, h).
      A: negative decay rates, broadcastable to (h, p, n).
      B: input projections (b, l, g, n); head i uses group i // (h / g).
      C: output projections (b, l, g, n).
      D: optional skip weights (h,).
      z: optional gates, like x.
      dt_bias: optional bias of dt (h,).
      dt_softplus: apply softplus to dt.
      initial_state: optional state before the first position (b, h, p, n); zeros when None.

    Returns:
      y like x, and the state after the last position (b, h, p, n). States and decays are
      float32, or float64 for float64 x.

    Raises:
      ValueError: the shapes do not match.
    """
    # A is checked separately, because it may broadcast over heads, channels and states.
    sizes = bind_ssd("recurrence", x, dt, None, B, C, D, z, dt_bias, initial_state)
    b, h, p, n, g = (sizes[axis] for axis in "bhpng")
    require_floats("recurrence", x=x)
    if A.ndim != 3 or any(a not in (1, full) for a, full in zip(A.shape, (h, p, n), strict=True)):
        raise ValueError(
            f"recurrence: A has shape {tuple(A.shape)}, expected one that broadcasts to "
            f"(h, p, n) = {(h, p, n)}"
        )

    dtype = compute_dtype(x)
    dt = step_sizes(dt, dt_bias, dt_softplus, dtype)
    A = A.astype(dtype)
    state = jnp.zeros((b, h, p, n), dtype) if initial_state is None else initial_state.astype(dtype)

    def per_head(t):
        return jnp.repeat(t.astype(dtype), h // g, axis=2)

    def step(state, inputs):
        x, dt, B, C = inputs
        dt = dt[..., None, None]
        state = jnp.exp(dt * A[None]) * state + dt * x[..., None] * B[:, :, None]
        return state, jnp.sum(state * C[:, :, None], axis=-1)

    inputs = (x.astype(dtype), dt, per_head(B), per_head(C))
    state, y = jax.lax.scan(step, state, [jnp.moveaxis(t, 1, 0) for t in inputs])
    D = None if D is None else D[:, None]
    return skip_and_gate(jnp.moveaxis(y, 0, 1), x, D, z), state


def segment_sums(terms: jax.Array) -> jax.Array:
    """Sum terms (..., k) between every two of their k + 1 boundaries, as in the SSD paper.

    Returns:
      (..., k + 1, k + 1); entry [j, i] is the sum of terms[i:j], and -inf where j < i. Masking the
      exponential instead would give NaN gradients where it overflows.
    """
    size = terms.shape[-1]
    end = jnp.arange(size + 1)[:, None]
    start = jnp.arange(size + 1)[None]
    # A matrix product: XLA would repeat a cumulative sum for every element that is computed of it.
    term = jnp.arange(size)[:, None, None]
    included = (start[None] <= term) & (term < end[None])
    sums = jnp.tensordot(terms, included.astype(terms.dtype), 1, precision="highest")
    # Added, not selected: the gradient of a selection keeps its mask, in the shape of the sums and
    # for all layers of a model.
    excluded = jnp.where(start <= end, 0, -jnp.inf).astype(sums.dtype)
    return sums + with_rank(excluded, sums.ndim)
