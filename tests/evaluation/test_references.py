"""Sets of images and references: sizes and channels of all images, and statistics alone."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from aim_jax.configs.defaults import eval_defaults
from aim_jax.data import ArrayImages, ImageSource, ImageSpec
from aim_jax.evaluation import evaluate, references, sweep
from aim_jax.evaluation.image_sets import (
    NpzImages,
    SourceImages,
    describe_fit,
    stored_shapes,
)
from aim_jax.models import inception
from tests import scoring

SHARED = {"image_size": 4, "channels": 1, "fit": "resize", "resize_size": 0,
          "random_crop": False, "random_flip": False}  # fmt: skip
PARAMS = {"softmax": {}}  # of an Inception that nothing is computed with


@pytest.fixture
def config():
    config = eval_defaults()
    config.num_samples, config.batch_size = 8, 8
    return config


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def quick(monkeypatch):
    """Waves over the pixels, and a distance of variances, in place of Inception and Fréchet's."""
    monkeypatch.setattr(inception, "extract", scoring.features)
    monkeypatch.setattr(evaluate, "frechet_distance", scoring.distance)


def save_images(folder, rng, modes, sizes=((8, 8),)):
    """Writes one PNG per mode, of sizes (W, H) in turn."""
    folder.mkdir(exist_ok=True)
    for i, mode in enumerate(modes):
        width, height = sizes[i % len(sizes)]
        pixels = rng.integers(2, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / f"{i:03}.png")
    return folder


def save_statistics(path, **changes):
    arrays = {"mu": np.zeros(2048), "sigma": np.eye(2048)} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


# The first image does not stand for all


@pytest.mark.parametrize("modes", [["L", *["RGB"] * 5], ["RGB", *["L"] * 5], ["L"] * 6, ["1", "P"]])
def test_channels_do_not_depend_on_the_first_image(modes, rng, config, tmp_path):
    images = references.open_set(str(save_images(tmp_path / "a", rng, modes)), None, config)
    assert images.shape == (len(modes), 8, 8, 3)
    grey = sum(mode in ("L", "1") for mode in modes)
    mixed = f"{grey} of {len(modes)} images are grey and read as RGB"
    assert images.fitted == (mixed if 0 < grey < len(modes) else "")
    colours = np.ptp(images.take(range(len(modes))).astype(int), axis=-1).max(axis=(1, 2))
    np.testing.assert_array_equal(colours > 0, [mode in ("RGB", "P") for mode in modes])


def test_a_reference_of_grey_samples_keeps_its_colours(rng, config, tmp_path):
    np.savez(tmp_path / "grey.npz", arr_0=np.full((6, 8, 8, 1), 9, np.uint8))
    folder = save_images(tmp_path / "a", rng, ["RGB"] * 6)
    like = NpzImages(tmp_path / "grey.npz")
    assert references.open_set(str(folder), None, config, like).shape == (6, 8, 8, 3)


@pytest.mark.parametrize("sizes", [((8, 8), (9, 9)), ((8, 8), (8, 8), (8, 12))])
def test_sizes_are_those_of_all_images(sizes, rng, config, tmp_path):
    folder = save_images(tmp_path / "a", rng, ["RGB"] * 6, sizes)
    with pytest.raises(ValueError, match=r"have 2 sizes, such as 8 x 8 and .*, expected one; set"):
        references.open_set(str(folder), None, config)
    config.data.image_size = 8
    images = references.open_set(str(folder), None, config)
    assert images.fitted.startswith("2 sizes from 8 x 8 to ")
    assert images.fitted.endswith(", to 8 x 8, resize")
    (folder / "bad.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot read the image .*bad\.png"):
        references.open_set(str(folder), None, config)


def test_small_images_anywhere_are_not_enlarged_unasked(rng, config, tmp_path):
    np.savez(tmp_path / "made.npz", arr_0=np.full((6, 8, 8, 3), 9, np.uint8))
    like = NpzImages(tmp_path / "made.npz")
    folder = save_images(tmp_path / "a", rng, ["RGB"] * 6, ((9, 9), (12, 8), (7, 20)))
    with pytest.raises(ValueError, match=r"2 images of '.*a' have 20 x 7 pixels, fewer than made"):
        references.open_set(str(folder), None, config, like)
    for file in ("002.png", "005.png"):
        (folder / file).unlink()
    images = references.open_set(str(folder), None, config, like)
    assert images.fitted == "2 sizes from 9 x 9 to 8 x 12, to 8 x 8, resize"


