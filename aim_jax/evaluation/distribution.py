"""How far two sets of images are apart, by the features of their images.

n images, d features. Statistics and everything that subtracts nearly equal numbers are float64, in
NumPy on the host; distances between features are float32, in JAX.
"""

import functools
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Gaussian(NamedTuple):
    """Mean (d,) and covariance (d, d), float64, of `count` images (0 where it is not known)."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int = 0  # type: ignore[assignment]  # tuples have a method of that name


class Moments:
    """Mean and covariance of features that come in batches; no feature is kept.

    Args:
      d: features of an image.

    Attributes:
      count: images; total: (d,) sum of their features; products: (d, d) sum of outer products.
    """

    def __init__(self, d: int):
        self.count, self.total, self.products = 0, np.zeros(d), np.zeros((d, d))

    def add(self, features: np.ndarray) -> None:
        """features (b, d).

        Raises:
          ValueError: a feature is not finite.
        """
        x = np.asarray(features, np.float64)
        if not np.all(np.isfinite(x)):
            broken = np.count_nonzero(~np.isfinite(x).all(axis=1))
            raise ValueError(
                f"features of {broken} of {len(x)} images are not finite; the weights of the "
                "feature network are damaged, or do not belong to it."
            )
        self.count += len(x)
        self.total += x.sum(axis=0)
        self.products += x.T @ x

    def gaussian(self) -> Gaussian:
        """Of all that was added; the covariance divides by count - 1.

        Raises:
          ValueError: fewer than two images.
        """
        if self.count < 2:
            raise ValueError(f"{self.count} images have no covariance; at least two are needed.")
        mean = self.total / self.count
        covariance = (self.products - self.count * np.outer(mean, mean)) / (self.count - 1)
        return Gaussian(mean, covariance, self.count)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)), arXiv 1706.08500, equation 6.

    The trace of the root is the sum of the roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2),
    which is symmetric; so there are no complex numbers, and singular covariances need no offset.
    It agrees with scipy.linalg.sqrtm to 1e-6 of the traces (`tests/evaluation/test_metrics.py`).
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    middle = root @ b.covariance @ root
    overlap = np.sqrt(np.maximum(np.linalg.eigvalsh((middle + middle.T) / 2), 0)).sum()
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return float(np.sum(np.square(a.mean - b.mean)) + traces - 2 * overlap)


class InceptionScore:
    """exp E KL(p(y|x) || p(y)) over splits of the images in their order.

    arXiv 1606.03498, section 4, with the splits of 5000 of the ADM evaluator.

    Args:
      count: images in all. classes: of the logits.
      in_turn: deals the images to the splits in turn; else a split is of consecutive images, as the
        ADM evaluator has it, and of few classes where they come class after class.

    Attributes:
      sums: (splits, classes + 2), of every split the sums of p, of p . log p, and of images.
    """

    def __init__(self, count: int, classes: int, split_size: int = 5000, in_turn: bool = False):
        self._size, self._in_turn = split_size, in_turn
        self.sums = np.zeros((-(-count // split_size), classes + 2))

    def add(self, logits: np.ndarray, start: int) -> None:
        """logits (b, classes) of the images start, start + 1, ..."""
        logits = np.asarray(logits, np.float64)
        log_p = logits - logits.max(axis=1, keepdims=True)
        log_p -= np.log(np.exp(log_p).sum(axis=1, keepdims=True))
        p = np.exp(log_p)
        information = (p * log_p).sum(axis=1, keepdims=True)
        rows = np.concatenate([p, information, np.ones_like(information)], axis=1)
        numbers = start + np.arange(len(rows))
        splits = numbers % len(self.sums) if self._in_turn else numbers // self._size
        np.add.at(self.sums, splits, rows)

    def result(self) -> tuple[float, float]:
        """Mean and standard deviation over the splits; the last one may be smaller.

        Raises:
          ValueError: images are missing.
        """
        if not len(self.sums) or not self.sums[:, -1].all():
            raise ValueError("the Inception Score of no images.")
        mean = self.sums[:, :-1] / self.sums[:, -1:]
        p, information = mean[:, :-1], mean[:, -1]
        entropy = -(p * np.log(np.maximum(p, np.finfo(float).tiny))).sum(axis=1)
        scores = np.exp(information + entropy)
        return float(scores.mean()), float(scores.std())


# Images of a subset for KID, of which 100 are drawn.
KERNEL_SUBSET = 1000


def kernel_distance(
    a: np.ndarray, b: np.ndarray, subsets: int = 100, size: int = KERNEL_SUBSET, seed: int = 0
) -> tuple[float, float]:
    """KID: the squared MMD of features under (x . y / d + 1)^3, unbiased (arXiv 1801.01401).

    Args:
      a, b: features (n, d). subsets, size: how many subsets are drawn, and of how many images;
        all images where there are fewer.

    Returns:
      Mean and standard deviation over the subsets.
    """
    rng = np.random.default_rng(seed)
    size = min(size, len(a), len(b))
    if size < 2:
        raise ValueError(f"KID needs at least two images on either side, got {size}.")

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    found = []
    for _ in range(subsets):
        x, y = (t[rng.choice(len(t), size, replace=False)].astype(np.float64) for t in (a, b))
        within = sum(k.sum() - np.trace(k) for k in (kernel(x, x), kernel(y, y)))
        found.append(within / (size * (size - 1)) - 2 * kernel(x, y).mean())
    return float(np.mean(found)), float(np.std(found))


class Manifold(NamedTuple):
    """Balls around images that reach to their k-th neighbour.

    Attributes:
      features: (n, d) float32. radii: (n,) squared.
    """

    features: np.ndarray
    radii: np.ndarray


@jax.jit
def _squared_distances(x: jax.Array, y: jax.Array) -> jax.Array:
    """(a, d) and (n, d) -> (a, n)."""
    with jax.default_matmul_precision("highest"):
        products = x @ y.T
    return jnp.maximum(jnp.sum(x**2, 1)[:, None] - 2 * products + jnp.sum(y**2, 1), 0)


def _blocks(x: np.ndarray, most: int = 1000) -> Iterator[np.ndarray]:
    yield from np.array_split(x, -(-len(x) // most))


@functools.partial(jax.jit, static_argnums=2)
def _radii(x: jax.Array, y: jax.Array, k: int) -> jax.Array:
    return -jax.lax.top_k(-_squared_distances(x, y), k + 1)[0][:, k]


def make_manifold(features: np.ndarray, k: int) -> Manifold:
    """The balls of a set of images; an image is not its own neighbour.

    Raises:
      ValueError: k images or fewer.
    """
    if len(features) <= k:
        raise ValueError(f"{len(features)} images have no {k} neighbours each.")
    everything = jnp.asarray(features, jnp.float32)
    radii = [np.asarray(_radii(block, everything, k)) for block in _blocks(features)]
    return Manifold(np.asarray(features, np.float32), np.concatenate(radii))


class Overlap(NamedTuple):
    """How the images of one set lie in the balls of another.

    Attributes:
      inside: share of the images that are in a ball. balls: balls that an image is in, on average.
      reached: share of the balls that hold an image.
    """

    inside: float
    balls: float
    reached: float


@jax.jit
def _membership(x: jax.Array, features: jax.Array, radii: jax.Array) -> jax.Array:
    return _squared_distances(x, features) <= radii


def overlap(features: np.ndarray, manifold: Manifold) -> Overlap:
    """Of images (n, d) with the balls of others."""
    balls, radii = jnp.asarray(manifold.features), jnp.asarray(manifold.radii)
    inside = total = 0
    reached = np.zeros(len(manifold.radii), bool)
    for block in _blocks(features):
        member = np.asarray(_membership(block, balls, radii))
        inside, total = inside + member.any(axis=1).sum(), total + member.sum()
        reached |= member.any(axis=0)
    return Overlap(inside / len(features), total / len(features), float(reached.mean()))


def precision_recall(real: np.ndarray, made: np.ndarray, k: int = 3) -> dict[str, float]:
    """Improved precision and recall (arXiv 1904.06991, equation 2), as the ADM evaluator has them.

    Args:
      real, made: features (n, d) and (m, d).

    Returns:
      precision: share of the made images in the real ones' balls; recall: the other way round.
    """
    return {
        "precision": float(overlap(made, make_manifold(real, k)).inside),
        "recall": float(overlap(real, make_manifold(made, k)).inside),
    }


def density_coverage(real: np.ndarray, made: np.ndarray, k: int = 5) -> dict[str, float]:
    """Density and coverage (arXiv 2002.09797, equations 4 and 5).

    Args:
      real, made: features (n, d) and (m, d).
    """
    found = overlap(made, make_manifold(real, k))
    return {"density": float(found.balls / k), "coverage": found.reached}


def nearest(features: np.ndarray, others: np.ndarray, k: int) -> np.ndarray:
    """For every image (n, d) the indices of the k nearest of the others (m, d), int (n, k)."""
    everything = jnp.asarray(others)
    distances = (_squared_distances(block, everything) for block in _blocks(features))
    return np.concatenate([np.asarray(jax.lax.top_k(-d, k)[1]) for d in distances])
