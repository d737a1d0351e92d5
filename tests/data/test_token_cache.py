"""Token caches, their making, tokenizer fingerprints and batches of codes."""

import dataclasses
import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import grain
import jax
import numpy as np
import pytest
from PIL import Image

from aim_jax.cli.extract_codes import extract as extract_program
from aim_jax.configs.defaults import vq_defaults
from aim_jax.data import (
    ArrayImages,
    CacheWriter,
    ImageSpec,
    TokenCache,
    extract_codes,
    fingerprint,
    image_batches,
    make_views,
    open_images,
    parse_part,
    token_batches,
)
from aim_jax.data.preprocessing import describe_data
from aim_jax.models.vq import VQModel
from aim_jax.training.inputs import parse_codes
from aim_jax.weights.directories import save_model
from aim_jax.weights.load import load_pretrained
from aim_jax.weights.tokenizer import tokenizer_fingerprint
from tests.compilation import xla_flags

ROOT = Path(__file__).resolve().parents[2]

OURS, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def writer_of(path, **changes):
    """The writer of a cache of ten examples (2, 6) in three shards."""
    settings = {
        "tokenizer": OURS,
        "vocab_size": 50,
        "grid": (2, 3),
        "class_names": ["cat", "dog", "owl"],
        "views": ["centre", "flip"],
        "num_examples": 10,
        "dataset": "pets",
        "split": "train",
        "tokenizer_name": "pets_vq",
        "shard_size": 4,
    }
    return CacheWriter(path, **(settings | changes))


def write(path, codes, labels, **changes):
    writer = writer_of(path, num_examples=len(codes), **changes)
    for shard, examples in enumerate(writer.ranges):
        rows = slice(examples.start, examples.stop)
        writer.write(shard, codes[rows], labels[rows])
    assert writer.finish() == []
    return path


@pytest.fixture
def made(rng):
    return rng.integers(0, 50, (10, 2, 6)), rng.integers(0, 3, 10)


@pytest.fixture
def path(tmp_path, made):
    return write(tmp_path / "cache", *made)


def content(path):
    """Names and bytes of all files of a cache, hidden ones too."""
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_round_trip(path, made, tmp_path):
    cache = TokenCache.open(path, expected_tokenizer=OURS)
    codes, labels = cache.take(np.arange(10))
    np.testing.assert_array_equal(codes, made[0])
    np.testing.assert_array_equal(labels, made[1])
    assert (codes.dtype, labels.dtype) == (np.uint16, np.int32)
    assert (len(cache), cache.num_tokens, cache.vocab_size, cache.grid) == (10, 6, 50, (2, 3))
    assert cache.class_names == ("cat", "dog", "owl")
    assert [len(shard) for shard in cache.shards] == [4, 4, 2]
    assert cache.views == ("centre", "flip")
    # Nothing else was left behind.
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
    assert sorted(content(path)) == ["manifest.json", *cache.manifest["shards"]]


def test_random_access_is_mapped_and_serves_grain(path, made):
    cache = TokenCache.open(path)
    assert all(isinstance(shard, np.memmap) for shard in cache.shards)
    indices, views = np.array([9, 0, 5, 0]), np.array([1, 0, 0, 1])
    np.testing.assert_array_equal(cache.take(indices, views)[0], made[0][indices, views])
    example = grain.MapDataset.source(cache).shuffle(seed=3)[2]
    [same] = np.flatnonzero((made[0] == example["codes"]).all(axis=(1, 2)))
    assert example["label"] == made[1][same]


def test_large_vocabularies_take_four_bytes(tmp_path):
    codes = np.array([[[0, 69_999]]])
    settings = {"vocab_size": 70_000, "grid": (1, 2), "views": ["centre"]}
    cache = TokenCache.open(write(tmp_path / "cache", codes, np.array([0]), **settings))
    assert cache[0]["codes"].dtype == np.uint32
    np.testing.assert_array_equal(cache[0]["codes"], codes[0])


