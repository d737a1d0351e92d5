"""Checksums of model directories: no damage loads as another model.

The description of a directory, `model.json`, holds the SHA-256 of every file of the model under
"files", and the SHA-256 of its own other entries under "sha256". `README.md` is text that people
edit, so it is not listed. Other files at the top of a directory are nobody's but the user's.
"""

import hashlib
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

from aim_jax.utils.checksums import differences, sha256
from aim_jax.utils.files import write_json
from aim_jax.utils.logging import say
from aim_jax.utils.names import short_list
from aim_jax.weights.model_files import UNSEALED_VERSION
from aim_jax.weights.parts import PARTS

FILES = "files"
OWN = "sha256"
TEXT = "README.md"


def write_description(file: Path, content: dict[str, Any]) -> None:
    """Write the description of a model directory; one that has checksums gets its own SHA-256."""
    content = json.loads(json.dumps(content))  # as it will be read
    if is_sealed(content):
        content[OWN] = _own_sum(content)
    write_json(file, content)


def file_sums(file: Path, further: Collection[str] = ()) -> dict[str, str]:
    """Return the SHA-256 by path of the files of a model, sorted.

    Args:
      file: The description.
      further: Names of files beside it that belong to the model.
    """
    names = sorted(
        name
        for name in _files(file.parent)
        if name != TEXT and (name in further or name.partition("/")[0] in PARTS)
        if not any(part.startswith(".") for part in name.split("/"))
    )
    return dict(zip(names, sha256([file.parent / name for name in names]), strict=True))


def is_sealed(content: dict[str, Any]) -> bool:
    """Return whether a description should have checksums: all but those of the first version."""
    return content.get("version") != UNSEALED_VERSION or FILES in content or OWN in content


def check_description(file: Path, content: dict[str, Any]) -> None:
    """Check the SHA-256 of a description.

    Raises:
      ValueError: The description is damaged, or was edited and not sealed again.
    """
    if content.get(OWN) != _own_sum(content):
        raise ValueError(
            f"{file} is not as it was written: its SHA-256 differs. If you edited it, run "
            f"aim-jax describe --checkpoint {file.parent} --seal; otherwise it is damaged, so get "
            "the model again."
        )


def check_files(file: Path, content: dict[str, Any]) -> None:
    """Check the files of a model directory against its description.

    Raises:
      ValueError: Files are damaged or missing, or there are other ones in `aim/` or `vq/`.
    """
    listed = content.get(FILES)
    if not isinstance(listed, dict):
        raise ValueError(f"{file} lists no files, so they cannot be verified; get the model again.")
    names = [
        name for name in _files(file.parent) if name in listed or name.partition("/")[0] in PARTS
    ]
    actual = dict(zip(names, sha256([file.parent / name for name in names]), strict=True))
    if wrong := differences(listed, actual):
        raise ValueError(
            f"{file.parent} is damaged or incomplete, its files differ from the list in "
            f"{file.name} ({short_list(wrong)}); get the model again."
        )


def check_model(file: Path, content: dict[str, Any]) -> None:
    """Check all checksums of a model directory; say if it has none, as of the first version.

    Raises:
      ValueError: The description or the files are not those that were written.
    """
    if not is_sealed(content):
        say(
            f"{file.parent} is not verified: an older version wrote it, without checksums. "
            f"aim-jax describe --checkpoint {file.parent} --seal adds them"
        )
        return
    check_description(file, content)
    check_files(file, content)


def _files(directory: Path) -> list[str]:
    """Return the paths of the model's files in a directory, from there and with "/"."""
    files = [file for file in directory.iterdir() if file.is_file()]
    for part in PARTS:  # a part may be a link to a directory
        files += filter(Path.is_file, (directory / part).rglob("*"))
    return [file.relative_to(directory).as_posix() for file in files]


def _own_sum(content: dict[str, Any]) -> str:
    """Return the SHA-256 of a description without that entry."""
    return sum_of({name: value for name, value in content.items() if name != OWN})


def sum_of(content: Any) -> str:
    """Return the SHA-256 of JSON values; spaces and order do not matter."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
