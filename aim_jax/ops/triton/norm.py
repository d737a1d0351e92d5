"""Gate, residual add, norm and modulation between two mixers, in one pass over the residual."""

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
    """Run the operation; a program handles one row.

    `residual_in` shares its buffer with `residual`.
    """
    row = tl.program_id(0).to(tl.int64)
    rows = tl.num_programs(0)
    layer = tl.load(layer).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < d

    update = tl.load(hidden + row * d + i, mask=inside, other=0).to(tl.float32)
    has_stream = inside
    if GATE >= 0:
        source = layer + GATE_OFFSET
        has_stream = inside & (source >= 0)
        gate_row = modulation + ((source * rows + row) * m + GATE) * d
        update *= tl.load(gate_row + i, mask=has_stream, other=1).to(tl.float32)
        if parts > 0:
            part = tl.arange(0, BLOCK_PARTS)
            squares = tl.load(sum_squares + row * parts + part, mask=part < parts, other=0)
            rstd = tl.rsqrt(tl.sum(squares, axis=0) / e + mixer_eps)
            update *= tl.where(source >= 0, rstd, 1.0)
    r = tl.load(residual + row * d + i, mask=has_stream, other=0) + update
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
    """Run `aim_jax.ops.add_norm_modulate` as one kernel, which updates the residual in place.

    See there for the other arguments, results and errors.

    Args:
      compute_capability: see `aim_jax.ops.triton`.
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
        f"add_norm_modulate: shift={shift}, scale={scale}, gate={gate}, "
        f"but modulation has {m} parts",
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
        sum_squares if parts else hidden,  # a placeholder that is not read
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
