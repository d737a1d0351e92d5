"""Files and directories that appear whole or not at all."""

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
    """A name beside `path` to write a file or a directory to; it becomes `path` after the block.

    What was there before stays until then, and for good if the block raises; a directory is away
    for the moment between two renames. No two writers, on whatever host, get the same name.
    Directories above are made; where `path` is a link, what it leads to is replaced.

    Raises:
      IsADirectoryError: a file was written, and `path` is a directory, which stays.
    """
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    mark = f".{path.name}.{uuid.uuid4().hex[:12]}"
    partial, old = path.with_name(f"{mark}.partial"), path.with_name(f"{mark}.old")
    try:
        yield partial
        if path.is_dir() and partial.is_file():
            raise IsADirectoryError(f"{path} is a directory; name a file in it.")
        if path.is_dir():  # only an empty one can be replaced
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
    """Writes indented JSON, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n")
