"""Names in text: matching what a user writes, lists that stay short, and text of strangers.

Names of classes, keys of weights and other text of files may hold control characters, which change
what a terminal shows, or be of any length. `check_text` refuses such text where a file is read.
Messages quote text with `aim_jax.utils.checks.shown`, and `printable` is for text that is printed
as it is.
"""

import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

from aim_jax.utils.checks import shortened, shown

LISTED = 10  # names in a message
MOST_REASON = 300  # characters of an error of another library
MOST_LISTED = 200  # characters of each
MOST_NAME = 500  # characters of a name
MOST_FILE_NAME = 100  # bytes of a file name that is made from a name
# Control characters, invisible ones (such as those that reverse the direction of text), halves of
# characters, and separators of lines.
REFUSED = ("Cc", "Cf", "Cs", "Zl", "Zp")
BYTES = range(0xDC80, 0xDD00)  # how Python holds bytes of file names that are not UTF-8
JOINERS = "\u200c\u200d"  # of the category Cf, but parts of Persian words and of emoji
# Escape sequences of terminals (ECMA-48).
ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])")


def check_text(what: str, text: str, most: int = MOST_NAME) -> None:
    """Check a text that a stranger may have written: a class name, a caption, a key of weights.

    Args:
      what: name of the text, for the message.
      text: the text; empty is allowed.
      most: largest number of characters.

    Raises:
      ValueError: the text is too long, or holds a character that a terminal may not show as it is.
    """
    if len(text) > most:
        raise ValueError(
            f"{what}: {shown(text)} has {len(text):,} characters; expected at most {most}."
        )
    for character in text:
        allowed = character in JOINERS or ord(character) in BYTES
        if unicodedata.category(character) in REFUSED and not allowed:
            raise ValueError(
                f"{what}: {shown(text)} holds the character U+{ord(character):04X}; expected text "
                "without control characters and line ends."
            )


def printable(text: str, lines: bool = True) -> str:
    r"""Remove a terminal's escape sequences; write other control characters as in "\x07".

    Args:
      text: the text.
      lines: keep line ends and tabs.
    """
    kept = "\n\t" if lines else ""
    shown_as_they_are = (c if c.isprintable() or c in kept + JOINERS else _escaped(c)
                         for c in ESCAPES.sub("", text))  # fmt: skip
    return "".join(shown_as_they_are)


def reason_of(error: Exception, most: int = MOST_REASON) -> str:
    """Return the first line of an error of another library, short and printable."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return shortened(printable(lines[0], lines=False), most)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode()


def file_name(name: str) -> str:
    """Return a name as a part of a file name: on one line, short, without separators of paths."""
    kept = "".join(c if c.isprintable() and c not in '/\\:*?"<>| ' else "_" for c in name)
    return kept.encode()[:MOST_FILE_NAME].decode(errors="ignore")


def short_list(names: Sequence[str], most: int = LISTED) -> str:
    """Join names by commas; of many, the first few and the number of the others.

    Names are made printable and shortened.
    """
    listed = ", ".join(printable(shortened(name, MOST_LISTED), False) for name in names[:most])
    return listed if len(names) <= most else f"{listed} and {len(names) - most} more"


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
            candidates = ", ".join(f"{shown(names[i])} (number {i})" for i in matches[:LISTED])
            raise ValueError(
                f"{shown(name)} fits {len(matches)} names: {candidates}; write one of them "
                "exactly, or its number."
            )
        if matches:
            return matches[0]
    return None


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip()


def _folded(name: str) -> str:
    return _composed(name).casefold().replace("_", " ")


def read_text(path: str | os.PathLike) -> str:
    """Read a text file as editors write it, with or without a byte order mark.

    Raises:
      ValueError: The file is not UTF-8 or UTF-16 text.
    """
    data = Path(path).read_bytes()
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None


def read_names(path: str | os.PathLike) -> tuple[str, ...]:
    """Read a file of one name per line, as editors write it.

    A byte order mark, the line ends of any system and blank lines at the end are allowed.

    Raises:
      ValueError: The file is not UTF-8 or UTF-16 text, a line between names is blank, or a name
        is refused by `check_text`.
    """
    names = [line.strip() for line in read_text(path).rstrip().split("\n")]
    if not all(names):
        raise ValueError(
            f"{path}: line {names.index('') + 1} is blank; expected one name per line."
        )
    for number, name in enumerate(names, 1):
        check_text(f"{path}, line {number}", name)
    return tuple(names)
