"""Generate images with an exported sampler; requires jax, flatbuffers, safetensors and pillow.

A model of captions also requires tokenizers.

Examples:
  python sample.py --classes cat,ship,3 --per_class 4 --seed 1 --out images.png
  python sample.py --classes cat --cfg_scale 3 --top_k 100 --cfg_interval 0.1,0.8
  python sample.py --captions "a red apple" "a blue heart" --per_class 4    # a model of captions

--help lists the settings. The grid has one row per class, with its name.
"""

import argparse
import json
import math
import os
import sys
import unicodedata
from pathlib import Path

import numpy as np
from jax import export
from PIL import Image, ImageDraw, ImageFont
from safetensors.numpy import load_file

HERE = Path(__file__).resolve().parent
MARGIN = 2
MIN_SIDE = 64  # smaller images are enlarged in the grid
LAST_LETTER = "\u024f"  # of the Latin letters that Pillow's font has
RANGES = {
    "cfg_scale": ("a finite number", math.isfinite),
    "temperature": ("a positive number", lambda x: 0 < x < math.inf),
    "top_k": ("an integer >= 0 (0 is off)", lambda x: 0 <= x < 2**31 and x == int(x)),
    "top_p": ("in (0, 1] (1 is off)", lambda x: 0 < x <= 1),
    "min_p": ("in [0, 1] (0 is off)", lambda x: 0 <= x <= 1),
}


def read_settings():
    """Return the content of settings.json.

    Raises:
      ValueError: if it is damaged.
    """
    file = HERE / "settings.json"
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        names = stored["class_names"]
        count = stored["num_classes"]
        numbers = stored["settings"]
        complete = (
            type(count) is int and type(stored["max_caption"]) is int
            and (count > 0) != (stored["max_caption"] > 0)
            and isinstance(names, list) and len(names) in (0, count)
            and all(isinstance(name, str) for name in names)
            and numbers.keys() <= RANGES.keys()
            and all(type(x) in (int, float) for x in numbers.values())
            and all(stored["dtypes"][name] in ("int32", "float32") for name in numbers)
            and len(stored["cfg_interval"]) == 2
            and all(type(x) in (int, float) for x in stored["cfg_interval"])
            and isinstance(stored["cfg_schedule"], str)
        )  # fmt: skip
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged ({error!r:.200}); export the model again") from None
    if not complete:
        raise ValueError(f"{file} is damaged; export the model again")
    try:
        checked_settings({}, stored, 1)
        checked_interval(None, stored)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file} is damaged ({error}); export the model again") from None
    return stored


def class_id(name, stored):
    """Return the id of a class from its name, in the same or another case, or from its number.

    Raises:
      ValueError: if there is no such class, or several.
    """
    if isinstance(name, int | np.integer):
        return int(name)
    names = stored["class_names"]
    forms = (
        lambda text: text,
        lambda text: unicodedata.normalize("NFC", text).strip(),
        lambda text: unicodedata.normalize("NFC", text).strip().casefold().replace("_", " "),
    )
    for form in forms:
        found = [i for i, other in enumerate(names) if form(other) == form(name)]
        if len(found) == 1:
            return found[0]
        if found:
            listed = ", ".join(f"{names[i]!r} (class {i})" for i in found)
            raise ValueError(f"class {name!r} is ambiguous: {listed}; pass the number")
    if name.isascii() and name.isdigit() and int(name) <= stored["num_classes"]:
        return int(name)
    known = ", ".join(map(repr, names[:20])) + (", ..." if len(names) > 20 else "")
    numbers = f"class ids 0..{stored['num_classes'] - 1}"
    raise ValueError(
        f"unknown class {name!r}; expected " + (f"{known}, or {numbers}" if names else numbers)
    )


