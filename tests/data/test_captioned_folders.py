"""Folders of captioned images: every form is read, and every problem is counted."""

import json
import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aim_jax.data import identity_of, image_batches, open_images
from aim_jax.data.captioned_folders import is_captioned
from aim_jax.data.captions import MOST_BYTES, MOST_CAPTION, Problems, clean, read_captions
from aim_jax.data.preprocessing import ImageSpec


def images(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (4, 4), (len(name), 0, 0)).save(folder / name)
    return folder


def metadata(folder: Path, *entries: dict) -> None:
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (folder / "metadata.jsonl").write_text(lines)


def opened(root: Path, split: str = "test", name: str = "captions"):
    """The split "test" has no part held out."""
    return open_images(name, split, root)


def by_name(source) -> dict[str, str]:
    return {os.path.basename(p): c for p, c in zip(source.paths, source.captions, strict=True)}


def count(source, text: str) -> int:
    """The number at the start of the one line of a summary that holds a text."""
    (line,) = [line for line in source.summary.splitlines() if text in line]
    return int(line.split()[0].replace(",", ""))


@pytest.fixture
def root(tmp_path):
    """A folder with two splits of four images, without captions."""
    for split in ("train", "test"):
        images(tmp_path / split, "a.png", "b.png", "c.jpg", "d.webp")
    return tmp_path


def write_jsonl(folder):
    metadata(folder, *({"file_name": n, "text": f"an {n}"} for n in os.listdir(folder)))


def write_csv(folder):
    rows = "".join(f'{n},"an {n}"\r\n' for n in os.listdir(folder))
    (folder / "metadata.csv").write_text("\ufefffile_name,text\r\n" + rows)


def write_texts(folder):
    for name in os.listdir(folder):
        (folder / name).with_suffix(".txt").write_text(f"an {name}\n")


@pytest.mark.parametrize("write", [write_jsonl, write_csv, write_texts])
def test_every_form_is_read(write, root):
    for split in ("train", "test"):
        write(root / split)
    source = opened(root)
    assert by_name(source) == {n: f"an {n}" for n in ("a.png", "b.png", "c.jpg", "d.webp")}
    assert source[1]["caption"] == "an b.png" and source[1]["label"] == 0
    assert source[1]["image"].shape == (4, 4, 3) and source.class_names == ("image",)
    assert source.summary.count("\n") == 0 and "4 captioned images" in source.summary
    assert is_captioned(root)


def test_metadata_of_the_root_names_images_of_all_splits(root):
    metadata(root, *({"file_name": f"{s}/{n}.png", "text": f"{s} {n}"}
                     for s in ("train", "test") for n in "ab"))  # fmt: skip
    source = opened(root)
    assert by_name(source) == {"a.png": "test a", "b.png": "test b"}
    assert count(source, "without a caption") == 2 and "missing" not in source.summary


def test_metadata_in_subfolders_is_relative_to_them(tmp_path):
    for part in ("x", "y"):
        metadata(images(tmp_path / "test" / part, "a.png"), {"file_name": "a.png", "text": part})
    images(tmp_path / "train", "a.png")
    assert opened(tmp_path).captions == ["x", "y"]


