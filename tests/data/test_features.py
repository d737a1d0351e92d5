"""Features of captions: their file, the batches with them, training and sampling from them."""

import dataclasses
import json
import pickle

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from aim_jax import generate, load_pretrained
from aim_jax.cli.sample import chosen
from aim_jax.configs.defaults import aim_defaults
from aim_jax.data import TokenCache, token_batches
from aim_jax.data.features import FeatureFile, FeatureRows, write_features
from aim_jax.models.captions import CaptionFeatures
from aim_jax.training import aim
from aim_jax.weights.directories import save_model
from tests.conftest import TINY_AIM
from tests.models.test_models import random_params
from tests.training.test_captions import write_captioned_codes

CAPTIONS = ["a red boat", "a blue house", "an old tree"]
ARRAYS = [np.full((rows, 5), value, np.float16) for rows, value in ((2, 1), (3, -1), (1, 0.5))]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    file = tmp_path_factory.mktemp("features") / "features.safetensors"
    write_features(file, CAPTIONS, ARRAYS)
    return file


def test_features_are_found_by_their_captions(path, capsys):
    file = FeatureFile(path)
    assert (file.width, file.captions, file.vocab_size) == (5, CAPTIONS, 0)
    values, lengths = file.encode(["an  old tree ", "", "a blue house"], 3)
    assert values.dtype == np.float32 and lengths.tolist() == [1, 0, 3]
    np.testing.assert_array_equal(values[:, :, 0], [[0, 0, 0.5], [0, 0, 0], [-1, -1, -1]])
    values, lengths = file.encode(["a blue house"], 2)
    assert values.shape == (1, 2, 5) and lengths.tolist() == [2]
    assert "1 of 1 captions have more than 2 rows of features" in capsys.readouterr().err
    with pytest.raises(ValueError, match="Shorten them, or raise max_caption"):
        file.encode(["a blue house"], 2, strict=True)
    with pytest.raises(ValueError, match="no features of 2 of 3 captions; the first is 'a dog'"):
        file.encode(["a dog", "an old tree", "a cat"], 2)
    again = pickle.loads(pickle.dumps(file))
    assert again == file and again.encode(["a red boat"], 2).lengths.tolist() == [2]
    assert hash(again) == hash(file)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": np.zeros((6, 5), np.int32)}, "expected .m, f. F16 or F32"),
        ({"values": np.zeros(6, np.float32)}, "expected .m, f. F16 or F32"),
        ({"values": np.zeros((7, 5), np.float16)}, "starts: expected to grow from 0 to 7"),
        ({"starts": np.array([0, 3, 2, 6])}, "starts: expected to grow from 0 to 6"),
        ({"starts": np.array([0, 6])}, "3 captions for 2 starts"),
        ({"starts": np.zeros(4)}, "expected .n . 1,. I64"),
        ({"captions": np.frombuffer(b"a\nb\nc", np.uint8)}, "a newline after every caption"),
        ({"captions": np.frombuffer(b"a\nb\na\n", np.uint8)}, "a caption is there twice"),
        ({"captions": np.frombuffer(b"a\nb\n\xff\n", np.uint8)}, "can't decode byte 0xff"),
    ],
    ids=str,
)
def test_damaged_files_are_refused(path, tmp_path, changes, message):
    save_file(load_file(path) | changes, tmp_path / "bad")
    with pytest.raises(
        ValueError, match=rf"bad cannot be read as features of captions: .*{message}"
    ):
        FeatureFile(tmp_path / "bad")


def test_other_files_are_refused(path, tmp_path):
    (tmp_path / "text").write_text("no features")
    with pytest.raises(ValueError, match="text cannot be read as features of captions"):
        FeatureFile(tmp_path / "text")
    (tmp_path / "short").write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="short cannot be read as features of captions"):
        FeatureFile(tmp_path / "short")
    save_file({"values": np.zeros((1, 2), np.float32)}, tmp_path / "part")
    with pytest.raises(ValueError, match="part cannot be read as features of captions"):
        FeatureFile(tmp_path / "part")
    with pytest.raises(FileNotFoundError):
        FeatureFile(tmp_path / "missing")


