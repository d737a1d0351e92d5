"""Folders of images with one folder per class: recognition of splits and classes, and a summary."""

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from aim_jax.data.sources import FolderImages, folders, images_in, is_image, walk
from aim_jax.utils.names import check_text, short_list

# Share of each class that is held out of "train" for validation.
VALIDATION_FRACTION = 0.05

# Words in the names of split folders, without regard to case.
SPLIT_WORDS = {
    "train": "train",
    "training": "train",
    "trn": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "tst": "test",
}
# Words beside them that say nothing: training_set, test-images, TrainData.
FILLERS = ("dataset", "data", "set", "split", "folder", "images", "image", "imgs", "img")


class Layout(NamedTuple):
    """Splits and classes of a folder of images.

    Attributes:
      root: The folder.
      splits: Folder of class folders by split; "train" is always present.
      class_names: Names of the classes, in label order.
      aside: Descriptions of what is not used.
    """

    root: Path
    splits: dict[str, Path]
    class_names: tuple[str, ...]
    aside: tuple[str, ...]


def split_of(name: str) -> tuple[str, tuple[str, ...]] | None:
    """Return the split that a folder's name says, and its other words; None if it says none.

    "Training", "test_set" and "seg_train" name a split; "trainers" does not.
    """
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).casefold()
    words = [_without_filler(word) for word in re.split(r"[\W_]+", spaced) if word]
    found = [word for word in words if word in SPLIT_WORDS]
    if len(found) != 1:
        return None
    return SPLIT_WORDS[found[0]], tuple(w for w in words if w not in (*found, *FILLERS))


def _without_filler(word: str) -> str:
    """Return "train" for "trainset", and a word without such an ending as it is."""
    for filler in FILLERS:
        if word.removesuffix(filler) in SPLIT_WORDS:
            return word.removesuffix(filler)
    return word


def recognise(root: Path) -> Layout:
    """Recognise the splits and classes of a folder of images.

    A split is a folder named like one (`split_of`) that holds class folders. A folder that holds
    images is a class, whatever its name, if there is no such split.

    Raises:
      ValueError: There are no class folders, or the layout can be read in several ways. The message
        says what to pass or to change.
    """
    entries = [folder for folder in folders(root) if holds_images(folder)]
    if not entries:
        raise ValueError(
            f"{root} has no class folders: expected one folder of images per class, in {root} or "
            f"in {root / 'train'}"
        )
    named = {folder: named for folder in entries if (named := split_of(folder.name))}
    splits = {folder: named[folder] for folder in named if not _has_own_images(folder)}
    if splits:
        return _with_splits(root, entries, splits)
    if len(named) == len(entries):
        raise ValueError(
            f"{root} has images in {_names(entries)} without class folders: put them into folders "
            f"named by their class, such as {entries[0] / 'CLASS' / 'image.png'}"
        )
    _check_classes(root, entries)
    return Layout(root, {"train": root}, _class_names(entries), tuple(_loose(root)))


def _with_splits(
    root: Path, entries: list[Path], splits: dict[Path, tuple[str, tuple[str, ...]]]
) -> Layout:
    by_split: dict[str, Path] = {}
    for folder, (split, other_words) in splits.items():
        if split in by_split or other_words != next(iter(splits.values()))[1]:
            raise ValueError(
                f"{root} holds several datasets or splits of one kind ({_names(splits)}): pass one "
                "of them, or keep one train, one validation and one test folder"
            )
        by_split[split] = folder
    if "train" not in by_split:
        first = next(iter(splits))
        raise ValueError(
            f"{root} has {_names(splits)} but no folder with training images: name it train, or "
            f"pass a folder of classes, such as {first}"
        )
    others = [folder for folder in entries if folder not in splits]
    classes = [other for other in others if _has_own_images(other) and not split_of(other.name)]
    if len(by_split) == 1 and classes:
        raise ValueError(
            f"{root} is unclear: {by_split['train'].name} looks like a split with class folders, "
            f"and {_names(classes)} like classes. Pass {by_split['train']}, or move the other "
            "folders away"
        )
    aside = [f"{other.name}/ ({len(images_in(other))} images)" for other in others]
    entries = [folder for folder in folders(by_split["train"]) if holds_images(folder)]
    _check_classes(by_split["train"], entries)
    return Layout(root, by_split, _class_names(entries), (*aside, *_loose(root)))


