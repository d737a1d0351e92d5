"""Metrics against independent NumPy and SciPy, and against numbers of public implementations."""

import shutil
import zipfile

import jax
import numpy as np
import pytest
import scipy.linalg
from PIL import Image

from aim_jax.data import ImageSpec, open_images
from aim_jax.data.sources import ArrayImages
from aim_jax.evaluation import features as feature_passes
from aim_jax.evaluation.distribution import (
    Gaussian,
    InceptionScore,
    Moments,
    density_coverage,
    frechet_distance,
    kernel_distance,
    nearest,
    precision_recall,
)
from aim_jax.evaluation.features import FeatureExtractor
from aim_jax.evaluation.image_sets import ImageParts, NpzImages, SourceImages
from aim_jax.evaluation.reconstruction import codebook_use, psnr, ssim
from aim_jax.models import inception


@pytest.fixture(scope="module")
def features():
    """Two sets of correlated features, (900, 64) and (700, 64)."""
    rng = np.random.default_rng(0)
    return tuple(
        rng.normal(size=(n, 64)) @ rng.normal(size=(64, 64)) * 0.3 + shift
        for n, shift in ((900, 0.0), (700, 0.2))
    )


def gaussian_of(x, parts=7) -> Gaussian:
    moments = Moments(x.shape[1])
    for part in np.array_split(x, parts):
        moments.add(part)
    return moments.gaussian()


def test_moments_of_batches_are_those_of_everything(features):
    found = gaussian_of(features[0] + 1000)  # far from zero, where sums of squares lose digits
    np.testing.assert_allclose(found.mean, features[0].mean(0) + 1000, rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(features[0].T), atol=1e-7)
    assert found.count == 900
    moments = Moments(64)
    moments.add(features[0])
    with pytest.raises(ValueError, match="features of 1 of 5 images are not finite"):
        moments.add(np.where(np.arange(5)[:, None] == 2, np.nan, 0 * features[0][:5]))
    with pytest.raises(ValueError, match="at least two"):
        Moments(64).gaussian()


def test_frechet_distance_against_scipy_and_closed_forms(features):
    a, b = (gaussian_of(x) for x in features)
    root = scipy.linalg.sqrtm(a.covariance @ b.covariance).real
    expected = np.sum((a.mean - b.mean) ** 2) + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-9)
    assert abs(frechet_distance(a, a)) < 1e-8
    moved = a._replace(mean=a.mean + 0.5)
    assert frechet_distance(a, moved) == pytest.approx(64 * 0.25, rel=1e-9)
    wider = a._replace(covariance=4 * a.covariance)
    assert frechet_distance(a, wider) == pytest.approx(np.trace(a.covariance), rel=1e-9)
    # Singular: 20 images of 64 features. SciPy's root of the product is the yardstick again.
    few, some = gaussian_of(features[0][:20], 3), gaussian_of(features[1][:30], 3)
    root = scipy.linalg.sqrtm(few.covariance @ some.covariance).real
    traces = np.trace(few.covariance) + np.trace(some.covariance)
    expected = np.sum((few.mean - some.mean) ** 2) + traces - 2 * np.trace(root)
    assert frechet_distance(few, some) == pytest.approx(expected, abs=1e-6 * traces)


def test_inception_score_is_that_of_torch_fidelity():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1000, 50)) * 3
    score = InceptionScore(1000, 50, split_size=100)
    for part in reversed(np.array_split(np.arange(1000), 13)):  # in any order
        score.add(logits[part], part[0])
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    splits = [
        np.exp(np.mean(np.sum(q * (np.log(q) - np.log(q.mean(0))), axis=1)))
        for q in np.split(p, 10)
    ]
    mean, deviation = score.result()
    assert mean == pytest.approx(np.mean(splits), rel=1e-10)
    assert deviation == pytest.approx(np.std(splits), rel=1e-9)
    alike = InceptionScore(30, 10)
    alike.add(np.zeros((30, 10)), 0)
    assert alike.result() == (pytest.approx(1.0), 0.0)
    certain = InceptionScore(10, 10)
    certain.add(1e3 * np.eye(10), 0)  # also: no overflow, no log of zero
    assert certain.result()[0] == pytest.approx(10.0)
    with pytest.raises(ValueError, match="no images"):
        InceptionScore(0, 10).result()


