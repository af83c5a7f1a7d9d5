"""Distances between two sets of outputs, from any feature vectors.

Frechet distance (arXiv:1706.08500) of Gaussians fitted to features, and the kernel distance (KID,
arXiv:1801.01401), the unbiased squared maximum mean discrepancy under a cubic polynomial kernel.
Neither is called FID here: that name belongs to one Inception network's features, and numbers from
other features are not comparable with it.  The protocol id names the features.

Frechet distances of small samples are biased upward, so only sets of equal size are compared; the
kernel distance has no such bias.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np

from ..errors import InputError
from ..method import Measurement

__all__ = [
    "Moments",
    "frechet_distance",
    "frechet_of",
    "kernel_distance",
    "kernel_protocol",
    "protocol",
]


def protocol(features: str) -> str:
    """Protocol id of the Frechet distance on named features."""
    return f"frechet/gaussian-float64/features={features}"


def kernel_protocol(features: str) -> str:
    """Protocol id of the kernel distance on named features."""
    return f"kid/cubic-polynomial-unbiased/features={features}"


@dataclasses.dataclass
class Moments:
    """Streaming, mergeable mean and covariance in float64 (pairwise update of Chan et al.).

    Attributes:
        n: Vectors taken in.
        mean: ``(d,)``.
        scatter: ``(d, d)``, the sum of squared deviations from the mean.
    """

    n: int = 0
    mean: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))
    scatter: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0)))

    def update(self, features: np.ndarray) -> Moments:
        """Take in ``(n, d)`` vectors."""
        rows = _matrix(features)
        if len(rows) == 0:
            return self
        centre = rows.mean(axis=0)
        deviations = rows - centre
        return self.merge(Moments(len(rows), centre, deviations.T @ deviations))

    def merge(self, other: Moments) -> Moments:
        """Take in everything another record has taken in."""
        if other.n == 0:
            return self
        if self.n == 0:
            self.n, self.mean, self.scatter = other.n, other.mean.copy(), other.scatter.copy()
            return self
        if other.mean.shape != self.mean.shape:
            raise InputError(f"features have width {other.mean.size}; {self.mean.size} is expected")
        total = self.n + other.n
        shift = other.mean - self.mean
        self.scatter = (
            self.scatter + other.scatter + np.outer(shift, shift) * (self.n * other.n / total)
        )
        self.mean = self.mean + shift * (other.n / total)
        self.n = total
        return self

    @property
    def covariance(self) -> np.ndarray:
        """Unbiased covariance ``(d, d)``; needs two vectors."""
        if self.n < 2:
            raise InputError(f"a covariance needs at least 2 feature vectors, got {self.n}")
        return self.scatter / (self.n - 1)


def frechet_distance(
    mean_1: np.ndarray, covariance_1: np.ndarray, mean_2: np.ndarray, covariance_2: np.ndarray
) -> float:
    """``|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`` of two Gaussians, means ``(d,)``, ``(d, d)``.

    The trace of the root is taken from the eigenvalues of ``S1^(1/2) S2 S1^(1/2)``, which is symmetric:
    no complex parts arise, also where a covariance is singular.
    """
    mean_1, mean_2 = (np.atleast_1d(np.asarray(m, np.float64)) for m in (mean_1, mean_2))
    first, second = (np.atleast_2d(np.asarray(c, np.float64)) for c in (covariance_1, covariance_2))
    if mean_1.shape != mean_2.shape or first.shape != second.shape:
        raise InputError(f"Gaussians of width {mean_1.size} and {mean_2.size} cannot be compared")
    values, vectors = np.linalg.eigh((first + first.T) / 2)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    inner = root @ ((second + second.T) / 2) @ root
    cross = np.sqrt(np.clip(np.linalg.eigvalsh((inner + inner.T) / 2), 0, None)).sum()
    shift = mean_1 - mean_2
    distance = shift @ shift + np.trace(first) + np.trace(second) - 2 * cross
    return float(max(distance, 0.0))


def frechet_of(one: np.ndarray | Moments, two: np.ndarray | Moments, features: str) -> Measurement:
    """Frechet distance of two sets of vectors ``(n, d)`` or their moments; ``features`` names them."""
    first, second = (m if isinstance(m, Moments) else Moments().update(m) for m in (one, two))
    value = frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
    return Measurement(value, protocol(features), min(first.n, second.n))


def kernel_distance(one: np.ndarray, two: np.ndarray, features: str) -> Measurement:
    """Unbiased kernel distance of ``(n, d)`` and ``(m, d)`` vectors, kernel ``(x.y / d + 1)^3``.

    It may be slightly negative for equal distributions: that is what unbiased means.
    """
    x, y = _matrix(one), _matrix(two)
    if min(len(x), len(y)) < 2 or x.shape[1] != y.shape[1]:
        raise InputError(
            f"the kernel distance needs two sets of at least 2 equally wide vectors, got {x.shape}, {y.shape}"
        )
    n, m, d = len(x), len(y), x.shape[1]
    k_xx, k_yy, k_xy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    value = (
        (k_xx.sum() - np.trace(k_xx)) / (n * (n - 1))
        + (k_yy.sum() - np.trace(k_yy)) / (m * (m - 1))
        - 2 * k_xy.mean()
    )
    return Measurement(float(value), kernel_protocol(features), min(n, m))


def _matrix(features: np.ndarray | Iterable[Iterable[float]]) -> np.ndarray:
    rows = np.asarray(features, np.float64)
    if rows.ndim != 2:
        raise InputError(f"features must be a matrix (n, d), got shape {rows.shape}")
    if not np.isfinite(rows).all():
        raise InputError("features hold NaN or infinity")
    return rows