def test_cache_of_another_tokenizer_is_refused(path):
    with pytest.raises(ValueError, match=f"{path} was made with .*{OURS} .*pets_vq.*{OTHER}"):
        TokenCache.open(path, expected_tokenizer=OTHER)


def test_missing_and_damaged_shards_are_named_and_made_again(path, made):
    whole = content(path)
    [shard] = path.glob("shard-00001-*.npy")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ValueError, match=rf"{shard.name} is damaged"):
        TokenCache.open(path)
    with pytest.raises(ValueError, match=rf"{shard.name} is damaged"):
        writer_of(path).finish()
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{shard.name} is missing"):
        TokenCache.open(path)
    writer = writer_of(path)
    assert writer.missing() == writer.finish() == [1]
    writer.write(1, made[0][4:8], made[1][4:8])
    assert writer.finish() == []
    assert content(path) == whole


def test_a_cache_that_is_not_finished_is_refused_and_continued(tmp_path, made, path):
    codes, labels = made
    half = tmp_path / "half"
    writer = writer_of(half)
    writer.write(2, codes[8:], labels[8:])
    assert writer.finish() == [0, 1]
    with pytest.raises(ValueError, match="not finished: 1 of 3 shards"):
        TokenCache.open(half)
    # A kill in the middle of a file leaves a hidden one, which counts for nothing.
    (half / ".shard-00000.0123.partial").write_bytes(b"half a shard")
    for field, value in (
        ("tokenizer", OTHER),
        ("views", ["centre", "other"]),
        ("num_examples", 11),
        ("pictures", {"image_size": 8}),
        ("shard_size", 5),
    ):
        with pytest.raises(
            ValueError, match=f"holds another token cache .{field}: .* on disk, .* requested"
        ):
            writer_of(half, **{field: value})
    writer = writer_of(half, tokenizer_name="the same by another path")
    assert writer.missing() == [0, 1]
    for shard in (0, 1):
        writer.write(shard, codes[4 * shard :][:4], labels[4 * shard :][:4])
    assert writer.finish() == []
    expected, found = content(path), content(half)
    expected.pop("manifest.json"), found.pop("manifest.json")
    assert found == expected


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
    with pytest.raises(ValueError, match="is damaged: it is missing grid"):
        opened_with(json.dumps({k: v for k, v in manifest.items() if k != "grid"}))
    with pytest.raises(ValueError, match="lists 3 shards, expected 4"):
        opened_with(json.dumps(manifest | {"num_examples": 13}))
    with pytest.raises(ValueError, match=r"holds .* expected .* \(3,\)"):
        opened_with(json.dumps(manifest | {"num_examples": 11}))
    huge = {"num_examples": 10**9, "shard_size": 10**9, "shards": manifest["shards"][:1]}
    with pytest.raises(ValueError, match=r"is damaged: it has .* describes 1,000,000,000 examples"):
        opened_with(json.dumps(manifest | huge))
    with pytest.raises(ValueError, match="lists 3 shards, expected 1000000000"):
        opened_with(json.dumps(manifest | {"num_examples": 10**9, "shard_size": 1}))
    names = ["../" + name for name in manifest["shards"]]
    with pytest.raises(ValueError, match=r"shards\[0\]: expected a name like shard-00000-"):
        opened_with(json.dumps(manifest | {"shards": names}))
    with pytest.raises(ValueError, match=r"1\), expected .*token cache.* 2\)\. Remove .* again"):
        opened_with(json.dumps(manifest | {"version": 1}))


def test_bad_codes_leave_nothing_behind(tmp_path, made):
    codes, labels = made[0][:4], made[1][:4]
    writer = writer_of(tmp_path / "cache")
    for wrong_codes, wrong_labels, message in (
        (np.where(np.arange(4)[:, None, None] == 3, 50, codes), labels, "to 50, expected 0 to 49"),
        (codes, np.where(np.arange(4) == 2, 3, labels), "out of range: 3"),
        (codes[..., :5], labels, "expected .*2, 6"),
        (codes[:3], labels[:3], "expected .4, 2, 6"),
    ):
        with pytest.raises(ValueError, match=message):
            writer.write(0, wrong_codes, wrong_labels)
        assert list(content(tmp_path / "cache")) == ["manifest.json"]
    with pytest.raises(ValueError, match="no examples"):
        writer_of(tmp_path / "empty", num_examples=0)