def test_what_cannot_be_written_is_refused(tmp_path):
    file = tmp_path / "file"
    for captions in (["a", "a"], ["a", " "], ["a", "b\nc"]):
        with pytest.raises(ValueError, match="captions: expected different ones"):
            write_features(file, captions, ARRAYS[:2])
    for arrays in (ARRAYS[:1], [np.zeros(3), np.zeros(3)], [ARRAYS[0], np.zeros((1, 4))]):
        with pytest.raises(ValueError, match="features: expected an array"):
            write_features(file, ["a", "b"], arrays)
    assert not file.exists()


@pytest.fixture(scope="module")
def config(path, tiny_model, tiny_model_dir, tmp_path_factory):
    """A short run on token caches, whose captions have features."""
    root = tmp_path_factory.mktemp("codes")
    write_captioned_codes(root, tiny_model, CAPTIONS)
    config = aim_defaults()
    config.steps, config.batch_size, config.log_every = 40, 8, 10
    config.eval_every = config.save_every = config.sample_every = 40
    config.optimizer.update(lr=1e-2, schedule="constant")
    config.data.update(image_size=4, channels=1)
    config.tokenizer = str(tiny_model_dir)
    config.codes = str(root)
    config.caption_features = str(path)
    config.model.update(dict(vars(TINY_AIM)))
    config.model.update(
        condition="text", num_classes=0, max_caption=3, caption_features=5, class_dropout=0.0
    )
    config.sample.update(per_class=2, classes=3)
    return config


def test_batches_hold_the_features_of_their_examples(config, path):
    cache = TokenCache.open(f"{config.codes}/validation")
    rows = FeatureRows(FeatureFile(path), cache.captions(), 3)
    assert len(rows) == 8
    batches = token_batches([cache], 4, captions=[rows], train=False)
    batch = next(batches)
    batches.close()
    assert batch["captions"].shape == (4, 3, 5) and batch["captions"].dtype == np.float32
    assert batch["caption_lengths"].tolist() == [2, 3, 1, 2]
    np.testing.assert_array_equal(batch["captions"][:, -1, 0], [1, -1, 0.5, 1])


def test_a_model_of_features_trains_and_samples(config, path, tmp_path):
    aim.train(config, tmp_path / "run")
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < 0.5 * losses[0]
    assert list((tmp_path / "run" / "samples").glob("*.png"))
    model = load_pretrained(tmp_path / "run")
    assert model.text is None and model.aim_config.caption_features == 5
    with pytest.raises(ValueError, match="name their file by --caption_features"):
        chosen(model, [], CAPTIONS, "")
    model = model.with_caption_features(path)
    assert chosen(model, [], CAPTIONS, "") == CAPTIONS
    tokens = generate(model, CAPTIONS, top_k=1, cfg_scale=1.0).tokens
    np.testing.assert_array_equal(tokens, 4 * np.arange(3)[:, None] * np.ones((1, 4), int))


def text_free_model(tiny_model, width):
    config = dataclasses.replace(
        TINY_AIM, condition="text", num_classes=0, max_caption=3, caption_features=width
    )
    return dataclasses.replace(
        tiny_model, aim_config=config, aim_params=random_params(config), class_names=()
    )


def test_features_belong_to_no_model_directory(tiny_model, path, tmp_path):
    model = text_free_model(tiny_model, 5).with_caption_features(path)
    loaded = load_pretrained(save_model(tmp_path / "model", model))
    assert loaded.text is None
    samples = generate(model, CAPTIONS, 1).tokens
    features = FeatureFile(path).encode(CAPTIONS, 3)
    assert isinstance(features, CaptionFeatures)
    np.testing.assert_array_equal(generate(loaded, features, 1).tokens, samples)
    with pytest.raises(ValueError, match="no features of 1 of 1 captions"):
        generate(model, ["a castle"], 1)


def test_features_and_model_must_fit(tiny_model, config, path, tmp_path):
    with pytest.raises(ValueError, match="features of 5 values; tiny takes 4"):
        text_free_model(tiny_model, 4).with_caption_features(path)
    with pytest.raises(ValueError, match="tiny takes no features of captions"):
        tiny_model.with_caption_features(path)
    for changes, message in (
        ({"caption_features": ""}, "config.caption_features is empty: name the file"),
        ({"caption_features": str(tmp_path / "none")}, "No such file"),
        ({"model.caption_features": 7}, "have 5 values; set it to 5"),
    ):
        wrong = config.copy_and_resolve_references()
        wrong.update_from_flattened_dict(changes)
        with pytest.raises((ValueError, OSError), match=message):
            aim.train(wrong, tmp_path / "wrong")
