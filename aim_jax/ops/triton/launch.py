"""Launching of Triton kernels from JAX, and choice of their block sizes."""

import contextlib

import jax
import jax.numpy as jnp
import jax_triton
import triton
from jax.extend.mlir import ir
from jax.interpreters import mlir
from jax_triton.triton_lib import (
    get_cuda_backend,
    triton_kernel_call_lowering,
    triton_kernel_call_p,
)

from aim_jax.ops.reference import require
from aim_jax.utils.cache import default_or_cached

# Compute capability of kernels whose caller does not pass one; None is the current device's. Set it
# to lower or compile, ahead of time, functions that call kernels indirectly; see `compiling_for`.
default_compute_capability = None

TARGET = "triton_kernel_call_ffi"

if (elsewhere := default_or_cached(triton.knobs.cache.dir, "triton")) is not None:
    triton.knobs.cache.dir = str(elsewhere)


def launch(kernel, *arrays, outputs, grid, aliases=(), compute_capability=None, **options):
    """Call a Triton kernel; its arguments are `arrays`, `outputs`, then constants by name.

    Args:
      kernel: a `triton.jit` function.
      *arrays: inputs; integers become int32 scalars.
      outputs: shape and dtype of every output, in the kernel's order.
      grid: number of programs along up to three axes.
      aliases: pairs of indices (input, output) that share a buffer.
      compute_capability: 80, 90, ...; None is `default_compute_capability`.
      **options: constants of the kernel, and num_warps, num_stages and enable_fp_fusion of
        `jax_triton.triton_call`.

    Returns:
      The outputs, a list.
    """
    arrays = [jnp.asarray(a, jnp.int32) if isinstance(a, int) else a for a in arrays]
    return jax_triton.triton_call(
        *arrays,
        kernel=kernel,
        custom_call_target_name=TARGET,
        out_shape=[jax.ShapeDtypeStruct(o.shape, o.dtype) for o in outputs],
        grid=grid,
        name=kernel.fn.__name__,
        input_output_aliases=dict(aliases),
        compute_capability=compute_capability or default_compute_capability,
        **options,
    )


@contextlib.contextmanager
def compiling_for(device):
    """Trace, lower and compile kernels for a GPU that is not attached.

    Args:
      device: one of `aim_jax.perf.accelerators.topology`.
    """
    global default_compute_capability
    previous = default_compute_capability
    default_compute_capability = round(10 * float(device.compute_capability))
    try:
        yield
    finally:
        default_compute_capability = previous


def lower(context, *arrays, **params):
    """Lower `triton_call` to XLA's typed custom-call interface; keep other callers' calls.

    jax-triton 0.3 emits calls of XLA's old interface, which cannot enter CUDA graphs, so the host
    launches every kernel. jaxlib has the same call in the typed interface, marked as compatible
    with graphs. With it, the whole body of a decode loop becomes one graph.
    """
    outputs = triton_kernel_call_lowering(get_cuda_backend, context, *arrays, **params)
    if params["custom_call_target_name"] == TARGET:
        attributes = outputs[0].owner.attributes
        opaque = ir.StringAttr.get(attributes["backend_config"].value_bytes)
        attributes["backend_config"] = ir.DictAttr.get({"opaque": opaque})
        attributes["api_version"] = mlir.i32_attr(4)
    return outputs


mlir.register_lowering(triton_kernel_call_p, lower, platform="cuda")


def require_kernel_dtype(op, x):
    """Raise ValueError unless the kernels, which compute in float32, keep the digits of x."""
    require(
        x.dtype in (jnp.bfloat16, jnp.float16, jnp.float32),
        f"{op}: x is {x.dtype}, but implementation='triton' expects bfloat16, float16 or float32; "
        "use implementation='xla'.",
    )


def split_channels(channels, programs, *, smallest=8, enough=512):
    """Return the number of channels per program: the largest power of two with enough programs.

    Few rows need small blocks to occupy the whole GPU. With many rows, large blocks repeat less of
    the work that programs have in common.

    Args:
      channels: size of the axis to split.
      programs: number of programs without splitting it.
      smallest: smallest block size.
      enough: number of programs at which splitting stops.
    """
    block = triton.next_power_of_2(channels)
    while block > smallest and programs * triton.cdiv(channels, block) < enough:
        block //= 2
    return block


def warps_for(elements, *, per_warp=1024):
    """Return the number of warps, a power of two up to 16, for `elements` values in registers."""
    return min(max(triton.next_power_of_2(triton.cdiv(elements, per_warp)), 1), 16)


def require_power_of_2(op, **sizes):
    """Raise ValueError if a size of a block, by the name of its argument, is no power of two."""
    for name, size in sizes.items():
        require(
            size == triton.next_power_of_2(size), f"{op}: {name} = {size}, expected a power of two"
        )
