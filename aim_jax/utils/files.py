"""Atomic writes of files and directories."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """Replace `path` atomically by a file or directory that the block writes.

    The context manager yields a temporary path beside `path`, and renames it to `path` after the
    block. The old content stays until then, and also if the block raises. An old directory is
    absent for the moment between two renames. Temporary paths are unique among all writers on all
    hosts. Missing parent directories are created. If `path` is a link, its target is replaced.

    Raises:
      IsADirectoryError: a file was written, but `path` is a directory, which is kept.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.{uuid.uuid4().hex[:12]}"
    partial = path.with_name(f"{prefix}.partial")
    old = path.with_name(f"{prefix}.old")
    try:
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
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write indented JSON atomically."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")
