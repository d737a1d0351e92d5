"""Compilation and loading of this package's C++ kernels, once per user and machine.

A library is code that this process runs. It is therefore loaded only from a directory and a file
that nobody else can write, and only if it has the checksum that was written with it.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import jax

from aim_jax.utils.cache import cache_directory, is_own_file, locked
from aim_jax.utils.files import replacing

SOURCES = Path(__file__).parent
TARGETS = tuple(
    f"aim_{name}"
    for name in (
        "linear", "mamba2_step", "dual_step", "add_norm_modulate", "sample",
        "conv2d", "conv2d_kernel_gradient", "group_norm", "group_norm_gradient",
    )
)  # fmt: skip
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC", "-pthread")


# Seconds that the compiler may take; it needs about 10.
COMPILER_SECONDS = 300.0
ADVICE = "Set CXX to another compiler, or decode with implementation='xla'."


class BuildError(RuntimeError):
    """No compiler was found, or it failed; the message says what to do."""


def compiler() -> list[str]:
    """Return the C++ compiler as a command: $CXX if it is set, else c++, g++ or clang++.

    $CXX may have arguments, as in "ccache g++".

    Raises:
      BuildError: none is installed, or $CXX is not the command of one.
    """
    if given := os.environ.get("CXX", "").strip():
        try:
            program, *arguments = shlex.split(given)
        except ValueError as error:
            raise BuildError(f"CXX={given!r} is not a command: {error}.") from error
        path = shutil.which(program)
        if path is None:
            raise BuildError(
                f"CXX={given!r}: there is no program {program!r}. Set CXX to a C++ compiler, or "
                "unset it to use c++, g++ or clang++."
            )
        return [path, *arguments]
    paths = [path for path in map(shutil.which, ("c++", "g++", "clang++")) if path]
    if not paths:
        raise BuildError(
            "no C++ compiler found (tried $CXX, c++, g++ and clang++). Install one, or decode with "
            "implementation='xla'."
        )
    return paths[:1]


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

    Processes that need it at the same time compile it once.

    Raises:
      BuildError: no compiler was found, it failed, or it took longer than `COMPILER_SECONDS`.
      OSError: see `cache_directory`.
    """
    command = [*compiler(), *FLAGS, *architecture_flags(), "-isystem", jax.ffi.include_dir()]
    key = [" ".join(command), jax.lib.__version__, processor()]
    key += [path.read_text() for path in sorted(SOURCES.glob("*.[ch]*"))]
    name = hashlib.sha256("\n".join(key).encode()).hexdigest()[:16]
    library = cache_directory("native") / f"{name}.so"
    if is_intact(library):
        return library
    with locked(library.with_suffix(".lock"), 2 * COMPILER_SECONDS):
        if not is_intact(library):
            _compile_to(library, command)
    return library


def is_intact(library: Path) -> bool:
    """Return whether a library is this user's own file and has the checksum beside it."""
    checksum = checksum_file(library)
    if not (is_own_file(library) and is_own_file(checksum)):
        return False
    return checksum.read_text().strip() == digest(library)


def checksum_file(library: Path) -> Path:
    """Return the path of the file with the checksum of a library."""
    return library.with_suffix(".sha256")


def digest(file: Path) -> str:
    """Return the SHA-256 of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _compile_to(library: Path, command: list[str]) -> None:
    """Compile the sources to a library and write its checksum; a failure leaves neither."""
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        sources = sorted(SOURCES.glob("*.cc"))
        objects = [Path(scratch) / f"{source.stem}.o" for source in sources]
        jobs = zip(sources, objects, strict=True)
        run_compilers([[*command, "-c", str(source), "-o", str(out)] for source, out in jobs])
        linked = Path(scratch) / library.name
        run_compilers([[*command, "-shared", *map(str, objects), "-o", str(linked)]])
        linked.chmod(0o700)
        # The checksum of another library does not fit, so an interruption between the two leads to
        # another compilation.
        with replacing(checksum_file(library)) as partial:
            partial.write_text(digest(linked) + "\n")
            partial.chmod(0o600)
        linked.replace(library)


def run_compilers(commands: Sequence[Sequence[str]]) -> None:
    """Run commands of the compiler at the same time, at most `COMPILER_SECONDS`.

    Raises:
      BuildError: one of them failed, or did not end in time; none is left running.
    """
    deadline = time.monotonic() + COMPILER_SECONDS
    with contextlib.ExitStack() as stack:
        started = [(command, *stack.enter_context(_started(command))) for command in commands]
        for command, process, output in started:
            name = shlex.join(command[:1])
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise BuildError(
                    f"{name} did not compile the kernels in {COMPILER_SECONDS:g} s. {ADVICE}"
                ) from None
            if process.returncode:
                output.seek(0)
                lines = output.read().decode(errors="replace").splitlines()
                errors = [line for line in lines if "error" in line]
                raise BuildError(
                    f"{name} could not compile the kernels for this processor: "
                    f"{(errors or ['no error message'])[0]}. {ADVICE}"
                )


@contextlib.contextmanager
def _started(command: Sequence[str]) -> Iterator[tuple[subprocess.Popen, IO[bytes]]]:
    """Start a command; yield its process and its output, and kill what runs after the block."""
    with tempfile.TemporaryFile() as output:
        try:
            # A compiler starts other programs, which a group of its own ends with it. A file takes
            # the output because a pipe would stay open in them.
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise BuildError(f"{shlex.join(command[:1])} cannot run: {error}. {ADVICE}") from error
        try:
            yield process, output
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


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
