"""The seam between two mixers: gate, add, norm and modulation in one pass over the residual."""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from aim_jax.ops.reference import bind_axes, require
from aim_jax.ops.triton.launch import launch, warps_for


@triton.jit
def add_norm_modulate_kernel(
    hidden, residual_in, norm_scale, modulation, sum_squares, layer, x, residual,
    d: tl.constexpr, m: tl.constexpr, SHIFT: tl.constexpr, SCALE: tl.constexpr,
    GATE: tl.constexpr, GATE_OFFSET: tl.constexpr, parts: tl.constexpr, e: tl.constexpr,
    eps: tl.constexpr, mixer_eps: tl.constexpr, BLOCK: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """A program is a row. `residual_in` is `residual`."""
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    layer = tl.load(layer).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < d

    update = tl.load(hidden + row * d + i, mask=inside, other=0).to(tl.float32)
    old = inside
    if GATE >= 0:
        source = layer + GATE_OFFSET
        old = inside & (source >= 0)
        gate_row = modulation + ((source * rows + row) * m + GATE) * d
        update *= tl.load(gate_row + i, mask=old, other=1).to(tl.float32)
        if parts > 0:
            part = tl.arange(0, BLOCK_PARTS)
            squares = tl.load(sum_squares + row * parts + part, mask=part < parts, other=0)
            rstd = tl.rsqrt(tl.sum(squares, axis=0) / e + mixer_eps)
            update *= tl.where(source >= 0, rstd, 1.0)
    r = tl.load(residual + row * d + i, mask=old, other=0) + update
    tl.store(residual + row * d + i, r, mask=inside)

    scale = tl.load(norm_scale + layer * d + i, mask=inside, other=0).to(tl.float32)
    normed = r * tl.rsqrt(tl.sum(r * r, axis=0) / d + eps) * scale
    modulation_row = modulation + (layer * rows + row) * m * d + i
    shift = tl.load(modulation_row + SHIFT * d, mask=inside, other=0).to(tl.float32)
    scale = tl.load(modulation_row + SCALE * d, mask=inside, other=0).to(tl.float32)
    tl.store(x + row * d + i, normed * (1 + scale) + shift, mask=inside)


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
    dtype=None,
    compute_capability=None,
):
    """Adds a branch to the residual stream and prepares the input of the next one.

        residual = residual + gate * hidden / sqrt(mean(u^2) + mixer_eps)
        x        = RMSNorm(residual) * norm_scale * (1 + scale) + shift

    The gate and the gated norm's divisor belong to the branch that made `hidden`: to layer
    `layer + gate_offset`. There is no such layer before the first one. There `hidden` is the input
    of the stack, which starts the stream: residual = hidden, whatever `residual` holds.

    Args:
      hidden: output of the last branch, before its gate (b, d).
      residual: the stream (b, d) float32, updated in place.
      norm_scale: scales of the norms (L, d).
      modulation: every layer's parts (L, b, m, d): `Modulation.layers`, made once per image.
      layer: int32 (), the layer that x is for.
      sum_squares: partial sums of u^2 of that branch's gated norm (b, parts), from `mamba2_step`
        or `dual_step`; None if `hidden` needs no division.
      inner: number of channels behind `sum_squares`, e.
      shift, scale, gate: which of the m parts these are. gate None: hidden is added as it is.
      gate_offset: -1 between layers; 0 inside one, between the mixer and an MLP.
      eps, mixer_eps: added to the mean squares of this norm and of the gated one.
      dtype: of x, that of the matrix product that follows; None is hidden's.
      compute_capability: see the package.

    Returns:
      x (b, d) in `dtype`; residual.

    Raises:
      ValueError: the arguments do not fit together.
    """
    sizes = bind_axes(
        "add_norm_modulate",
        hidden=(hidden, "bd"),
        residual=(residual, "bd"),
        norm_scale=(norm_scale, "Ld"),
        modulation=(modulation, "Lbmd"),
        sum_squares=(sum_squares, "bs"),
    )
    b, d, m = (sizes[axis] for axis in "bdm")
    parts = sizes.get("s", 0)
    require(
        all(0 <= part < m for part in (shift, scale, 0 if gate is None else gate)),
        f"add_norm_modulate: parts {shift}, {scale}, {gate} of a modulation of {m} parts",
    )
    require(
        not parts or (inner and gate is not None),
        "add_norm_modulate: sum_squares needs `inner`, the number of channels, and a gate",
    )
    require(
        residual.dtype == jnp.float32,
        f"add_norm_modulate: residual is {residual.dtype}, expected float32",
    )
    block = triton.next_power_of_2(d)
    return launch(
        add_norm_modulate_kernel,
        hidden, residual, norm_scale, modulation,
        sum_squares if parts else hidden,  # not read without parts
        layer,
        outputs=[jax.ShapeDtypeStruct((b, d), dtype or hidden.dtype), residual],
        aliases=((1, 1),),
        grid=(b,),
        num_warps=warps_for(block, per_warp=256),
        compute_capability=compute_capability,
        d=d, m=m, SHIFT=shift, SCALE=scale, GATE=-1 if gate is None else gate,
        GATE_OFFSET=gate_offset, parts=parts, e=inner or 0, eps=float(eps),
        mixer_eps=float(mixer_eps), BLOCK=block, BLOCK_PARTS=triton.next_power_of_2(max(parts, 1)),
    )  # fmt: skip
