"""Evaluation from the model to the report, with random features."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from aim_jax.configs.defaults import eval_defaults
from aim_jax.evaluation import evaluate, references
from aim_jax.evaluation.distribution import frechet_distance
from aim_jax.evaluation.features import FeatureExtractor
from aim_jax.evaluation.image_sets import ImageParts, NpzImages
from aim_jax.evaluation.prompts import balanced_labels
from aim_jax.models import inception
from aim_jax.sampling.generate import generate
from aim_jax.weights.convert.inception import load_inception
from tests import scoring
from tests.inception_weights import save_seeded_inception
from tests.programs import run

DATA = {"image_size": 4, "channels": 1, "fit": "resize", "resize_size": 0,
        "random_crop": False, "random_flip": False}  # fmt: skip


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    return save_seeded_inception(tmp_path_factory.mktemp("inception"))


@pytest.fixture(scope="module")
def inception_params(inception_file):
    return load_inception(inception_file)


@pytest.fixture
def quick_distance(monkeypatch):
    """A distance that takes no time in place of the Fréchet distance, which takes 7 s of CPU time.

    tests/evaluation/test_metrics.py compares the Fréchet distance with SciPy.
    """
    assert evaluate.frechet_distance is frechet_distance
    monkeypatch.setattr(evaluate, "frechet_distance", scoring.distance)


@pytest.fixture
def quick_features(monkeypatch):
    """Waves over the pixels in place of Inception; its features have tests of their own."""
    monkeypatch.setattr(inception, "extract", jax.jit(scoring.features))


@pytest.fixture
def model(tiny_model):
    return dataclasses.replace(tiny_model, info={"data": DATA})


@pytest.fixture
def config():
    config = eval_defaults()
    config.num_samples, config.batch_size, config.seed = 14, 8, 3
    return config


def test_classes_come_in_turns():
    labels = balanced_labels(50, 10)
    assert all((np.bincount(part) == 1).all() for part in labels.reshape(5, 10))


def test_samples_are_resumed_where_they_stopped(model, config, tmp_path, monkeypatch):
    whole = evaluate.sample_npz(model, config, tmp_path / "whole").read_bytes()
    with np.load(tmp_path / "whole" / "samples.npz") as file:
        images, labels = file["arr_0"], file["labels"]
    assert images.dtype == np.uint8 and images.shape == (14, 4, 4, 3)
    np.testing.assert_array_equal(labels, np.arange(14) % 3)
    # The images are those that anybody gets who asks for them, in whatever batches.
    alone = generate(model, labels[5:7], 3, first_index=5).images
    np.testing.assert_array_equal(images[5:7], np.repeat(alone, 3, axis=3))

    add = ImageParts.add

    def killed(parts, number, drawn):
        add(parts, number, drawn)
        raise KeyboardInterrupt

    monkeypatch.setattr(ImageParts, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate.sample_npz(model, config, tmp_path / "cut")
    monkeypatch.undo()
    assert not (tmp_path / "cut" / "samples.npz").exists()
    drawn = []
    monkeypatch.setattr(
        evaluate, "generate",
        lambda *args, **kwargs: drawn.append(kwargs["first_index"]) or generate(*args, **kwargs),
    )  # fmt: skip
    assert evaluate.sample_npz(model, config, tmp_path / "cut").read_bytes() == whole
    assert drawn == [8]
    config.sample.cfg_scale = 1.0
    with pytest.raises(ValueError, match=r"other settings \(cfg_scale differ\)"):
        evaluate.sample_npz(model, config, tmp_path / "cut")
    config.sample.cfg_scale = float("nan")
    with pytest.raises(ValueError, match="cfg_scale=nan"):
        evaluate.sample_npz(model, config, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_report_and_pictures(
    model, config, inception_params, picture_folder, tmp_path, quick_distance
):
    out, cache = tmp_path / "out", tmp_path / "cache"
    report = evaluate.evaluate(
        model, "", f"{picture_folder}:validation", inception_params, config, out, cache
    )
    metrics = report["metrics"]
    assert set(metrics) == {"fid", "sfid", "inception_score", "kid", "precision", "recall",
                            "density", "coverage"}  # fmt: skip
    extract = FeatureExtractor(inception_params, 8)
    made = extract.of(NpzImages(out / "samples.npz"))
    target = extract.of(references.open_set(f"{picture_folder}:validation", model, config))
    assert target.count == 12
    expected = scoring.distance(made.pool, target.pool)
    assert metrics["fid"] == pytest.approx(expected, rel=1e-4)
    assert metrics["fid"] > 0 and metrics["sfid"] > 0 and metrics["inception_score"][0] > 1
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(report))
    text = (out / "report.md").read_text()
    assert f"| fid | {metrics['fid']:.5g} |" in text and "cfg_scale | 2.0" in text
    notes = " ".join(report["notes"])
    assert "14 images in samples for 2048 features" in notes and "compare it only with" in notes
    assert "KID uses subsets of 12 images instead of 1000" in notes
    # Six pictures beside the caption of their row.
    assert np.asarray(Image.open(out / "neighbours.png")).shape[1] > 6 * 66 + 2
    assert (out / "images.png").is_file() and not list(out.rglob("*.partial"))
    assert len(list(cache.glob("*.npz"))) == 1


def test_pictures_scored_against_themselves(
    model, config, inception_params, picture_folder, tmp_path, quick_distance, quick_features
):
    """Everything is as good as it can be."""
    cache = tmp_path / "cache"
    real = references.open_set(f"{picture_folder}:validation", model, config)
    np.savez(tmp_path / "real.npz", arr_0=next(iter(real.batches(48))))
    folder = tmp_path / "real"
    folder.mkdir()
    for i, picture in enumerate(real.take(range(len(real)))):
        Image.fromarray(picture[..., 0]).save(folder / f"{i:02d}.png")
    for samples in (tmp_path / "real.npz", folder):
        report = evaluate.evaluate(
            None, str(samples), str(tmp_path / "real.npz"), inception_params, config,
            tmp_path / f"same_{samples.name}", cache,
        )  # fmt: skip
        metrics = report["metrics"]
        assert metrics["precision"] == metrics["recall"] == metrics["coverage"] == 1.0
        assert report["settings"]["scored"].startswith("real")
        unknown = "real.npz has no labels" in " ".join(report["notes"])
        assert unknown == (samples.suffix == ".npz")
    with pytest.raises(ValueError, match=r"another report \('Evaluation of real.*, not .* by tiny"):
        evaluate.evaluate(
            model, "", f"{picture_folder}:validation", inception_params, config,
            tmp_path / "same_real.npz", cache, reconstructions=True,
        )  # fmt: skip
    Image.new("L", (6, 4)).save(folder / "00.png")
    with pytest.raises(ValueError, match=r"'.*real' have 2 sizes, such as 4 x 4 and 4 x 6 pixels"):
        references.open_set(str(folder), None, config)
    unsaid = dataclasses.replace(model, info={})
    with pytest.raises(ValueError, match=r"does not record the size .* the images of '.*real'"):
        references.open_set(str(folder), unsaid, config)


def test_reference_files_of_the_adm_evaluator(
    model, inception_params, config, tmp_path, monkeypatch, quick_distance, quick_features
):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (12, 4, 4, 3), dtype=np.uint8)
    np.savez(tmp_path / "made.npz", arr_0=images)
    extract = FeatureExtractor(inception_params, 8)
    mean, wide = rng.normal(size=2048), np.eye(2048)
    statistics = {"mu": mean, "sigma": wide, "mu_s": mean[:2023], "sigma_s": wide[:2023, :2023]}
    np.savez(tmp_path / "virtual.npz", arr_0=images[:6], **statistics)

    def run(reference, out):
        return evaluate.evaluate(
            None, str(tmp_path / "made.npz"), str(reference), inception_params, config, out,
            tmp_path / "cache",
        )  # fmt: skip

    report = run(tmp_path / "virtual.npz", tmp_path / "out")
    made = extract.of(NpzImages(tmp_path / "made.npz"))
    target = made.pool._replace(mean=mean, covariance=wide)
    assert report["metrics"]["fid"] == pytest.approx(scoring.distance(made.pool, target), rel=1e-6)
    assert report["metrics"]["recall"] == 1.0
    del statistics["mu_s"]
    np.savez(tmp_path / "no_spatial.npz", arr_0=images[:6], **statistics)
    report = run(tmp_path / "no_spatial.npz", tmp_path / "out")
    assert "sfid" not in report["metrics"] and "No sFID" in " ".join(report["notes"])
    np.savez(tmp_path / "other.npz", arr_0=images[:6], mu=mean[:64], sigma=wide[:64, :64])
    with pytest.raises(ValueError, match=r"expected mu \(2048,\)"):
        run(tmp_path / "other.npz", tmp_path / "out")
    np.savez(tmp_path / "nan.npz", arr_0=images[:6], mu=mean * np.nan, sigma=wide)
    with pytest.raises(ValueError, match=r"nan\.npz: non-finite values in mu;"):
        run(tmp_path / "nan.npz", tmp_path / "out")
    with pytest.raises(ValueError, match="non-finite values in mu;"):  # before anything is drawn
        monkeypatch.setattr(evaluate, "sample_npz", lambda *args: pytest.fail("was drawn"))
        evaluate.evaluate(
            model, "", str(tmp_path / "nan.npz"), inception_params, config, tmp_path / "drawn",
            tmp_path / "cache",
        )  # fmt: skip
    np.savez(tmp_path / "large.npz", arr_0=np.full((12, 8, 8, 3), 9, np.uint8))
    with pytest.raises(ValueError, match=r"tiny has images of 4 x 4, the reference large\.npz"):
        evaluate.evaluate(
            model, "", str(tmp_path / "large.npz"), inception_params, config, tmp_path / "drawn",
            tmp_path / "cache",
        )  # fmt: skip
    with pytest.raises(ValueError, match=r"images of 4 x 4, the reference large.npz of 8 x 8"):
        run(tmp_path / "large.npz", tmp_path / "out")


def test_reconstructions(
    model, config, inception_params, picture_folder, tmp_path, quick_distance, quick_features
):
    report = evaluate.evaluate(
        model, "", f"{picture_folder}:validation", inception_params, config, tmp_path,
        tmp_path / "cache", reconstructions=True,
    )  # fmt: skip
    metrics = report["metrics"]
    assert set(metrics) == {"rfid", "psnr", "usage", "perplexity"}
    assert "No SSIM" in " ".join(report["notes"]) and metrics["rfid"] > 0
    real = references.open_set(f"{picture_folder}:validation", model, config)
    real = np.concatenate(list(real.batches(5))).astype(np.float64)
    with np.load(tmp_path / "reconstructions.npz") as file:
        error = np.mean(np.square(file["arr_0"] - real), axis=(1, 2, 3))
    expected = np.mean(10 * np.log10(255**2 / error))
    assert metrics["psnr"] == pytest.approx(expected, rel=1e-4)
    assert 0 < metrics["usage"] <= 1 <= metrics["perplexity"] <= model.vq_config.n_embed


def test_reconstructions_are_compared_with_their_originals(
    model, config, inception_params, tmp_path, quick_features
):
    """Not with the statistics of a whole data set that a reference file carries."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 4, 4, 1), dtype=np.uint8)
    mean, wide = np.full(2048, 7.0), np.eye(2048)
    np.savez(tmp_path / "virtual.npz", arr_0=images, mu=mean, sigma=wide)
    extract = FeatureExtractor(inception_params, 8)
    opened = [
        references.open_reference(
            str(tmp_path / "virtual.npz"), extract, model, config, tmp_path, only_images=only
        ).features
        for only in (False, True)
    ]
    np.testing.assert_array_equal(opened[0].pool.mean, mean)
    of_images = extract.of(NpzImages(tmp_path / "virtual.npz"))
    np.testing.assert_array_equal(opened[1].pool.mean, of_images.pool.mean)
    assert opened[1].count == 8


