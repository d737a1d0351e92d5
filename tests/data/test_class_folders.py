"""Layouts of class folders: understood and shown, or refused; never guessed."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from aim_jax.configs import from_folder
from aim_jax.data import identity_of, open_images
from aim_jax.data.class_folders import split_of


def fill(root: Path, *folders: str, count: int = 4, mode: str = "RGB") -> Path:
    """Write small images into folders."""
    rng = np.random.default_rng(0)
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            pixels = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            Image.fromarray(pixels).convert(mode).save(root / folder / f"{i}.png")
    return root


def classes(root: Path, split: str = "train") -> tuple[str, ...]:
    return open_images("folder", split, root).class_names


# ------------------------------------------------------------------------ layout: splits


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("Training", "Testing"), ("train", "test")),
        (("TRAIN", "VAL"), ("train", "validation")),
        (("training_set", "test_set"), ("train", "test")),
        (("train-images", "valid-images"), ("train", "validation")),
        (("TrainData", "DevData"), ("train", "validation")),
        (("seg_train", "seg_test"), ("train", "test")),
        (("trainset", "testset"), ("train", "test")),
        (("ILSVRC2012_img_train", "ILSVRC2012_img_val"), ("train", "validation")),
    ],
)
def test_layout_splits_in_their_common_names(names, splits, tmp_path):
    for name, count in zip(names, (4, 2), strict=True):
        fill(tmp_path / name, "cat", "dog", "owl", count=count)
    assert tuple(split_of(name)[0] for name in names) == splits
    assert classes(tmp_path) == ("cat", "dog", "owl")
    train = open_images("folder", "train", tmp_path)
    assert {Path(path).parts[-3] for path in train.paths} == {names[0]}
    other = open_images("folder", splits[1], tmp_path)
    assert {Path(path).parts[-3] for path in other.paths} == {names[1]} and len(other) == 6


@pytest.mark.parametrize("name", ["trainers", "cat", "testament", "training_validation", "2012"])
def test_layout_other_names_are_no_splits(name):
    assert split_of(name) is None


def test_layout_a_class_may_be_called_train(tmp_path):
    fill(tmp_path / "vehicles", "car", "plane", "train")
    assert classes(tmp_path / "vehicles") == ("car", "plane", "train")
    for split in ("train", "val"):
        fill(tmp_path / "split" / split, "car", "train", "test")
    assert classes(tmp_path / "split") == ("car", "test", "train")


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (("train", "test"), "without class folders: put them into folders"),
        (("train/cat", "train/dog", "Training/cat"), "several datasets or splits of one kind"),
        (("a_train/cat", "b_test/cat"), "several datasets or splits of one kind"),
        (("Testing/cat", "val/cat"), "no folder with training images"),
        (("images/cat", "images/dog"), r"pass .*/images, or"),
        (("one/cat", "two/cat"), "holds only folders of folders"),
        (("seg_train/seg_train/sea", "seg_train/seg_train/street"), "pass .*seg_train/seg_train"),
        (("train/a", "train/b", "car", "plane"), "unclear: train looks like a split"),
        ((), "no class folders"),
    ],
)
def test_layout_unclear_ones_are_refused_with_what_to_do(folders, message, tmp_path):
    fill(tmp_path, *folders)
    for split in ("train", "validation"):
        with pytest.raises(ValueError, match=message):
            open_images("folder", split, tmp_path)


def test_layout_splits_must_have_the_same_classes(tmp_path):
    fill(tmp_path, "train/cat", "train/dog", "val/cat")
    with pytest.raises(ValueError, match="only one of them has dog"):
        open_images("folder", "validation", tmp_path)


def test_layout_hidden_and_bookkeeping_folders_never_count(tmp_path):
    fill(tmp_path, "a", "b", count=10)
    fill(
        tmp_path,
        "a/.ipynb_checkpoints",
        "a/.thumbnails",
        "b/__MACOSX",
        "@eaDir",
        ".git",
        "b/@eaDir",
    )
    (tmp_path / "a" / "._0.png").write_bytes(b"resource fork")
    assert classes(tmp_path) == ("a", "b")
    assert sum(len(open_images("folder", s, tmp_path)) for s in ("train", "validation")) == 20


def test_layout_numbered_folders_are_in_the_order_of_their_numbers(tmp_path):
    fill(tmp_path, *map(str, range(12)))
    assert classes(tmp_path) == tuple(map(str, range(12)))
    fill(tmp_path / "padded", "08", "9", "10", "100")
    assert classes(tmp_path / "padded") == ("08", "9", "10", "100")
    fill(tmp_path / "mixed", "1", "10", "2", "x")
    assert classes(tmp_path / "mixed") == ("1", "10", "2", "x")


def test_layout_is_said_with_what_is_left_aside(tmp_path):
    fill(tmp_path / "train", "cat", count=4)
    fill(tmp_path / "train", "dog", count=7)
    fill(tmp_path, "test", "extra", "val/cat", "val/dog")
    (tmp_path / "train" / "cat" / "notes.txt").write_text("")
    (tmp_path / "train" / "cat" / "list.txt").write_text("")
    (tmp_path / "train" / "dog" / "linked").symlink_to(tmp_path / "extra")
    Image.new("RGB", (4, 4)).save(tmp_path / "cover.png")
    said = open_images("folder", "train", tmp_path).summary
    assert (
        said.startswith("train: 11 images in ") and "2 classes (cat, dog) of 4 to 7 images" in said
    )
    for aside in ("2 .txt files", "1 linked folders", "extra/ (4 images)", "test/ (4 images)",
                  "1 images outside of class folders"):  # fmt: skip
        assert aside in said, said
    held_out = open_images("folder", "validation", fill(tmp_path / "plain", "a", "b")).summary
    assert "(5% of each class)" in held_out


# ------------------------------------------------------------------------------- names


def test_names_of_files_are_bytes(tmp_path):
    fill(tmp_path, "x", "y", count=10)
    folder = os.fsencode(tmp_path / "x")
    os.rename(folder + b"/0.png", folder + b"/caf\xe9.png")
    os.rename(os.fsencode(tmp_path / "y"), os.fsencode(tmp_path) + b"/\xe9t\xe9")
    sources = [open_images("folder", split, tmp_path) for split in ("train", "validation")]
    assert sum(map(len, sources)) == 20
    assert all(
        source[i]["image"].shape == (4, 4, 3) for source in sources for i in range(len(source))
    )
    assert identity_of(sources)["train"]["images"] == len(sources[0])


def test_names_of_classes_agree_in_whatever_form_of_unicode(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
    fill(tmp_path / "train", composed, "tea")
    fill(tmp_path / "val", decomposed, "tea")
    assert len(open_images("folder", "validation", tmp_path)) == 8
    fill(tmp_path / "train", decomposed)
    with pytest.raises(ValueError, match="differ in their Unicode form"):
        open_images("folder", "train", tmp_path)


# ------------------------------------------------------- the first element stands for all


@pytest.mark.parametrize("colour", [0, 37, 79])
def test_first_one_image_in_colour_makes_the_set_coloured(colour, tmp_path):
    fill(tmp_path, "a", count=80, mode="L")
    assert from_folder.survey(str(tmp_path)).channels == 1
    fill(tmp_path, "b", count=2, mode="L")
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a" / f"{colour}.png")
    assert from_folder.survey(str(tmp_path)).channels == 3


# --------------------------------------------------------------------- identity of a run


def test_identity_tells_data_apart(tmp_path):
    def identity():
        return identity_of([open_images("folder", s, tmp_path) for s in ("train", "validation")])

    fill(tmp_path, "a", "b")
    first = identity()
    assert identity() == first
    (tmp_path / "a").rename(tmp_path / "c")
    assert identity()["class_names"] == ["b", "c"]
    (tmp_path / "c").rename(tmp_path / "a")
    assert identity() == first
    (tmp_path / "a" / "0.png").rename(tmp_path / "a" / "9.png")
    assert identity() != first and identity()["class_names"] == first["class_names"]


def test_class_folders_with_control_characters_are_refused(tmp_path):
    fill(tmp_path, "boat", "ho\x1b[2Juse")
    with pytest.raises(ValueError, match=r"a class folder in .*: 'ho\\x1b\[2Juse' holds") as caught:
        open_images("folder", "train", tmp_path)
    assert str(caught.value).isprintable()
