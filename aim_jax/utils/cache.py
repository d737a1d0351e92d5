"""Cache directory of the user, which holds code that this library runs, and files of work saved.

It holds compiled programs and kernels, features of references, and indexes of tar files. Code is
loaded from it, so it has to belong to the user alone.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from absl import logging

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def cache_directory(part: str = "") -> Path:
    """Return the cache directory, or a part of it, which only this user can write; create it.

    It is $XDG_CACHE_HOME/aim_jax, by default ~/.cache/aim_jax. Where that cannot be created or
    written, belongs to another user, or can be written by others, every part is in a private
    temporary directory that this process removes at its end. A warning names it and the reason.

    Args:
      part: name of a subdirectory, such as "references".

    Raises:
      OSError: there is no directory for temporary files either.
    """
    try:
        root = private_directory(_preferred_root())
        return private_directory(root / part) if part else root
    except OSError as error:
        root = _temporary_root(str(error))
    return private_directory(root / part) if part else root


def private_directory(path: Path) -> Path:
    """Create a directory with mode 0700 unless it exists, and return it.

    Raises:
      OSError: it cannot be created or written, belongs to another user, or others can write it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"{path} cannot be created ({error.strerror})") from error
    status = path.stat()
    if status.st_uid != os.geteuid():
        raise OSError(f"{path} belongs to another user (uid {status.st_uid})")
    if status.st_mode & OTHERS_WRITE:
        raise OSError(
            f"{path} can be written by other users (mode {stat.S_IMODE(status.st_mode):04o}; "
            f"delete it, or check its contents and run chmod 700 {path})"
        )
    if not os.access(path, os.W_OK | os.X_OK):
        raise OSError(f"{path} cannot be written")
    return path


def is_own_file(path: Path) -> bool:
    """Return whether a regular file, no link, belongs to this user and only the user writes it."""
    try:
        status = path.lstat()
    except OSError:
        return False
    is_own = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
    return is_own and not status.st_mode & OTHERS_WRITE


def can_write(path: Path) -> bool:
    """Return whether a file or directory can be created or changed at a path."""
    parents = [path.absolute(), *path.absolute().parents]
    nearest = next(parent for parent in parents if parent.exists())
    if nearest == parents[0] and not nearest.is_dir():
        return os.access(nearest, os.W_OK)
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def writable_or_cached(path: Path) -> Path:
    """Return where to keep a file: at `path`, or in the cache directory where that is read-only."""
    if can_write(path.parent):
        return path
    name = hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:16]
    cached = cache_directory("files") / f"{name}-{path.name}"
    logging.warning("%s cannot be written; %s is kept in %s.", path.parent, path.name, cached)
    return cached


def default_or_cached(default: str, part: str) -> Path | None:
    """Return the directory that another library should use instead of its default.

    Args:
      default: the library's own directory, such as "~/.triton/cache".
      part: see `cache_directory`.

    Returns:
      None if the default exists or can be created, else a part of the cache directory.
    """
    try:
        path = Path(default).expanduser()
        is_usable = path.exists() or can_write(path)
    except RuntimeError:  # a user without a home directory
        is_usable = False
    return None if is_usable else cache_directory(part)


@contextlib.contextmanager
def locked(path: Path, seconds: float) -> Iterator[None]:
    """Hold an exclusive lock on a file during the block; processes take turns.

    After `seconds`, or where the file system has no locks, the block runs without it. It may
    therefore only save work that is also correct when it is done twice.
    """
    with path.open("w") as file:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EINTR):
                    break
            time.sleep(0.05)
        yield  # closing the file releases the lock


def _preferred_root() -> Path:
    """Return the cache directory of the user.

    Raises:
      OSError: the user has no home directory; / is none either, as some containers set it.
    """
    if cache_home := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache_home).absolute() / "aim_jax"
    try:
        home = Path.home()
    except RuntimeError:  # neither $HOME nor an entry in the list of users
        raise OSError("this user has no home directory") from None
    if home == Path(home.anchor):
        raise OSError(f"the home directory is {home}")
    if not home.is_dir():
        raise OSError(f"the home directory {home} does not exist")
    return home / ".cache" / "aim_jax"


@functools.cache
def _temporary_root(reason: str) -> Path:
    """Return the temporary directory, and log each reason for it once."""
    directory = Path(_temporary_directory().name)
    logging.warning(
        "Nothing is cached for later runs: %s. Set XDG_CACHE_HOME to a directory of your own. "
        "This run uses %s.",
        reason,
        directory,
    )
    return directory


@functools.cache
def _temporary_directory() -> tempfile.TemporaryDirectory:
    """Return a private directory that is removed when this process ends."""
    try:
        return tempfile.TemporaryDirectory(prefix="aim_jax_")  # of mode 0700
    except OSError as error:
        raise OSError(
            f"no directory for temporary files can be written ({error.strerror}); set TMPDIR to one"
        ) from error
