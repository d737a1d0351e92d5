"""Products within the chunks of the Mamba-2 scan and their gradients, as fused kernels.

A chunk of q positions is a lower triangle of tiles (T, T), for positions t that read and positions
s that are read. With the notation of `aim_jax.ops.ssd_scan`,

    y_t = sum_{s <= t} w(t, s) x_s + D x_t,    w(t, s) = (C_t . B_s) exp(a(s, t)) dt_s

The scores C . B belong to a group of heads and are a matrix product of XLA. The kernels read them,
make the weights w of one tile in registers, and never write them: an array (q, q) per head would be
most of what a training step moves. Two sums give the gradients, with v(t, s) = dy_t . x_s:

    dx_s     = sum_{t >= s} w(t, s) dy_t + D dy_s
    dw(t, s) = v(t, s)

Decays are sums of terms of one sign in two levels. Of two positions of one tile a kernel sums the
terms between them directly. Of positions of two tiles j < i it adds three sums that XLA makes,

    a(s, t) = to_end(s) + between(i, j) + from_start(t)

from s to the end of j, over the tiles between, and from the start of i to t. Gradients with respect
to these sums are sums over pairs (t, s), and XLA differentiates the sums themselves, which are
additions only. So the gradient of dt A at a position is a sum over the pairs that it lies between,
not a difference of sums over other pairs, which would lose the digits of small terms.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from aim_jax.ops.triton.launch import launch


@triton.jit
def decays_within(terms, k, T: tl.constexpr):
    """Compute exp(a(s, t)) for the positions (t, s) of the tile whose terms dt A `terms` points to.

    It is 0 if t < s.
    """
    # Entry s holds the term after s. Sums along the last axis need no exchange between warps.
    following = tl.load(terms + k + 1, mask=k + 1 < T, other=0)
    upto_t = tl.where(k[:, None] > k[None, :], following[None, :], 0.0)
    sums = tl.cumsum(upto_t, axis=1, reverse=True)
    return tl.exp(tl.where(k[:, None] >= k[None, :], sums, float("-inf")))


@triton.jit
def ssd_outputs_kernel(
    x, scores, dt, terms, from_start, to_end, between, D, y,
    l: tl.constexpr, h: tl.constexpr, p: tl.constexpr, g: tl.constexpr,
    c: tl.constexpr, u: tl.constexpr, T: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sum w(t, s) x_s over s; a program computes a tile of t for a block of channels of a head."""
    blocks: tl.constexpr = (p + BLOCK_P - 1) // BLOCK_P
    head, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    i = tl.program_id(1)
    row, chunk = (tl.program_id(2) // c).to(tl.int64), tl.program_id(2) % c
    q: tl.constexpr = u * T
    k = tl.arange(0, T)
    channel = block * BLOCK_P + tl.arange(0, BLOCK_P)
    x += (row * l * h + head) * p + channel[None, :]
    y += (row * l * h + head) * p + channel[None, :]
    p_mask = (channel < p)[None, :]
    first = chunk * q  # of the chunk
    scores += ((row * c + chunk) * g + head // (h // g)) * q * q
    vector = (row * h + head) * (c * q) + first
    between += (((row * h + head) * c + chunk) * u + i) * u
    t = i * T + k

    total = tl.zeros([T, BLOCK_P], tl.float32)
    for j in range(0, i):
        s = j * T + k
        weight = tl.exp(tl.load(to_end + vector + s) + tl.load(between + j))
        weight *= tl.load(dt + vector + s)
        tile = tl.load(scores + t[:, None] * q + s[None, :]) * weight[None, :]
        mask = (first + s < l)[:, None] & p_mask
        x_s = tl.load(x + (first + s)[:, None] * (h * p), mask=mask, other=0)
        total = tl.dot(tile.to(x_s.dtype), x_s, total, input_precision="tf32x3")
    total *= tl.exp(tl.load(from_start + vector + t))[:, None]

    tile = tl.load(scores + t[:, None] * q + t[None, :])
    tile *= decays_within(terms + vector + i * T, k, T)
    tile *= tl.load(dt + vector + t)[None, :]
    mask = (first + t < l)[:, None] & p_mask
    x_t = tl.load(x + (first + t)[:, None] * (h * p), mask=mask, other=0)
    total = tl.dot(tile.to(x_t.dtype), x_t, total, input_precision="tf32x3")
    total += tl.load(D + head) * x_t.to(tl.float32)
    tl.store(y + (first + t)[:, None] * (h * p), total, mask=mask)


@triton.jit
def ssd_inputs_gradient_kernel(
    dy, scores, dt, terms, from_start, to_end, between, D, dx,
    l: tl.constexpr, h: tl.constexpr, p: tl.constexpr, g: tl.constexpr,
    c: tl.constexpr, u: tl.constexpr, T: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sum w(t, s) dy_t over t; a program computes a tile of s for a block of channels of a head."""
    blocks: tl.constexpr = (p + BLOCK_P - 1) // BLOCK_P
    head, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    j = tl.program_id(1)
    row, chunk = (tl.program_id(2) // c).to(tl.int64), tl.program_id(2) % c
    q: tl.constexpr = u * T
    k = tl.arange(0, T)
    channel = block * BLOCK_P + tl.arange(0, BLOCK_P)
    operand = dx.dtype.element_ty
    dy += (row * l * h + head) * p + channel[None, :]
    dx += (row * l * h + head) * p + channel[None, :]
    p_mask = (channel < p)[None, :]
    first = chunk * q  # of the chunk
    scores += ((row * c + chunk) * g + head // (h // g)) * q * q
    vector = (row * h + head) * (c * q) + first
    between += ((row * h + head) * c + chunk) * u * u + j
    s = j * T + k

    total = tl.zeros([T, BLOCK_P], tl.float32)
    for i in range(j + 1, u):
        t = i * T + k
        weight = tl.exp(tl.load(from_start + vector + t) + tl.load(between + i * u))
        tile = tl.load(scores + t[:, None] * q + s[None, :]) * weight[:, None]
        mask = (first + t < l)[:, None] & p_mask
        dy_t = tl.load(dy + (first + t)[:, None] * (h * p), mask=mask, other=0).to(operand)
        total = tl.dot(tl.trans(tile.to(operand)), dy_t, total, input_precision="tf32x3")
    total *= tl.exp(tl.load(to_end + vector + s))[:, None]

    tile = tl.load(scores + s[:, None] * q + s[None, :])
    tile *= decays_within(terms + vector + j * T, k, T)
    mask = (first + s < l)[:, None] & p_mask
    dy_s = tl.load(dy + (first + s)[:, None] * (h * p), mask=mask, other=0)
    total = tl.dot(tl.trans(tile.to(operand)), dy_s.to(operand), total, input_precision="tf32x3")
    total *= tl.load(dt + vector + s)[:, None]
    total += tl.load(D + head) * dy_s.to(tl.float32)
    tl.store(dx + (first + s)[:, None] * (h * p), total, mask=mask)


@triton.jit
def ssd_weights_gradient_kernel(
    x, dy, scores, dt, terms, from_start, to_end, between, dscores, by_t, by_s, skip,
    l: tl.constexpr, h: tl.constexpr, p: tl.constexpr, g: tl.constexpr,
    c: tl.constexpr, u: tl.constexpr, T: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Compute gradients from dw(t, s) = dy_t . x_s; a program does a tile of all heads of a group.

    See `ssd_weights_gradient` for the outputs. Tiles above the diagonal are zeros.
    """
    i, j = tl.program_id(0) // u, tl.program_id(0) % u
    group = tl.program_id(1)
    row, chunk = (tl.program_id(2) // c).to(tl.int64), tl.program_id(2) % c
    q: tl.constexpr = u * T
    r: tl.constexpr = h // g
    k = tl.arange(0, T)
    first = chunk * q  # of the chunk
    t = i * T + k
    s = j * T + k
    # From here on, 32-bit offsets within a row suffice and take half the registers.
    x += row * l * h * p
    dy += row * l * h * p
    scores += ((row * c + chunk) * g + group) * q * q
    dscores += ((row * c + chunk) * g + group) * q * q
    place = t[:, None] * q + s[None, :]
    tile = tl.load(scores + place)
    total = tl.zeros([T, T], tl.float32)
    for head in range(group * r, (group + 1) * r):
        vector = (row * h + head) * (c * q) + first
        pair = ((row * h + head) * c + chunk) * u * u + tl.program_id(0)
        sums_t = tl.zeros([T], tl.float32)
        sums_s = tl.zeros([T], tl.float32)
        if j <= i:
            dw = tl.zeros([T, T], tl.float32)
            for start in range(0, p, BLOCK_P):
                channel = start + tl.arange(0, BLOCK_P)
                p_mask = (channel < p)[None, :]
                place_t = (first + t)[:, None] * (h * p) + (head * p + channel)[None, :]
                place_s = (first + s)[:, None] * (h * p) + (head * p + channel)[None, :]
                x_s = tl.load(x + place_s, mask=(first + s < l)[:, None] & p_mask, other=0)
                dy_t = tl.load(dy + place_t, mask=(first + t < l)[:, None] & p_mask, other=0)
                dy_t = dy_t.to(x_s.dtype)
                dw = tl.dot(dy_t, tl.trans(x_s), dw, input_precision="tf32x3")
            dt_s = tl.load(dt + vector + s)[None, :]
            if i == j:
                on_diagonal = tl.where(k[:, None] == k[None, :], dw, 0.0)
                tl.store(skip + ((row * h + head) * c + chunk) * u + i, tl.sum(on_diagonal))
                dw *= decays_within(terms + vector + i * T, k, T)
                by_pair = dw * tile
                upto_s = tl.cumsum(by_pair * dt_s, axis=1)
                sums_t = tl.sum(tl.where(k[:, None] > k[None, :], upto_s, 0.0), axis=0)
            else:
                weight = tl.exp(tl.load(to_end + vector + s) + tl.load(between + pair))
                dw *= tl.exp(tl.load(from_start + vector + t))[:, None] * weight[None, :]
                by_pair = dw * tile
                sums_t = tl.sum(by_pair * dt_s, axis=1)
            sums_s = tl.sum(by_pair, axis=0)
            total += dw * dt_s
        tl.store(by_t + pair * T + k, sums_t)
        tl.store(by_s + pair * T + k, sums_s)
    tl.store(dscores + place, total)


class Sizes(NamedTuple):
    """Sizes of a scan in chunks and tiles.

    Attributes:
      l, h, p, g: positions, heads, channels per head, groups.
      c, u, T: chunks, tiles per chunk, positions per tile.
    """

    l: int
    h: int
    p: int
    g: int
    c: int
    u: int
    T: int


def tile_size(dtype: Any) -> int:
    """Return the positions per tile for inputs of a dtype: as many as registers have room for."""
    return 32 if jnp.dtype(dtype) == jnp.float32 else 64


class Decays(NamedTuple):
    """Step sizes and sums of dt A, float32; positions after the sequence have dt = 0.

    Attributes:
      dt: step sizes (b, h, c, u, T).
      terms: dt A (b, h, c, u, T).
      from_start: sums of the terms of a tile up to each position, inclusive (b, h, c, u, T).
      to_end: sums of the terms of a tile after each position (b, h, c, u, T).
      between: entry [i, j] is the sum of the terms of the tiles after j and before i; -inf unless
        j < i (b, h, c, u, u).
    """

    dt: jax.Array
    terms: jax.Array
    from_start: jax.Array
    to_end: jax.Array
    between: jax.Array


def ssd_outputs(
    x: jax.Array,
    scores: jax.Array,
    decays: Decays,
    D: jax.Array,
    *,
    sizes: Sizes,
    dtype: Any,
    compute_capability: int | None = None,
) -> jax.Array:
    """Compute the outputs of positions from inputs of the same chunk.

    Args:
      x: inputs (b, l, h, p).
      scores: C . B of the pairs of positions of a chunk (b, c, g, q, q) float32; entries above the
        diagonal are not used.
      decays: step sizes and decays.
      D: skip weights (h,) float32.
      sizes: see `Sizes`.
      dtype: dtype of the outputs.
      compute_capability: see `aim_jax.ops.triton`.

    Returns:
      y (b, l, h, p).
    """
    (y,) = _launch(
        ssd_outputs_kernel, x, scores, *decays, D,
        outputs=[jax.ShapeDtypeStruct(x.shape, dtype)],
        sizes=sizes,
        compute_capability=compute_capability,
    )  # fmt: skip
    return y


def ssd_inputs_gradient(
    dy: jax.Array,
    scores: jax.Array,
    decays: Decays,
    D: jax.Array,
    *,
    sizes: Sizes,
    dtype: Any,
    compute_capability: int | None = None,
) -> jax.Array:
    """Compute the gradient dx (b, l, h, p) of `ssd_outputs`.

    Args:
      dy: gradient with respect to the outputs (b, l, h, p).
      scores, decays, D, sizes: arguments of `ssd_outputs`.
      dtype: dtype of x and of the gradient.
      compute_capability: see `aim_jax.ops.triton`.
    """
    (dx,) = _launch(
        ssd_inputs_gradient_kernel, dy, scores, *decays, D,
        outputs=[jax.ShapeDtypeStruct(dy.shape, dtype)],
        sizes=sizes,
        compute_capability=compute_capability,
    )  # fmt: skip
    return dx


def ssd_weights_gradient(
    x: jax.Array,
    dy: jax.Array,
    scores: jax.Array,
    decays: Decays,
    *,
    sizes: Sizes,
    dtype: Any,
    compute_capability: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Compute the sums over pairs of positions that make up the other gradients of `ssd_outputs`.

    The sums are over e(t, s) = (dy_t . x_s) (C_t . B_s) exp(a(s, t)). Entry [i, j] belongs to the
    pairs of a t in tile i and an s in tile j, and is zero unless j <= i.

    Args:
      x: inputs (b, l, h, p).
      dy: gradient with respect to the outputs (b, l, h, p).
      scores, decays, sizes: arguments of `ssd_outputs`.
      dtype: dtype of the gradient of the scores.
      compute_capability: see `aim_jax.ops.triton`.

    Returns:
      dscores: gradient of the scores (b, c, g, q, q).
      by_t: for j < i the sums of e(t, s) dt_s over s, for every t; for j = i the sums over s <= m
        < t, for every m (b, h, c, u, u, T).
      by_s: sums of e(t, s) over t, for every s (b, h, c, u, u, T).
      skip: sums of dy_t . x_t over every tile (b, h, c, u).
    """
    _, h, _, _, c, u, T = sizes
    by_pair = jax.ShapeDtypeStruct((len(x), h, c, u, u, T), jnp.float32)
    skip = jax.ShapeDtypeStruct((len(x), h, c, u), jnp.float32)
    dscores, by_t, by_s, by_tile = _launch(
        ssd_weights_gradient_kernel, x, dy, scores, *decays,
        outputs=[jax.ShapeDtypeStruct(scores.shape, dtype), by_pair, by_pair, skip],
        sizes=sizes,
        compute_capability=compute_capability,
    )  # fmt: skip
    return dscores, by_t, by_s, by_tile


def _launch(kernel: Any, *arrays: jax.Array, sizes: Sizes, **options: Any) -> list[jax.Array]:
    """Launch one of the three kernels."""
    _, h, p, g, c, u, _ = sizes
    # The most warps and channels at once for which no registers spill.
    largest, warps = 64, 8
    if kernel is ssd_weights_gradient_kernel:
        largest, warps = (32, 4) if arrays[0].dtype == jnp.float32 else (64, 16)
    block = min(max(triton.next_power_of_2(p), 16), largest)
    tiles = (u * u, g) if kernel is ssd_weights_gradient_kernel else (h * triton.cdiv(p, block), u)
    return launch(
        kernel, *arrays, grid=(*tiles, len(arrays[0]) * c), num_warps=warps, num_stages=2,
        BLOCK_P=block, **options, **sizes._asdict(),
    )  # fmt: skip


class Options(NamedTuple):
    """Static arguments of `within_chunks`: sizes, dtype of the outputs, and compute capability."""

    sizes: Sizes
    dtype: Any
    compute_capability: int | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def within_chunks(
    options: Options,
    x: jax.Array,
    B: jax.Array,
    C: jax.Array,
    decays: Decays,
    D: jax.Array,
) -> jax.Array:
    """Compute the outputs of positions from inputs of the same chunk, differentiably.

    The backward pass keeps the arguments only and computes the scores again.

    Args:
      options: see `Options`.
      x: inputs (b, l, h, p).
      B, C: projections (b, c, q, g, n), in the same dtype.
      decays: step sizes and decays.
      D: skip weights (h,) float32.

    Returns:
      y (b, l, h, p).
    """
    return ssd_outputs(x, _scores(B, C), decays, D, **options._asdict())


def _scores(B, C):
    return product("bctgn,bcsgn->bcgts", C, B)


def product(subscripts: str, one: jax.Array, other: jax.Array) -> jax.Array:
    """Compute an einsum of two arrays in float32, at full precision for float32 arrays."""
    return jnp.einsum(
        subscripts, one, other, precision="highest", preferred_element_type=jnp.float32
    )


def _within_chunks_forward(options, *arguments):
    return within_chunks(options, *arguments), arguments


def _within_chunks_backward(options, arguments, dy):
    x, B, C, decays, D = arguments
    scores = _scores(B, C)
    of_x, of_scores = (options._replace(dtype=t.dtype)._asdict() for t in (x, B))
    dx = ssd_inputs_gradient(dy, scores, decays, D, **of_x)
    dscores, by_t, by_s, skip = ssd_weights_gradient(x, dy, scores, decays, **of_scores)
    dB = product("bcgts,bctgn->bcsgn", dscores, C).astype(B.dtype)
    dC = product("bcgts,bcsgn->bctgn", dscores, B).astype(C.dtype)
    i = jnp.arange(options.sizes.u)[None, None, None, :, None, None]
    j = i.swapaxes(3, 4)
    # The term after m lies between the positions of the pairs s <= m < t.
    after = jnp.sum(jnp.where(i == j, by_t, 0), axis=4)
    decays_gradient = Decays(
        dt=jnp.sum(by_s, axis=3),
        terms=jnp.pad(after[..., :-1], [(0, 0)] * 4 + [(1, 0)]),
        from_start=jnp.sum(jnp.where(i > j, by_t, 0), axis=4),
        to_end=decays.dt * jnp.sum(jnp.where(i > j, by_s, 0), axis=3),
        between=jnp.sum(jnp.where(i > j, by_t, 0), axis=5),
    )
    return dx, dB, dC, decays_gradient, jnp.sum(skip, axis=(0, 2, 3))


within_chunks.defvjp(_within_chunks_forward, _within_chunks_backward)