def test_splits_of_pictures_that_come_class_after_class_are_dealt_in_turn():
    labels = np.repeat(np.arange(10), 100)
    logits = 50.0 * np.eye(10)[labels]

    def of(in_turn):
        score = InceptionScore(len(logits), 10, split_size=500, in_turn=in_turn)
        for start in range(0, len(logits), 70):
            score.add(logits[start : start + 70], start)
        return score.result()[0]

    assert of(in_turn=True) == pytest.approx(10) and of(in_turn=False) == pytest.approx(5)


def test_kernel_distance_is_the_unbiased_estimate(features):
    a, b = features[0][:60], features[1][:60]
    k = lambda x, y: (np.dot(x, y) / 64 + 1) ** 3  # noqa: E731
    pairs = [(i, j) for i in range(60) for j in range(60)]
    within = sum(k(x[i], x[j]) for x in (a, b) for i, j in pairs if i != j) / (60 * 59)
    across = sum(k(a[i], b[j]) for i, j in pairs) / 60**2
    mean, deviation = kernel_distance(a, b, subsets=2, size=60)
    assert mean == pytest.approx(within - 2 * across, rel=1e-9) and deviation < 1e-9
    mean, _ = kernel_distance(features[0][:450], features[0][450:], subsets=50, size=200)
    assert abs(mean) < 0.2 * kernel_distance(*features, subsets=50, size=200)[0]
    with pytest.raises(ValueError, match="at least two"):
        kernel_distance(a[:1], b)


def test_neighbour_metrics_against_a_search_by_hand():
    rng = np.random.default_rng(3)
    real = rng.normal(size=(1100, 6)).astype(np.float32)  # more than one block
    made = (rng.normal(size=(1050, 6)) * 0.8 + 0.3).astype(np.float32)

    def distances(x, y):
        return np.sqrt(((x[:, None].astype(np.float64) - y[None]) ** 2).sum(-1))

    def inside(x, balls, k):
        radii = np.sort(distances(balls, balls), axis=1)[:, k]
        return distances(x, balls) <= radii

    found = precision_recall(real, made)
    assert found["precision"] == inside(made, real, 3).any(1).mean()
    assert found["recall"] == inside(real, made, 3).any(1).mean()
    member, found = inside(made, real, 5), density_coverage(real, made)
    assert found["density"] == pytest.approx(member.sum() / (5 * len(made)), rel=1e-12)
    assert found["coverage"] == member.any(0).mean()
    np.testing.assert_array_equal(
        nearest(made[:9], real, 4), np.argsort(distances(made[:9], real), axis=1)[:, :4]
    )
    with pytest.raises(ValueError, match="3 images do not have 3 neighbours"):
        precision_recall(real[:3], made)
    twins = np.repeat(real[:10], 4, axis=0)  # radius zero: a twin is a neighbour
    assert precision_recall(twins, twins) == {"precision": 1.0, "recall": 1.0}


def test_psnr_and_ssim_are_those_of_scikit_image():
    rng = np.random.default_rng(5)
    x = rng.integers(0, 256, (3, 32, 40, 3), dtype=np.uint8)
    y = np.clip(x + rng.normal(size=x.shape) * 20, 0, 255).astype(np.uint8)
    # scikit-image 0.26.0: structural_similarity and peak_signal_noise_ratio, data_range 255.
    np.testing.assert_allclose(ssim(x, y), SSIM, rtol=1e-5)
    np.testing.assert_allclose(psnr(x, y), PSNR, rtol=1e-5)
    assert np.allclose(ssim(x, x), 1)
    np.testing.assert_allclose(psnr(x, x), 10 * np.log10(255**2 / 1e-8), rtol=1e-6)
    flat = np.full((1, 16, 16, 1), 250, np.uint8)
    assert ssim(flat, flat)[0] == pytest.approx(1, abs=1e-6)