def test_sides_are_those_of_the_turned_image(rng, config, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    for i, (size, options) in enumerate((((8, 6), {"exif": exif}), ((6, 8), {}))):
        pixels = rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.jpg", **options)
    with pytest.raises(ValueError, match="have 8 x 6 pixels, expected squares"):
        references.open_set(str(tmp_path), None, config)


class OneByOne(ImageSource):
    """Images of growing sizes, as of a dataset without files."""

    def __init__(self, split, sizes):
        super().__init__("growing", split, ("",))
        self._sizes = sizes

    def __len__(self):
        return len(self._sizes)

    def __getitem__(self, index):
        return {"image": np.zeros((self._sizes[index],) * 2 + (3,), np.uint8), "label": 0}


def test_shapes_of_every_source_count():
    grey = ArrayImages("a", "train", ("",), np.zeros((5, 4, 6, 1), np.uint8), np.zeros(5))
    growing = OneByOne("train", [4, 4, 8])
    shapes = stored_shapes([grey, growing])
    assert shapes == {(4, 6, 1): 5, (4, 4, 3): 2, (8, 8, 3): 1}
    assert stored_shapes([OneByOne("train", [4] * 1000 + [5])]) == {(4, 4, 3): 31, (5, 5, 3): 1}
    assert SourceImages([growing], ImageSpec(4)).fitted == (
        "2 sizes from 4 x 4 to 8 x 8, to 4 x 4, resize"
    )
    assert describe_fit(shapes, ImageSpec(4, channels=1)).endswith("; colour converted to grey")
    assert describe_fit({(4, 4, 1): 3}, ImageSpec(4, channels=1)) == ""


def test_black_images_may_come_first(tmp_path):
    images = np.zeros((70, 4, 4, 3), np.uint8)
    images[69, 0, 0, 0] = 200
    np.savez(tmp_path / "a.npz", arr_0=images)
    assert len(NpzImages(tmp_path / "a.npz")) == 70
    np.savez(tmp_path / "b.npz", arr_0=images[:69] + 1)
    with pytest.raises(ValueError, match="have no value above 1"):
        NpzImages(tmp_path / "b.npz")


def test_reports_say_how_images_were_read(rng, config, tmp_path, quick):
    folder = save_images(tmp_path / "a", rng, ["L", *["RGB"] * 7])
    other = save_images(tmp_path / "b", rng, ["L"] * 8)
    report = evaluate.evaluate(
        None, str(folder), str(other), PARAMS, config, tmp_path / "out", tmp_path / "cache"
    )
    settings = report["settings"]
    assert settings["scored images, read as"] == settings["reference, read as"] == "8 x 8, RGB"
    assert settings["scored images, fitted"] == "1 of 8 images are grey and read as RGB"
    assert report["parameters"] == {}


# Statistics alone


def score(reference, config, tmp_path, model=None, **options):
    made = tmp_path / "made.npz"
    images = np.random.default_rng(1).integers(0, 256, (8, 4, 4, 3), dtype=np.uint8)
    np.savez(made, arr_0=images)
    return evaluate.evaluate(
        model, "" if model else str(made), str(reference), PARAMS, config, tmp_path / "out",
        tmp_path / "cache", **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("pytorch-fid", {}),
        ("float32", {"mu": np.zeros(2048, np.float32), "sigma": np.eye(2048, dtype=np.float32)}),
        ("ADM without images", {"mu_s": np.zeros(2023), "sigma_s": np.eye(2023)}),
    ],
)
def test_statistics_alone_give_fid(form, changes, config, tmp_path, quick):
    report = score(save_statistics(tmp_path / "stats.npz", **changes), config, tmp_path)
    metrics = report["metrics"]
    spatial = {"sfid"} if "mu_s" in changes else set()
    assert set(metrics) == {"fid", "inception_score"} | spatial
    extract = evaluate.FeatureExtractor(PARAMS)
    made = extract.of(NpzImages(tmp_path / "made.npz")).pool
    target = made._replace(mean=np.zeros(2048), covariance=np.eye(2048))
    assert metrics["fid"] == pytest.approx(scoring.distance(made, target), rel=1e-6)
    notes = " ".join(report["notes"])
    assert "KID, precision, recall, density, coverage and nearest neighbours are left out" in notes
    assert ("No sFID" in notes) == (not spatial) and "KID uses subsets" not in notes
    assert report["settings"]["reference images"] == "as in the file"
    assert "images compared one by one" not in report["settings"]
    out = tmp_path / "out"
    assert (out / "report.md").is_file() and not (out / "neighbours.png").exists()


