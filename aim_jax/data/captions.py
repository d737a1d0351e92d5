"""Captions of images: cleaning, and counts of everything that is wrong with them."""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from aim_jax.utils.logging import say
from aim_jax.utils.names import JOINERS, REFUSED, read_text, short_list

NAME = "captions"  # of the dataset in `open_images`
# Captioned images form one class: a class-conditional model of them is unconditional.
CLASS_NAMES = ("image",)
FIELDS = ("text", "caption")  # of an entry, where no other is chosen; the first one present counts
MOST_CAPTION = 2000  # characters
MOST_BYTES = 2**16  # of a file that holds one caption
LISTED = 3  # names per problem

# Problems; an image without a usable caption is left aside.
MISSING = "images without a caption, left aside"
EMPTY = "images with an empty caption, kept as images without text"
CUT = f"captions cut to {MOST_CAPTION:,} characters"
CONTROLS = "captions with control characters, which were removed"
NOT_TEXT = "captions that are not UTF-8 text, ignored"
DAMAGED = "entries that cannot be read, ignored"
SEVERAL = "further captions of an image that has one, ignored"
NO_IMAGE = "captions of missing images, ignored"
OUTSIDE = "captions of files outside of the folder, ignored"


class Problems:
    """Counts of problems by kind, and the first names of each kind."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._names: dict[str, list[str]] = {}

    def add(self, kind: str, name: str) -> None:
        """Count a problem of the caption, image or file with this name."""
        self._counts[kind] += 1
        names = self._names.setdefault(kind, [])
        if len(names) < LISTED:
            names.append(name)

    def lines(self) -> list[str]:
        """Return one line per kind of problem."""
        return [self._line(kind, count) for kind, count in sorted(self._counts.items())]

    def _line(self, kind: str, count: int) -> str:
        dots = ", ..." if count > LISTED else ""
        return f"{count:,} {kind}: {short_list(self._names[kind])}{dots}"


def clean(caption: str, name: str, problems: Problems) -> str | None:
    """Return a caption as it is used: one line, no control characters, at most `MOST_CAPTION`.

    Args:
      caption: The caption as written.
      name: Name of its image, for the problems.
      problems: Counts what is changed.

    Returns:
      The caption, which may be empty; None if it holds halves of characters.
    """
    words = " ".join(caption[: 2 * MOST_CAPTION].split())
    if not words.isprintable():
        kinds = [unicodedata.category(c) for c in words]
        if "Cs" in kinds:
            problems.add(NOT_TEXT, name)
            return None
        kept = (
            c for c, kind in zip(words, kinds, strict=True) if kind not in REFUSED or c in JOINERS
        )
        cleaned = " ".join("".join(kept).split())
        if cleaned != words:
            problems.add(CONTROLS, name)
        words = cleaned
    if len(words) > MOST_CAPTION or len(caption) > 2 * MOST_CAPTION:
        problems.add(CUT, name)
    if not words:
        problems.add(EMPTY, name)
    return words[:MOST_CAPTION].rstrip()


def decoded(data: bytes, name: str, problems: Problems) -> str | None:
    """Return the text of a file of one caption: UTF-8, or UTF-16 with its byte order mark."""
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    if len(data) > MOST_BYTES:
        problems.add(DAMAGED, f"{name} (more than {MOST_BYTES:,} bytes)")
        return None
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        problems.add(NOT_TEXT, name)
        return None


def read_captions(path: str | os.PathLike) -> list[str]:
    """Read a file of one caption per line, to generate images from.

    Captions are cleaned as those of datasets, and a line says what was changed. Blank lines at the
    end do not count; another blank line is the empty caption.

    Raises:
      OSError: The file cannot be read.
      ValueError: It is not UTF-8 or UTF-16 text, or holds no caption.
    """
    text = read_text(path).rstrip()
    if not text:
        raise ValueError(f"{path} holds no caption; expected one per line.")
    problems = Problems()
    captions = []
    for number, line in enumerate(text.split("\n"), 1):
        caption = clean(line, f"line {number}", problems) if line.strip() else ""
        captions.append(caption or "")
    if problems.lines():
        say(summary_of(str(path), problems))
    return captions


def caption_of(entry: Mapping[str, Any], field: str, name: str, problems: Problems) -> str | None:
    """Return the cleaned caption in an entry of metadata; None if it has none.

    Args:
      entry: Values by field. A list of captions counts as its first.
      field: Name of the field; "" takes the first of `FIELDS`.
      name: Name of the image, for the problems.
      problems: Counts what is wrong.
    """
    names = (field,) if field else FIELDS
    value = next((entry[key] for key in names if entry.get(key) is not None), None)
    if isinstance(value, list) and value:
        for _ in value[1:]:
            problems.add(SEVERAL, name)
        value = value[0]
    if value is None:
        return None
    if not isinstance(value, str):
        problems.add(DAMAGED, f"{name} (its caption is no text)")
        return None
    return clean(value, name, problems)


def looked_for(field: str) -> str:
    """Return the field or fields that a caption may be in, for messages."""
    return field or " or ".join(FIELDS)


def summary_of(summary: str, problems: Problems) -> str:
    """Return a summary with one more line per kind of problem."""
    return "\n  ".join([summary, *problems.lines()])


def digested(captions: Iterable[str]) -> Iterable[bytes]:
    """Yield captions as bytes for a fingerprint."""
    for caption in captions:
        yield caption.encode() + b"\0"
