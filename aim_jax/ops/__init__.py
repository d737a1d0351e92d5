"""Operations of the Mamba mixers: scans, single steps, causal convolution and cross entropy.

They depend on JAX only. `implementation=` selects the code that computes an operation; see
`aim_jax.ops.implementation`.
"""

from aim_jax.ops.conv import causal_conv1d, conv_ring
from aim_jax.ops.cross_entropy import cross_entropy, linear_cross_entropy
from aim_jax.ops.decode import (
    add_norm_modulate,
    conv_step,
    dual_step,
    linear,
    mamba1_step,
    mamba2_step,
)
from aim_jax.ops.dual import (
    DualCache,
    grow_dual_cache,
    init_dual_cache,
    ssd_dual_extend,
    ssd_dual_step,
)
from aim_jax.ops.implementation import IMPLEMENTATIONS
from aim_jax.ops.reference import recurrence
from aim_jax.ops.selective_scan import selective_scan, selective_scan_step
from aim_jax.ops.ssd import ssd_scan, ssd_step

__all__ = [
    "IMPLEMENTATIONS",
    "DualCache",
    "add_norm_modulate",
    "causal_conv1d",
    "conv_ring",
    "conv_step",
    "cross_entropy",
    "dual_step",
    "grow_dual_cache",
    "init_dual_cache",
    "linear",
    "linear_cross_entropy",
    "mamba1_step",
    "mamba2_step",
    "recurrence",
    "selective_scan",
    "selective_scan_step",
    "ssd_dual_extend",
    "ssd_dual_step",
    "ssd_scan",
    "ssd_step",
]
