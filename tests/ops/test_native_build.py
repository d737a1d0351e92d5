"""Native libraries: whose are loaded, and how they are built. The compiler is a stand-in."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aim_jax.ops.native import build
from aim_jax.utils import cache
from tests.conftest import ROOT

COMPILER = """#!/bin/sh
echo "$@" >> "$CALLS"
sleep "${SLOW:-0}"
while [ "$1" != -o ]; do shift; done
printf library > "$2"
"""


@pytest.fixture
def calls(monkeypatch, tmp_path) -> Path:
    """The file of the calls of a compiler that writes the same library each time."""
    program = tmp_path / "bin" / "compiler"
    program.parent.mkdir()
    program.write_text(COMPILER)
    program.chmod(0o755)
    calls = tmp_path / "calls"
    calls.write_text("")
    monkeypatch.setenv("CXX", str(program))
    monkeypatch.setenv("CALLS", str(calls))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return calls


def count(calls: Path) -> int:
    return len(calls.read_text().splitlines())


SOURCES = len(list(build.SOURCES.glob("*.cc")))
ONE_BUILD = SOURCES + 1  # and the linking


def test_a_library_is_built_once_and_private(calls):
    library = build.compile_sources()
    assert library.read_text() == "library" and cache.is_own_file(library)
    assert build.compile_sources() == library and count(calls) == ONE_BUILD
    assert {path.suffix for path in library.parent.iterdir()} == {".so", ".sha256", ".lock"}


@pytest.mark.parametrize("damage", ["truncated", "replaced", "link", "open", "no checksum"])
def test_libraries_that_are_not_intact_are_built_again(damage, calls, tmp_path):
    library = build.compile_sources()
    if damage == "truncated":
        library.write_text("lib")
    elif damage == "replaced":
        library.write_text("planted")
    elif damage == "link":
        (tmp_path / "other.so").write_text("library")
        library.unlink()
        library.symlink_to(tmp_path / "other.so")
    elif damage == "open":
        library.chmod(0o777)
    else:
        build.checksum_file(library).unlink()
    assert not build.is_intact(library)
    assert build.compile_sources() == library and count(calls) == 2 * ONE_BUILD
    assert library.read_text() == "library" and build.is_intact(library)


def test_planted_libraries_in_predictable_directories_are_not_loaded(calls, monkeypatch, tmp_path):
    """Without a home, in the directory of temporary files that everybody can write."""
    library = build.compile_sources()
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    for function in (cache._temporary_root, cache._temporary_directory):
        function.cache_clear()
    for folder in (tmp_path / f"aim_jax_{os.getuid()}", tmp_path / "aim_jax"):
        for name in (library.name, f"native-{library.stem}.so"):
            for place in (folder / "native", folder):
                place.mkdir(parents=True, exist_ok=True)
                (place / name).write_text("planted")
    found = build.compile_sources()
    assert found.read_text() == "library" and count(calls) == 2 * ONE_BUILD
    for function in (cache._temporary_root, cache._temporary_directory):
        function.cache_clear()


def test_libraries_in_directories_that_others_can_write_are_not_loaded(calls, tmp_path):
    library = build.compile_sources()
    library.parent.chmod(0o777)
    found = build.compile_sources()
    assert found != library and found.name == library.name and count(calls) == 2 * ONE_BUILD
    assert not found.is_relative_to(tmp_path / "cache")


def test_processes_that_start_together_build_once(calls, monkeypatch):
    monkeypatch.setenv("SLOW", "1")
    code = "from aim_jax.ops.native import build; print(build.compile_sources())"
    command = [sys.executable, "-c", code]
    started = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    outputs = {process.communicate(timeout=120)[0] for process in started}
    assert len(outputs) == 1 and count(calls) == ONE_BUILD


def test_a_lock_that_nobody_releases_delays_only(tmp_path):
    with cache.locked(tmp_path / "a.lock", 1):
        start = time.monotonic()
        with cache.locked(tmp_path / "a.lock", 0.2):
            assert 0.2 <= time.monotonic() - start < 60


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_compiler_that_hangs_is_ended_with_the_programs_it_started(calls, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "COMPILER_SECONDS", 0.5)
    program = tmp_path / "hangs"
    program.write_text(f"#!/bin/sh\nsleep 600 & echo $! >> {tmp_path}/pids\nwait\n")
    program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    with pytest.raises(build.BuildError, match=r"hangs did not compile the kernels in 0\.5 s"):
        build.compile_sources()
    for pid in (tmp_path / "pids").read_text().split():
        # A killed process may run for a moment until the system has ended it.
        deadline = time.monotonic() + 30
        while is_running(pid) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not is_running(pid)
    assert not list((tmp_path / "cache" / "aim_jax" / "native").glob("*.so"))


def test_a_compiler_may_have_arguments(calls, monkeypatch, tmp_path):
    wrapper = tmp_path / "bin" / "ccache"
    wrapper.write_text('#!/bin/sh\nexec "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("CXX", "ccache compiler -DNAME='a b'")
    assert build.compiler() == [str(wrapper), "compiler", "-DNAME=a b"]
    assert build.compile_sources().read_text() == "library"
    assert count(calls) == ONE_BUILD and "-DNAME=a b" in calls.read_text()


@pytest.mark.parametrize("given", ["no_such_compiler -O1", "'unbalanced", '""'])
def test_a_compiler_that_is_not_there_is_named(given, monkeypatch):
    monkeypatch.setenv("CXX", given)
    with pytest.raises(build.BuildError, match="CXX="):
        build.compiler()
