"""The program that trains both stages on a folder, and the preparation of the folder recipes."""

import json
import types

import pytest
from PIL import Image

from aim_jax.cli import folder
from aim_jax.cli.train_folder import train_folder
from aim_jax.configs import from_folder
from aim_jax.data import TokenCache
from aim_jax.training import monitor, tokenizer
from aim_jax.utils.signals import EXIT_STOPPED
from tests.programs import run


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    """Make both trainings end after one step, whatever the device reaches."""
    patch = pytest.MonkeyPatch()
    patch.setattr("aim_jax.configs.budget.LEAST_STEPS", 1)
    patch.setattr("aim_jax.configs.budget.images_per_second", lambda config: 1.0)
    yield
    patch.undo()


@pytest.mark.slow
def test_both_stages_run_and_resume(short, picture_folder, tmp_path):
    out = tmp_path / "out"
    given = ("train-folder", picture_folder, "--out", out, "--budget_minutes=0.01", "--per_class=1")
    done = run(*given)
    assert done.returncode == 0, done.stderr
    assert (out / "samples" / "grid.png").is_file()
    assert str(out / "samples" / "grid.png") in done.stdout
    for text in (
        "stage 1 of 3",
        "stage 2 of 3",
        "stage 3 of 3",
        "budget of 0.01 minutes",
        "finished in",
    ):
        assert text in done.stderr
    model = json.loads((out / "aim" / "model" / "model.json").read_text())
    vq = json.loads((out / "vq" / "model" / "model.json").read_text())["vq"]
    assert model["class_names"] == ["boat", "house", "old tree"]
    assert model["vq"] == vq and model["aim"]["vocab_size"] == vq["n_embed"]
    assert (out / "aim" / "codes" / "train" / "manifest.json").is_file()

    again = run(*given)
    assert again.returncode == 0 and again.stderr.count("resumed from step") == 2


@pytest.fixture(scope="module")
def captioned_folder(tmp_path_factory):
    """Captioned 16x16 images of both splits."""
    root = tmp_path_factory.mktemp("captioned")
    for split, count in (("train", 16), ("validation", 4)):
        (root / split).mkdir()
        for i in range(count):
            Image.new("L", (16, 16), 15 * i).save(root / split / f"{i}.png")
            (root / split / f"{i}.txt").write_text(f"shade of grey number {i}")
    return root


@pytest.mark.slow
def test_captioned_images_make_a_model_of_text(short, captioned_folder, tmp_path):
    out = tmp_path / "out"
    given = ("train-folder", captioned_folder, "--out", out, "--budget_minutes=0.01")
    done = run(*given, "--per_class=1")
    assert done.returncode == 0, done.stderr
    assert "16 grey images with captions" in done.stderr and "cuts 0.00% of" in done.stderr
    model = json.loads((out / "aim" / "model" / "model.json").read_text())
    assert (model["aim"]["condition"], model["class_names"]) == ("text", [])
    assert (out / "aim" / "text_tokenizer.json").read_bytes() == (
        out / "aim" / "model" / "text_tokenizer.json"
    ).read_bytes()
    assert TokenCache.open(out / "aim" / "codes" / "validation").captions()[0] == (
        "shade of grey number 0"
    )
    assert (out / "samples" / "grid.png").is_file()

    again = run(*given, "--per_class=1")
    assert again.returncode == 0 and again.stderr.count("resumed from step") == 2


def test_signal_after_the_last_step_of_a_stage_ends_the_program(tmp_path, monkeypatch):
    """The first stage is complete then, and the second does not begin."""

    def train(config, workdir):
        monkeypatch.setattr(monitor, "_last_stop", ["SIGTERM"])
        return types.SimpleNamespace(step=config.steps)

    config = types.SimpleNamespace(stage="vq", steps=5)
    monkeypatch.setattr(from_folder, "vq_config", lambda *_: config)
    monkeypatch.setattr(folder, "prepare", lambda *_: None)
    monkeypatch.setattr(tokenizer, "train", train)
    assert train_folder("images", tmp_path) == EXIT_STOPPED


def test_missing_folder_is_one_line(tmp_path):
    wrong = run("train-folder", tmp_path / "nothing", "--out", tmp_path / "out")
    assert wrong.returncode == 1
    assert "does not exist" in wrong.stderr and wrong.stderr.count("\n") <= 3
    assert not (tmp_path / "out").exists()