def test_five_percent_are_held_out_by_name(tmp_path):
    names = [f"{i}.png" for i in range(40)]
    metadata(images(tmp_path, *names), *({"file_name": n, "text": n} for n in names))
    train, validation = (opened(tmp_path, split) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (38, 2)
    assert sorted([*train.captions, *validation.captions]) == sorted(names)
    assert by_name(train) == {n: n for n in by_name(train)}
    assert "all but 5%" in train.summary


@pytest.mark.parametrize(
    ("name", "captions"),
    [("captions", ["t", "c"]), ("captions:caption", ["c", "c"]), ("captions:tags", ["one"])],
)
def test_the_field_can_be_chosen(name, captions, root):
    metadata(
        root / "test",
        {"file_name": "a.png", "text": "t", "caption": "c", "tags": ["one", "two"]},
        {"file_name": "b.png", "text": None, "caption": "c", "tags": 5},
    )
    source = opened(root, name=name)
    assert source.captions == captions and source.name == name
    if name == "captions:tags":
        assert count(source, "its caption is no text") == 1
        assert count(source, "further captions") == 1


def test_problems_of_metadata_are_counted(root):
    folder = root / "test"
    metadata(
        folder,
        {"file_name": "a.png", "text": "a\x1b[2J \u202esign"},
        {"file_name": "a.png", "text": "again"},
        {"file_name": "b.png", "text": " "},
        {"file_name": "c.jpg", "text": "x" * 10_000},
        {"file_name": "d.webp", "text": "\ud800"},
        {"file_name": "gone.png", "text": "gone"},
        {"file_name": "../train/a.png", "text": "outside of the split"},
        {"file_name": "../../etc/passwd", "text": "outside"},
        {"file_name": "/etc/passwd", "text": "outside"},
        {"file_name": "a.png\0", "text": "odd"},
        {"text": "nameless"},
    )
    with open(folder / "metadata.jsonl", "ab") as file:
        file.write(b'{"file_name": "d.webp", "text": "caf\xe9"}\n{"file_name": \n[1]\n')
    source = opened(root)
    assert by_name(source) == {"a.png": "a[2J sign", "b.png": "", "c.jpg": "x" * MOST_CAPTION}
    for text, expected in (
        ("control characters", 1),
        ("further captions of an image that has one", 1),
        ("an empty caption", 1),
        ("cut to 2,000 characters", 1),
        ("not UTF-8", 2),
        ("of missing images", 1),
        ("outside of the folder", 3),
        ("cannot be read", 4),
        ("without a caption, left aside: d.webp", 1),
    ):
        assert count(source, text) == expected, source.summary
    assert source.summary.replace("\n", "").isprintable()


def test_problems_of_csv_are_counted(root):
    rows = b"file_name,text\na.png,caf\xe9\nb.png,b\nc.jpg,c,c\n\nd.webp\n"
    (root / "test" / "metadata.csv").write_bytes(rows)
    source = opened(root)
    assert source.captions == ["b"]
    assert count(source, "not UTF-8") == 1
    assert count(source, "metadata.csv, line 4 (3 fields, expected 2)") == 2


def test_problems_of_text_files_are_counted(root):
    folder = root / "test"
    (folder / "a.txt").write_bytes("\ufeffRed Apple\r\n".encode())
    (folder / "b.txt").write_bytes("grün".encode("utf-16"))
    (folder / "c.txt").write_bytes(b"caf\xe9")
    (folder / "d.txt").write_bytes(b"x" * (MOST_BYTES + 1))
    (folder / "notes.txt").write_text("mine")
    (folder / "data.bin").write_text("")
    images(root, "loose.png")
    images(root / "more", "a.png", "b.png")
    source = opened(root)
    assert by_name(source) == {"a.png": "Red Apple", "b.png": "grün"}
    for text in ("not UTF-8 text, ignored: c.jpg", "cannot be read, ignored: d.webp", "notes.txt"):
        assert count(source, text) == 1
    assert count(source, "without a caption") == 2
    assert "left aside: 1 .bin files, 3 images outside of the splits" in source.summary


def test_a_pipe_and_a_broken_link_are_no_captions(root):
    folder = root / "test"
    os.mkfifo(folder / "a.txt")
    (folder / "b.txt").symlink_to(root / "nothing")
    (folder / "c.txt").write_text("c")
    assert opened(root).captions == ["c"]
    assert count(opened(root), "cannot be read") == 2


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda f: None, "4 images but no captions: looked for the field text or caption in"),
        (lambda f: metadata(f, {"file_name": "a.png", "prompt": "x"}), "4 images without a cap"),
        (lambda f: (f / "metadata.csv").write_text("name,text\na.png,a\n"), "file_name among them"),
        (lambda f: (f / "metadata.csv").write_text("file_name,text,text\n"), "different names"),
        (lambda f: (f / "metadata.csv").write_text("file_name,text\na.png," + "x" * 200_000),
         "line 2: field larger than"),
        (lambda f: (write_csv(f), write_jsonl(f)), "has both metadata.jsonl and metadata.csv"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_refused_in_one_line(write, message, root):
    write(root / "test")
    with pytest.raises(ValueError, match=message) as refusal:
        opened(root)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("splits", "split", "message"),
    [
        (("train", "Training"), "train", "several train splits"),
        (("validation", "test"), "train", "no folder with training images"),
        (("train",), "test", "no test split"),
    ],
)
def test_unclear_splits_are_refused(splits, split, message, tmp_path):
    for name in splits:
        write_texts(images(tmp_path / name, "a.png"))
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, split)
    with pytest.raises(ValueError, match="needs its directory"):
        open_images("captions", split)


