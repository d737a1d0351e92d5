"""Atomic writes of files and directories, and the error of a full disk."""

import contextlib
import errno
import functools
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aim_jax.utils.endings import closing_all

# Errors of a disk that takes no more: it is full, the user's quota is, or a file is too large.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskFullError(OSError):
    """A file or directory could not be written because the disk is full."""

    def __init__(self, path: str | os.PathLike, reason: str):
        super().__init__(
            f"cannot write {path} ({reason}). Free disk space, and run the same command again."
        )
        self.path = path
        self.reason = reason


def full_disk(error: BaseException | None) -> str:
    """Return the system's message of a full disk if that led to `error`, else "".

    The errors before it are looked at too, because libraries replace them: in clean-up that fails
    as well, and with their own types, which quote the message.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        for number in FULL:
            message = os.strerror(number)
            if (isinstance(error, OSError) and error.errno == number) or message in str(error):
                return message
        error = error.__cause__ or error.__context__
    return ""


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Name `path` in the error if the disk is full while the block writes it.

    Raises:
      DiskFullError: the disk is full.
    """
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if reason := full_disk(error):
            raise DiskFullError(path, reason) from error
        raise


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Replace `path` atomically by a file or directory that the block writes.

    The context manager yields a temporary path beside `path`, and renames it to `path` after the
    block. The old content stays until then, and also if the block raises. An old directory is
    absent for the moment between two renames. Temporary paths are unique among all writers on all
    hosts. Missing parent directories are created. If `path` is a link, its target is replaced.

    Raises:
      IsADirectoryError: a file was written, but `path` is a directory, which is kept.
      DiskFullError: the disk is full.
    """
    path = Path(path).resolve()
    prefix = f".{path.name}.{uuid.uuid4().hex[:12]}"
    partial = path.with_name(f"{prefix}.partial")
    old = path.with_name(f"{prefix}.old")
    with writing(path), closing_all() as at_end:
        path.parent.mkdir(parents=True, exist_ok=True)
        at_end(functools.partial(_remove, partial))
        yield partial
        if path.is_dir() and partial.is_file():
            raise IsADirectoryError(f"{path} is a directory; name a file in it.")
        if path.is_dir():  # os.replace only replaces an empty directory
            os.replace(path, old)
        try:
            os.replace(partial, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON atomically."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")