def _check_classes(root: Path, entries: list[Path]) -> None:
    """Check the class folders of a split.

    Raises:
      ValueError: None has images of its own, but only folders of images; or `check_text` refuses
        a name.
    """
    for entry in entries:
        check_text(f"a class folder in {root}", entry.name)
    if not any(map(_has_own_images, entries)):
        inner = str(entries[0]) if len(entries) == 1 else f"one of them, such as {entries[0]}"
        raise ValueError(
            f"{root} holds only folders of folders ({_names(entries)}), so its classes are "
            f"unclear: pass {inner}, or move the class folders up"
        )


def _loose(root: Path) -> Iterator[str]:
    count = sum(is_image(name) for name in os.listdir(root))
    if count:
        yield f"{count} images outside of class folders"


def _names(paths: Iterable[Path]) -> str:
    return short_list([f"{path.name}/" for path in paths])


def _class_names(entries: Iterable[Path]) -> tuple[str, ...]:
    """Return the names of class folders: by number if all are numbers, else in sorted order."""
    names = sorted(entry.name for entry in entries)
    if all(re.fullmatch("[0-9]+", name) for name in names):
        names.sort(key=int)
    return tuple(names)


def holds_images(folder: Path) -> bool:
    """Return whether there is an image in a folder or its subfolders."""
    return any(is_image(name) for _, _, names in walk(folder) for name in names)


def _has_own_images(folder: Path) -> bool:
    return any(is_image(name) for name in os.listdir(folder))


def open_folder(name: str, root: Path, split: str) -> FolderImages:
    """Open a split of a folder of images; see `recognise`.

    Without a validation folder, 5 % of each class are held out of "train", chosen by file name.

    Raises:
      ValueError: See `recognise`; the split is missing, its classes are not those of "train", or
        there are too few images.
    """
    layout = recognise(root)
    if split == "test" and "test" not in layout.splits:
        raise ValueError(f"{root} has no test split: expected a folder {root / 'test'}")
    train = layout.splits["train"]
    folder = layout.splits.get(split, train)
    class_folders = _match_classes(folder, layout)
    aside: Counter[str] = Counter()
    files = [images_in(class_folder, aside) for class_folder in class_folders]
    held_out = split != "test" and "validation" not in layout.splits
    if held_out:
        files = [held_out_share(paths, folder, split) for paths in files]
    paths = [path for group in files for path in group]
    labels = [label for label, group in enumerate(files) for _ in group]
    if not paths:
        raise ValueError(
            f"{root} has too few images to hold out a validation split: one in every class"
        )
    counts = [len(group) for group in files]
    where = str(folder)
    if held_out:
        share = "all but " if split == "train" else ""
        where += f" ({share}{VALIDATION_FRACTION:.0%} of each class)"
    left = [*layout.aside, *(f"{count} {kind}" for kind, count in sorted(aside.items()))]
    summary = (
        f"{split}: {len(paths)} images in {where}; {len(counts)} classes "
        f"({short_list(layout.class_names)}) of {min(counts)} to {max(counts)} images"
        + (f"; left aside: {', '.join(left)}" if left else "")
    )
    return FolderImages(
        name, split, layout.class_names, paths, labels, root=folder, summary=summary
    )


def _match_classes(folder: Path, layout: Layout) -> list[Path]:
    """Return the folders of a split in the order of the classes.

    Systems write the same letters in different ways (NFC, NFD), so names are compared in NFC.
    """
    own = {unicodedata.normalize("NFC", f.name): f for f in folders(folder) if holds_images(f)}
    wanted = [unicodedata.normalize("NFC", name) for name in layout.class_names]
    unmatched = sorted(own.keys() ^ set(wanted))
    if unmatched:
        raise ValueError(
            f"{folder} and {layout.splits['train']} differ in their class folders: only one of "
            f"them has {short_list(unmatched)}"
        )
    if len(set(wanted)) < len(wanted):
        raise ValueError(
            f"{folder} has class folders whose names look the same ({short_list(wanted)}): they "
            "differ in their Unicode form; rename or merge them"
        )
    empty = [str(f) for f in folders(folder) if f not in own.values()]
    if empty:
        raise ValueError(
            f"{len(empty)} class folders hold no images: {short_list(empty)}; remove them or add "
            "images"
        )
    return [own[name] for name in wanted]


def held_out_share(paths: list[str], root: Path, split: str) -> list[str]:
    """Return the files of one group that belong to `split`, chosen by the hash of their names."""

    def digest(path: str) -> bytes:
        relative = os.path.relpath(path, root).replace(os.sep, "/")
        return hashlib.sha256(os.fsencode(relative)).digest()

    count = max(1, round(VALIDATION_FRACTION * len(paths))) if len(paths) > 1 else 0
    held_out = set(sorted(paths, key=digest)[:count])
    return [path for path in paths if (path in held_out) == (split == "validation")]
