"""What all kernels share: the call from JAX, and block sizes."""

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

# Of kernels whose caller does not say: None is that of the present device. To lower or compile
# ahead of time what calls kernels from deep inside, set it.
default_compute_capability = None

TARGET = "triton_kernel_call_ffi"


def launch(kernel, *arrays, outputs, grid, aliases=(), compute_capability=None, **options):
    """Calls a Triton kernel: its arguments are `arrays`, `outputs`, then constants by name.

    Args:
      kernel: a `triton.jit` function.
      *arrays: inputs; integers become int32 scalars.
      outputs: shape and dtype of every output, in the kernel's order.
      grid: programs along up to three axes.
      aliases: pairs (input, output) by index that share a buffer.
      compute_capability: 80, 90, ...; None is `default_compute_capability`.
      **options: constants of the kernel, and num_warps, num_stages, enable_fp_fusion of
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


def lower(context, *arrays, **params):
    """What `triton_call` becomes in a CUDA program; other callers' calls are left as they are.

    jax-triton 0.3 writes calls of XLA's old interface, which stay out of CUDA graphs: the host
    launches every kernel. jaxlib has the same call in the typed interface, marked as fit for
    graphs, and with it the whole body of a decode loop becomes one.
    """
    outputs = triton_kernel_call_lowering(get_cuda_backend, context, *arrays, **params)
    if params["custom_call_target_name"] == TARGET:
        attributes = outputs[0].owner.attributes
        opaque = ir.StringAttr.get(attributes["backend_config"].value_bytes)
        attributes["backend_config"] = ir.DictAttr.get({"opaque": opaque})
        attributes["api_version"] = mlir.i32_attr(4)
    return outputs


mlir.register_lowering(triton_kernel_call_p, lower, platform="cuda")


def split_channels(channels, programs, *, smallest=8, enough=512):
    """The largest power of two of channels per program that leaves `enough` programs.

    Few rows need small blocks to occupy the whole GPU; with many rows a large block repeats less
    of the work that its programs share.

    Args:
      channels: size of the axis to be split.
      programs: programs without splitting it.
      smallest, enough: no block below the first, no split once there are `enough` programs.
    """
    block = triton.next_power_of_2(channels)
    while block > smallest and programs * triton.cdiv(channels, block) < enough:
        block //= 2
    return block


def warps_for(elements, *, per_warp=1024):
    """Warps of a program that holds `elements` values in registers: 1 to 16, a power of two."""
    return min(max(triton.next_power_of_2(triton.cdiv(elements, per_warp)), 1), 16)