def test_statistics_alone_score_a_model(tiny_model, config, tmp_path, quick):
    model = dataclasses.replace(tiny_model, info={"data": SHARED})
    stats = save_statistics(tmp_path / "stats.npz")
    report = score(stats, config, tmp_path, model)
    assert report["metrics"]["fid"] > 0 and list(report["parameters"]) == ["AiM", "tokenizer"]
    with pytest.raises(ValueError, match=r"statistics without images, so .* nothing to reconst"):
        score(stats, config, tmp_path, model, reconstructions=True)
    rows = sweep.sweep(
        model, {"cfg_scale": [1.0, 2.0]}, str(stats), PARAMS, config, tmp_path / "sweep",
        tmp_path / "cache",
    )  # fmt: skip
    assert [set(row["metrics"]) for row in rows] == [{"fid", "inception_score"}] * 2
    for metric in ("kid", "sfid"):
        with pytest.raises(ValueError, match=f"--metric={metric}: .* use --metric=fid"):
            sweep.check_metric(metric, str(stats))
    for metric in ("fid", "inception_score"):
        sweep.check_metric(metric, str(stats))


def test_files_without_images_or_statistics_say_what_is_missing(config, tmp_path, quick):
    np.savez(tmp_path / "kid.npz", feats=np.zeros((3, 2048)))
    np.savez(tmp_path / "named.npz", images=np.zeros((3, 4, 4, 3), np.uint8))
    np.savez(tmp_path / "mean.npz", mu=np.zeros(2048))
    for name, held in (("kid", "feats"), ("named", "images"), ("mean", "mu")):
        with pytest.raises(ValueError, match=f"images are missing: it holds {held}, expected arr_"):
            score(tmp_path / f"{name}.npz", config, tmp_path)
    save_statistics(tmp_path / "wide.npz", mu=np.zeros(768), sigma=np.eye(768))
    with pytest.raises(ValueError, match=r"expected mu \(2048,\)"):
        score(tmp_path / "wide.npz", config, tmp_path)
    whole = save_statistics(tmp_path / "stats.npz").read_bytes()
    changed = bytearray(whole)
    changed[5000] ^= 255  # within mu, whose checksum no longer fits
    (tmp_path / "stats.npz").write_bytes(changed)
    with pytest.raises(ValueError, match=r"stats\.npz: mu, sigma cannot be read"):
        score(tmp_path / "stats.npz", config, tmp_path)
    (tmp_path / "stats.npz").write_bytes(whole[:5000])
    with pytest.raises(ValueError, match="not a complete npz file"):
        score(tmp_path / "stats.npz", config, tmp_path)
    assert not (tmp_path / "out").exists()


def test_names_of_arrays_are_shown_printable(tmp_path):
    np.savez(tmp_path / "strange.npz", **{"a\x01b\u202e": np.zeros(3), "c" * 1000: np.zeros(3)})
    with pytest.raises(ValueError, match="images are missing") as caught:
        NpzImages(tmp_path / "strange.npz")
    assert str(caught.value).isprintable() and r"a\x01b\u202e" in str(caught.value)
    assert len(str(caught.value)) < 700


def test_statistics_are_no_samples(tmp_path):
    with pytest.raises(ValueError, match="images are missing: it holds mu, sigma"):
        NpzImages(save_statistics(tmp_path / "stats.npz"))
