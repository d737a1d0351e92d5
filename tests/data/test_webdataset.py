"""Tar files of WebDataset: read in place, with every problem counted."""

import io
import json
import tarfile

import pytest
from PIL import Image

from aim_jax.data import open_images
from aim_jax.data.captioned_folders import is_captioned


def encoded(grey: int, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), grey).save(file, form)
    return file.getvalue()


def write(path, *members: tuple[str, bytes], form: int = tarfile.USTAR_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def pairs(start: int, stop: int) -> list[tuple[str, bytes]]:
    return [
        member
        for i in range(start, stop)
        for member in ((f"{i:03d}.png", encoded(i)), (f"{i:03d}.txt", f"grey {i}\n".encode()))
    ]


def examples_of(source):
    return {example["caption"]: int(example["image"][0, 0, 0]) for example in source}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_images_and_captions_are_read_in_place(form, tmp_path):
    long = "d" * 150 + "/"  # takes headers of its own
    write(tmp_path / "train-000.tar", *pairs(0, 15), form=form)
    members = [(long + name, data) for name, data in pairs(15, 20)]
    write(tmp_path / "train-001.tar", *members, form=tarfile.GNU_FORMAT)
    write(tmp_path / "val-000.tar", *pairs(20, 23))
    train, validation = (open_images("captions", s, tmp_path) for s in ("train", "validation"))
    assert examples_of(train) == {f"grey {i}": i for i in range(20)}
    assert examples_of(validation) == {f"grey {i}": i for i in range(20, 23)}
    assert train[0]["image"].shape == (4, 4, 1) and train[0]["label"] == 0
    assert train.summary == f"train: 20 captioned images in 2 tar files of {tmp_path}"
    assert train.fingerprint() != validation.fingerprint()
    assert is_captioned(tmp_path)
    with pytest.raises(ValueError, match="no test images"):
        open_images("captions", "test", tmp_path)


def test_splits_are_folders_or_held_out(tmp_path):
    write(tmp_path / "one" / "train" / "0.tar", *pairs(0, 3))
    write(tmp_path / "one" / "validation" / "0.tar", *pairs(3, 5))
    assert len(open_images("captions", "validation", tmp_path / "one")) == 2
    write(tmp_path / "two" / "shard-{0..9}.tar", *pairs(0, 40))
    parts = [open_images("captions", s, tmp_path / "two") for s in ("train", "validation")]
    assert [len(part) for part in parts] == [38, 2]
    assert len(examples_of(parts[0]) | examples_of(parts[1])) == 40


def test_json_and_its_fields(tmp_path):
    entry = json.dumps({"caption": "c", "text": "t", "prompt": "p"}).encode()
    image = encoded(7, "JPEG")
    write(
        tmp_path / "0.tar", ("a.jpg", image), ("a.json", entry), ("b.JPG", image),
        ("b.txt", b"plain"), ("b.json", entry), ("b.seg.png", image), ("c.cls", b"1"),
    )  # fmt: skip

    def captions(name):
        source = open_images(name, "train", tmp_path), open_images(name, "validation", tmp_path)
        return sorted(source[0].captions + source[1].captions), source[0].summary

    assert captions("captions")[0] == ["plain", "t"]
    assert captions("captions:prompt")[0] == ["p", "p"]
    assert "left aside: 1 .cls files, 1 .seg.png files" in captions("captions")[1]


def test_problems_are_counted(tmp_path):
    write(
        tmp_path / "train-0.tar", *pairs(0, 2),
        ("2.png", encoded(2)),
        ("3.txt", b"no image"),
        ("4.png", encoded(4)), ("4.txt", b"caf\xe9"),
        ("5.png", encoded(5)), ("5.json", b'{"text": 1'),
        ("6.png", encoded(6)), ("6.txt", b""),
        ("000.txt", b"again"), ("000.jpg", encoded(9, "JPEG")),
        ("._7.png", b""),
    )  # fmt: skip
    write(tmp_path / "val-0.tar", *pairs(0, 1))
    source = open_images("captions", "train", tmp_path)
    assert examples_of(source) == {"grey 0": 0, "grey 1": 1, "": 6}
    lines = source.summary.splitlines()
    for text in (
        "1 captions of missing images, ignored: train-0.tar/3",
        "1 captions that are not UTF-8 text, ignored: train-0.tar/4",
        "1 entries that cannot be read, ignored: train-0.tar/5.json (",
        "1 further captions of an image that has one, ignored: train-0.tar/000.txt",
        "1 images with an empty caption, kept as images without text: train-0.tar/6",
        "3 images without a caption, left aside: train-0.tar/2, train-0.tar/4, train-0.tar/5",
    ):
        assert any(line.strip().startswith(text) for line in lines), source.summary
    assert "1 .jpg files" in lines[0]


def test_links_are_not_followed(tmp_path):
    path = write(tmp_path / "train-0.tar", *pairs(0, 2))
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("9.png")
        info.type = tarfile.SYMTYPE
        info.linkname = "/etc/passwd"
        archive.addfile(info)
    write(tmp_path / "val-0.tar", *pairs(0, 1))
    source = open_images("captions", "train", tmp_path)
    assert len(source) == 2 and "1 linked files" in source.summary


def damaged_header(data: bytes) -> bytes:
    return data[: 2 * 512] + b"\xff" * 512 + data[3 * 512 :]


def negative_size(data: bytes) -> bytes:
    """A header whose size is -512 as a binary number, with its checksum."""
    header = bytearray(data[2 * 512 : 3 * 512])
    header[124:136] = b"\xff" * 10 + b"\xfe\x00"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return data[: 2 * 512] + bytes(header) + data[3 * 512 :]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:1100], "train-0.tar .*repair or remove it"),
        (lambda data: data[:1024], "train-0.tar is damaged or cut off at byte 1,024"),
        (lambda data: data[:1025], "repair or remove it"),
        (damaged_header, "is damaged or cut off at byte 1,024"),
        (negative_size, "wrong size at byte 1,024"),
        (lambda data: b"", "cannot be read as a tar file"),
        (lambda data: b"text" * 1000, "cannot be read as a tar file"),
        (lambda data: bytes(10240), "1 tar files but no captioned images: looked for NAME"),
    ],
)
def test_damaged_files_are_named(change, message, tmp_path):
    path = write(tmp_path / "train-0.tar", *pairs(0, 3))
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as refusal:
        open_images("captions", "train", tmp_path)
    assert "\n" not in str(refusal.value)


def test_folders_without_captions_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no images, and no tar files to train on"):
        open_images("captions", "train", tmp_path)
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="compressed tar files"):
        open_images("captions", "train", tmp_path)


def test_a_damaged_image_is_named(tmp_path):
    write(tmp_path / "train-0.tar", ("0.png", encoded(0)[:30]), ("0.txt", b"zero"))
    write(tmp_path / "val-0.tar", *pairs(0, 1))
    with pytest.raises(ValueError, match=r"cannot read the image train-0\.tar/0"):
        open_images("captions", "train", tmp_path)[0]
