r"""Alignment of images and captions: retrieval by a judge that was trained on real pairs.

Example:
  python benchmarks/text_alignment.py noto=emoji/noto_emoji twemoji=emoji/twemoji \
    --checkpoint runs/emoji/aim --left_out emoji/both/left_out.jsonl --out alignment

The judge is a small dual encoder of images and captions. It learns the real images of all sets and
both splits by the contrastive loss of CLIP (arXiv 2103.00020, figure 3), from shifted, brightened,
blurred and noisy copies, and is kept in OUT/judge.npz. An image is right if its caption is among
the five nearest of all captions, and its skin tone is right if it is nearer than the same caption
with any other tone. Images are generated for "CAPTION, STYLE style" (see emoji_captions.py): for
all captions held out from training, for others evenly spaced among those of training, and for
captions that training has seen in other styles alone (--left_out). The first table has the same
figures of the real images. Without --checkpoint only that table is made.

OUT receives report.json and a grid of samples of held-out captions beside real images (grid.png).
"""

import argparse
import itertools
import json
import re
import sys
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # find benchmarks/ from anywhere

from aim_jax import generate, load_pretrained  # noqa: E402
from aim_jax.data import decode_image  # noqa: E402
from aim_jax.evaluation.report import provenance  # noqa: E402
from aim_jax.utils.files import write_json  # noqa: E402
from aim_jax.utils.images import make_grid, save_png, to_rgb  # noqa: E402
from aim_jax.utils.logging import Progress  # noqa: E402

WORDS = 2**14  # rows of the table of words and pairs of words
WIDTH = 128  # of the common space
TONE = re.compile(r"(?:light|medium|dark|medium-light|medium-dark) skin tone")
NEAREST = 5
BATCH = 64  # images to generate or to judge at once


class Pair(NamedTuple):
    """A real image and what it shows."""

    image: np.ndarray  # uint8 (h, w, 3)
    caption: str
    style: str
    held_out: bool


class Judge(nn.Module):
    """Encoders of images (b, h, w, 3) in [-1, 1] and of word numbers (b, k), 0 for none."""

    def setup(self) -> None:
        """Create the layers."""
        self.table = nn.Embed(WORDS, 2 * WIDTH)
        self.text_layers = [nn.Dense(2 * WIDTH), nn.Dense(WIDTH)]
        self.convolutions = [nn.Conv(n, (3, 3), strides=2) for n in (32, 64, 128, 256)]
        self.norms = [nn.GroupNorm(8) for _ in self.convolutions]
        self.image_layer = nn.Dense(WIDTH)
        self.scale = self.param("scale", nn.initializers.constant(np.log(20.0)), ())

    def images(self, x: jax.Array) -> jax.Array:
        """Return unit vectors (b, WIDTH)."""
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = nn.relu(norm(convolution(x)))
        return unit(self.image_layer(x.reshape(len(x), -1)))

    def captions(self, words: jax.Array) -> jax.Array:
        """Return unit vectors (b, WIDTH)."""
        known = (words > 0)[..., None]
        x = jnp.sum(self.table(words) * known, axis=1) / jnp.maximum(known.sum(1), 1)
        first, second = self.text_layers
        return unit(second(nn.relu(first(x))))

    def __call__(self, x: jax.Array, words: jax.Array) -> jax.Array:
        """Return the contrastive loss of a batch of pairs with different captions."""
        logits = jnp.exp(self.scale) * self.images(x) @ self.captions(words).T
        right = jnp.arange(len(x))
        loss = optax.softmax_cross_entropy_with_integer_labels
        return jnp.mean(loss(logits, right) + loss(logits.T, right)) / 2


