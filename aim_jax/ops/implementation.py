"""One vocabulary for the code that computes an op: `implementation=`.

- "xla": plain JAX, on any device and differentiable; the reference of the others.
- "native": fused C++ kernels for CPUs (`aim_jax.ops.native`), which need a C++ compiler.
- "triton": fused kernels for NVIDIA GPUs (`aim_jax.ops.triton`), which need the extra `cuda`.
- "pallas": fused kernels for TPUs; no op has one yet.

None is the rule. For an op it is "xla", because no kernel has a derivative. For the token loop,
which needs none, it is the fused kernels of the device where there are any; see
`aim_jax.sampling.engine.resolve`. An implementation that is named is used, or refused with the
reason: nothing else takes its place in silence.
"""

import importlib
from types import ModuleType

IMPLEMENTATIONS = ("xla", "native", "triton", "pallas")


def implementation_of(op: str, implementation: str | None, available: tuple[str, ...]) -> str:
    """The implementation that an op uses.

    Args:
      op: its name, for the message.
      implementation: what the caller asks for; None is the rule.
      available: what the op has.

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
    """The package with the kernels of "native" or "triton".

    Raises:
      ImportError: what they need is not installed.
    """
    return importlib.import_module(f"aim_jax.ops.{implementation}")
