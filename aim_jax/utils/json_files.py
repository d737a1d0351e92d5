"""Checked reading of JSON files, which anybody may have written or damaged.

`read_json` reads a file that a `Check` describes. A check is a function of the name of a value
("vq.n_embed") and the value, which raises ValueError if the value is not as expected; the functions
below build checks from smaller ones:

    CHECK = record({"version": choice(1), "class_names": list_of(text())}, {"info": anything})

Every failure is a ValueError in one line, with the file, the name of the value, the value in short
and what was expected. Files are bounded in size and depth. Names of entries are checked as text and
occur once.
"""

import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, NamedTuple

from aim_jax.utils.checks import check_integer, check_type, shown
from aim_jax.utils.names import MOST_NAME, check_text, short_list

Check = Callable[[str, Any], None]

MOST_BYTES = 16 * 2**20  # of a file
MOST_LINE = 2**20  # bytes of a line of a file of lines
MOST_DEPTH = 32  # nested lists and objects
TOO_DEEP = f"it has more than {MOST_DEPTH} nested levels"
MOST_INTEGER = 2**53  # integers up to here are exact in every reader of JSON


class Line(NamedTuple):
    """A line of a file of JSON lines.

    Attributes:
      name: file and number, for messages.
      data: the line with its end; the beginning of an overlong one.
      content: what it holds, or None.
      problem: why it cannot be read, or "".
    """

    name: str
    data: bytes
    content: Any
    problem: str


def read_json(
    path: str | os.PathLike,
    check: Check,
    failure: str = "is damaged",
    *,
    most_bytes: int = MOST_BYTES,
    allow_nan: bool = False,
) -> Any:
    """Read and check a JSON file.

    Args:
      path: the file.
      check: check of its content.
      failure: beginning of the message about a wrong content, such as "is not a report".
      most_bytes: largest size.
      allow_nan: accept NaN and Infinity, which measurements may be.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is not a regular file, is too large, not JSON in UTF-8, or refused by `check`.
    """
    with opened(path) as file:
        data = file.read(most_bytes + 1)
    try:
        if len(data) > most_bytes:
            raise ValueError(f"it is larger than {most_bytes:,} bytes.")
        return parse_json(data, check, allow_nan)
    except ValueError as error:
        raise ValueError(f"{path} {failure}: {error}") from None


def read_json_lines(
    path: str | os.PathLike, check: Check, allow_nan: bool = False
) -> Iterator[Line]:
    """Yield the lines of a file of one JSON value per line; blank lines are left out.

    A line that cannot be read is yielded with its problem, because a killed process may leave one.
    Only one line is in memory at a time, at most `MOST_LINE` bytes of it.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is not a regular file.
    """
    with opened(path) as file:
        number = 0
        while data := file.readline(MOST_LINE):
            number += 1
            name = f"{path}, line {number}"
            if len(data) == MOST_LINE and not data.endswith(b"\n"):
                while (more := file.readline(MOST_LINE)) and not more.endswith(b"\n"):
                    pass
                yield Line(name, data, None, f"it is longer than {MOST_LINE:,} bytes.")
            elif data.strip():
                try:
                    yield Line(name, data, parse_json(data, check, allow_nan), "")
                except ValueError as error:
                    yield Line(name, data, None, str(error))