def unit(x: jax.Array) -> jax.Array:
    """Return vectors of length 1."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def numbers_of(captions: list[str]) -> np.ndarray:
    """Return numbers of the words and pairs of neighbouring words of captions, int32 (n, k)."""
    rows = []
    for caption in captions:
        words = re.findall(r"[\w-]+|[^\w\s]", caption.lower())
        terms = [*words, *map(" ".join, itertools.pairwise(words))]
        rows.append([1 + zlib.crc32(term.encode()) % (WORDS - 1) for term in terms])
    numbers = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for row, terms in zip(numbers, rows, strict=True):
        row[: len(terms)] = terms
    return numbers


def read_pairs(styles: dict[str, Path]) -> list[Pair]:
    """Read the images and captions of all styles and splits."""
    pairs = []
    for style, folder in styles.items():
        for split in ("train", "validation"):
            for line in (folder / split / "metadata.jsonl").read_text().splitlines():
                entry = json.loads(line)
                file = folder / split / entry["file_name"]
                image = decode_image(str(file), file.name)
                pairs.append(Pair(image, entry["text"], style, split == "validation"))
    return pairs


def disturbed(images: jax.Array, key: jax.Array) -> jax.Array:
    """Shift, brighten, blur and add noise to images (b, h, w, 3) in [-1, 1]."""
    height, width = images.shape[1:3]
    keys = jax.random.split(key, 5)
    padded = jnp.pad(images, ((0, 0), (3, 3), (3, 3), (0, 0)), constant_values=1.0)

    def shift(image, offset):
        return jax.lax.dynamic_slice(image, (*offset, 0), (height, width, 3))

    x = jax.vmap(shift)(padded, jax.random.randint(keys[0], (len(images), 2), 0, 7))
    x = x * jax.random.uniform(keys[1], (len(x), 1, 1, 1), minval=0.9, maxval=1.1)
    small = jax.image.resize(x, (len(x), height // 2, width // 2, 3), "linear")
    blurred = jax.image.resize(small, x.shape, "linear")
    x = jnp.where(jax.random.bernoulli(keys[2], 0.5, (len(x), 1, 1, 1)), blurred, x)
    strength = jax.random.uniform(keys[3], (len(x), 1, 1, 1), maxval=0.15)
    return x + strength * jax.random.normal(keys[4], x.shape)


def as_floats(images: np.ndarray) -> np.ndarray:
    """Scale images from uint8 to [-1, 1]."""
    return images.astype(np.float32) / 127.5 - 1


def train_judge(pairs: list[Pair], steps: int, batch: int) -> dict:
    """Return the parameters of a judge, trained on pairs of different captions in turns."""
    captions = sorted({pair.caption for pair in pairs})
    of_caption: dict[str, list[int]] = {caption: [] for caption in captions}
    for i, pair in enumerate(pairs):
        of_caption[pair.caption].append(i)
    images = np.stack([pair.image for pair in pairs])
    words = numbers_of(captions)
    judge = Judge()
    rng = np.random.default_rng(0)
    params = judge.init(jax.random.key(0), as_floats(images[:2]), words[:2])["params"]
    optimizer = optax.adamw(optax.cosine_decay_schedule(1e-3, steps), weight_decay=0.05)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, key, x, words):
        loss, grads = jax.value_and_grad(
            lambda p: judge.apply({"params": p}, disturbed(x, key), words)
        )(params)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    progress = Progress("training the judge", "steps")
    for i in range(steps):
        chosen = rng.choice(len(captions), min(batch, len(captions)), replace=False)
        picked = [rng.choice(of_caption[captions[c]]) for c in chosen]
        key = jax.random.fold_in(jax.random.key(1), i)
        params, state, loss = step(params, state, key, as_floats(images[picked]), words[chosen])
        if i % 100 == 99:
            print(f"step {i + 1}: loss {float(loss):.3f}", flush=True)
        progress(i + 1, steps)
    return params


def opened_judge(file: Path, pairs: list[Pair], steps: int, batch: int) -> dict:
    """Return the judge in a file, or train it and write the file."""
    if file.exists():
        with np.load(file) as stored:
            return traverse_util.unflatten_dict(dict(stored), sep="/")
    params = train_judge(pairs, steps, batch)
    flat = traverse_util.flatten_dict(jax.tree.map(np.asarray, params), sep="/")
    np.savez(file, **flat)
    return params


def scores_of(params: dict, images: np.ndarray, captions: list[str]) -> np.ndarray:
    """Return the cosine of every image uint8 (n, h, w, 3) with every caption, (n, m)."""
    encode = jax.jit(lambda x: Judge().apply({"params": params}, x, method="images"))
    parts = [encode(as_floats(images[i : i + BATCH])) for i in range(0, len(images), BATCH)]
    text = Judge().apply({"params": params}, numbers_of(captions), method="captions")
    return np.concatenate(parts) @ np.asarray(text).T


def figures(scores: np.ndarray, shown: list[str], captions: list[str]) -> dict[str, Any]:
    """Return shares of images whose caption is the nearest, among the nearest, of the right tone.

    Args:
      scores: of images and captions, (n, m).
      shown: caption of each image.
      captions: all captions.
    """
    index = {caption: i for i, caption in enumerate(captions)}
    right = np.asarray([index[caption] for caption in shown])
    rank = (scores > scores[np.arange(len(shown)), right][:, None]).sum(axis=1)
    families: dict[str, list[int]] = {}
    for i, caption in enumerate(captions):
        families.setdefault(TONE.sub("*", caption), []).append(i)
    tones = []
    for row, caption in zip(scores, shown, strict=True):
        family = families[TONE.sub("*", caption)]
        if TONE.search(caption) and len(family) > 1:
            tones.append(family[int(np.argmax(row[family]))] == index[caption])
    return {
        "images": len(shown),
        "nearest": float(np.mean(rank == 0)),
        f"among {NEAREST}": float(np.mean(rank < NEAREST)),
        "with a tone": len(tones),
        "right tone": float(np.mean(tones)) if tones else None,
    }


def generated(model: Any, captions: list[str], style: str, seed: int) -> np.ndarray:
    """Return an image uint8 (h, w, 3) for each caption in a style."""
    prompts = [f"{caption}, {style} style" for caption in captions]
    progress = Progress(f"generating, {style}")
    images = []
    for i in range(0, len(prompts), BATCH):
        part = prompts[i : i + BATCH]
        padded = (part * BATCH)[:BATCH]
        batch = generate(model, padded, seed, first_index=i).images
        images.append(to_rgb(np.asarray(batch)[: len(part)]))
        progress(i + len(part), len(prompts))
    return np.concatenate(images)


def table(rows: dict[str, dict]) -> str:
    """Return rows of figures as a table."""
    names = ("images", "nearest", f"among {NEAREST}", "with a tone", "right tone")
    lines = [f"| | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for title, row in rows.items():
        cells = [f"{row[n]:.1%}" if isinstance(row[n], float) else str(row[n]) for n in names]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Train the judge, and print and write the figures of real and generated images."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("styles", nargs="+", metavar="STYLE=FOLDER")
    parser.add_argument("--checkpoint", default="", help="text-to-image model")
    parser.add_argument("--left_out", type=Path, help="left_out.jsonl of emoji_captions.py")
    parser.add_argument("--out", type=Path, required=True, help="directory for the results")
    parser.add_argument("--steps", type=int, default=3000, help="of the judge (3000)")
    parser.add_argument("--batch", type=int, default=256, help="of the judge (256)")
    parser.add_argument("--training", type=int, default=500, help="captions of training (500)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (0)")
    args = parser.parse_args()
    styles = {style: Path(folder) for style, _, folder in (s.partition("=") for s in args.styles)}
    pairs = read_pairs(styles)
    captions = sorted({pair.caption for pair in pairs})
    args.out.mkdir(parents=True, exist_ok=True)
    params = opened_judge(args.out / "judge.npz", pairs, args.steps, args.batch)

    rows = {}
    for held_out in (True, False):
        chosen = [pair for pair in pairs if pair.held_out == held_out]
        images = np.stack([pair.image for pair in chosen])
        scores = scores_of(params, images, captions)
        title = f"real, {'held out' if held_out else 'of training'}"
        rows[title] = figures(scores, [pair.caption for pair in chosen], captions)
    if args.checkpoint:
        model = load_pretrained(args.checkpoint)
        left_out: dict[str, list[str]] = {}
        if args.left_out:
            for line in args.left_out.read_text().splitlines():
                entry = json.loads(line)
                left_out.setdefault(entry["style"], []).append(entry["text"])
        grid = []
        for style in styles:
            own = [pair for pair in pairs if pair.style == style]
            held_out = [pair.caption for pair in own if pair.held_out]
            skipped = {*held_out, *left_out.get(style, [])}
            known = [pair.caption for pair in own if pair.caption not in skipped]
            spaced = np.linspace(0, len(known) - 1, min(args.training, len(known))).astype(int)
            asked = {
                "held out": held_out,
                "of training": [known[i] for i in spaced],
                "of the other styles": left_out.get(style, []),
            }
            for title, shown in asked.items():
                if not shown:
                    continue
                images = generated(model, shown, style, args.seed)
                scores = scores_of(params, images, captions)
                rows[f"{style}, {title}"] = figures(scores, shown, captions)
                if title == "held out":
                    real = {pair.caption: pair.image for pair in own}
                    for i in np.linspace(0, len(shown) - 1, 16).astype(int):
                        grid += [images[i], real[shown[i]]]
        save_png(make_grid(np.stack(grid), 8, min_side=64), args.out / "grid.png")
    print(table(rows))
    write_json(args.out / "report.json", {"figures": rows, "environment": provenance()})


if __name__ == "__main__":
    main()
