"""State-space operations: scans, single steps and the causal convolution of the Mamba mixers."""

from aim_jax.ops.conv import causal_conv1d
from aim_jax.ops.reference import recurrence
from aim_jax.ops.selective_scan import selective_scan, selective_scan_step
from aim_jax.ops.ssd import ssd_scan, ssd_step

__all__ = [
    "causal_conv1d",
    "recurrence",
    "selective_scan",
    "selective_scan_step",
    "ssd_scan",
    "ssd_step",
]
