"""Tells whether the Triton kernels can be used in this environment, and if not, why.

It is beside the package `aim_jax.ops.triton`, which cannot be imported where they cannot be used.
"""

import functools
import importlib
from importlib import metadata

INSTALL = "pip install 'aim_jax[cuda]'"
CUDA_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")


@functools.cache
def triton_unavailable_because() -> str:
    """Return why the Triton kernels cannot be used here, in one line; "" if they can.

    The test is to import them. jax-triton reaches into JAX, JAX's CUDA plugin and Triton, so that
    installed packages can still be of releases that do not work together.
    """
    try:
        importlib.import_module("aim_jax.ops.triton")
    except Exception as error:
        return str(error).removeprefix("aim_jax.ops.triton: ")
    return ""


def cause_of(error: Exception) -> str:
    """Explain, in one line, an error of importing jax-triton or what it builds on.

    Args:
      error: of `import jax_triton`, of `import triton`, or of taking a name from them.
    """
    if isinstance(error, ModuleNotFoundError) and error.name in ("triton", "jax_triton"):
        return f"{error.name.replace('_', '-')} is not installed: {INSTALL}"
    jaxlib = version_of("jaxlib")
    for plugin in CUDA_PLUGINS:
        # JAX ignores a plugin of another version with a warning; jax-triton then misses its names.
        if version_of(plugin) not in (None, jaxlib):
            return f"{plugin} {version_of(plugin)} does not fit jaxlib {jaxlib}: {INSTALL}"
    packages = ("jax-triton", "triton", "jax", *CUDA_PLUGINS[:1])
    versions = ", ".join(f"{name} {version_of(name) or 'not installed'}" for name in packages)
    message = (str(error).splitlines() or [""])[0]
    return (
        f"importing jax-triton fails with {type(error).__name__}: {message} ({versions}). "
        f"Versions that work together: {INSTALL}"
    )


def version_of(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
