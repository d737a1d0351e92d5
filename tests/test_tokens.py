"""Token caches, tokenizer fingerprints and batches of codes."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from aim_jax.checkpoint import load_pretrained, save_model
from aim_jax.config import vq_defaults
from aim_jax.data import (
    ArrayImages,
    ImageSpec,
    TokenCache,
    extract_codes,
    fingerprint,
    image_batches,
    open_images,
    token_batches,
    write_token_cache,
)
from aim_jax.models.vq import VQModel

ROOT = Path(__file__).resolve().parents[1]

OURS, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def write(path, codes, labels, **changes):
    """Writes a cache of codes (n, 2, 6) in uneven chunks."""
    settings = {
        "tokenizer": OURS,
        "vocab_size": 50,
        "grid": (2, 3),
        "class_names": ["cat", "dog", "owl"],
        "views": ["centre", "flip"],
        "dataset": "pets",
        "split": "train",
        "tokenizer_name": "pets_vq",
        "shard_size": 4,
    }
    chunks = [(codes[i : i + 3], labels[i : i + 3]) for i in range(0, len(codes), 3)]
    return write_token_cache(path, chunks, **(settings | changes))


@pytest.fixture
def made(rng):
    return rng.integers(0, 50, (10, 2, 6)), rng.integers(0, 3, 10)


@pytest.fixture
def path(tmp_path, made):
    return write(tmp_path / "cache", *made)


def test_round_trip(path, made, tmp_path):
    cache = TokenCache.open(path, expected_tokenizer=OURS)
    np.testing.assert_array_equal(cache.codes, made[0])
    np.testing.assert_array_equal(cache.labels, made[1])
    assert (cache.codes.dtype, cache.labels.dtype) == (np.uint16, np.int32)
    assert (len(cache), cache.num_tokens, cache.vocab_size, cache.grid) == (10, 6, 50, (2, 3))
    assert cache.class_names == ("cat", "dog", "owl")
    assert [shard["examples"] for shard in cache.manifest["shards"]] == [4, 4, 2]
    assert cache.manifest["views"] == ["centre", "flip"]
    # Nothing else was left behind.
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
    assert len(list(path.iterdir())) == 4


def test_large_vocabularies_take_four_bytes(tmp_path):
    codes = np.array([[[0, 69_999]]])
    settings = {"vocab_size": 70_000, "grid": (1, 2), "views": ["centre"]}
    cache = TokenCache.open(write(tmp_path / "cache", codes, np.array([0]), **settings))
    assert cache.codes.dtype == np.uint32
    np.testing.assert_array_equal(cache.codes, codes)


def test_cache_of_another_tokenizer_is_refused(path):
    with pytest.raises(ValueError, match=f"{path} was made with .*{OURS} .pets_vq.*{OTHER}"):
        TokenCache.open(path, expected_tokenizer=OTHER)


def test_missing_and_damaged_shards_are_named(path):
    shard = path / "shard-00001.npz"
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=r"shard-00001\.npz is damaged"):
        TokenCache.open(path)
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00001\.npz is missing"):
        TokenCache.open(path)


def test_missing_and_damaged_manifests(path, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a token cache"):
        TokenCache.open(tmp_path)
    file = path / "manifest.json"
    manifest = json.loads(file.read_text())

    def opened_with(content):
        file.write_text(content)
        return TokenCache.open(path)

    with pytest.raises(ValueError, match="is damaged"):
        opened_with(json.dumps(manifest)[:-20])
    with pytest.raises(ValueError, match="is damaged: it lacks grid"):
        opened_with(json.dumps({k: v for k, v in manifest.items() if k != "grid"}))
    with pytest.raises(ValueError, match="hold 10 examples, not 11"):
        opened_with(json.dumps(manifest | {"num_examples": 11}))
    with pytest.raises(ValueError, match=r"expected .*token cache"):
        opened_with(json.dumps(manifest | {"version": 2}))


def test_bad_codes_leave_nothing_behind(tmp_path, made):
    codes, labels = made
    for wrong_codes, wrong_labels, message in (
        (np.where(np.arange(10)[:, None, None] == 9, 50, codes), labels, "to 50, expected 0 to 49"),
        (codes, np.where(np.arange(10) == 7, 3, labels), "out of range: 3"),
        (codes[..., :5], labels, "expected .*2, 6"),
        (codes[:0], labels[:0], "no examples"),
    ):
        with pytest.raises(ValueError, match=message):
            write(tmp_path / "cache", wrong_codes, wrong_labels)
        assert not list(tmp_path.iterdir())


def test_existing_directories_are_kept(path, made):
    with pytest.raises(ValueError, match=f"{path} already exists"):
        write(path, *made)
    assert len(TokenCache.open(path)) == 10


def test_training_batches_take_either_view(path, made):
    codes, labels = made
    cache = TokenCache.open(path)
    rows = {tuple(codes[i, v]): (i, v) for i in range(10) for v in range(2)}
    iterator = token_batches(cache, 4, seed=2, train=True)
    batches = [next(iterator) for _ in range(50)]
    assert batches[0]["codes"].dtype == batches[0]["labels"].dtype == np.int32
    drawn = [rows[tuple(row)] for batch in batches for row in batch["codes"]]
    for (index, _), label in zip(
        drawn, np.concatenate([b["labels"] for b in batches]), strict=True
    ):
        assert labels[index] == label
    epochs = np.reshape([index for index, _ in drawn], (20, 10))
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs.tolist())
    assert {view for _, view in drawn} == {0, 1}
    assert len(set(drawn)) == 20


def test_evaluation_batches_take_the_first_view(path, made):
    batches = list(token_batches(TokenCache.open(path), 4, train=False))
    np.testing.assert_array_equal(np.concatenate([b["codes"] for b in batches]), made[0][:, 0])
    np.testing.assert_array_equal(np.concatenate([b["labels"] for b in batches]), made[1])
    assert len(batches[-1]["labels"]) == 2


def test_resume_is_exact(path):
    cache = TokenCache.open(path)
    iterator = token_batches(cache, 3, seed=5, train=True)
    for _ in range(7):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    ahead = [next(iterator) for _ in range(5)]
    resumed = token_batches(cache, 3, seed=5, train=True)
    resumed.set_state(state)
    for expected in ahead:
        batch = next(resumed)
        np.testing.assert_array_equal(batch["codes"], expected["codes"])
        np.testing.assert_array_equal(batch["labels"], expected["labels"])


def test_fingerprint():
    @dataclasses.dataclass(frozen=True)
    class Config:
        ch: int = 8
        ch_mult: tuple = (1, 2)

    params = {"a": {"w": np.arange(6, dtype=np.float32).reshape(2, 3)}, "b": np.ones(2, np.float32)}
    first = fingerprint(Config(), params)
    assert len(first) == 64
    # Neither the order of keys nor a round trip through JSON changes it.
    assert fingerprint({"ch_mult": [1, 2], "ch": 8}, dict(reversed(params.items()))) == first
    changed = [
        fingerprint(Config(ch=9), params),
        fingerprint(Config(), params | {"b": np.array([1, np.nextafter(1, 2, dtype=np.float32)])}),
        fingerprint(Config(), params | {"a": {"w": params["a"]["w"].reshape(3, 2)}}),
        fingerprint(Config(), params | {"a": {"v": params["a"]["w"]}}),
    ]
    assert len({first, *changed}) == 5


def test_extracted_codes(tmp_path, rng):
    images = rng.integers(0, 256, (7, 4, 4, 1), dtype=np.uint8)
    source = ArrayImages("pets", "train", ["cat", "dog"], images, np.arange(7) % 2)
    sizes, progress = [], []

    def encode(batch):
        sizes.append(len(batch))
        return np.round((batch[:, ::2, ::2, 0] + 1) * 127.5).astype(np.int32).reshape(-1, 4)

    spec = ImageSpec(4, 1, random_flip=True)
    chunks = extract_codes(encode, source, spec, 3, progress=lambda *done: progress.append(done))
    out = write_token_cache(
        tmp_path / "cache", chunks, tokenizer=OURS, vocab_size=256, grid=(2, 2),
        class_names=source.class_names, views=("centre", "flip"),
    )  # fmt: skip
    cache = TokenCache.open(out)
    views = np.stack([images[:, ::2, ::2], images[:, ::2, ::-1][:, :, ::2]], axis=1)
    np.testing.assert_array_equal(cache.codes, views.reshape(7, 2, 4))
    assert cache.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert set(sizes) == {3}
    assert progress == [(3, 7), (6, 7), (7, 7)]
    [(codes, _)] = extract_codes(encode, source, spec, 8, flip=False)
    np.testing.assert_array_equal(codes[:, 0], cache.codes[:, 0])


def test_extract_codes_program(tmp_path, tiny_model, picture_folder):
    described = vq_defaults().data
    described.update(name="folder", dir=str(picture_folder), image_size=4, channels=1)
    info = {"data": described.to_dict()}
    model = save_model(tmp_path / "model", dataclasses.replace(tiny_model, info=info))
    program = [sys.executable, ROOT / "launch" / "extract_codes.py"]
    program += [f"--tokenizer={model}", f"--out={tmp_path / 'codes'}", "--batch_size=5"]
    settings = {"capture_output": True, "text": True, "cwd": tmp_path}
    settings["env"] = os.environ | {"PYTHONPATH": str(ROOT)}
    run = subprocess.run(program, **settings)
    assert run.returncode == 0, run.stderr

    tokenizer = load_pretrained(model)
    expected = fingerprint(tokenizer.vq_config, tokenizer.vq_params)
    train, held_out = (
        TokenCache.open(tmp_path / "codes" / split, expected) for split in ("train", "validation")
    )
    assert (train.codes.shape, held_out.codes.shape) == ((48, 2, 4), (12, 1, 4))
    assert train.class_names == ("boat", "house", "old tree")
    assert (train.vocab_size, train.grid) == (16, (2, 2))
    source = open_images("folder", "train", picture_folder)
    [batch] = image_batches(source, ImageSpec(4, 1), 48, train=False)
    np.testing.assert_array_equal(train.labels, batch["labels"])
    vq = VQModel(tokenizer.vq_config)
    for view, images in enumerate([batch["images"], batch["images"][:, :, ::-1]]):
        codes = vq.apply({"params": tokenizer.vq_params}, images, method="encode_to_tokens")
        # A tie between two codes may fall either way in a batch of another size.
        assert np.mean(train.codes[:, view] == np.asarray(codes)) > 0.98

    again = subprocess.run(program, **settings)
    assert again.returncode == 1
    assert again.stderr.strip().splitlines()[-1].startswith(f"error: {tmp_path / 'codes'}")
