"""Memory of long programs in large pages, on Linux."""

import os
import platform
import sys
from pathlib import Path

# Whether the kernel gives large pages to all programs, to those that ask, or to none.
CHOICE = Path("/sys/kernel/mm/transparent_hugepage/enabled")
VARIABLE = "GLIBC_TUNABLES"
ASKING = "glibc.malloc.hugetlb=1"
GLIBC = (2, 35)  # the first version with this setting


def huge_pages(environment: dict[str, str]) -> dict[str, str]:
    """Return environment variables with which a process asks for large pages; {} to leave it.

    XLA on CPU allocates the temporary arrays of a training step, often gigabytes, and frees them
    after it, so the kernel prepares every page anew in every step. Pages of 2 MB instead of 4 kB
    make that, and the access to them, faster. Most kernels give them to programs that ask.

    Args:
      environment: variables of the process. What the user has set in `GLIBC_TUNABLES` counts.
    """
    if environment.get(VARIABLE) or not _may_ask():
        return {}
    return {VARIABLE: ASKING}


def _may_ask() -> bool:
    library, version = platform.libc_ver()
    if sys.platform != "linux" or library != "glibc":
        return False
    try:
        has_setting = tuple(int(number) for number in version.split(".")[:2]) >= GLIBC
        return has_setting and "[madvise]" in CHOICE.read_text()
    except (OSError, ValueError):
        return False


def restart_with_huge_pages() -> None:
    """Start the running program again with `huge_pages`, if that changes anything.

    glibc reads its settings as a process starts only. The process keeps its number, and the program
    starts from its beginning, so this comes before anything else. Nothing happens in a process that
    was not started with these arguments, such as one that runs tests.
    """
    given = sys.argv[1:]
    added = huge_pages(dict(os.environ))
    if not (sys.executable and given) or sys.orig_argv[-len(given) :] != given or not added:
        return
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | added)
