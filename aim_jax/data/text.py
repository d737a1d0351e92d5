"""Text tokenizer of captions: byte-level byte-pair encoding.

The algorithm is that of the library `tokenizers` (Hugging Face): it is well kept, runs in Rust, has
wheels for every platform of JAX, and also trains. Byte-level encoding needs no token for unknown
characters, because every string is a string of bytes. `sentencepiece` stores a binary Protobuf
message, which cannot be checked before its C++ parser reads it.

The file of a tokenizer holds only its merges, in order of their rank:

    {"format": "aim_jax text tokenizer", "version": 1, "merges": ["Ġ c", "a t", "Ġc at", ...]}

Token 0 to 255 are the bytes, written as the printable characters of GPT-2 and sorted by them (Ġ is
the space). Each merge joins two earlier tokens into the next one. Normalization and splitting are
part of the version. The library never reads the file.
"""

import dataclasses
import functools
import hashlib
import json
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from aim_jax.utils.checks import check_arguments, check_integer, shown
from aim_jax.utils.files import write_json
from aim_jax.utils.json_files import choice, list_of, read_json, record, text
from aim_jax.utils.logging import say

TEXT_TOKENIZER_FILE = "text_tokenizer.json"
FORMAT = "aim_jax text tokenizer"
VERSION = 1
BYTES = 256
MOST_MERGES = 2**18
MOST_TOKEN = 100  # bytes of a learned token
PADDING = -1  # no token; on the left of every caption that is shorter than its row
CHECK = record(
    {
        "format": choice(FORMAT),
        "version": choice(VERSION),
        "merges": list_of(text(), 0, MOST_MERGES),
    },
    closed=True,
)


def normalize(caption: str) -> str:
    """Return a caption in lower case, in Unicode's form NFC, with single spaces between its words.

    Raises:
      ValueError: it holds half of a character (a surrogate), as text that was not UTF-8 does.
    """
    try:
        caption.encode()
    except UnicodeEncodeError:
        raise ValueError(
            f"the caption {shown(caption, ascii)} holds half of a character; expected UTF-8 text."
        ) from None
    return " ".join(unicodedata.normalize("NFC", caption.lower()).split())


@dataclasses.dataclass(frozen=True)
class TextTokenizer:
    """Byte-level tokenizer of captions.

    Attributes:
      merges: pairs of tokens, with a space between the two, in order of their rank.

    Raises:
      ValueError: a merge does not join two earlier tokens.
    """

    merges: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        known = set(_alphabet())
        for rank, merge in enumerate(self.merges):
            parts = merge.split(" ")
            if len(parts) != 2 or not known.issuperset(parts):
                raise ValueError(
                    f"merges[{rank}]: {shown(merge)} does not join two earlier tokens."
                )
            known.add("".join(parts))

    @classmethod
    @check_arguments
    def train(cls, captions: Iterable[str], vocab_size: int) -> "TextTokenizer":
        """Learn a vocabulary from captions.

        Args:
          captions: the captions; each is read once.
          vocab_size: most tokens. Fewer are learned if the captions have no further pair that
            occurs twice.

        Raises:
          ValueError: `vocab_size` is not from 256 to 262,400, or a caption is refused by
            `normalize`.
        """
        check_integer("vocab_size", vocab_size, BYTES, BYTES + MOST_MERGES)
        from tokenizers import trainers

        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, min_frequency=2, max_token_length=MOST_TOKEN,
            initial_alphabet=_alphabet(), show_progress=False,
        )  # fmt: skip
        trained = _library_tokenizer(())
        trained.train_from_iterator(map(normalize, captions), trainer)
        merges = json.loads(trained.to_str())["model"]["merges"]
        return cls(tuple(map(" ".join, merges)))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "TextTokenizer":
        """Read the file of a tokenizer.

        Raises:
          OSError: it cannot be read.
          ValueError: it is no text tokenizer, or damaged; the message names it.
        """
        content = read_json(path, CHECK, "cannot be read as a text tokenizer")
        try:
            return cls(tuple(content["merges"]))
        except ValueError as error:
            raise ValueError(f"{path} cannot be read as a text tokenizer: {error}") from None

    def save(self, path: str | os.PathLike) -> None:
        """Write the tokenizer to a file, atomically."""
        write_json(Path(path), self._content())

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return len(self._vocabulary)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that tokens depend on, in hexadecimal digits."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()

    @check_arguments
    def encode(self, captions: Sequence[str], length: int, strict: bool = False) -> np.ndarray:
        """Return the tokens of captions.

        Args:
          captions: n captions. An empty one, or one of white space, is the null caption.
          length: tokens per row. The end of a longer caption is cut off, and a line says so.
          strict: refuse longer captions instead.

        Returns:
          int32 (n, length), with -1 on the left of shorter captions; the null caption is all -1.

        Raises:
          ValueError: a caption is refused by `normalize`, or is longer than `length` and `strict`.
        """
        check_integer("length", length, 1)
        rows = np.full((len(captions), length), PADDING, np.int32)
        longer = []
        for row, caption in zip(rows, captions, strict=True):
            tokens = self._bpe.encode(normalize(caption)).ids
            if len(tokens) > length:
                longer.append(caption)
            tokens = tokens[:length]
            row[length - len(tokens) :] = tokens
        if longer:
            message = (
                f"{len(longer)} of {len(captions)} captions have more than {length} tokens; the "
                f"first is {shown(longer[0])}"
            )
            if strict:
                raise ValueError(f"{message}. Shorten them, or raise max_caption.")
            say(f"{message}. Their ends are cut off")
        return rows

    @check_arguments
    def decode(self, tokens: np.ndarray) -> list[str]:
        """Return the normalized captions of tokens (n, l); negative ones are padding."""
        return [self._bpe.decode(row[row >= 0].tolist()).strip() for row in np.asarray(tokens)]

    @functools.cached_property
    def _vocabulary(self) -> dict[str, int]:
        # Two merges may give the same token.
        tokens = dict.fromkeys([*_alphabet(), *(m.replace(" ", "") for m in self.merges)])
        return {token: number for number, token in enumerate(tokens)}

    @functools.cached_property
    def _bpe(self) -> Any:
        return _library_tokenizer(self.merges, self._vocabulary)

    def _content(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, "merges": list(self.merges)}

    def __getstate__(self) -> dict[str, Any]:  # what is cached stays behind
        return {"merges": self.merges}


@functools.cache
def _alphabet() -> list[str]:
    """Return the characters that stand for the 256 bytes, sorted."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())


def _library_tokenizer(merges: Sequence[str], vocabulary: dict[str, int] | None = None) -> Any:
    """Return the library's tokenizer of normalized text."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    pairs: list[Any] = [tuple(merge.split(" ")) for merge in merges]
    bpe = tokenizers.Tokenizer(models.BPE(vocab=vocabulary or {}, merges=pairs))
    # A first word gets a space too, so that a word has one token wherever it stands.
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.ByteLevel()
    return bpe
