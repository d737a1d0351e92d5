"""The one reader of JSON: its bounds, its messages, and lines of files of lines."""

import json
import os

import pytest

from aim_jax.utils.json_files import (
    MOST_DEPTH,
    MOST_LINE,
    anything,
    choice,
    dict_of,
    either,
    flag,
    integer,
    list_of,
    measured,
    nullable,
    read_json,
    read_json_lines,
    record,
    string,
    text,
)

CHECK = record(
    {
        "version": choice(1),
        "sizes": list_of(integer(1, 9), 1, 3),
        "scores": dict_of(either(measured, list_of(measured, 2, 2))),
    },
    {"name": nullable(text(5)), "path": string, "on": flag, "part": record({"a": anything})},
    closed=True,
)
GOOD = {"version": 1, "sizes": [1, 2], "scores": {"fid": 5, "kid": [0.5, 1]}}


def test_good_files_are_read(tmp_path):
    file = tmp_path / "x.json"
    for more in ({}, {"name": None}, {"name": "猫\u200ce"}, {"path": "a\nb", "on": True}):
        file.write_text(json.dumps(GOOD | more))
        assert read_json(file, CHECK) == GOOD | more
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode())  # a byte order mark
    assert read_json(file, CHECK) == GOOD


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"version": True}, "version: expected 1, got True"),
        ({"version": "1"}, "version: expected 1, got '1'"),
        ({"sizes": [1, "2"]}, r"sizes\[1\]='2'; expected an integer"),
        ({"sizes": [1, 10]}, r"sizes\[1\]=10; expected 1 to 9"),
        ({"sizes": [1, 2.0]}, r"sizes\[1\]=2.0; expected an integer"),
        ({"sizes": []}, "sizes: expected 1 to 3 elements, got 0"),
        ({"sizes": {"a": 1}}, "sizes: expected a list, got a dict"),
        ({"scores": {"kid": [1]}}, "scores.kid: expected 2 elements, got 1"),
        ({"scores": {"fid": "5"}}, "scores.fid: expected a number, got '5'"),
        ({"scores": 5}, "scores: expected a JSON object, got 5"),
        ({"name": "too long"}, "name: 'too long' has 8 characters; expected at most 5"),
        ({"name": "\x1b[2J"}, r"name: '\\x1b\[2J' holds the character U\+001B"),
        ({"name": "\u202ea"}, r"U\+202E"),
        ({"name": "\ud800"}, r"U\+D800"),
        ({"path": 5}, "path: expected a string, got 5"),
        ({"on": 1}, "on: expected a bool, got 1"),
        ({"part": {}}, "part: it is missing a"),
        ({"colour\n": 1}, r"'colour\\n' holds the character U\+000A"),
        ({"colour": 1}, "unknown entries 'colour'; expected version, sizes"),
        ({"sizes": 10**400}, "expected a list, got 1000"),
    ],
)
def test_wrong_values_are_named(more, message, tmp_path):
    file = tmp_path / "x.json"
    file.write_text(json.dumps(GOOD | more))
    with pytest.raises(ValueError, match=message) as caught:
        read_json(file, CHECK)
    said = str(caught.value)
    assert said.startswith(f"{file} is damaged: ") and said.isprintable() and len(said) < 500


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not readable JSON"),
        (b"{", "not readable JSON"),
        (b"[1]", "expected a JSON object, got a list"),
        (b'{"a": 1, "a": 2}', "'a' occurs twice"),
        (b'{"\xff": 1}', "not readable JSON"),
        (b'{"a": NaN}', "NaN is not a number"),
        (b'{"a": 1e999}', "the number 1e999 is too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not readable JSON"),
        (b"[" * 100_000, "nested levels"),
        (b'{"a": ' * 40 + b"1" + b"}" * 40, f"more than {MOST_DEPTH} nested levels"),
        (b'{"version": 1}' + b" " * 200_000, "larger than 200,000 bytes"),
    ],
)
def test_files_that_are_no_such_json_are_refused(data, message, tmp_path):
    file = tmp_path / "x.json"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_json(file, CHECK, "is not one of ours", most_bytes=200_000)
    assert str(caught.value).startswith(f"{file} is not one of ours: ")
    assert str(caught.value).isprintable()


def test_only_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: is not a regular file"):
        read_json(tmp_path / "pipe", anything)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_json(tmp_path / "nowhere", anything)


def test_lines_that_cannot_be_read_are_named(tmp_path):
    file = tmp_path / "x.jsonl"
    long = b'"' + b"x" * (2 * MOST_LINE) + b'"'
    file.write_bytes(b'{"a": 1}\n\n[1]\n' + long + b'\n{"a": NaN}\r\n{"a": 3')
    lines = list(read_json_lines(file, record({"a": measured}), allow_nan=True))
    assert [line.name for line in lines] == [f"{file}, line {i}" for i in (1, 3, 4, 5, 6)]
    assert [bool(line.problem) for line in lines] == [False, True, True, False, True]
    assert lines[0].content == {"a": 1} and lines[3].data.endswith(b"\r\n")
    assert "longer than" in lines[2].problem and not lines[4].data.endswith(b"\n")
