"""Text tokenizer: every string, padding, long captions, the file and what it refuses."""

import json
import pickle

import numpy as np
import pytest

from aim_jax.data.text import TextTokenizer, normalize

CAPTIONS = [
    "A red  apple",
    "a blue apple",
    "a red balloon",
    "woman firefighter: dark skin tone",
] * 2


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return TextTokenizer.train(iter(CAPTIONS), 290)


def test_training_is_deterministic_and_bounded(tokenizer):
    assert tokenizer.vocab_size == 290
    assert TextTokenizer.train(CAPTIONS, 290) == tokenizer
    # Of one caption only a pair that occurs twice is learned.
    assert TextTokenizer.train(["ab ab"], 300).merges == ("a b", "Ġ ab")
    assert TextTokenizer.train([], 256).vocab_size == 256
    longest = TextTokenizer.train(["a" * 3000] * 2, 400)
    assert max(len(merge) for merge in longest.merges) <= 101


def test_words_share_a_token_wherever_they_stand(tokenizer):
    first, later = tokenizer.encode(["apple", "red apple"], 2)
    assert first[0] == -1 and first[1] == later[1] >= 256


@pytest.mark.parametrize(
    "text", ["日本 🍏 zebra", "a\x00b", "½ ´`", "woman firefighter: dark skin"]
)
def test_every_string_is_representable(tokenizer, text):
    tokens = tokenizer.encode([text], 64)
    assert tokens.dtype == np.int32 and tokens.max() < tokenizer.vocab_size
    assert tokenizer.decode(tokens) == [normalize(text)]


def test_normalization(tokenizer):
    assert normalize(" Cafe\u0301\tAU\n lait ") == "caf\u00e9 au lait"
    same = tokenizer.encode(["Cafe\u0301  AU lait", "caf\u00e9 au lait"], 20)
    np.testing.assert_array_equal(*same)
    with pytest.raises(ValueError, match=r"'\\ud800 a' holds half of a character"):
        tokenizer.encode(["\ud800 a"], 3)


def test_padding_and_the_null_caption(tokenizer):
    short, empty, white = tokenizer.encode(["a red apple", "", " \t "], 6)
    (exact,) = tokenizer.encode(["a red apple"], int((short >= 0).sum()))
    np.testing.assert_array_equal(short[short >= 0], exact)
    assert (np.diff((short >= 0).astype(int)) >= 0).all()  # on the left
    assert (empty == -1).all() and (white == -1).all()


def test_long_captions_are_cut_and_said_or_refused(tokenizer, capsys):
    (whole,) = tokenizer.encode([CAPTIONS[3]], 30)
    np.testing.assert_array_equal(tokenizer.encode(CAPTIONS[2:4], 5)[1], whole[whole >= 0][:5])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("1 of 2 captions have more than 5 tokens; the first is 'woman fire")
    with pytest.raises(ValueError, match=r"1 of 2 captions have more than 5 tokens.*max_caption"):
        tokenizer.encode(CAPTIONS[2:4], 5, strict=True)


def test_file_and_pickle_keep_the_tokenizer(tokenizer, tmp_path):
    tokens = tokenizer.encode(CAPTIONS, 20)
    tokenizer.save(tmp_path / "text.json")
    for copy in (TextTokenizer.load(tmp_path / "text.json"), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.fingerprint == tokenizer.fingerprint
        np.testing.assert_array_equal(copy.encode(CAPTIONS, 20), tokens)
    assert TextTokenizer(tokenizer.merges[:-1]).fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merges": ["q qq"]}, r"merges\[0\]: 'q qq' does not join two earlier tokens"),
        ({"merges": ["qq"]}, r"merges\[0\]: 'qq' does not join"),
        ({"merges": [["a", "b"]]}, r"merges\[0\]: expected a string"),
        ({"version": 2}, "version: expected 1"),
        ({"format": "other"}, "format: expected"),
        ({"normalizer": {}}, "unknown entries 'normalizer'"),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, message):
    path = tmp_path / "text.json"
    TextTokenizer().save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(
        ValueError, match=f"text.json cannot be read as a text tokenizer: {message}"
    ):
        TextTokenizer.load(path)
