"""The program that trains text tokenizers."""

import json

import numpy as np
import pytest
from PIL import Image

from aim_jax.cli.train_text_tokenizer import measure
from aim_jax.data import CacheWriter
from aim_jax.data.text import TextTokenizer
from tests.programs import run

CAPTIONS = ["a red apple", "a red balloon", "a blue apple", "", "日本"]


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """A folder of five captioned images, with a validation split."""
    root = tmp_path_factory.mktemp("captioned")
    for split in ("train", "validation"):
        (root / split).mkdir()
        lines = []
        for i, caption in enumerate(CAPTIONS):
            Image.new("L", (4, 4), 50 * i).save(root / split / f"{i}.png")
            lines.append(json.dumps({"file_name": f"{i}.png", "text": caption}) + "\n")
        (root / split / "metadata.jsonl").write_text("".join(lines))
    return root


def test_a_folder_and_its_token_cache_give_the_same_tokenizer(captioned, tmp_path):
    out = tmp_path / "text.json"
    given = ("--vocab_size=270", "--max_caption=5")
    done = run("train_text_tokenizer", "--data", captioned, "--out", out, *given)
    assert done.returncode == 0, done.stderr
    tokenizer = TextTokenizer.load(out)
    lengths = (tokenizer.encode(CAPTIONS, 30) >= 0).sum(1)
    for text in (
        "train: 5 captioned images in",
        "1 images with an empty caption",
        f"{tokenizer.vocab_size} tokens, learned from 4 captions",
        f"the longest {max(lengths)}",
        f"max_caption=5 cuts {np.mean(lengths[lengths > 0] > 5):.2%} of the captions",
    ):
        assert text in done.stderr, done.stderr
    codes = tmp_path / "codes"
    writer = CacheWriter(
        codes / "train", tokenizer="a" * 64, vocab_size=5, grid=(1, 1), class_names=["image"],
        views=["centre"], num_examples=5, captioned=True,
    )  # fmt: skip
    writer.write(0, np.zeros((5, 1, 1), int), np.zeros(5, int), CAPTIONS)
    writer.finish()
    done = run("train-text-tokenizer", "--codes", codes, "--out", tmp_path / "again.json", *given)
    assert done.returncode == 0 and (tmp_path / "again.json").read_bytes() == out.read_bytes()


def test_fit_counts_tokens():
    tokenizer = TextTokenizer.train(["ab ab"], 300)  # " ab" is one token
    fit = measure(tokenizer, ["ab", "ab ab c", ""])
    assert fit.lengths.tolist() == [1, 4] and fit.coverage == 3 / 5


def test_mistakes_are_one_line(picture_folder, tmp_path):
    out = ("--out", tmp_path / "text.json")
    for given, message in (
        ((), "pass the captions as --data DIR"),
        (("--data", picture_folder, "--codes", "codes"), "pass the captions as --data DIR"),
        (("--data", picture_folder), "48 images but no captions"),
        (("--data", picture_folder, "--data_name=folder"), "folder has no captions"),
    ):
        wrong = run("train_text_tokenizer", *given, *out)
        assert wrong.returncode == 1 and message in wrong.stderr, wrong.stderr
        assert wrong.stderr.splitlines()[-1].startswith("error: ")
        assert not (tmp_path / "text.json").exists()