def opened(path: str | os.PathLike) -> IO[bytes]:
    """Open a regular file; a pipe would block.

    Raises:
      OSError: the file cannot be read.
      ValueError: it is not a regular file.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(f"{path}: is not a regular file.")
    return open(path, "rb")


def parse_json(data: bytes, check: Check, allow_nan: bool = False) -> Any:
    """Return the checked content of JSON text in UTF-8; see `read_json`.

    Raises:
      ValueError: the text is not JSON, or refused by `check`; the message names no file.
    """
    try:
        content = json.loads(
            data.decode("utf-8-sig"),
            object_pairs_hook=_unique,
            parse_float=float if allow_nan else _finite,
            parse_constant=float if allow_nan else _refuse_constant,
        )
        _check_nested(content)
    except RecursionError:
        raise ValueError(f"it is not readable JSON ({TOO_DEEP}).") from None
    except ValueError as error:
        raise ValueError(f"it is not readable JSON ({error}).") from None
    check("", content)
    return content


def anything(name: str, value: Any) -> None:
    """Accept any JSON value."""


def text(most: int = MOST_NAME) -> Check:
    """Check a string as `check_text` does."""

    def check(name: str, value: Any) -> None:
        check_type(_named(name), value, str)
        check_text(_named(name), value, most)

    return check


def string(name: str, value: Any) -> None:
    """Check a string of any characters, such as a path; to print it, use `printable`."""
    check_type(_named(name), value, str)


def integer(low: int = 0, high: int = MOST_INTEGER) -> Check:
    """Check an integer and its range."""
    return lambda name, value: check_integer(_named(name), value, low, high)


def measured(name: str, value: Any) -> None:
    """Check a measured number, which may be NaN or infinite."""
    check_type(_named(name), value, float)
    if isinstance(value, int) and abs(value) > MOST_INTEGER:
        raise ValueError(f"{_at(name)}expected a number of float64, got {shown(value)}.")


def flag(name: str, value: Any) -> None:
    """Check a bool."""
    check_type(_named(name), value, bool)


def choice(*known: Any) -> Check:
    """Check that a value is one of a few; 1 and True are different ones."""

    def check(name: str, value: Any) -> None:
        if not any(type(value) is type(one) and value == one for one in known):
            expected = " or ".join(map(repr, known))
            raise ValueError(f"{_at(name)}expected {expected}, got {shown(value)}.")

    return check


def list_of(check: Check, least: int = 0, most: int = MOST_INTEGER) -> Check:
    """Check a list, its length, and every element."""

    def check_list(name: str, value: Any) -> None:
        if not isinstance(value, list):
            raise ValueError(f"{_at(name)}expected a list, got {shown(value)}.")
        if not least <= len(value) <= most:
            expected = f"{least:,}" if least == most else f"{least:,} to {most:,}"
            expected = f"{least:,} or more" if most == MOST_INTEGER else expected
            raise ValueError(f"{_at(name)}expected {expected} elements, got {len(value):,}.")
        for index, element in enumerate(value):
            check(f"{name}[{index}]", element)

    return check_list


def dict_of(check: Check, least: int = 0) -> Check:
    """Check an object with entries of any name, and every value."""

    def check_dict(name: str, value: Any) -> None:
        _check_object(name, value)
        if len(value) < least:
            raise ValueError(f"{_at(name)}expected {least} or more entries, got {len(value)}.")
        for key, element in value.items():
            check(_inside(name, key), element)

    return check_dict


def record(
    required: Mapping[str, Check], optional: Mapping[str, Check] = {}, closed: bool = False
) -> Check:
    """Check an object with named entries, in their order.

    Args:
      required: checks of the entries that must be present.
      optional: checks of entries that may be absent.
      closed: refuse further entries; otherwise they are ignored, as those of a newer version.
    """

    def check_record(name: str, value: Any) -> None:
        _check_object(name, value)
        unknown = [repr(key) for key in value if key not in required and key not in optional]
        if closed and unknown:
            known = ", ".join([*required, *optional])
            raise ValueError(f"{_at(name)}unknown entries {short_list(unknown)}; expected {known}.")
        missing = [key for key in required if key not in value]
        if missing:
            raise ValueError(f"{_at(name)}it is missing {short_list(missing)}.")
        for key, check in {**required, **optional}.items():
            if key in value:
                check(_inside(name, key), value[key])

    return check_record


def nullable(check: Check) -> Check:
    """Accept null, and what `check` accepts."""
    return lambda name, value: None if value is None else check(name, value)


def both(one: Check, other: Check) -> Check:
    """Check a value twice."""

    def check(name: str, value: Any) -> None:
        one(name, value)
        other(name, value)

    return check


def either(one: Check, other: Check) -> Check:
    """Check a value by `other` if it is a list, else by `one`."""
    return lambda name, value: (other if isinstance(value, list) else one)(name, value)


# A line of metrics.jsonl: the step, and numbers by name.
METRICS_LINE: Check = both(record({"step": integer()}), dict_of(measured))


def _named(name: str) -> str:
    return name or "the content"


def _at(name: str) -> str:
    return f"{name}: " if name else ""


def _inside(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key


def _check_object(name: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise ValueError(f"{_at(name)}expected a JSON object, got {shown(value)}.")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the entries of an object; readers differ in which of two of one name they use."""
    entries: dict[str, Any] = {}
    for key, value in pairs:
        check_text("name of an entry", key)
        if key in entries:
            raise ValueError(f"{shown(key)} occurs twice")
        entries[key] = value
    return entries


def _finite(written: str) -> float:
    value = float(written)
    if math.isinf(value):
        raise ValueError(f"the number {shown(written, str)} is too large")
    return value


def _refuse_constant(written: str) -> float:
    raise ValueError(f"{written} is not a number")


def _check_nested(content: Any) -> None:
    """Check the depth of lists and objects, one level after the other."""
    level = [content]
    for _ in range(MOST_DEPTH):
        nested = [x for x in level if isinstance(x, dict | list)]
        level = [y for x in nested for y in (x.values() if isinstance(x, dict) else x)]
        if not level:
            return
    raise ValueError(TOO_DEEP)
