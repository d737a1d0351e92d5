"""Names in text: matching, files of names, captions."""

import unicodedata

import numpy as np
import pytest

from aim_jax.utils.images import class_caption, make_grid
from aim_jax.utils.names import (
    check_text,
    file_name,
    match_name,
    printable,
    read_names,
    short_list,
)


def test_a_name_that_is_there_exactly_is_that_one():
    names = ("A", "B", "a", "b", "cat_x", "cat x", "6")
    assert [match_name(name, names) for name in names] == list(range(7))


def test_other_forms_are_tried_in_turn():
    names = ("Ankle boot", unicodedata.normalize("NFD", "café"), "STRASSE", "tench")
    assert match_name("ankle_BOOT", names) == 0
    assert match_name(" café ", names) == 1
    assert match_name("straße", names) == 2
    assert match_name("boot", names) is None and match_name("", names) is None


@pytest.mark.parametrize(
    ("name", "names", "candidates"),
    [
        ("cat", ("Cat", "CAT", "dog"), "'Cat' .number 0., 'CAT' .number 1."),
        ("cat-x", ("CAT-X", "Cat-x"), "'CAT-X'"),
        ("CAT X", ("cat_x", "cat x"), "'cat_x'"),
        ("crane", ("crane", "tench", "crane"), "'crane' .number 0., 'crane' .number 2."),
    ],
)
def test_an_ambiguous_name_is_refused_with_the_candidates(name, names, candidates):
    with pytest.raises(ValueError, match=candidates):
        match_name(name, names)


@pytest.mark.parametrize(
    "data",
    [
        b"cat\ndog\n",
        b"\xef\xbb\xbfcat\r\ndog\r\n\r\n\r\n",
        "cat\ndog".encode("utf-16"),
        b"cat \ndog\t\n \n",
    ],
)
def test_files_of_names_are_read_as_editors_write_them(data, tmp_path):
    file = tmp_path / "names.txt"
    file.write_bytes(data)
    assert read_names(file) == ("cat", "dog")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"cat\n\ndog\n", "line 2 is blank"),
        (b"caf\xe9\n", "not UTF-8 text"),
        (b"", "line 1 is blank"),
    ],
)
def test_files_of_names_that_are_unclear_are_refused(data, message, tmp_path):
    file = tmp_path / "names.txt"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_names(file)


def test_long_lists_are_cut():
    assert short_list([str(i) for i in range(12)]) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"


@pytest.mark.parametrize(
    ("one", "two"),
    [("Rätsel", "Rötsel"), ("café", "cafè"), ("кот", "лис"), ("αβγ", "αβδ"), ("猫", "犬"),
     ("Phở", "Phô"), ("\udce9", "\udcea")],
)  # fmt: skip
def test_captions_beyond_ascii_can_be_told_apart(one, two):
    image = np.zeros((1, 32, 32, 3), np.uint8)
    grids = [np.asarray(make_grid(image, 1, [name])) for name in (one, two)]
    assert not np.array_equal(*grids)
    grids = [np.asarray(make_grid(image, 1, None, 64, [name])) for name in (one, two)]
    assert not np.array_equal(*grids)


def test_captions_are_numbers_where_a_letter_is_missing():
    names = ("кот", "猫", unicodedata.normalize("NFD", "é"), "T-shirt/top")
    assert [class_caption(names, i) for i in range(4)] == [names[0], "1", names[2], names[3]]
    assert class_caption((), 3) == "3"


def test_text_of_others_is_checked_and_printed_without_control_characters():
    for name in ("", "T-shirt/top", "猫", "می\u200cخواهم", "👩\u200d🚀", "x" * 500):
        check_text("name", name)
        assert printable(name) == name
    check_text("name", "caf\udce9")  # a folder whose name is not UTF-8
    assert printable("caf\udce9") == "caf\\udce9"
    for name in ("a\n", "\x1b[2J", "\x9b1m", "\u202egnp", "\u2028", "\ud800", "\ufeffa", "x" * 501):
        with pytest.raises(ValueError, match=r"^name: '") as caught:
            check_text("name", name)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 300
    assert printable("\x1b[31mred\x1b[0m\t\n\u202e\ud800") == "red\t\n\\u202e\\ud800"
    assert printable("a\tb\nc", lines=False) == "a\\tb\\nc"


def test_names_of_files_are_safe():
    assert file_name("old tree") == "old_tree" and file_name("T-shirt/top") == "T-shirt_top"
    for name in ("../../x", "a\nb\x1b", "猫" * 500, "C:\\x", "..", "\ud800"):
        made = file_name(name)
        assert len(made.encode()) <= 100 and made.isprintable() and not set(made) & set('/\\: "')


def test_control_characters_in_files_of_names_are_refused(tmp_path):
    (tmp_path / "names.txt").write_text("boat\nho\x1b[2Juse\n")
    with pytest.raises(ValueError, match=r"names.txt, line 2: 'ho\\x1b\[2Juse' holds .* U\+001B"):
        read_names(tmp_path / "names.txt")