def caption_tokens(captions, stored):
    """Return the tokens of captions int32 (n, max_caption), with -1 on the left of shorter ones.

    Raises:
      ValueError: if a caption is no text, or text_tokenizer.json is damaged.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers

    file = HERE / "text_tokenizer.json"
    try:
        merges = json.loads(file.read_text(encoding="utf-8"))["merges"]
        pairs = [tuple(merge.split(" ")) for merge in merges]
        parts = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, pairs)]
        vocabulary = {token: number for number, token in enumerate(dict.fromkeys(parts))}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    except Exception as error:  # the library raises its own kinds
        raise ValueError(f"{file} is damaged ({error!r:.200}); export the model again") from None
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    rows = np.full((len(captions), stored["max_caption"]), -1, np.int32)
    for row, caption in zip(rows, captions, strict=True):
        if not isinstance(caption, str):
            raise ValueError(f"captions: expected texts, got {caption!r:.80}")
        text = " ".join(unicodedata.normalize("NFC", caption.lower()).split())
        tokens = tokenizer.encode(text).ids[: len(row)]
        row[len(row) - len(tokens) :] = tokens
    return rows


def checked_settings(settings, stored, count):
    """Return the settings of `count` images as arrays by name.

    Raises:
      ValueError: if a setting is out of range.
      TypeError: if a setting is unknown or not a number.
    """
    unknown = sorted(settings.keys() - stored["settings"].keys())
    if unknown:
        raise TypeError(
            f"{', '.join(unknown)}: unknown setting; expected {', '.join(stored['settings'])}, "
            "cfg_interval, cfg_schedule"
        )
    given = {name: value for name, value in settings.items() if value is not None}
    arrays = {}
    for name, value in (stored["settings"] | given).items():
        expected, accepts = RANGES[name]
        if isinstance(value, bool) or not isinstance(value, int | float | np.number):
            raise TypeError(f"{name}={value!r}: expected {expected}")
        dtype = np.dtype(stored["dtypes"][name])
        try:
            with np.errstate(over="ignore"):
                rounded = float(dtype.type(value)) if dtype.kind == "f" else value
            is_valid = math.isfinite(value) and accepts(rounded)
        except OverflowError:  # an integer beyond all floats
            is_valid = False
        if not is_valid:
            raise ValueError(f"{name}={value!s:.40}: expected {expected}")
        arrays[name] = np.full(count, value, dtype)
    return arrays


def checked_interval(interval, stored):
    """Return the interval of guidance as float32 (2,); by default that of settings.json.

    Raises:
      ValueError: if it is not a range of fractions.
    """
    interval = stored["cfg_interval"] if interval is None else interval
    if np.shape(interval) != (2,) or not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(
            f"cfg_interval={interval!r}: expected two fractions of the image in [0, 1], with "
            "start < end"
        )
    return np.asarray(interval, np.float32)


def sample(labels, seed=0, *, cfg_interval=None, cfg_schedule=None, **settings):
    """Generate one image per label or caption.

    Args:
      labels: class ids or class names (b,), or captions for a model of captions.
      seed: integer that determines the randomness, together with the index of each image.
      cfg_interval: start and end of guidance, as fractions of the tokens.
      cfg_schedule: growth of guidance over an image; only the exported one is accepted.
      **settings: cfg_scale, temperature, top_k, top_p, min_p. All settings are by default those of
        settings.json.

    Returns:
      Tokens int32 (b, t) and images uint8 (b, H, W, c).

    Raises:
      ValueError: if labels, seed or settings are out of range.
      TypeError: if a setting is unknown or not a number.
    """
    stored = read_settings()
    condition = checked_labels(labels, stored)
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed={seed}: expected an integer from 0 to 2**32 - 1")
    if cfg_schedule not in (None, stored["cfg_schedule"]):
        raise ValueError(
            f"cfg_schedule={cfg_schedule!r}: this sampler was exported with "
            f"{stored['cfg_schedule']!r}; export the model again with --cfg_schedule {cfg_schedule}"
        )
    per_image = checked_settings(settings, stored, len(condition))
    interval = checked_interval(cfg_interval, stored)
    program = export.deserialize((HERE / "sampler.jax").read_bytes())
    weights = load_file(HERE / "weights.safetensors")
    index = np.arange(len(condition), dtype=np.int32)
    arguments = (weights, condition, np.uint32(seed), index, per_image, interval)
    tokens, images, finite = program.call(*arguments)
    if not np.all(finite):
        raise ValueError("the model computed logits that are infinite or not a number")
    return tokens, images


def checked_labels(labels, stored):
    """Return class ids int32 (b,), or the tokens of captions int32 (b, max_caption).

    Raises:
      ValueError: if there are none, or one is out of range or unknown.
    """
    if stored["max_caption"]:
        if not len(labels):
            raise ValueError("expected captions")
        return caption_tokens(list(labels), stored)
    ids = [class_id(label, stored) for label in labels]
    classes = stored["num_classes"]
    if not ids or not all(0 <= label <= classes for label in ids):
        raise ValueError(
            f"labels: expected class ids 0..{classes - 1}, or {classes} for the null class"
        )
    return np.asarray(ids, np.int32)


def caption(label, stored):
    """Return a caption, or the name of a class; its number where the font cannot show the name."""
    if isinstance(label, str):
        return label[:48]
    names = stored["class_names"]
    name = names[label] if label < len(names) else ""
    shown = name and name.isprintable() and max(name) <= LAST_LETTER
    return name if shown else f"class {label}"


def labelled_grid(images, columns, captions):
    """Return a grid of images uint8 (n, H, W, c), with a caption to the left of each row."""
    images = np.asarray(images)
    images = np.repeat(images, 3, axis=-1) if images.shape[-1] == 1 else images
    factor = -(-MIN_SIDE // images.shape[1])
    images = images.repeat(factor, axis=1).repeat(factor, axis=2)
    height, width = images.shape[1] + MARGIN, images.shape[2] + MARGIN
    font = ImageFont.load_default(size=16)
    left = int(max(map(font.getlength, captions))) + 12
    size = left + columns * width + MARGIN, len(captions) * height + MARGIN
    canvas = Image.new("RGB", size, "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        corner = left + MARGIN + column * width, MARGIN + row * height
        canvas.paste(Image.fromarray(image), corner)
    draw = ImageDraw.Draw(canvas)
    for row, text in enumerate(captions):
        draw.text((6, row * height + height // 2), text, fill="black", font=font, anchor="lm")
    return canvas


def save_png(image, path):
    """Write a PNG under a temporary name, and rename it."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"--out {path} is a directory; name a file in it")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        image.save(partial, format="PNG")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def main():
    """Write a labelled grid and print its path."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--classes", "--labels", help="class names or ids; by default all classes, at most 20"
    )
    parser.add_argument("--captions", nargs="+", help="captions, for a model of captions")
    parser.add_argument(
        "--per_class", type=int, default=1, help="images per class or caption (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0)
    try:
        stored = read_settings()
    except (ValueError, OSError) as error:
        parser.error(str(error))
    for name, default in stored["settings"].items():
        kind = int if stored["dtypes"][name].startswith("int") else float
        expected = RANGES[name][0]
        parser.add_argument(f"--{name}", type=kind, help=f"{expected} (default: {default})")
    parser.add_argument(
        "--cfg_interval",
        type=lambda text: tuple(map(float, text.split(","))),
        help="start and end of guidance, such as 0.1,0.8 "
        f"(default: {','.join(map(str, stored['cfg_interval']))})",
    )
    parser.add_argument("--cfg_schedule", help=f"only {stored['cfg_schedule']}, which was exported")
    parser.add_argument("--out", default="images.png")
    args = parser.parse_args()
    settings = {name: getattr(args, name) for name in (*stored["settings"], "cfg_interval")}
    names = args.classes.split(",") if args.classes else range(min(20, stored["num_classes"]))
    try:
        if args.per_class < 1:
            raise ValueError(f"--per_class {args.per_class}: expected 1 or more")
        if bool(stored["max_caption"]) != bool(args.captions):
            kind = "--captions" if stored["max_caption"] else "--classes"
            raise ValueError(f"this sampler takes {kind}")
        classes = args.captions or [class_id(name, stored) for name in names]
        labels = [label for label in classes for _ in range(args.per_class)]
        _, images = sample(labels, args.seed, cfg_schedule=args.cfg_schedule, **settings)
        captions = [caption(label, stored) for label in classes]
        save_png(labelled_grid(images, args.per_class, captions), args.out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(args.out)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("stopped by Ctrl-C", file=sys.stderr, flush=True)
        os._exit(130)  # the interpreter's clean-up would wait for the computation
