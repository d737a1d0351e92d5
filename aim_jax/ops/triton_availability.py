"""Availability of the Triton kernels in this environment.

It is not part of the package `aim_jax.ops.triton`, whose import fails where they cannot be used.
"""

import functools
import importlib
from importlib import metadata

import jax

INSTALL = "pip install 'aim_jax[cuda]'"
CUDA_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")


@functools.cache
def triton_unavailable_because() -> str:
    """Return the reason, in one line, that the Triton kernels are unavailable; "" if they work.

    The check imports them. jax-triton uses internals of JAX, JAX's CUDA plugin and Triton, so
    releases of these packages can be incompatible even if all are installed.
    """
    try:
        importlib.import_module("aim_jax.ops.triton")
    except Exception as error:
        return str(error).removeprefix("aim_jax.ops.triton: ")
    return ""


def cause_of(error: Exception) -> str:
    """Explain, in one line, an error of importing jax-triton or its dependencies.

    Args:
      error: raised by importing jax_triton, triton, or a name from them.
    """
    if isinstance(error, ModuleNotFoundError) and error.name in ("triton", "jax_triton"):
        return f"{error.name.replace('_', '-')} is not installed: {INSTALL}"
    jaxlib = version_of("jaxlib")
    for plugin in CUDA_PLUGINS:
        # JAX ignores a plugin of another version with a warning; jax-triton then lacks its names.
        if version_of(plugin) not in (None, jaxlib):
            return f"{plugin} {version_of(plugin)} does not fit jaxlib {jaxlib}: {INSTALL}"
    packages = ("jax-triton", "triton", "jax", *CUDA_PLUGINS[:1])
    versions = ", ".join(f"{name} {version_of(name) or 'not installed'}" for name in packages)
    message = (str(error).splitlines() or [""])[0]
    return (
        f"importing jax-triton fails with {type(error).__name__}: {message} ({versions}). "
        f"Versions that work together: {INSTALL}"
    )


def newer_than_assembler() -> bool:
    """Return whether the first GPU has compute capability 10 or higher."""
    capability = getattr(jax.devices()[0], "compute_capability", None)
    return capability is not None and float(capability) >= 10


def version_of(package: str) -> str | None:
    """Return the version of a package, or None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
