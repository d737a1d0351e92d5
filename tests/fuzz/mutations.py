"""Damage to files, as hypothesis chooses it: to the values of JSON, and to bytes."""

import copy
import json

from hypothesis import strategies as st

# Text that must not reach a terminal or a file name as it is, or is too long.
TEXTS = (
    "", "0", "\x1b[2J", "a\nb", "a\rb", "\0", "\u202eevil", "\u2028", "\ud800", "../../x",
    "/etc/passwd", "x" * 501, "é" * 10_000, "\x9b31m", "\ufeffa", "猫", "object", "<script>",
)  # fmt: skip
NUMBERS = (
    0, -1, 1, 2, 3, 2**31 - 1, 2**31, 2**53 + 1, 10**6, 10**9, 10**30, 10**400, -(10**400), 0.5,
    -0.0, 1e-320, 1e300, float("nan"), float("inf"),
)  # fmt: skip
REPLACED = (b"", b"\xef\xbb\xbf", b"null", b"[" * 100_000, b'{"a":' * 5000)
INSERTED = (
    b"\xff",
    b"\x1b[2J",
    b"{",
    b"]",
    b",",
    b'"',
    b"NaN",
    b"1e999",
    b"9" * 5000,
    b"\n",
    b"\0",
)
OTHERS = (None, True, False, [], {}, [[]], [None], {"a": 1}, [0] * 1000, [1e9, "x"], {"": {"": []}})


def paths_of(value, path=()):
    """The path of every value in a tree of JSON, the root first."""
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from paths_of(value[key], (*path, key))


def nested(depth):
    value = 0
    for _ in range(depth):
        value = [value]
    return value


def changed(draw, content):
    """A copy of JSON content with one value replaced, removed, added, renamed or nested."""
    content = copy.deepcopy(content)
    *parents, key = draw(st.sampled_from(list(paths_of(content))[1:] or [(None,)]))
    if key is None:
        return draw(st.sampled_from(OTHERS))
    parent = content
    for step in parents:
        parent = parent[step]
    kind = draw(st.sampled_from(("text", "number", "other", "remove", "add", "rename", "nest")))
    if kind == "remove":
        del parent[key]
    elif kind == "nest":
        parent[key] = nested(draw(st.sampled_from((1, 2, 40, 500))))
    elif kind == "rename" and isinstance(parent, dict):
        parent[draw(st.sampled_from(TEXTS))] = parent.pop(key)
    elif kind == "add" and isinstance(parent, dict):
        parent[draw(st.sampled_from(TEXTS))] = draw(st.sampled_from(OTHERS))
    elif kind == "add":
        parent.insert(key, draw(st.sampled_from((*TEXTS, *NUMBERS, *OTHERS))))
    else:
        values = {"text": TEXTS, "number": NUMBERS}.get(kind, OTHERS)
        parent[key] = draw(st.sampled_from(values))
    return content


def written(content):
    """JSON text of a content; NaN and halves of characters included."""
    return json.dumps(content).encode()


def damaged(draw, data):
    """Bytes with an end cut off, bits flipped, or a part replaced, repeated or inserted."""
    kind = draw(st.sampled_from(("cut", "flip", "insert", "repeat", "zeros", "replace")))
    at = draw(st.integers(0, max(len(data) - 1, 0)))
    if kind == "cut":
        return data[:at]
    if kind == "flip" and data:
        return data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :]
    if kind == "repeat":
        return data[:at] + data[max(0, at - 20) : at] * 3 + data[at:]
    if kind == "zeros":
        return data[:at] + bytes(20) + data[at + 20 :]
    if kind == "replace":
        return draw(st.sampled_from(REPLACED))
    return data[:at] + draw(st.sampled_from(INSERTED)) + data[at:]
