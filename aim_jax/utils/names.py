"""Names in text: matching what a user writes, and lists that stay short."""

import os
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

LISTED = 10  # names in a message


def short_list(names: Sequence[str], most: int = LISTED) -> str:
    """Join names by commas; of many, the first few and the number of the others."""
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


def match_name(name: str, names: Sequence[str]) -> int | None:
    """Return the index of the name that `name` means, or None.

    A name that is equal counts first; then one equal in Unicode's form NFC, without spaces around
    it; then one equal without regard to case, with underscores as spaces.

    Raises:
      ValueError: Several names fit equally well; the message lists them.
    """
    forms: tuple[Callable[[str], str], ...] = (str, _composed, _folded)
    for form in forms:
        matches = [i for i, candidate in enumerate(names) if form(candidate) == form(name)]
        if len(matches) > 1:
            candidates = ", ".join(f"{names[i]!r} (number {i})" for i in matches[:LISTED])
            raise ValueError(
                f"{name!r} fits {len(matches)} names: {candidates}; write one of them exactly, or "
                "its number."
            )
        if matches:
            return matches[0]
    return None


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip()


def _folded(name: str) -> str:
    return _composed(name).casefold().replace("_", " ")


def read_names(path: str | os.PathLike) -> tuple[str, ...]:
    """Read a file of one name per line, as editors write it.

    A byte order mark, the line ends of any system and blank lines at the end are allowed.

    Raises:
      ValueError: The file is not UTF-8 or UTF-16 text, or a line between names is blank.
    """
    data = Path(path).read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        names = [line.strip() for line in data.decode(encoding).rstrip().split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    if not all(names):
        raise ValueError(
            f"{path}: line {names.index('') + 1} is blank; expected one name per line."
        )
    return tuple(names)