def test_names_agree_in_whatever_form_of_unicode(root):
    written = unicodedata.normalize("NFD", "é.png")
    images(root / "test", written)
    metadata(root / "test", {"file_name": unicodedata.normalize("NFC", written), "text": "e"})
    assert by_name(opened(root)) == {written: "e"}


def test_identity_holds_the_captions(root):
    def fingerprint(text):
        metadata(root / "test", {"file_name": "a.png", "text": text})
        return identity_of([opened(root)])["test"]["sha256"]

    assert fingerprint("one") == fingerprint("one") != fingerprint("two")


def test_class_folders_are_not_captioned(root, picture_folder):
    (root / "test" / "metadata.csv").write_text("site,camera\n")
    (root / "train" / "a.txt").write_text("one of eight")
    assert not is_captioned(root) and not is_captioned(picture_folder)


def test_transparent_images_become_white(tmp_path):
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(images(tmp_path / "train") / "a.png")
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(images(tmp_path / "test") / "a.png")
    write_texts(tmp_path / "test")
    assert (opened(tmp_path)[0]["image"] == 255).all()


def test_batches_have_the_tokens_of_their_captions(root):
    write_jsonl(root / "test")
    source = opened(root)
    tokens = np.arange(8, dtype=np.int16).reshape(4, 2)
    (batch,) = image_batches(source, ImageSpec(4), 4, train=False, captions=tokens)
    np.testing.assert_array_equal(batch["captions"], tokens)
    assert batch["captions"].dtype == np.int32
    assert "captions" not in next(image_batches(source, ImageSpec(4), 4, train=False))


@pytest.mark.parametrize(
    ("written", "cleaned"),
    [
        ("  a\n b\t\u00a0c\u2028d ", "a b c d"),
        ("zero\u200bwidth \x00", "zerowidth"),
        ("👩\u200d🚒 خط\u200cنستعلیق", "👩\u200d🚒 خط\u200cنستعلیق"),
        ("\udce9", None),
        ("", ""),
    ],
)
def test_captions_are_one_printable_line(written, cleaned):
    assert clean(written, "x", Problems()) == cleaned


def test_a_file_of_captions_is_read_as_editors_write_it(tmp_path, capsys):
    file = tmp_path / "captions.txt"
    file.write_bytes("\ufeffa red  boat\r\n\r\nna\u00efve \x07caf\u00e9\r\n\r\n".encode())
    assert read_captions(file) == ["a red boat", "", "na\u00efve caf\u00e9"]
    assert (
        "1 captions with control characters, which were removed: line 3" in capsys.readouterr().err
    )
    file.write_text("x" * 2500, encoding="utf-16")
    assert read_captions(file) == ["x" * 2000]
    assert "1 captions cut to 2,000 characters" in capsys.readouterr().err
    for content, message in ((b"\n\n", "holds no caption"), (b"a\xff", "not UTF-8 text")):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_captions(file)
