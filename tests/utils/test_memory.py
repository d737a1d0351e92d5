import os
import platform
import subprocess
import sys

import pytest

from aim_jax.utils import memory

CHANGED = "GLIBC_TUNABLES"
CODE = """
import os, pathlib, sys
from aim_jax.utils import memory
memory.CHOICE = pathlib.Path(os.environ["CHOICE"])
print("started", flush=True)
memory.restart_with_huge_pages()
print(os.getpid(), os.environ.get("GLIBC_TUNABLES"), *sys.argv[1:])
"""
needs_glibc = pytest.mark.skipif(
    sys.platform != "linux" or platform.libc_ver()[0] != "glibc", reason="a setting of glibc"
)


@pytest.fixture
def choice(tmp_path, monkeypatch):
    file = tmp_path / "enabled"
    monkeypatch.setattr(memory, "CHOICE", file)
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(sys, "platform", "linux")
    return file


@pytest.mark.parametrize(
    ("kernel", "user", "version", "asks"),
    [
        ("always [madvise] never", None, "2.36", True),
        ("always [madvise] never", "", "2.35", True),
        ("[always] madvise never", None, "2.36", False),
        ("always madvise [never]", None, "2.36", False),
        (None, None, "2.36", False),
        ("always [madvise] never", "glibc.malloc.check=1", "2.36", False),
        ("always [madvise] never", None, "2.34", False),
        ("always [madvise] never", None, "", False),
    ],
)
def test_only_programs_that_may_ask_do(kernel, user, version, asks, choice, monkeypatch):
    if kernel:
        choice.write_text(f"{kernel}\n")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", version))
    environment = {} if user is None else {CHANGED: user}
    assert memory.huge_pages(environment) == ({CHANGED: memory.ASKING} if asks else {})


def test_tests_are_not_started_again(choice, monkeypatch):
    choice.write_text("always [madvise] never\n")
    monkeypatch.delenv(CHANGED, raising=False)
    monkeypatch.setattr(sys, "argv", ["aim-jax", "train", "--config=cifar10"])
    monkeypatch.setattr(os, "execve", lambda *_: pytest.fail("started again"))
    memory.restart_with_huge_pages()


@needs_glibc
@pytest.mark.parametrize("asks", [True, False])
def test_a_program_starts_again_once_with_its_arguments(asks, tmp_path):
    kernel = tmp_path / "enabled"
    kernel.write_text("always [madvise] never" if asks else "[always] madvise never")
    environment = {k: v for k, v in os.environ.items() if k != CHANGED} | {"CHOICE": str(kernel)}
    process = subprocess.Popen(
        [sys.executable, "-c", CODE, "train", "--a b"],
        env=environment, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    lines = process.communicate()[0].splitlines()
    assert lines[:-1] == ["started"] * (1 + asks)
    assert lines[-1] == f"{process.pid} {memory.ASKING if asks else None} train --a b"
