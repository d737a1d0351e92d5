"""Implementations of the ops, selected with `implementation=`.

- "xla": plain JAX, differentiable, on any device; the reference for the others.
- "native": fused C++ kernels for CPUs (`aim_jax.ops.native`); they need a C++ compiler.
- "triton": fused kernels for NVIDIA GPUs (`aim_jax.ops.triton`); they need the `cuda` extra.
- "pallas": fused kernels for TPUs; no op has one yet.

None is the default. For an op it means "xla", because most kernels are not differentiable. Those
of `ssd_scan` and `causal_conv1d` are: on NVIDIA GPUs, None means "triton" there in functions of
`sharded_jit`, which are the steps of a training; see `training_default`. For the token loop, which
needs no gradients, it means the fused kernels of the device if there are any; see
`aim_jax.sampling.engine.resolve`. Training of tokenizers chooses in the same way between "xla" and
the differentiable ops of `aim_jax.ops.conv2d` and `aim_jax.ops.group_norm`. An explicit
implementation is either used or rejected with an error that says why; it is never replaced
silently.
"""

import contextlib
import importlib
from types import ModuleType

import jax
from absl import logging

from aim_jax.ops.triton_availability import newer_than_assembler, triton_unavailable_because
from aim_jax.parallel.sharding import active_mesh

IMPLEMENTATIONS = ("xla", "native", "triton", "pallas")
TRITON_PLATFORMS = ("gpu", "cuda")  # JAX's platform names of NVIDIA GPUs


def implementation_of(op: str, implementation: str | None, available: tuple[str, ...]) -> str:
    """Resolve the implementation of an op.

    Args:
      op: name of the op, for the error message.
      implementation: the caller's choice; None means "xla".
      available: implementations that the op has.

    Raises:
      ValueError: the op has no such implementation.
    """
    chosen = implementation or "xla"
    if chosen not in available:
        raise ValueError(
            f"{op}: implementation={chosen!r}; expected None or one of {', '.join(available)}."
        )
    return chosen


def training_default() -> str:
    """Return "triton" if an NVIDIA GPU runs the `sharded_jit` function being traced, else "xla".

    The mesh of the function names the devices. Other functions may run anywhere, and the kernels
    have no batching rule. Logs a warning with the reason where the kernels are unavailable.
    """
    mesh = active_mesh()
    if mesh is None or getattr(mesh.abstract_device, "platform", "") not in TRITON_PLATFORMS:
        return "xla"
    reason = triton_unavailable_because()
    if newer_than_assembler():
        reason = "Triton emits PTX for this GPU that the assembler of the cuda extra cannot read."
    if reason:
        logging.log_first_n(logging.WARNING, "Training without fused kernels: %s", 1, reason)
        return "xla"
    return "triton"


def kernels_of(implementation: str) -> ModuleType:
    """Import the package with the "native" or "triton" kernels.

    Raises:
      ImportError: a package that the kernels need is not installed.
    """
    return importlib.import_module(f"aim_jax.ops.{implementation}")


def compiling_kernels_for(device: jax.Device) -> contextlib.AbstractContextManager:
    """Return a context that compiles the Triton kernels for a device that is not attached."""
    if device.platform not in TRITON_PLATFORMS or triton_unavailable_because():
        return contextlib.nullcontext()
    return kernels_of("triton").launch.compiling_for(device)
