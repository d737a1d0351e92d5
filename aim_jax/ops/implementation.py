"""Implementations of the ops, selected with `implementation=`.

- "xla": plain JAX, differentiable, on any device; the reference for the others.
- "native": fused C++ kernels for CPUs (`aim_jax.ops.native`); they need a C++ compiler.
- "triton": fused kernels for NVIDIA GPUs (`aim_jax.ops.triton`); they need the `cuda` extra.
- "pallas": fused kernels for TPUs; no op has one yet.

None is the default. For an op it means "xla", because most kernels are not differentiable. For the
token loop, which needs no gradients, it means the fused kernels of the device if there are any; see
`aim_jax.sampling.engine.resolve`. Training of tokenizers chooses in the same way between "xla" and
the differentiable ops of `aim_jax.ops.conv2d` and `aim_jax.ops.group_norm`. An explicit
implementation is either used or rejected with an error that says why; it is never replaced
silently.
"""

import importlib
from types import ModuleType

IMPLEMENTATIONS = ("xla", "native", "triton", "pallas")


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


def kernels_of(implementation: str) -> ModuleType:
    """Import the package with the "native" or "triton" kernels.

    Raises:
      ImportError: a package that the kernels need is not installed.
    """
    return importlib.import_module(f"aim_jax.ops.{implementation}")
