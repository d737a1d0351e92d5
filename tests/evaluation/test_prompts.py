"""Evaluation of models of captions: where prompts come from, samples, reports, refusals."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from aim_jax import generate
from aim_jax.configs.defaults import eval_defaults
from aim_jax.evaluation import evaluate
from aim_jax.evaluation.prompts import open_prompts
from aim_jax.models import inception
from aim_jax.weights.convert.inception import load_inception
from tests import scoring
from tests.evaluation.test_evaluate import DATA
from tests.inception_weights import save_seeded_inception

CAPTIONS = ["a red boat", "a blue house", "a boat, red", "houses", "blue", "red", "a boat"]


@pytest.fixture
def model(text_model):
    return dataclasses.replace(text_model, info={"data": DATA})


@pytest.fixture
def config():
    config = eval_defaults()
    config.num_samples, config.batch_size, config.seed = 8, 4, 3
    return config


@pytest.fixture
def captioned(tmp_path):
    """A folder of captioned 4x4 images in two splits."""
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        folder = tmp_path / "captioned" / split
        folder.mkdir(parents=True)
        lines = []
        for i, caption in enumerate(CAPTIONS):
            image = Image.fromarray(rng.integers(0, 256, (4, 4), dtype=np.uint8))
            image.save(folder / f"{i}.png")
            lines.append(json.dumps({"file_name": f"{i}.png", "text": caption}))
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    return tmp_path / "captioned"


def test_captions_of_the_reference_take_turns(model, config, captioned):
    prompts = open_prompts(model, config, f"{captioned}:validation")
    assert prompts.labels.tolist() == [*CAPTIONS, CAPTIONS[0]]
    assert prompts.name == f"{captioned}:validation (7)"
    config.data.dir = str(captioned)
    both = open_prompts(model, config, "captions:train+validation")
    assert both.labels.tolist() == [(CAPTIONS * 2)[i] for i in (0, 1, 3, 5, 7, 9, 11, 13)]


def test_a_file_of_captions_comes_first(model, config, captioned, tmp_path):
    config.captions = str(tmp_path / "prompts.txt")
    (tmp_path / "prompts.txt").write_text("a cat\na \u00e9l\u00e9phant\n")
    prompts = open_prompts(model, config, f"{captioned}:validation")
    assert prompts.labels.tolist() == ["a cat", "a \u00e9l\u00e9phant"] * 4
    config.captions = f"{captioned}:train"
    other = open_prompts(model, config, "reference.npz")
    assert other.name == f"{captioned}:train (7)"
    assert other.settings != prompts.settings


def test_classes_take_turns_without_captions(tiny_model, config):
    prompts = open_prompts(tiny_model, config, "cifar10:test")
    assert prompts.labels.tolist() == [0, 1, 2, 0, 1, 2, 0, 1] and prompts.settings == {}
    config.captions = "prompts.txt"
    with pytest.raises(
        ValueError, match=r"tiny generates from classes; leave out config\.captions"
    ):
        open_prompts(tiny_model, config, "cifar10:test")


def test_prompts_that_cannot_be_used_say_why(model, config, picture_folder, tmp_path):
    needed = "set config.captions to a text file of one caption per line"
    for reference in ("reference.npz", str(picture_folder), f"{picture_folder}:train"):
        with pytest.raises(ValueError, match=f"has no captions.*{needed}"):
            open_prompts(model, config, reference)
    config.captions = str(tmp_path / "none.txt")
    with pytest.raises(FileNotFoundError, match=r"none\.txt"):
        open_prompts(model, config)
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(ValueError, match=r"none\.txt"):
        open_prompts(model, config)
    encoded = dataclasses.replace(model.aim_config, caption_vocab=0, caption_features=4)
    other = dataclasses.replace(model, aim_config=encoded, text=None)
    with pytest.raises(ValueError, match="words takes features of captions"):
        open_prompts(other, config)


def test_captions_are_evaluated_and_kept_beside_their_samples(
    model, config, captioned, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluate, "frechet_distance", scoring.distance)
    monkeypatch.setattr(inception, "extract", jax.jit(scoring.features))
    params = load_inception(save_seeded_inception(tmp_path))
    out = tmp_path / "out"
    reference = f"{captioned}:validation"
    arguments = ("", reference, params, config, out, tmp_path / "cache")
    report = evaluate.evaluate(model, *arguments)
    assert report["settings"]["captions"] == f"{reference} (7)"
    assert f"| captions | {reference} (7) |" in (out / "report.md").read_text()
    with np.load(out / "samples.npz", allow_pickle=False) as file:
        assert set(file) == {"arr_0", "captions"}
        prompts, images = file["captions"], file["arr_0"]
    assert prompts.tolist() == [*CAPTIONS, CAPTIONS[0]]
    alone = generate(model, prompts[5:7].tolist(), 3, first_index=5).images
    np.testing.assert_array_equal(images[5:7], np.repeat(alone, 3, axis=3))
    (tmp_path / "prompts.txt").write_text("a cat\n")
    config.captions = str(tmp_path / "prompts.txt")
    with pytest.raises(ValueError, match=r"other settings \(captions differ\)"):
        evaluate.evaluate(model, *arguments)
