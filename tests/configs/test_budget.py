"""Sizes and lengths that a time budget chooses."""

import json

import numpy as np
import pytest
from PIL import Image

from aim_jax.configs import budget
from aim_jax.configs.budget import apply_budget, choose
from aim_jax.configs.from_folder import aim_config, vq_config
from aim_jax.models import AiMConfig, VQConfig

COSTS = {(32, 1, 2): 0.01, (64, 1, 2): 0.04, (64, 2, 4): 0.4}


@pytest.mark.parametrize(
    ("minutes", "images", "size", "steps"),
    [
        (1, 1000, (32, 1, 2), 84),  # too little for any: the smallest, as long as it can
        (60, 10_000, (64, 1, 2), 1265),  # 20,000 images of 0.04 s take 13 of its 27 minutes
        (60, 100, (64, 1, 2), 600),  # a small folder needs no more
        (600, 10_000, (64, 2, 4), 1265),
        (6000, 3_000, (64, 2, 4), 5625),  # 60 times every image
    ],
)
def test_largest_size_that_sees_enough_images_fills_its_share(minutes, images, size, steps):
    choice = choose(COSTS, "vq", minutes, images, batch_size=32)
    assert (choice.size, choice.steps) == (size, steps)
    assert choice.seconds == steps * 32 * COSTS[size]
    assert choice.seconds <= 60 * minutes * budget.SHARES["vq"]


@pytest.fixture
def folder(tmp_path):
    """Two classes of 64 x 64 images."""
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return str(tmp_path / "images")


def sizes(config):
    return config.model.ch, config.model.num_res_blocks, config.model.ch_mult


def test_budget_follows_the_measured_rate(folder, tmp_path, monkeypatch, capsys):
    measured = []
    monkeypatch.setattr(
        budget, "images_per_second", lambda config: measured.append(sizes(config)) or 1e6
    )
    config = vq_config(folder)
    apply_budget(config, tmp_path / "run", ())
    assert measured == [(32, 1, (1, 1, 2))]  # the smallest model
    assert sizes(config) == (64, 2, (1, 2, 4)) and VQConfig(**config.model).downsampling == 4
    assert "budget of 60 minutes" in capsys.readouterr().err

    monkeypatch.setattr(budget, "images_per_second", lambda config: 0.5)
    config = vq_config(folder)
    apply_budget(config, tmp_path / "run", ("optimizer.lr",))
    assert sizes(config) == (32, 1, (1, 1, 2)) and config.steps == int(0.45 * 3600 * 0.5 / 32)
    assert config.optimizer.lr == 3e-4  # given by the user, here with the default
    assert "a model of width 64" in capsys.readouterr().err

    config = vq_config(folder)
    config.steps = 50
    config.budget_minutes = 60.0
    apply_budget(config, tmp_path / "run", ("steps", "budget_minutes"))
    assert (config.steps, config.optimizer.warmup_steps, config.eval_every) == (50, 5, 200)

    aim = aim_config(folder)
    apply_budget(aim, tmp_path / "run", ())
    assert AiMConfig(**aim.model).d_model == 128 and aim.steps == int(0.4 * 3600 * 0.5 / 64)


def test_no_budget_keeps_the_recipe(folder, tmp_path, monkeypatch):
    monkeypatch.delattr(budget, "images_per_second")
    config = vq_config(folder)
    before = config.to_json()
    config.budget_minutes = 0.0
    apply_budget(config, tmp_path / "run", ())
    config.budget_minutes = None
    apply_budget(config, tmp_path / "run", ("steps",))
    assert config.to_json() == before


def test_run_that_resumes_keeps_its_choice(folder, tmp_path, monkeypatch):
    monkeypatch.delattr(budget, "images_per_second")
    first = vq_config(folder)
    first.steps = 77
    first.model.ch = 32
    (tmp_path / "run" / "checkpoints" / "5").mkdir(parents=True)
    settings = json.loads(first.to_json_best_effort()) | {"learned_from": {"class_names": []}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(settings))
    config = vq_config(folder)
    config.model.num_res_blocks = 1
    apply_budget(config, tmp_path / "run", ("model.num_res_blocks",))
    assert (config.steps, *sizes(config)) == (77, 32, 1, (1, 2, 4))
    aim = aim_config(folder)  # a run of the other stage, which the training refuses
    before = aim.to_json()
    apply_budget(aim, tmp_path / "run", ())
    assert aim.to_json() == before
    (tmp_path / "run" / "run.json").write_text('{"steps": 3')
    with pytest.raises(ValueError, match=r"run\.json"):
        apply_budget(config, tmp_path / "run", ())


def test_bad_budgets_are_refused(folder, tmp_path):
    config = vq_config(folder)
    config.budget_minutes = -1.0
    with pytest.raises(ValueError, match="budget_minutes=-1"):
        apply_budget(config, tmp_path / "run", ())


def test_lpips_does_not_grow_with_the_model(folder, tmp_path, monkeypatch):
    """Half of a second per image is of LPIPS, whatever the size of the model."""
    monkeypatch.setattr(
        budget, "images_per_second", lambda config: 1 / (0.01 + 0.5 * config.loss.perceptual)
    )
    config = vq_config(folder)
    config.loss.perceptual = 1.0
    costs = budget._costs(config, ())
    first, second, third = costs.values()
    assert first == pytest.approx(0.51)
    config.loss.perceptual = 0.0
    assert [cost + 0.5 for cost in budget._costs(config, ()).values()] == pytest.approx(
        [first, second, third]
    )
