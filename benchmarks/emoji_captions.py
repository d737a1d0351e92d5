r"""Join sets of captioned images into one folder whose captions name the set.

Example:
  python benchmarks/emoji_captions.py noto=emoji/noto_emoji twemoji=emoji/twemoji --out emoji/both
  aim-jax train-folder emoji/both --out runs/emoji

Every image is in the new folder twice: with its caption ("woman firefighter"), and with the name of
its set behind the caption ("woman firefighter, twemoji style"). So a model generates in the style
that is asked for, and in any of them where none is. The folders have train/ and validation/ with
metadata.jsonl (fields file_name, text and base, the text without skin tones).

Of three percent of the bases, chosen by hash, each set gives no training images: they are seen in
other styles alone, and are listed in left_out.jsonl (fields style, file_name and text).
"""

import argparse
import hashlib
import json
import shutil
import sys
from pathlib import Path

SPLITS = ("train", "validation")
LEFT_OUT = 3  # percent of the bases, for each style


def captions_of(text: str, style: str) -> dict[str, str]:
    """Return the captions of an image, by the end of its name in the new folder."""
    return {"": text, f"-{style}": f"{text}, {style} style"}


def is_left_out(base: str, style: int) -> bool:
    """Return whether the images of a base are no training images of a style, by its number."""
    percent = int(hashlib.sha256(base.encode()).hexdigest(), 16) % 100
    return percent // LEFT_OUT == style


def join(styles: dict[str, Path], split: str, out: Path) -> int:
    """Write a split of the new folder and return its number of images."""
    lines = []
    left_out = []
    (out / split).mkdir(parents=True)
    for number, (style, folder) in enumerate(styles.items()):
        for line in (folder / split / "metadata.jsonl").read_text().splitlines():
            entry = json.loads(line)
            image = folder / split / entry["file_name"]
            if split == "train" and is_left_out(entry["base"], number):
                left_out.append(json.dumps(entry | {"style": style}))
                continue
            for ending, caption in captions_of(entry["text"], style).items():
                name = f"{style}-{image.stem}{ending}{image.suffix}"
                shutil.copyfile(image, out / split / name)
                lines.append(json.dumps(entry | {"file_name": name, "text": caption}))
    (out / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    if left_out:
        (out / "left_out.jsonl").write_text("\n".join(left_out) + "\n")
    return len(lines)


def main() -> None:
    """Join the folders that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("styles", nargs="+", metavar="STYLE=FOLDER")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    styles = {}
    for argument in args.styles:
        style, _, folder = argument.partition("=")
        if not folder or not (Path(folder) / "train" / "metadata.jsonl").is_file():
            sys.exit(f"{argument}: expected STYLE=FOLDER with FOLDER/train/metadata.jsonl")
        styles[style] = Path(folder)
    if args.out.exists():
        sys.exit(f"{args.out} exists; choose another --out")
    for split in SPLITS:
        print(f"{split}: {join(styles, split, args.out)} images")


if __name__ == "__main__":
    main()
