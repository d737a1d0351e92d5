"""The decode step, the prefix scans and the sampler as fused CUDA kernels, written in Triton.

Nothing imports it before its kernels are asked for; it needs the `cuda` extra, but no GPU to
import, lower or compile ahead of time. Every function is a plain JAX function that works inside
`jit`, `lax.scan` and `shard_map`; none has a derivative or a batching rule.

Shared conventions. L layers, b rows (sequences), h heads, p headdim, e = h p inner channels, n
state, g groups, w convolution width, T tokens, d model, v vocabulary.

- Parameters and caches lead with the layer axis L and are passed whole, with the layer as an
  int32 scalar: a slice taken by XLA would be a copy.
- Caches are updated in place (`input_output_aliases`): use the returned array, donate the given
  one. Only the current layer's part of it is read or written.
- Arithmetic is float32; arrays may be float32 or bfloat16, except where a docstring says more.
- The convolution's cache is a ring of the last w inputs: the input of position t is in slot t mod
  w. Zeros start a sequence; `aim_jax.ops.conv_ring` makes one from the inputs of a prefix.
- `compute_capability` (80, 90, ...) selects the architecture; None is the present device's.
"""

from aim_jax.ops.triton_availability import cause_of

try:
    from aim_jax.ops.triton import launch  # noqa: F401  (the only module that imports jax_triton)
except Exception as error:  # a jax-triton made for another JAX can fail in any way
    raise ImportError(f"aim_jax.ops.triton: {cause_of(error)}") from error

from aim_jax.ops.triton.dual import dual_step
from aim_jax.ops.triton.mamba1 import conv_step, mamba1_step
from aim_jax.ops.triton.mamba2 import mamba2_step
from aim_jax.ops.triton.norm import add_norm_modulate
from aim_jax.ops.triton.prefill import selective_scan_prefill, ssd_prefill
from aim_jax.ops.triton.sampling import sample

__all__ = [
    "add_norm_modulate",
    "conv_step",
    "dual_step",
    "mamba1_step",
    "mamba2_step",
    "sample",
    "selective_scan_prefill",
    "ssd_prefill",
]
