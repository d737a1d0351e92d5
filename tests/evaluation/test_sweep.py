"""Sweeps over sampling settings, and scaling reports."""

import dataclasses
import json

import numpy as np
import pytest

from aim_jax.configs.defaults import eval_defaults
from aim_jax.evaluation import evaluate, scaling, sweep
from aim_jax.evaluation.distribution import Gaussian
from aim_jax.evaluation.feature_sets import FeatureSet
from aim_jax.evaluation.features import FeatureExtractor
from aim_jax.models import PRESETS
from aim_jax.utils.images import to_rgb
from aim_jax.weights.directories import save_model
from aim_jax.weights.fingerprints import parameter_fingerprints
from aim_jax.weights.load import load_pretrained

DATA = {"image_size": 4, "channels": 1, "fit": "resize", "resize_size": 0,
        "random_crop": False, "random_flip": False}  # fmt: skip


@pytest.fixture
def pixels_for_features(monkeypatch):
    """Pixels stand in for the features of a network, which other tests look at."""

    def of(self, images, keep=None):
        rows = to_rgb(np.concatenate(list(images.batches(8)))).reshape(len(images), -1) / 255
        gaussian = Gaussian(rows.mean(0), np.cov(rows.T), len(rows))
        kept, indices = rows.astype(np.float32)[:keep], np.arange(len(rows))[:keep]
        return FeatureSet(len(rows), gaussian, gaussian, kept, indices, None)

    monkeypatch.setattr(FeatureExtractor, "of", of)
    monkeypatch.setattr(
        FeatureExtractor, "of_cached", lambda self, images, keep, cache: of(self, images, keep)
    )


def test_sweep_goes_on_and_finds_the_best(
    tiny_model, picture_folder, tmp_path, pixels_for_features, monkeypatch
):
    model = dataclasses.replace(tiny_model, info={"data": DATA})
    config, out = eval_defaults(), tmp_path / "out"
    config.num_samples, config.batch_size = 12, 12

    def run(grid, **changed):
        settings = config.copy_and_resolve_references()
        settings.update(changed)
        reference = f"{picture_folder}:train"
        return sweep.sweep(model, grid, reference, {"a": {"kernel": np.zeros(1)}}, settings, out,
                           tmp_path / "cache")  # fmt: skip

    first = run({"cfg_scale": [1.0, 4.0]})
    assert [row["settings"]["cfg_scale"] for row in first] == [1.0, 4.0]
    assert first[0]["metrics"]["fid"] != first[1]["metrics"]["fid"]
    drawn = []
    real = evaluate.sample_npz
    monkeypatch.setattr(
        evaluate, "sample_npz", lambda *a: drawn.append(a[1].sample.cfg_scale) or real(*a)
    )
    rows = run({"cfg_scale": [1.0, 2.0, 4.0], "top_k": [0, 3]})
    assert len(rows) == 6 and rows[:2] == first and sorted(drawn) == [1.0, 2.0, 2.0, 4.0]
    assert not list(out.glob("samples*"))
    best = sweep.best_of(rows, "fid")
    assert best["metrics"]["fid"] == min(row["metrics"]["fid"] for row in rows)
    text = sweep.table(rows, best)
    assert text.count("\n| **") == 1 and f"**{best['metrics']['fid']:.5g}**" in text
    with pytest.raises(ValueError, match="another model, reference, schedule, seed or number"):
        run({"cfg_scale": [1.0]}, seed=5)
    with pytest.raises(ValueError, match="no setting has a value of inception_score"):
        sweep.best_of(rows, "inception_score")
    assert sweep.best_of(rows, "kid")["metrics"]["kid"][0] == min(
        row["metrics"]["kid"][0] for row in rows
    )


def test_the_best_setting_becomes_the_models_own(tiny_model, tmp_path):
    path = save_model(tmp_path / "model", tiny_model)
    settings = {"cfg_scale": 3.5, "temperature": 0.9, "top_k": 5, "top_p": 1.0}
    settings["cfg_schedule"] = "constant"
    sweep.write_defaults(str(path), settings)
    found = load_pretrained(path)
    assert found.sampling == {"cfg_scale": 3.5, "temperature": 0.9, "top_k": 5, "top_p": 1.0}
    assert found.aim_config == tiny_model.aim_config
    config = eval_defaults()
    sweep.check_writable(str(path), config)
    for name in ("cifar10", "hf://owner/name"):
        with pytest.raises(ValueError, match=f"{name} is read-only"):
            sweep.check_writable(name, config)
    config.sample.cfg_schedule = "linear"
    with pytest.raises(ValueError, match="cannot hold a guidance schedule"):
        sweep.check_writable(str(path), config)


