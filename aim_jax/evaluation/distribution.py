"""Distances between two sets of images, computed from the features of the images.

Shapes: n images, d features. Statistics, and all differences of nearly equal numbers, are float64
in NumPy on the host. Distances between features are float32 in JAX.
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Gaussian(NamedTuple):
    """Mean and covariance of the features of a set of images.

    Attributes:
      mean: float64 (d,).
      covariance: float64 (d, d).
      count: number of images; 0 if unknown.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int = 0  # type: ignore[assignment]  # tuples have a method of that name


class Moments:
    """Running mean and covariance of features that arrive in batches; features are not stored.

    Args:
      d: number of features per image.

    Attributes:
      count: number of images.
      total: (d,), sum of the features.
      products: (d, d), sum of the outer products of the features.
    """

    def __init__(self, d: int):
        self.count = 0
        self.total = np.zeros(d)
        self.products = np.zeros((d, d))

    def add(self, features: np.ndarray) -> None:
        """Add a batch of features (b, d).

        Raises:
          ValueError: if a feature is not finite.
        """
        x = np.asarray(features, np.float64)
        if not np.all(np.isfinite(x)):
            not_finite = np.count_nonzero(~np.isfinite(x).all(axis=1))
            raise ValueError(
                f"features of {not_finite} of {len(x)} images are not finite; the weights of the "
                "feature network are damaged or belong to another network."
            )
        self.count += len(x)
        self.total += x.sum(axis=0)
        self.products += x.T @ x

    def gaussian(self) -> Gaussian:
        """Return mean and covariance of all images; the covariance divides by count - 1.

        Raises:
          ValueError: if there are fewer than two images.
        """
        if self.count < 2:
            raise ValueError(f"{self.count} images have no covariance; expected at least two.")
        mean = self.total / self.count
        covariance = (self.products - self.count * np.outer(mean, mean)) / (self.count - 1)
        return Gaussian(mean, covariance, self.count)


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Compute the Fréchet distance of two Gaussians (arXiv 1706.08500, equation 6).

    The distance is |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)). The trace of the root is the
    sum of the roots of the eigenvalues of C_a^(1/2) C_b C_a^(1/2). This matrix is symmetric, so no
    complex numbers arise and singular covariances need no offset. The result agrees with
    scipy.linalg.sqrtm to 1e-6 of the traces (`tests/evaluation/test_metrics.py`).
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    middle = root @ b.covariance @ root
    overlap = np.sqrt(np.maximum(np.linalg.eigvalsh((middle + middle.T) / 2), 0)).sum()
    traces = np.trace(a.covariance) + np.trace(b.covariance)
    return float(np.sum(np.square(a.mean - b.mean)) + traces - 2 * overlap)


