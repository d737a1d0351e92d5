"""Compiles the C++ sources of this package for the machine at hand, once, and loads them."""

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
    """There is no compiler, or it refused the sources; the message says what to do."""


def cache_directory() -> Path:
    """What can be made anew is kept in $XDG_CACHE_HOME/aim_jax, by default ~/.cache/aim_jax."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "aim_jax"
    try:
        return Path.home() / ".cache" / "aim_jax"
    except RuntimeError:  # a user without a home, as in some containers
        return Path(tempfile.gettempdir()) / f"aim_jax_{os.getuid()}"


def compiler() -> str:
    """The C++ compiler: $CXX, or the first of c++, g++ and clang++ that is there."""
    names = [name for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name]
    found = [path for path in map(shutil.which, names) if path]
    if not found:
        raise BuildError(
            "no C++ compiler found (CXX, c++, g++, clang++). Install one, or decode without it: "
            "implementation='xla'."
        )
    return found[0]


def architecture_flags() -> tuple[str, ...]:
    """Compiler flags for the processor of this machine."""
    if platform.machine() in ("x86_64", "AMD64"):
        return ("-march=native", "-mprefer-vector-width=512")
    return ("-mcpu=native",)


def processor() -> str:
    """What decides which instructions there are; part of the name of the compiled file."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine()
    lines = info.read_text().splitlines()
    return "\n".join(
        sorted({x for x in lines if x.startswith(("model name", "flags", "Features"))})
    )


def compile_sources() -> Path:
    """The shared library for this machine, compiled if no earlier call has done so.

    Raises:
      BuildError: there is no compiler, or it failed.
    """
    sources = sorted(SOURCES.glob("*.cc"))
    command = [compiler(), *FLAGS, *architecture_flags(), "-isystem", jax.ffi.include_dir()]
    what = [" ".join(command), jax.lib.__version__, processor()]
    what += [path.read_text() for path in sorted(SOURCES.glob("*.[ch]*"))]
    name = hashlib.sha256("\n".join(what).encode()).hexdigest()[:16]
    library = cache_directory() / f"native-{name}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch, ThreadPoolExecutor() as pool:
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        jobs = zip(sources, objects, strict=True)
        list(pool.map(lambda job: _run([*command, "-c", str(job[0]), "-o", str(job[1])]), jobs))
        made = Path(scratch) / library.name
        _run([*command, "-shared", *map(str, objects), "-o", str(made)])
        made.rename(library)
    return library


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        raise BuildError(
            f"{command[0]} could not compile the kernels for this processor: "
            f"{(errors or ['it said nothing'])[0]}. CXX names another compiler; "
            "implementation='xla' decodes without them."
        )


@functools.cache
def register() -> None:
    """Makes the kernels known to XLA, compiling them first where that is due (about 10 s).

    Raises:
      BuildError: see `compile_sources`.
    """
    library = ctypes.CDLL(str(compile_sources()))
    for target in TARGETS:
        jax.ffi.register_ffi_target(
            target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu"
        )