SSIM = [0.96498099, 0.96704608, 0.96630188]
PSNR = [22.343498, 22.505096, 22.437266]


def test_codebook_use():
    assert codebook_use(np.array([5, 5, 0, 5, 5, 0, 0, 0])) == {
        "usage": 0.5,
        "perplexity": pytest.approx(4.0),
    }


def test_npz_images_come_in_batches(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 6, 3), dtype=np.uint8)
    for save in (np.savez, np.savez_compressed):
        save(tmp_path / "a.npz", arr_0=images, labels=np.arange(10))
        found = NpzImages(tmp_path / "a.npz")
        assert found.shape == images.shape
        np.testing.assert_array_equal(np.concatenate(list(found.batches(4))), images)
        np.testing.assert_array_equal(found.take([7, 0, 7]), images[[7, 0, 7]])

    def refuse(message, **arrays):
        np.savez(tmp_path / "b.npz", **arrays)
        with pytest.raises(ValueError, match=message):
            NpzImages(tmp_path / "b.npz")

    refuse(r"float32, expected uint8.*round\(\(x \+ 1\)", arr_0=images.astype(np.float32) / 127 - 1)
    refuse(r"expected \(n, H, W, 3\)", arr_0=images.transpose(0, 3, 1, 2))
    refuse("images are missing: it holds images, expected arr_0", images=images)
    refuse(r"n > 0", arr_0=images[:0])
    refuse(r"no value above 1.*x \* 255", arr_0=images % 2)
    (tmp_path / "c.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:300])
    with pytest.raises(ValueError, match="not a complete npz file"):
        NpzImages(tmp_path / "c.npz")
    with pytest.raises(FileNotFoundError):
        NpzImages(tmp_path / "none.npz")


def test_source_images_are_what_a_model_is_trained_on():
    pictures = np.random.default_rng(0).integers(0, 256, (5, 8, 12, 3), dtype=np.uint8)
    source = ArrayImages("some", "train", ("a",), pictures, np.zeros(5))
    found = SourceImages([source], ImageSpec(8))
    np.testing.assert_array_equal(np.concatenate(list(found.batches(2))), pictures[:, :, 2:10])
    other = ArrayImages("some", "train", ("a",), 255 - pictures, np.zeros(5))
    assert SourceImages([other], ImageSpec(8)).identity != found.identity
    both = SourceImages([other, source], ImageSpec(8))
    assert both.shape == (10, 8, 8, 3)
    np.testing.assert_array_equal(
        both.take([4, 5]), [255 - pictures[4, :, 2:10], found.take([0])[0]]
    )


def test_parts_go_on_and_join(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (7, 2, 2, 1), dtype=np.uint8)
    out = tmp_path / "all.npz"
    parts = ImageParts(tmp_path / "parts", out, {"seed": 1, "cfg_scale": 2.0})
    parts.add(1, images[4:])
    assert 1 in parts and 0 not in parts
    again = ImageParts(tmp_path / "parts", out, {"seed": 1, "cfg_scale": 2.0})
    assert 1 in again
    again.add(0, images[:4])
    again.join(2, labels=np.arange(7))
    with np.load(tmp_path / "all.npz") as file:
        np.testing.assert_array_equal(file["arr_0"], images)
        np.testing.assert_array_equal(file["labels"], np.arange(7))
    assert zipfile.ZipFile(tmp_path / "all.npz").testzip() is None
    assert not list(tmp_path.rglob("*.partial")) and not list(tmp_path.rglob("*.npy"))
    with pytest.raises(ValueError, match=r"other settings \(cfg_scale differ\)"):
        ImageParts(tmp_path / "parts", out, {"seed": 1, "cfg_scale": 3.0})
    (tmp_path / "parts" / "settings.json").unlink()
    with pytest.raises(ValueError, match="without the settings that it was made with"):
        ImageParts(tmp_path / "parts", out, {"seed": 1, "cfg_scale": 3.0})


class Stopping(FeatureExtractor):
    """Random features, which an image decides; stops after a number of batches."""

    def __init__(self, batches):
        super().__init__({"softmax": {"kernel": np.zeros(1)}}, 4)
        self.left, self.size = batches, self._batch_size

    def __call__(self, images):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        sizes = inception.NUM_FEATURES, inception.NUM_SPATIAL, inception.NUM_CLASSES
        rows = [
            np.stack([np.random.default_rng(image[0, 0]).random(n, np.float32) for image in images])
            for n in sizes
        ]
        return inception.Features(*rows)


def test_a_pass_over_a_set_goes_on_bit_by_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_passes, "SAVE_EVERY", 0.0)
    monkeypatch.setattr(feature_passes, "BLOCK", 8)
    images = np.arange(1, 24, dtype=np.uint8)[:, None, None, None].repeat(3, axis=3)
    np.savez(tmp_path / "set.npz", arr_0=images)
    found = NpzImages(tmp_path / "set.npz")
    batches = -(-len(images) // Stopping(0).size)
    assert batches > 2  # else there is no middle to stop at
    whole = Stopping(batches).of_cached(found, 9, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        Stopping(2).of_cached(found, 9, tmp_path / "cut")
    (partial,) = (tmp_path / "cut").iterdir()
    cut = partial.read_bytes()
    again = Stopping(batches)
    resumed = again.of_cached(found, 9, tmp_path / "cut")
    assert again.left == 2 and not partial.exists()
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(a, b)
    # The features that were kept, one by one.
    np.testing.assert_array_equal(resumed.features, Stopping(1)(images[resumed.indices]).pool)
    assert Stopping(0).of_cached(found, 9, tmp_path / "cut").count == 23  # as it was kept

    # What is damaged is begun anew.
    (file,) = (tmp_path / "cut").iterdir()
    file.unlink()
    partial.write_bytes(cut[: len(cut) // 2])
    again = Stopping(batches)
    again.of_cached(found, 9, tmp_path / "cut")
    assert again.left == 0


def test_moments_of_several_processes_are_joined_without_rounding(monkeypatch):
    rng = np.random.default_rng(5)
    parts = [1e6 + rng.normal(size=(count, 3)) for count in (7, 4)]
    sides = []
    for part in parts:
        sides.append(Moments(3))
        sides[-1].add(part)
    sent = iter((np.array([sides[1].count]), sides[1].total, sides[1].products))

    def every_process(mine):
        """What all processes send, of which this is the first."""
        assert mine.dtype == np.uint8
        return np.stack([mine, next(sent).ravel().view(np.uint8)])

    monkeypatch.setattr(feature_passes.jax, "process_count", lambda: 2)
    monkeypatch.setattr(feature_passes.multihost_utils, "process_allgather", every_process)
    joined = feature_passes.over_processes(sides[0])
    assert joined.count == 11
    np.testing.assert_array_equal(joined.total, sides[0].total + sides[1].total)
    np.testing.assert_array_equal(joined.products, sides[0].products + sides[1].products)


def test_edited_folders_are_other_references(picture_folder, tmp_path):
    shutil.copytree(picture_folder, tmp_path / "copy")

    def identity():
        source = open_images("folder", "train", tmp_path / "copy")
        return SourceImages([source], ImageSpec(4)).identity

    before = identity()
    assert identity() == before
    picture = Image.fromarray(np.zeros((4, 5), np.uint8))
    picture.save(tmp_path / "copy" / "train" / "boat" / "7.png")
    assert identity() != before
