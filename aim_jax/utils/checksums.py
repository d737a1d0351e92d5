"""Checksums of files, and their comparison with a list."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any


def sha256(files: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of files in hexadecimal digits; threads read and hash in parallel."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(_sha256, files))


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def differences(listed: Mapping[str, Any], actual: Mapping[str, Any]) -> list[str]:
    """Return what differs between the listed and the actual checksums of files, by name.

    Hidden files that are not listed are ignored, because file managers and systems leave them.
    """
    lines = [f"missing: {name}" for name in listed.keys() - actual.keys()]
    lines += [f"damaged: {name}" for name in listed.keys() & actual if listed[name] != actual[name]]
    lines += [
        f"unexpected: {name}"
        for name in actual.keys() - listed.keys()
        if not any(part.startswith(".") for part in Path(name).parts)
    ]
    return sorted(lines)