def test_other_directories_are_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=f"{tmp_path} already exists and is not a token cache"):
        writer_of(tmp_path)
    assert list(content(tmp_path)) == ["notes.txt"]


def test_training_batches_take_either_view(path, made):
    codes, labels = made
    cache = TokenCache.open(path)
    rows = {tuple(codes[i, v]): (i, v) for i in range(10) for v in range(2)}
    iterator = token_batches([cache], 4, seed=2, train=True)
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
    batches = list(token_batches([TokenCache.open(path)], 4, train=False))
    np.testing.assert_array_equal(np.concatenate([b["codes"] for b in batches]), made[0][:, 0])
    np.testing.assert_array_equal(np.concatenate([b["labels"] for b in batches]), made[1])
    assert len(batches[-1]["labels"]) == 2


CAPTIONS = [f"a {i} 👩\u200d🚒" for i in range(9)] + [""]


def write_captioned(path, made, captions=CAPTIONS):
    writer = writer_of(path, captioned=True)
    for shard in writer.missing():
        rows = slice(writer.ranges[shard].start, writer.ranges[shard].stop)
        writer.write(shard, made[0][rows], made[1][rows], captions[rows])
    assert writer.finish() == []
    return path


def test_captions_lie_beside_the_shards(path, made, tmp_path):
    cache = TokenCache.open(write_captioned(tmp_path / "captioned", made))
    assert cache.captioned and cache.captions() == CAPTIONS
    files = cache.manifest["shards"] + cache.manifest["captions"]
    assert sorted(content(cache.path)) == sorted(["manifest.json", *files])
    plain = TokenCache.open(path)  # the other files are those of a cache without captions
    assert cache.manifest["shards"] == plain.manifest["shards"] and not plain.captioned
    assert {"captioned", "captions"}.isdisjoint(plain.manifest)
    other = write_captioned(tmp_path / "other", made, ["b", *CAPTIONS[1:]])
    fingerprints = {c.fingerprint() for c in (cache, plain, TokenCache.open(other))}
    assert len(fingerprints) == 3
    assert "with captions" in cache.summary and "3 classes" in plain.summary
    with pytest.raises(ValueError, match=f"{path} has no captions: make it again from captioned"):
        plain.captions()


def test_captions_are_resumed_and_checked(made, tmp_path):
    path = write_captioned(tmp_path / "cache", made)
    whole = content(path)
    [file] = path.glob("captions-00001-*.jsonl")
    file.write_text('"another"\n' * 4)
    with pytest.raises(ValueError, match=rf"{file.name} is damaged"):
        TokenCache.open(path)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{file.name} is missing"):
        TokenCache.open(path)
    assert writer_of(path, captioned=True).missing() == [1]
    (path / ".captions-00001.012.partial").write_bytes(b"half a file")
    write_captioned(path, made)
    assert content(path) == whole
    with pytest.raises(ValueError, match=r"another token cache .captioned: true on disk, false"):
        writer_of(path)


@pytest.mark.parametrize(
    ("captioned", "captions", "message"),
    [
        (True, None, "expected 4 captions, got none"),
        (True, CAPTIONS[:3], "expected 4 captions, got 3"),
        (False, CAPTIONS[:4], "expected no captions, got 4"),
        (True, ["a\nb", *CAPTIONS[:3]], "a caption: .* holds the character U"),
    ],
)
def test_captions_must_fit_the_cache(captioned, captions, message, made, tmp_path):
    writer = writer_of(tmp_path / "cache", captioned=captioned)
    with pytest.raises(ValueError, match=message):
        writer.write(0, made[0][:4], made[1][:4], captions)
    assert list(content(tmp_path / "cache")) == ["manifest.json"]


