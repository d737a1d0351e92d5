"""Captions in the training data of text models: from token caches and from images."""

import dataclasses

import numpy as np
import pytest

from aim_jax.configs.defaults import aim_defaults
from aim_jax.data import ArrayImages, CacheWriter
from aim_jax.data.text import TextTokenizer
from aim_jax.training import inputs
from aim_jax.weights.tokenizer import tokenizer_fingerprint

TRAIN = ["red apple", "", "blue apple", "a very long red and blue apple"]
VALIDATION = ["blue", "red"]


@pytest.fixture
def config(tmp_path):
    """A configuration of a text model, with its text tokenizer."""
    tokenizer = TextTokenizer.train(TRAIN, 260)
    tokenizer.save(tmp_path / "text_tokenizer.json")
    config = aim_defaults()
    config.text_tokenizer = str(tmp_path / "text_tokenizer.json")
    config.model.update(condition="text", max_caption=12, caption_vocab=tokenizer.vocab_size)
    config.batch_size = 2
    config.data.update(image_size=4, channels=1)
    return config


def images_of(split, captions):
    count = 4 if split == "train" else 2
    images = np.arange(count, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 1), np.uint8)
    source = ArrayImages("grey", split, ["image"], images, np.zeros(count, int))
    source.captions = captions
    return source


def cache(path, tokenizer, split, captions):
    count = 4 if split == "train" else 2
    writer = CacheWriter(
        path / split, tokenizer=tokenizer_fingerprint(tokenizer), vocab_size=16, grid=(2, 2),
        class_names=["image"], views=["centre"], num_examples=count, captioned=captions is not None,
    )  # fmt: skip
    codes = np.repeat(np.arange(count), 4).reshape(count, 1, 4)
    writer.write(0, codes, np.zeros(count, int), captions)
    writer.finish()


@pytest.fixture(params=["codes", "images"])
def opened(request, config, tiny_model, tmp_path, monkeypatch):
    """Function of the captions of both splits that opens the data of the configuration."""

    def open_data(train=TRAIN, validation=VALIDATION):
        captions = {"train": train, "validation": validation}
        if request.param == "codes":
            path = tmp_path / str(len(list(tmp_path.iterdir())))
            for split, texts in captions.items():
                cache(path, tiny_model, split, texts)
            config.codes = str(path)
        else:
            monkeypatch.setattr(
                inputs, "open_images", lambda name, split, _: images_of(split, captions[split])
            )
        return inputs.open_codes(config, tiny_model, (0, 1))

    return open_data


def example_of(batch, row):
    """The number of the example in a row of a batch, from its code or its pixels."""
    if "images" in batch:
        return round((batch["images"][row, 0, 0, 0] + 1) * 127.5)
    return batch["codes"][row, 0]


def test_batches_have_the_tokens_of_captions(opened, config):
    data = opened()
    tokens = TextTokenizer.load(config.text_tokenizer).encode(TRAIN, 12)
    batches = data.train_batches()
    seen = set()
    for batch in (next(batches) for _ in range(6)):
        assert batch["captions"].shape == (2, 12) and batch["captions"].dtype == np.int32
        for row in range(2):
            number = example_of(batch, row)
            seen.add(number)
            np.testing.assert_array_equal(batch["captions"][row], tokens[number])
    assert seen == {0, 1, 2, 3} and (tokens[1] == -1).all()
    batches.close()
    (batch,) = data.validation_batches()
    np.testing.assert_array_equal(
        batch["captions"], TextTokenizer.load(config.text_tokenizer).encode(VALIDATION, 12)
    )
    assert list(data.captions.validation_texts) == VALIDATION and data.class_names == ()


def test_long_captions_are_said(opened, capsys):
    opened()
    assert "1 of 4 captions have more than 12 tokens" in capsys.readouterr().err


def test_identity_names_captions_and_their_tokenizer(opened, config, tmp_path):
    first = opened().identity
    assert opened().identity == first
    assert opened(["another", *TRAIN[1:]]).identity != first
    other = TextTokenizer.train([], 256)
    other.save(config.text_tokenizer)
    config.model.caption_vocab = 256
    changed = opened().identity
    assert {k for k in first if first[k] != changed[k]} == {"text_tokenizer"}
    config.text_tokenizer = str(tmp_path)  # a directory with the file
    assert opened().identity == changed
    config.model.condition = "class"
    data = opened()
    assert data.captions is None and data.class_names == ("image",)
    assert first.keys() - data.identity.keys() == {"text_tokenizer"}
    assert "captions" not in next(data.validation_batches())


def test_mistakes_are_named(opened, config):
    with pytest.raises(ValueError, match="no captions"):
        opened(None, None)
    config.model.caption_vocab = 300
    with pytest.raises(ValueError, match=r"caption_vocab=300, but the text tokenizer has 260"):
        opened()
    config.model.caption_features = 8
    with pytest.raises(ValueError, match="name the file of the features, or set the number to 0"):
        opened()
    config.model.caption_features = 0
    config.text_tokenizer = ""
    with pytest.raises(ValueError, match=r"config\.text_tokenizer is empty: train one"):
        opened()


def test_mixed_caches_keep_their_captions(config, tiny_model, tmp_path):
    for name, word in (("a", "red"), ("b", "blue")):
        cache(tmp_path / name, tiny_model, "train", [f"{word} {i}" for i in range(4)])
        cache(tmp_path / name, tiny_model, "validation", VALIDATION)
    config.codes = f"{tmp_path / 'a'},{tmp_path / 'b'}:0.5"
    data = inputs.open_codes(config, dataclasses.replace(tiny_model), (0, 1))
    tokenizer = TextTokenizer.load(config.text_tokenizer)
    batches = data.train_batches()
    words = []
    for batch in (next(batches) for _ in range(12)):
        for caption, codes in zip(tokenizer.decode(batch["captions"]), batch["codes"], strict=True):
            word, number = caption.split()
            assert int(number) == codes[0]
            words.append(word)
    batches.close()
    assert words.count("red") == 16 and words.count("blue") == 8


def test_examples_of_captions_are_spread():
    captions = ["a", "", "b", "a", "c", "d", "e"]
    assert inputs.example_captions(captions, 3) == ["a", "c", "e"]
    assert inputs.example_captions(captions, 9) == ["a", "b", "c", "d", "e"]
    assert inputs.example_captions(["", ""], 3) == []