def test_published_figures_have_the_published_correlation():
    """B, L and XL of arXiv 2408.12245: -0.9838 between log parameters and log FID."""
    counts = [scaling.parameter_count(PRESETS[size]) for size in ("B", "L", "XL")]
    assert counts == [147_622_080, 349_760_000, 763_291_392]
    found = scaling.fit(counts, [3.52, 2.83, 2.56])
    assert found.correlation == pytest.approx(-0.9838, abs=5e-4)
    exact = scaling.fit([1, 10, 100], [8, 4, 2])
    assert exact.slope == pytest.approx(-np.log10(2)) and exact.correlation == pytest.approx(-1)
    with pytest.raises(ValueError, match="at least two"):
        scaling.fit([5, 5], [1, 2])


def test_scaling_report_of_runs(tiny_model, tmp_path, capsys):
    runs = []
    for name, width, loss, fid in (("small", 16, 4.0, 50.0), ("wide", 64, 3.0, 25.0)):
        workdir = tmp_path / name
        config = dataclasses.replace(tiny_model.aim_config, d_model=width)
        save_model(workdir / "model", dataclasses.replace(tiny_model, aim_config=config))
        (workdir / "run.json").write_text(json.dumps({"batch_size": 8}))
        rows = [{"step": 5, "val_loss": 9.0}, {"step": 10, "val_loss": loss}, {"step": 11}]
        (workdir / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
        (workdir / "evaluation").mkdir()
        made = {"metrics": {"fid": fid}, "settings": {"images": 500, "reference": "cifar10, test"}}
        (workdir / "evaluation" / "report.json").write_text(json.dumps(made))
        runs.append(scaling.read_run(workdir))
    assert capsys.readouterr().err.count("does not record its parameters") == 2
    assert [run.loss for run in runs] == [4.0, 3.0] and [run.fid for run in runs] == [50.0, 25.0]
    assert runs[1].flops > runs[0].flops and runs[1].parameters > runs[0].parameters
    found = scaling.fits(runs)
    assert set(found) == {"loss over parameters", "fid over parameters", "loss over flops",
                          "fid over flops"}  # fmt: skip
    ratio = np.log(runs[1].parameters / runs[0].parameters)
    assert found["fid over parameters"].slope == pytest.approx(np.log(0.5) / ratio)
    text = scaling.report(runs)
    assert "| wide |" in text and "-1.0000" in text and "FID: images 500, reference cifar" in text
    other = runs[0]._replace(compared=runs[0].compared | {"images": 50_000})
    with pytest.raises(ValueError, match=r"cannot be compared.*same number of images"):
        scaling.report([other, runs[1]])
    with pytest.raises(ValueError, match="at least two runs"):
        scaling.report(runs[:1])
    capsys.readouterr()
    made["parameters"] = parameter_fingerprints(tiny_model)
    (tmp_path / "small" / "evaluation" / "report.json").write_text(json.dumps(made))
    assert scaling.read_run(tmp_path / "small").fid == 25.0
    assert not capsys.readouterr().err
    made["parameters"]["tokenizer"] = "0"
    (tmp_path / "small" / "evaluation" / "report.json").write_text(json.dumps(made))
    with pytest.raises(ValueError, match=r"report\.json is of other parameters .* \(its tokenizer"):
        scaling.read_run(tmp_path / "small")


def test_plots(tiny_model, tmp_path):
    rows = [
        {"settings": {"cfg_scale": s, "top_k": k}, "metrics": {"fid": s + k, "kid": [s, 0.1]}}
        for s in (1.0, 2.0) for k in (0, 5)
    ]  # fmt: skip
    assert sweep.draw(rows, tmp_path / "sweep.png").stat().st_size > 5000
    runs = [scaling.Run("a", 10, 1e3, 4.0, 9.0), scaling.Run("b", 100, 1e5, 3.0, None)]
    assert scaling.draw(runs, tmp_path / "scaling.png").stat().st_size > 5000