def test_damaged_captions_are_named(made, tmp_path):
    path = write_captioned(tmp_path / "cache", made)
    manifest = json.loads((path / "manifest.json").read_text())
    for lines, message in (
        ('"a"\n', "has 1 captions, expected 4"),
        ('"a"\n' * 3 + "7\n", "line 4 is no caption: .*expected a string"),
        ('"a"\n' * 3 + '"\\u001b"\n', r"line 4 is no caption: .*U\+001B"),
    ):
        name = f"captions-00000-{hashlib.sha256(lines.encode()).hexdigest()}.jsonl"
        (path / name).write_text(lines)
        names = [name, *manifest["captions"][1:]]
        (path / "manifest.json").write_text(json.dumps(manifest | {"captions": names}))
        with pytest.raises(ValueError, match=message):
            TokenCache.open(path).captions()
    for change, message in (
        ({"captions": manifest["captions"][:2]}, "lists 2 captions, expected 3"),
        ({"captions": manifest["shards"]}, r"captions\[0\]: expected a name like captions-00000-"),
        ({"captioned": False}, "captions: expected a list in a finished cache with captions"),
    ):
        (path / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(ValueError, match=message):
            TokenCache.open(path)


def test_batches_have_the_tokens_of_their_captions(pair):
    tables = [np.arange(len(cache))[:, None] + [[1000 * i, 0]] for i, cache in enumerate(pair)]
    iterator = token_batches(pair, 8, captions=tables, seed=1, train=True)
    for batch in (next(iterator) for _ in range(5)):
        assert batch["captions"].dtype == np.int32
        expected = batch["codes"][:, :1] * [[1000, 0]] + batch["codes"][:, 1:2]
        np.testing.assert_array_equal(batch["captions"], expected)


@pytest.fixture
def pair(tmp_path):
    """Caches of 10 and 20 examples whose first code tells the cache, the second the example."""
    caches = []
    for number, (size, views) in enumerate(((10, 2), (20, 3))):
        codes = np.zeros((size, views, 6), int)
        codes[..., 0], codes[..., 1] = number, np.arange(size)[:, None]
        codes[..., 2] = np.arange(views)
        names = [f"view {i}" for i in range(views)]
        path = write(tmp_path / str(number), codes, np.arange(size) % 3, views=names)
        caches.append(TokenCache.open(path))
    return caches


@pytest.mark.parametrize(("weights", "share"), [(None, 1 / 3), ((1, 0.5), 1 / 2), ((3, 1), 3 / 5)])
def test_mixing_keeps_proportions(pair, weights, share):
    iterator = token_batches(pair, 150, weights=weights, seed=1, train=True)
    drawn = np.concatenate([next(iterator)["codes"] for _ in range(4)])
    for start in range(0, 600, 60):  # evenly from the beginning, not only in the long run
        assert abs(np.mean(drawn[start : start + 60, 0] == 0) - share) <= 1 / 30
    for number, cache in enumerate(pair):
        mine = drawn[drawn[:, 0] == number]
        whole = mine[: len(mine) // len(cache) * len(cache), 1].reshape(-1, len(cache))
        assert (np.sort(whole) == np.arange(len(cache))).all()
        assert set(mine[:, 2]) == set(range(len(cache.views)))


@pytest.mark.parametrize("mixed", [False, True])
def test_resume_is_exact_for_any_number_of_processes(pair, mixed):
    caches = pair if mixed else pair[:1]
    make = lambda **parts: token_batches(caches, 4, seed=5, train=True, **parts)  # noqa: E731
    iterator = make()
    for _ in range(7):
        next(iterator)
    state = json.loads(json.dumps(iterator.get_state()))
    ahead = [next(iterator) for _ in range(5)]
    resumed, *halves = make(), *(make(shard_index=i, shard_count=2) for i in range(2))
    for other in (resumed, *halves):
        other.set_state(state)
    for expected in ahead:
        batch, parts = next(resumed), [next(half) for half in halves]
        for key in expected:
            np.testing.assert_array_equal(batch[key], expected[key])
            np.testing.assert_array_equal(np.concatenate([p[key] for p in parts]), expected[key])


def test_only_caches_that_are_alike_are_mixed(path, made, tmp_path):
    for field, value in (
        ("tokenizer", OTHER),
        ("grid", (3, 2)),
        ("class_names", ["cat", "dog", "emu"]),
    ):
        other = write(tmp_path / field, *made, **{field: value})
        with pytest.raises(ValueError, match=f"cannot be mixed: their {field} differ"):
            token_batches([TokenCache.open(path), TokenCache.open(other)], 4, train=True)
    with pytest.raises(ValueError, match="expected 1 positive weights"):
        token_batches([TokenCache.open(path)], 4, train=True, weights=[-1])


def test_the_syntax_of_mixes():
    assert parse_codes("codes/a") == [(Path("codes/a"), 1)]
    assert parse_codes("codes/a, b:0.5") == [(Path("codes/a"), 1), (Path("b"), 0.5)]
    for wrong in ("a,", "a:0", "a:-1", "a:much", "a:nan", ":2"):
        with pytest.raises(ValueError, match="DIRECTORY:WEIGHT"):
            parse_codes(wrong)


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


def encode(batch):
    """Every other pixel is a code."""
    return np.round((np.asarray(batch)[:, ::2, ::2, 0] + 1) * 127.5).astype(np.int32).reshape(-1, 4)


@pytest.fixture
def pets(rng):
    images = rng.integers(0, 256, (7, 4, 4, 1), dtype=np.uint8)
    return ArrayImages("pets", "train", ["cat", "dog"], images, np.arange(7) % 2)


def extract(path, source, kind="centre_flip", spec=ImageSpec(4, 1, random_flip=True), **more):  # noqa: B008
    """Extracts codes in shards of three and batches of two."""
    views = make_views(kind, spec, more.pop("crop_range", 1.1))
    writer = writer_of(
        path, vocab_size=256, grid=(2, 2), class_names=source.class_names, views=views.names,
        num_examples=len(source), pictures=views.pictures, shard_size=3,
    )  # fmt: skip
    extract_codes(more.pop("encode", encode), source, views, writer, 2, **more)
    return writer.finish()


def test_extracted_codes(tmp_path, pets):
    sizes, progress = [], []

    def watched(batch):
        sizes.append(len(batch))
        return encode(batch)

    done = lambda *counts: progress.append(counts)  # noqa: E731
    assert extract(tmp_path / "cache", pets, encode=watched, progress=done) == []
    codes, labels = TokenCache.open(tmp_path / "cache").take(np.arange(7))
    views = [pets.images[:, ::2, ::2], pets.images[:, ::2, ::-1][:, :, ::2]]
    np.testing.assert_array_equal(codes, np.stack(views, axis=1).reshape(7, 2, 4))
    np.testing.assert_array_equal(labels, pets.labels)
    assert set(sizes) == {2}
    assert progress == [(2, 7), (3, 7), (5, 7), (6, 7), (7, 7)]
    assert extract(tmp_path / "one", pets, "centre") == []
    np.testing.assert_array_equal(
        TokenCache.open(tmp_path / "one").take(np.arange(7))[0], codes[:, :1]
    )


def test_extracted_captions(tmp_path, pets):
    pets.captions = [f"pet {i}" for i in range(7)]
    views = make_views("centre", ImageSpec(4, 1))
    settings = {"grid": (2, 2), "class_names": pets.class_names, "views": views.names}
    settings |= {"num_examples": 7, "vocab_size": 256, "shard_size": 3, "captioned": True}
    writer = writer_of(tmp_path / "cache", **settings)
    extract_codes(encode, pets, views, writer, 2)
    assert writer.finish() == []
    assert TokenCache.open(tmp_path / "cache").captions() == pets.captions


def test_ten_crops(rng):
    spec = ImageSpec(4, 3, random_crop=True)
    views = make_views("ten_crop", spec, 1.8)
    picture = rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)
    source = ArrayImages("pets", "train", ["cat"], picture[None], [0])
    [batch] = image_batches(source, views.square, 1, train=False)
    cut = np.concatenate(list(views.cut(batch["images"])))
    square = picture[:, 1:8] / 127.5 - 1  # the shorter side is 7 = int(4 * 1.8) already
    corners = [(1, 1), (0, 0), (0, 3), (3, 0), (3, 3)]
    expected = [square[y : y + 4, x : x + 4] for y, x in corners]
    expected += [crop[:, ::-1] for crop in expected]
    np.testing.assert_allclose(cut, expected, atol=1e-6)
    assert views.names[:3] == ("centre", "top_left", "top_right")
    assert views.names[5:] == tuple(f"{name}_flip" for name in views.names[:5])
    for wrong in (ImageSpec(4, 3), ImageSpec(32, 1, "pad")):
        with pytest.raises(ValueError, match="ten_crop has no room"):
            make_views("ten_crop", wrong)
    with pytest.raises(ValueError, match="unknown views 'five'"):
        make_views("five", spec)


def test_ten_crops_are_extracted(tmp_path, rng):
    images = rng.integers(0, 256, (7, 6, 6, 1), dtype=np.uint8)
    source = ArrayImages("pets", "train", ["cat", "dog"], images, np.arange(7) % 2)
    assert extract(tmp_path / "cache", source, "ten_crop", crop_range=1.5) == []
    codes, _ = TokenCache.open(tmp_path / "cache").take(np.arange(7))
    assert codes.shape == (7, 10, 4)
    np.testing.assert_array_equal(codes[:, 4], images[:, 2:, 2:][:, ::2, ::2].reshape(7, 4))


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_parts_together_make_the_cache_of_one(tmp_path, pets, parts):
    assert extract(tmp_path / "one", pets) == []
    left = [extract(tmp_path / "many", pets, part=(i, parts)) for i in reversed(range(parts))]
    assert left[0] and not left[-1]
    assert content(tmp_path / "many") == content(tmp_path / "one")


def test_an_interrupted_extraction_goes_on(tmp_path, pets):
    assert extract(tmp_path / "whole", pets) == []
    calls = []

    def dying(batch):
        calls.append(None)
        if len(calls) > 8:
            raise KeyboardInterrupt
        return encode(batch)

    with pytest.raises(KeyboardInterrupt):
        extract(tmp_path / "cut", pets, encode=dying)
    shards = sorted(name for name in content(tmp_path / "cut") if name.startswith("shard"))
    assert [name[:11] for name in shards] == ["shard-00000"]
    calls.clear()
    progress = []
    done = lambda *counts: progress.append(counts)  # noqa: E731
    assert extract(tmp_path / "cut", pets, progress=done) == []
    assert progress[-1] == (4, 4)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    with pytest.raises(ValueError, match=r"holds another token cache .pictures: .*views: "):
        extract(tmp_path / "cut", pets, "ten_crop", crop_range=1.5)


def test_parts_are_numbered_from_one():
    assert [parse_part(text) for text in ("", "1/1", "3/16")] == [(0, 1), (0, 1), (2, 16)]
    for wrong in ("0/2", "3/2", "1", "a/b", "1/2/3"):
        with pytest.raises(ValueError, match="expected the form 3/16"):
            parse_part(wrong)


@pytest.fixture
def tokenizer(tmp_path, tiny_model):
    """The tiny model on disk, trained on folders of 4x4 pictures."""
    described = vq_defaults().data
    described.update(name="folder", image_size=4, channels=1)
    info = {"data": describe_data(described)}
    return save_model(tmp_path / "model", dataclasses.replace(tiny_model, info=info))


def start(tokenizer, out, *options, devices=2):
    """Starts the program with shards of 16 pictures."""
    program = [sys.executable, "-m", "aim_jax", "extract_codes", f"--tokenizer={tokenizer}"]
    program += [f"--out={out}", "--batch_size=4", "--shard_size=16", *options]
    return subprocess.Popen(
        [*map(str, program)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": xla_flags(devices)},
    )  # fmt: skip


def ended(process, status=0):
    """What a program wrote until it ended as expected."""
    error = process.communicate(timeout=300)[1]
    assert process.returncode == status, error
    return error


def test_captions_of_a_folder_are_extracted_and_resumed(tmp_path, tokenizer):
    folder = tmp_path / "images"
    for split, count in (("train", 3), ("validation", 1)):
        (folder / split).mkdir(parents=True)
        for i in range(count):
            Image.new("L", (4, 4), 80 * i).save(folder / split / f"{i}.png")
            (folder / split / f"{i}.txt").write_text(f"{split} {i}")
    given = {"data_name": "captions", "data_dir": str(folder), "shard_size": 2}
    out = tmp_path / "codes"
    for _ in range(2):  # the second finds nothing to do
        extract_program(str(tokenizer), out, batch_size=1, **given)
        caches = [TokenCache.open(out / split) for split in ("train", "validation")]
        assert [len(cache.views) for cache in caches] == [2, 1]
        assert caches[0].captions() == ["train 0", "train 1", "train 2"]
        assert caches[1].captions() == ["validation 0"]
    (folder / "train" / "0.txt").write_text("another")
    with pytest.raises(ValueError, match=r"another token cache .examples: "):
        extract_program(str(tokenizer), out, **given)


def test_images_are_encoded_at_another_size(tmp_path, tokenizer, picture_folder):
    options = {"data_name": "folder", "data_dir": str(picture_folder), "splits": ["validation"]}
    extract_program(str(tokenizer), tmp_path / "codes", image_size=8, **options)
    assert TokenCache.open(tmp_path / "codes" / "validation").grid == (4, 4)
    with pytest.raises(ValueError, match="--image_size=7 is not a multiple of 2"):
        extract_program(str(tokenizer), tmp_path / "other", image_size=7, **options)
    assert not (tmp_path / "other").exists()


def test_extract_codes_program(tmp_path, tokenizer, picture_folder):
    out = tmp_path / "codes"
    with socket.socket() as free:
        free.bind(("localhost", 0))
        data = f"--data={picture_folder}"
        together = [data, f"--coordinator=localhost:{free.getsockname()[1]}", "--num_processes=2"]
    pair = [start(tokenizer, out, *together, f"--process_id={i}") for i in range(2)]
    assert f"{out / 'train'}: 48 images, 2 views of 4 tokens each" in ended(pair[0])
    ended(pair[1])
    model = load_pretrained(tokenizer)
    # Codes do not depend on the decoder.
    model.vq_params["decoder"] = {}
    expected = tokenizer_fingerprint(model)
    train, held_out = (TokenCache.open(out / split, expected) for split in ("train", "validation"))
    codes, labels = train.take(np.arange(48))
    assert (codes.shape, held_out[0]["codes"].shape, len(held_out)) == ((48, 2, 4), (1, 4), 12)
    assert train.class_names == ("boat", "house", "old tree")
    assert (train.vocab_size, train.grid) == (16, (2, 2))
    source = open_images("folder", "train", picture_folder)
    [batch] = image_batches(source, ImageSpec(4, 1), 48, train=False)
    np.testing.assert_array_equal(labels, batch["labels"])
    vq = VQModel(model.vq_config)
    encode = jax.jit(lambda p, x: vq.apply({"params": p}, x, method="encode_to_tokens"))
    for view, images in enumerate([batch["images"], batch["images"][:, :, ::-1]]):
        found = np.asarray(encode(model.vq_params, images))
        # A tie between two codes may fall either way in a batch of another size.
        assert np.mean(codes[:, view] == found) > 0.98

    error = ended(start(tokenizer, out, data, "--views=centre", "--part=2/2"), status=1)
    assert (
        error.strip()
        .splitlines()[-1]
        .startswith(f"error: {out / 'train'} holds another token cache (views: ")
    )
