"""Compilation and loading of this package's C++ kernels, once per machine."""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

SOURCES = Path(__file__).parent
TARGETS = tuple(
    f"aim_{name}" for name in ("linear", "mamba2_step", "dual_step", "add_norm_modulate", "sample")
)
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-pthread")


class BuildError(RuntimeError):
    """No compiler was found, or it failed; the message says what to do."""


def cache_directory() -> Path:
    """Return the cache directory: $XDG_CACHE_HOME/aim_jax, by default ~/.cache/aim_jax.

    A user without a home directory gets a directory among the temporary files.
    """
    if cache_home := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache_home) / "aim_jax"
    try:
        return Path.home() / ".cache" / "aim_jax"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / f"aim_jax_{os.getuid()}"


def compiler() -> str:
    """Return the C++ compiler: the first that is installed of $CXX, c++, g++ and clang++.

    Raises:
      BuildError: none is installed.
    """
    names = [name for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name]
    paths = [path for path in map(shutil.which, names) if path]
    if not paths:
        raise BuildError(
            "no C++ compiler found (tried $CXX, c++, g++ and clang++). Install one, or decode with "
            "implementation='xla'."
        )
    return paths[0]


def architecture_flags() -> tuple[str, ...]:
    """Return the compiler flags for this machine's processor."""
    if platform.machine() in ("x86_64", "AMD64"):
        return ("-march=native", "-mprefer-vector-width=512")
    return ("-mcpu=native",)


def processor() -> str:
    """Describe this machine's processor and its instruction sets, to key the compiled library."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    lines = info.read_text().splitlines()
    return "\n".join(
        sorted({x for x in lines if x.startswith(("model name", "flags", "Features"))})
    )


def compile_sources() -> Path:
    """Return the path of the shared library for this machine; compile it if it is not cached.

    Raises:
      BuildError: no compiler was found, or it failed.
    """
    sources = sorted(SOURCES.glob("*.cc"))
    command = [compiler(), *FLAGS, *architecture_flags(), "-isystem", jax.ffi.include_dir()]
    key = [" ".join(command), jax.lib.__version__, processor()]
    key += [path.read_text() for path in sorted(SOURCES.glob("*.[ch]*"))]
    name = hashlib.sha256("\n".join(key).encode()).hexdigest()[:16]
    library = cache_directory() / f"native-{name}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch, ThreadPoolExecutor() as pool:
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        jobs = zip(sources, objects, strict=True)
        list(pool.map(lambda job: _run([*command, "-c", str(job[0]), "-o", str(job[1])]), jobs))
        linked = Path(scratch) / library.name
        _run([*command, "-shared", *map(str, objects), "-o", str(linked)])
        linked.rename(library)
    return library


def _run(command: list[str]) -> None:
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        errors = [line for line in process.stderr.splitlines() if "error" in line]
        raise BuildError(
            f"{command[0]} could not compile the kernels for this processor: "
            f"{(errors or ['no error message'])[0]}. Set CXX to another compiler, or decode with "
            "implementation='xla'."
        )


@functools.cache
def register() -> None:
    """Register the kernels with XLA; compile them first if needed (about 10 s).

    Raises:
      BuildError: see `compile_sources`.
    """
    library = ctypes.CDLL(str(compile_sources()))
    for target in TARGETS:
        jax.ffi.register_ffi_target(
            target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu"
        )
