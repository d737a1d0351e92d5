"""What is kept of the features of a set of images: while they come, and for the metrics."""

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aim_jax.evaluation.distribution import Gaussian, InceptionScore, Moments
from aim_jax.models import inception
from aim_jax.utils.files import replacing
from aim_jax.utils.logging import say


class FeatureSet(NamedTuple):
    """What the metrics need of a set of images.

    Attributes:
      count: images.
      pool, spatial: statistics of FID's and sFID's features; spatial may be missing in a reference.
      features: (m, 2048) float32 of some images, for what compares them one by one.
      indices: (m,) which ones, evenly spaced over the set.
      inception_score: mean and standard deviation over splits, or None without the last layer.
    """

    count: int  # type: ignore[assignment]  # tuples have a method of that name
    pool: Gaussian
    spatial: Gaussian | None
    features: np.ndarray
    indices: np.ndarray
    inception_score: tuple[float, float] | None

    def save(self, file: Path) -> None:
        """Writes an npz file, whole or not at all; `load` reads it."""
        assert self.spatial is not None  # only references of other evaluators lack it
        _save(
            file,
            count=np.asarray(self.count),
            mu=self.pool.mean,
            sigma=self.pool.covariance,
            mu_s=self.spatial.mean,
            sigma_s=self.spatial.covariance,
            features=self.features,
            indices=self.indices,
            inception_score=np.asarray(self.inception_score or ()),
        )

    @classmethod
    def load(cls, file: Path) -> "FeatureSet | None":
        """What `save` wrote; None where it is missing or damaged."""
        names = "count", "mu", "sigma", "mu_s", "sigma_s", "features", "indices", "inception_score"
        stored = _load(file, names)
        if stored is None:
            return None
        count, score = int(stored["count"]), tuple(stored["inception_score"].tolist())
        pool, spatial = (Gaussian(stored[f"mu{s}"], stored[f"sigma{s}"], count) for s in ("", "_s"))
        return cls(count, pool, spatial, stored["features"], stored["indices"], score or None)


class FeatureSums:
    """What one process has summed up of its share of a set; goes on where it was saved.

    Args:
      count: images of the whole set. in_turn: see `InceptionScore`.
      indices: ascending; the images whose features are kept one by one.

    Attributes:
      blocks: of images, that were added. pool, spatial, score: their sums.
      kept: parts of (m, 2048) float32.
    """

    def __init__(self, count: int, indices: np.ndarray, in_turn: bool = False):
        self._indices, self.blocks = indices, 0
        self.pool, self.spatial = Moments(inception.NUM_FEATURES), Moments(inception.NUM_SPATIAL)
        self.score = InceptionScore(count, inception.NUM_CLASSES, in_turn=in_turn)
        self.kept: list[np.ndarray] = [np.zeros((0, inception.NUM_FEATURES), np.float32)]

    def add(self, found: inception.Features, start: int) -> None:
        """Features of a block of images, the images start, start + 1, ...

        Raises:
          ValueError: a feature is not finite.
        """
        pool = np.asarray(found.pool)
        self.pool.add(pool)
        self.spatial.add(np.asarray(found.spatial))
        if found.logits is not None:
            self.score.add(np.asarray(found.logits), start)
        inside = self._indices - start
        self.kept.append(pool[inside[(inside >= 0) & (inside < len(pool))]])
        self.blocks += 1

    def save(self, file: Path) -> None:
        """Writes what was summed up so far, whole or not at all."""
        moments = {"pool": self.pool, "spatial": self.spatial}
        _save(
            file,
            blocks=np.asarray(self.blocks),
            count=np.asarray(self.pool.count),
            kept=np.concatenate(self.kept),
            score=self.score.sums,
            **{f"{k}_total": m.total for k, m in moments.items()},
            **{f"{k}_products": m.products for k, m in moments.items()},
        )

    def restore(self, file: Path) -> None:
        """Takes over what `save` wrote; nothing where the file is missing or damaged."""
        sums = "pool_total", "pool_products", "spatial_total", "spatial_products"
        stored = _load(file, ("blocks", "count", "kept", "score", *sums))
        if stored is None:
            return
        self.blocks, self.kept = int(stored["blocks"]), [stored["kept"]]
        self.score.sums = stored["score"]
        for name, moments in {"pool": self.pool, "spatial": self.spatial}.items():
            moments.count = int(stored["count"])
            moments.total, moments.products = stored[f"{name}_total"], stored[f"{name}_products"]


def _save(file: Path, **arrays: np.ndarray) -> None:
    with replacing(file) as partial, partial.open("wb") as written:
        np.savez(written, **arrays)  # type: ignore[arg-type]


def _load(file: Path, names: tuple[str, ...]) -> dict[str, np.ndarray] | None:
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            return {name: stored[name] for name in names}
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        say(f"{file} is damaged ({error}); it is made anew.")
    return None