def test_labels_of_samples_are_looked_at(tmp_path):
    images = np.full((6, 4, 4, 3), 9, np.uint8)

    def notes(**arrays):
        np.savez(tmp_path / "a.npz", arr_0=images, **arrays)
        return evaluate.notes_on_labels(NpzImages(tmp_path / "a.npz"))

    assert "no labels" in notes()[0]
    assert notes(labels=np.array([0, 1, 2, 0, 1, 2])) == notes(labels=np.arange(6) % 4) == []
    assert "from 1 to 4 images per class" in notes(labels=np.array([0, 0, 0, 0, 1, 2]))[0]
    with pytest.raises(ValueError, match=r"labels have shape \(5,\), expected \(6,\)"):
        notes(labels=np.arange(5))


def test_pictures_smaller_than_the_samples_are_not_enlarged_unasked(config, tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (2, 28, 28), dtype=np.uint8)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
    np.savez(tmp_path / "made.npz", arr_0=np.full((6, 32, 32, 3), 9, np.uint8))
    made = NpzImages(tmp_path / "made.npz")
    with pytest.raises(ValueError, match=r"have 28 x 28 pixels, fewer than made\.npz"):
        references.open_set(str(tmp_path), None, config, made)
    config.data.image_size, config.data.channels, config.data.fit = 32, 1, "pad"
    padded = references.open_set(str(tmp_path), None, config, made)
    assert padded.fitted == "28 x 28 to 32 x 32, pad"
    np.testing.assert_array_equal(padded.take([0])[0, 2:-2, 2:-2, 0], pictures[0])
    with pytest.raises(ValueError, match=r"unknown dataset './none': it is neither a folder"):
        references.open_set("./none", None, config)


def test_program_says_what_is_missing(inception_file, tmp_path):
    def said(*options):
        done = run("evaluate", "--out", tmp_path / "out", *options)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        return done.stderr.strip().splitlines()[-1]

    assert "pass --reference" in said("--checkpoint", "cifar10")
    both = ("--checkpoint", "cifar10", "--reference", "cifar10:test")
    assert "TorchScript" in said(*both, "--inception", "")
    both_ways = (*both, "--reconstruct", "--samples", "samples.npz")
    assert "made from the reference images" in said(*both_ways, "--inception", str(inception_file))
    assert "no such file" in said(*both, "--inception", str(tmp_path / "none"))
    floats = tmp_path / "floats.npz"
    np.savez(floats, arr_0=np.zeros((4, 8, 8, 3), np.float32))
    given = ("--samples", str(floats), "--reference", str(floats))
    assert "expected uint8" in said(*given, "--inception", str(inception_file))
    np.savez(floats, arr_0=np.full((5, 8, 8, 3), 9, np.uint8))
    assert "samples: 5 images; expected 6" in said(*given, "--inception", str(inception_file))
    assert not (tmp_path / "out").exists()
