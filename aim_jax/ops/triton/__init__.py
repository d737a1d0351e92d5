"""Fused Triton kernels for NVIDIA GPUs: decode step, scans, gradients of a scan, and sampler.

The package is imported only when its kernels are used. It needs the `cuda` extra, but no GPU to
import, lower or compile ahead of time. Every function is a plain JAX function that works inside
`jit`, `lax.scan` and `shard_map`. `ssd_scan` and `causal_conv1d` are differentiable in reverse
mode, the others are not. None has a batching rule.

Axes: L layers, b rows (sequences), h heads, p headdim, e = h p inner channels, n state, g groups, w
convolution width, T tokens, d model, v vocabulary.

Conventions:

- Parameters and caches have a leading layer axis L. They are passed whole, with the layer as an
  int32 scalar, because XLA would copy a slice.
- Caches are updated in place (`input_output_aliases`): donate the argument and use the returned
  array. Only the current layer's part is read or written.
- Arithmetic is float32. Arrays may be float32 or bfloat16, unless a docstring says otherwise.
- The convolution's cache is a ring buffer of the last w inputs, with the input of position t in
  slot t mod w. It starts as zeros; `aim_jax.ops.conv_ring` makes one from the inputs of a prefix.
- `compute_capability` (80, 90, ...) selects the architecture; None is the current device's.
"""

from aim_jax.ops.triton_availability import cause_of

try:
    from aim_jax.ops.triton import launch  # noqa: F401  (the only module that imports jax_triton)
except Exception as error:  # a jax-triton for another version of JAX can fail in any way
    raise ImportError(f"aim_jax.ops.triton: {cause_of(error)}") from error

from aim_jax.ops.triton.conv import (
    causal_conv1d,  # noqa: F401  (made of kernels, not one)
    conv_gradients,
    conv_outputs,
)
from aim_jax.ops.triton.dual import dual_step
from aim_jax.ops.triton.mamba1 import conv_step, mamba1_step
from aim_jax.ops.triton.mamba2 import mamba2_step
from aim_jax.ops.triton.norm import add_norm_modulate
from aim_jax.ops.triton.prefill import selective_scan_prefill, ssd_prefill
from aim_jax.ops.triton.sampling import sample
from aim_jax.ops.triton.ssd_chunks import (
    ssd_inputs_gradient,
    ssd_outputs,
    ssd_weights_gradient,
)
from aim_jax.ops.triton.ssd_training import ssd_scan  # noqa: F401  (made of kernels, not one)

__all__ = [
    "add_norm_modulate",
    "conv_gradients",
    "conv_outputs",
    "conv_step",
    "dual_step",
    "mamba1_step",
    "mamba2_step",
    "sample",
    "selective_scan_prefill",
    "ssd_inputs_gradient",
    "ssd_outputs",
    "ssd_prefill",
    "ssd_weights_gradient",
]