class InceptionScore:
    """Inception Score, exp E KL(p(y|x) || p(y)), over splits of the images in their order.

    From arXiv 1606.03498, section 4, with splits of 5000 images as in the ADM evaluator.

    Args:
      count: total number of images.
      classes: number of classes of the logits.
      split_size: images per split.
      in_turn: assign images to the splits round-robin. By default a split holds consecutive images,
        as in the ADM evaluator, and has few classes if the images are sorted by class.

    Attributes:
      sums: (splits, classes + 2): for every split, the sums of p and of p . log p, and the number
        of images.
    """

    def __init__(self, count: int, classes: int, split_size: int = 5000, in_turn: bool = False):
        self._size = split_size
        self._in_turn = in_turn
        self.sums = np.zeros((-(-count // split_size), classes + 2))

    def add(self, logits: np.ndarray, start: int) -> None:
        """Add the logits (b, classes) of the images start, start + 1, and so on."""
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
        """Return mean and standard deviation over the splits; the last one may be smaller.

        Raises:
          ValueError: if a split has no images.
        """
        if not len(self.sums) or not self.sums[:, -1].all():
            raise ValueError(
                "the Inception Score is undefined: a split has no images; add all images first."
            )
        mean = self.sums[:, :-1] / self.sums[:, -1:]
        p = mean[:, :-1]
        information = mean[:, -1]
        entropy = -(p * np.log(np.maximum(p, np.finfo(float).tiny))).sum(axis=1)
        scores = np.exp(information + entropy)
        return float(scores.mean()), float(scores.std())


# Number of images in each of the random subsets for KID.
KERNEL_SUBSET = 1000


def kernel_distance(
    a: np.ndarray,
    b: np.ndarray,
    subsets: int = 100,
    size: int = KERNEL_SUBSET,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[float, float]:
    """Compute KID, the unbiased squared MMD under the kernel (x . y / d + 1)^3 (arXiv 1801.01401).

    Args:
      a: features (n, d) of one set.
      b: features (m, d) of the other set.
      subsets: number of random subsets.
      size: images per subset; all images of the smaller set if it has fewer.
      seed: seed of the subsets.
      progress: called after each subset with the number of subsets done and their total.

    Returns:
      Mean and standard deviation over the subsets.

    Raises:
      ValueError: if a set has fewer than two images.
    """
    rng = np.random.default_rng(seed)
    size = min(size, len(a), len(b))
    if size < 2:
        raise ValueError(f"KID requires at least two images in each set, got {size}.")

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1) ** 3

    distances = []
    for done in range(1, subsets + 1):
        x, y = (t[rng.choice(len(t), size, replace=False)].astype(np.float64) for t in (a, b))
        within = sum(k.sum() - np.trace(k) for k in (kernel(x, x), kernel(y, y)))
        distances.append(within / (size * (size - 1)) - 2 * kernel(x, y).mean())
        if progress is not None:
            progress(done, subsets)
    return float(np.mean(distances)), float(np.std(distances))


class Manifold(NamedTuple):
    """Balls around images in feature space that reach to their k-th nearest neighbours.

    Attributes:
      features: float32 (n, d), the centres.
      radii: (n,), the squared radii.
    """

    features: np.ndarray
    radii: np.ndarray


@jax.jit
def _squared_distances(x: jax.Array, y: jax.Array) -> jax.Array:
    """Compute the squared distances (a, n) between x (a, d) and y (n, d)."""
    with jax.default_matmul_precision("highest"):
        products = x @ y.T
    squares = jnp.sum(x**2, 1)[:, None] - 2 * products + jnp.sum(y**2, 1)[None]
    return jnp.maximum(squares, 0)


def _blocks(x: np.ndarray, max_rows: int = 1000) -> Iterator[np.ndarray]:
    yield from np.array_split(x, -(-len(x) // max_rows))


@functools.partial(jax.jit, static_argnums=2)
def _radii(x: jax.Array, y: jax.Array, k: int) -> jax.Array:
    return -jax.lax.top_k(-_squared_distances(x, y), k + 1)[0][:, k]


def make_manifold(features: np.ndarray, k: int) -> Manifold:
    """Return the balls of a set of images (n, d); an image is not its own neighbour.

    Raises:
      ValueError: if there are k images or fewer.
    """
    if len(features) <= k:
        raise ValueError(
            f"{len(features)} images do not have {k} neighbours each; expected at least {k + 1}."
        )
    all_features = jnp.asarray(features, jnp.float32)
    radii = [np.asarray(_radii(block, all_features, k)) for block in _blocks(features)]
    return Manifold(np.asarray(features, np.float32), np.concatenate(radii))


class Overlap(NamedTuple):
    """Overlap of the images of one set with the balls of another.

    Attributes:
      inside: fraction of the images that are in at least one ball.
      balls: number of balls that contain an image, averaged over the images.
      reached: fraction of the balls that contain at least one image.
    """

    inside: float
    balls: float
    reached: float


@jax.jit
def _membership(x: jax.Array, features: jax.Array, radii: jax.Array) -> jax.Array:
    return _squared_distances(x, features) <= radii[None]


def overlap(features: np.ndarray, manifold: Manifold) -> Overlap:
    """Compute the overlap of images (n, d) with the balls of another set."""
    balls = jnp.asarray(manifold.features)
    radii = jnp.asarray(manifold.radii)
    inside = total = 0
    reached = np.zeros(len(manifold.radii), bool)
    for block in _blocks(features):
        member = np.asarray(_membership(block, balls, radii))
        inside += member.any(axis=1).sum()
        total += member.sum()
        reached |= member.any(axis=0)
    return Overlap(inside / len(features), total / len(features), float(reached.mean()))


def precision_recall(real: np.ndarray, made: np.ndarray, k: int = 3) -> dict[str, float]:
    """Compute improved precision and recall (arXiv 1904.06991, equation 2).

    The definition is that of the ADM evaluator.

    Args:
      real: features (n, d) of real images.
      made: features (m, d) of generated images.
      k: each ball reaches to the k-th neighbour.

    Returns:
      precision, the fraction of generated images in the balls of real images, and recall, the
      fraction of real images in the balls of generated images.
    """
    return {
        "precision": float(overlap(made, make_manifold(real, k)).inside),
        "recall": float(overlap(real, make_manifold(made, k)).inside),
    }


def density_coverage(real: np.ndarray, made: np.ndarray, k: int = 5) -> dict[str, float]:
    """Compute density and coverage (arXiv 2002.09797, equations 4 and 5).

    Args:
      real: features (n, d) of real images.
      made: features (m, d) of generated images.
      k: each ball reaches to the k-th neighbour.

    Returns:
      density and coverage.
    """
    made_in_real = overlap(made, make_manifold(real, k))
    return {"density": float(made_in_real.balls / k), "coverage": made_in_real.reached}


def nearest(features: np.ndarray, others: np.ndarray, k: int) -> np.ndarray:
    """Return the indices int (n, k) of the k nearest `others` (m, d) of every image (n, d)."""
    all_others = jnp.asarray(others)
    distances = (_squared_distances(block, all_others) for block in _blocks(features))
    return np.concatenate([np.asarray(jax.lax.top_k(-d, k)[1]) for d in distances])
