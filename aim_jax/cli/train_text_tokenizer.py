r"""Train the text tokenizer of a text-to-image model on the captions of a dataset.

Example:
  aim-jax train_text_tokenizer --data emoji --out runs/text_tokenizer.json

The captions are those of a folder of captioned images (--data), of another dataset (--data_name),
or of token caches (--codes). Only the train split is learned from. The program prints the size of
the vocabulary, how well it fits the captions, their lengths, and the share that a model with
config.model.max_caption tokens cuts. Training of AiM takes the file as config.text_tokenizer.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from absl import flags

from aim_jax.configs.from_folder import caption_length
from aim_jax.data import ImageSource, TokenCache, open_images
from aim_jax.data import captions as texts
from aim_jax.data.text import BYTES, MOST_MERGES, TextTokenizer
from aim_jax.training.inputs import captions_of
from aim_jax.utils.logging import say

AT_ONCE = 1024  # captions


class Fit(NamedTuple):
    """Fit of a text tokenizer to captions that are not empty.

    Attributes:
      lengths: Tokens of each caption, (n,).
      coverage: Share of tokens that are more than one byte.
    """

    lengths: np.ndarray
    coverage: float


def define_flags() -> None:
    """Define the flags of the program."""
    flags.DEFINE_string("out", None, "File for the text tokenizer.")
    flags.DEFINE_string("data", "", "Directory of the captioned images.")
    flags.DEFINE_string("data_name", texts.NAME, "Dataset; see aim_jax.data.open_images.")
    flags.DEFINE_list("codes", [], "Token caches with captions, instead of a dataset.")
    flags.DEFINE_integer(
        "vocab_size", 4096, "Most tokens, 256 of them bytes.", lower_bound=BYTES,
        upper_bound=BYTES + MOST_MERGES,
    )  # fmt: skip
    flags.DEFINE_integer(
        "max_caption", None, "Tokens that the model reads of a caption. Default: so many that at "
        "most 0.5 % of the captions are cut.", lower_bound=1,
    )  # fmt: skip
    flags.mark_flags_as_required(["out"])


def main() -> None:
    """Train on the captions that the flags name."""
    f = flags.FLAGS
    if bool(f.codes) == bool(f.data or f["data_name"].present):
        raise ValueError("pass the captions as --data DIR, as --data_name NAME, or as --codes DIR.")
    sources: list[ImageSource | TokenCache]
    if f.codes:
        sources = [TokenCache.open(Path(path) / "train") for path in f.codes]
    else:
        sources = [open_images(f.data_name, "train", f.data or None)]
    for source in sources:
        say(source.summary)
    captions = [caption for source in sources for caption in captions_of(source)]
    train_text_tokenizer(captions, Path(f.out), f.vocab_size, f.max_caption)


def train_text_tokenizer(
    captions: Sequence[str], out: Path, vocab_size: int = 4096, max_caption: int | None = None
) -> TextTokenizer:
    """Train a text tokenizer, write it to a file, and print how it fits the captions.

    Args:
      captions: The captions.
      out: File for the tokenizer.
      vocab_size: Most tokens.
      max_caption: Tokens that the model reads of a caption; None takes `caption_length`.

    Raises:
      ValueError: All captions are empty, or a size is invalid.
    """
    if not any(captions):
        raise ValueError(f"all {len(captions)} captions are empty, so there is nothing to learn.")
    tokenizer = TextTokenizer.train(captions, vocab_size)
    tokenizer.save(out)
    fit = measure(tokenizer, captions)
    most = max_caption or caption_length(fit.lengths)
    say(
        f"{out}: {tokenizer.vocab_size:,} tokens, learned from {len(fit.lengths):,} captions\n"
        f"coverage: {fit.coverage:.1%} of the tokens of the captions are more than one byte\n"
        f"length: {fit.lengths.mean():.1f} tokens per caption, the longest {fit.lengths.max()}; "
        f"max_caption={most} cuts {(fit.lengths > most).mean():.2%} of the captions"
    )
    return tokenizer


def measure(tokenizer: TextTokenizer, captions: Sequence[str]) -> Fit:
    """Measure how a text tokenizer fits captions; empty ones are left out."""
    given = [caption for caption in captions if caption]
    lengths = np.zeros(len(given), int)
    long_tokens = 0
    for start in range(0, len(given), AT_ONCE):
        some = given[start : start + AT_ONCE]
        # At most a token per byte, and one for the space before. Lower case may take more bytes.
        most = 1 + 3 * max(len(caption.encode()) for caption in some)
        tokens = tokenizer.encode(some, most)
        lengths[start : start + len(some)] = (tokens >= 0).sum(1)
        long_tokens += int((tokens >= BYTES).sum())
    return Fit(lengths, long_tokens / max(1, int(lengths.sum())))
