"""Features of a set of images: running sums of a pass over the set, and inputs of the metrics."""

import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np

from aim_jax.evaluation.distribution import Gaussian, InceptionScore, Moments
from aim_jax.models import inception
from aim_jax.utils.files import replacing
from aim_jax.utils.logging import say


class FeatureSet(NamedTuple):
    """Statistics and features of a set of images, as the metrics need them.

    Attributes:
      count: number of images.
      pool: statistics of the features for FID.
      spatial: statistics of the features for sFID; None for some references.
      features: float32 (m, 2048), features of some images, for metrics that compare single images.
      indices: (m,), indices of these images, evenly spaced over the set.
      inception_score: mean and standard deviation over splits; None without the last layer.
    """

    count: int  # type: ignore[assignment]  # tuples have a method of that name
    pool: Gaussian
    spatial: Gaussian | None
    features: np.ndarray
    indices: np.ndarray
    inception_score: tuple[float, float] | None

    def save(self, file: Path) -> None:
        """Write an npz file atomically; `load` reads it."""
        assert self.spatial is not None  # missing only in references of other evaluators
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
        """Load a file of `save`; return None if it is missing or damaged."""
        names = "count", "mu", "sigma", "mu_s", "sigma_s", "features", "indices", "inception_score"
        stored = _load(file, names)
        if stored is None:
            return None
        count = int(stored["count"])
        score = tuple(stored["inception_score"].tolist())
        pool, spatial = (Gaussian(stored[f"mu{s}"], stored[f"sigma{s}"], count) for s in ("", "_s"))
        return cls(count, pool, spatial, stored["features"], stored["indices"], score or None)


class FeatureSums:
    """Running sums of one process over its share of a set; can be saved and resumed.

    Args:
      count: number of images of the complete set.
      indices: ascending indices of the images whose features are kept.
      in_turn: see `InceptionScore`.

    Attributes:
      blocks: number of blocks of images added.
      pool: sums of the features for FID.
      spatial: sums of the features for sFID.
      score: sums for the Inception Score.
      kept: features of the kept images, in parts of float32 (m, 2048).
    """

    def __init__(self, count: int, indices: np.ndarray, in_turn: bool = False):
        self._indices = indices
        self.blocks = 0
        self.pool = Moments(inception.NUM_FEATURES)
        self.spatial = Moments(inception.NUM_SPATIAL)
        self.score = InceptionScore(count, inception.NUM_CLASSES, in_turn=in_turn)
        self.kept: list[np.ndarray] = [np.zeros((0, inception.NUM_FEATURES), np.float32)]

    def add(self, found: inception.Features, start: int) -> None:
        """Add the features of a block of images, which are the images start, start + 1, and so on.

        Raises:
          ValueError: if a feature is not finite.
        """
        pool = np.asarray(found.pool)
        self.pool.add(pool)
        self.spatial.add(np.asarray(found.spatial))
        if found.logits is not None:
            self.score.add(np.asarray(found.logits), start)
        offsets = self._indices - start
        self.kept.append(pool[offsets[(offsets >= 0) & (offsets < len(pool))]])
        self.blocks += 1

    def save(self, file: Path) -> None:
        """Write the sums so far to a file atomically; `restore` reads it."""
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
        """Restore the sums of a file of `save`; do nothing if it is missing or damaged."""
        sums = "pool_total", "pool_products", "spatial_total", "spatial_products"
        stored = _load(file, ("blocks", "count", "kept", "score", *sums))
        if stored is None:
            return
        self.blocks = int(stored["blocks"])
        self.kept = [stored["kept"]]
        self.score.sums = stored["score"]
        for name, moments in {"pool": self.pool, "spatial": self.spatial}.items():
            moments.count = int(stored["count"])
            moments.total = stored[f"{name}_total"]
            moments.products = stored[f"{name}_products"]


def _save(file: Path, **arrays: np.ndarray) -> None:
    with replacing(file) as partial, partial.open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]


def _load(file: Path, names: tuple[str, ...]) -> dict[str, np.ndarray] | None:
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            return {name: stored[name] for name in names}
    except FileNotFoundError:
        pass
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        say(f"{file} is damaged ({error}); computing it again.")
    return None
