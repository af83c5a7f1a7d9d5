"""Distances between two sets of outputs, from any feature vectors.

    Frechet  |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), Gaussians fitted to features (arXiv:1706.08500)
    KID      squared maximum mean discrepancy, kernel (x.y / d + 1)^3, unbiased (arXiv:1801.01401): over all pairs,
             or as the mean over random subsets, which is what libraries print
    CMMD     1000 x squared maximum mean discrepancy of unit CLIP embeddings, kernel exp(-|x - y|^2 / (2 sigma^2)),
             sigma 10 (arXiv:2401.09603), with the diagonal as its authors' code has it, or without

None of them is called FID here: that name belongs to one Inception network's features, and numbers from other
features are not comparable with it.  The protocol id names the features.

Frechet distances of small samples are biased upward, so their sample sizes are part of the id: only equal ones
are compared.  The unbiased kernel distances have no such bias.  Moments and rows are streamed and merge; kernels
are summed block by block, so that no matrix of all pairs is held.

Kernel distances over all pairs have an asymptotic interval (:mod:`expunge.core.discrepancy`), over prompts where these
are known.  It is one of the value where the distributions differ; where they are equal it degenerates and is not to be
read as a test.  On few vectors it is too narrow for KID's kernel, whose third powers have long tails.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from ..core.discrepancy import squared_discrepancy
from ..core.features import Features
from ..core.protocols import full_id
from ..errors import InputError, SettingError, nearest
from ..method import Measurement, Metric, Outputs, Prompt

__all__ = [
    "KINDS",
    "Distance",
    "Moments",
    "Rows",
    "clip_distance",
    "frechet_distance",
    "frechet_of",
    "kernel_distance",
    "subset_kernel_distance",
]

KINDS = ("frechet", "kid", "kid-subsets", "cmmd", "cmmd-unbiased")


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
    square = (mean_1.size, mean_1.size)
    if mean_1.shape != mean_2.shape or not first.shape == second.shape == square:
        raise InputError(
            f"Gaussians with means {mean_1.shape}, {mean_2.shape} and covariances {first.shape}, {second.shape} "
            "cannot be compared; all four must be of one width"
        )
    if not all(np.isfinite(part).all() for part in (mean_1, mean_2, first, second)):
        raise InputError("means or covariances hold NaN or infinity")
    values, vectors = np.linalg.eigh((first + first.T) / 2)
    root = (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
    inner = root @ ((second + second.T) / 2) @ root
    cross = np.sqrt(np.clip(np.linalg.eigvalsh((inner + inner.T) / 2), 0, None)).sum()
    shift = mean_1 - mean_2
    distance = shift @ shift + np.trace(first) + np.trace(second) - 2 * cross
    return float(max(distance, 0.0))


def frechet_of(one: np.ndarray | Moments, two: np.ndarray | Moments, features: str) -> Measurement:
    """Frechet distance of two sets of vectors ``(n, d)`` or their moments; ``features`` names them.

    How many vectors there are is part of the protocol, because the distance depends on it.
    """
    first, second = (m if isinstance(m, Moments) else Moments().update(m) for m in (one, two))
    value = frechet_distance(first.mean, first.covariance, second.mean, second.covariance)
    sizes = str(first.n) if first.n == second.n else f"{first.n},{second.n}"
    id = full_id("frechet/gaussian-float64", features=features, n=sizes)
    return Measurement(value, id, min(first.n, second.n))


@dataclasses.dataclass
class Rows:
    """Streaming, mergeable feature vectors, kept for distances that need all pairs.

    Attributes:
        parts: Batches ``(n, d)`` in the order they came, in the precision they came in.
        prompts: What each vector answers, or empty where that is not known.
    """

    parts: list[np.ndarray] = dataclasses.field(default_factory=list)
    prompts: list[Hashable] = dataclasses.field(default_factory=list)

    @property
    def n(self) -> int:
        """Vectors taken in."""
        return sum(len(part) for part in self.parts)

    def update(self, features: np.ndarray, prompts: Sequence[Hashable] = ()) -> Rows:
        """Take in ``(n, d)`` vectors, with the prompt of each or of none of them."""
        rows = np.asarray(features)
        _matrix(rows)
        if self.parts and rows.shape[1] != self.parts[0].shape[1]:
            raise InputError(
                f"features have width {rows.shape[1]}; {self.parts[0].shape[1]} is expected"
            )
        if not len(rows):
            return self
        if len(prompts) not in (0, len(rows)):
            raise InputError(f"{len(rows)} vectors came with {len(prompts)} prompts")
        if self.parts and bool(self.prompts) != bool(len(prompts)):
            raise InputError(
                "prompts came with some of the vectors; allowed is with all or with none"
            )
        self.parts.append(rows)
        self.prompts.extend(prompts)
        return self

    def merge(self, other: Rows) -> Rows:
        """Take in everything another record has taken in."""
        start = 0
        for part in other.parts:
            self.update(part, other.prompts[start : start + len(part)])
            start += len(part)
        return self

    def matrix(self) -> np.ndarray:
        """All of them, ``(n, d)`` in float64."""
        if not self.parts:
            return np.zeros((0, 0))
        return np.concatenate(self.parts).astype(np.float64)


def kernel_distance(
    one: np.ndarray,
    two: np.ndarray,
    features: str,
    prompts: Sequence[Hashable] = (),
    reference_prompts: Sequence[Hashable] = (),
) -> Measurement:
    """Unbiased kernel distance of ``(n, d)`` and ``(m, d)`` vectors over all pairs, kernel ``(x.y / d + 1)^3``.

    It may be slightly negative for equal distributions: that is what unbiased means.

    Args:
        one, two: Vectors of the outputs and of the reference.
        features: Names them.
        prompts, reference_prompts: What each of them answers, where that is known; outputs of one prompt count
            together in the interval, on both sides.
    """
    x, y = _pair(one, two, "the kernel distance")
    id = full_id("kid/cubic-polynomial-unbiased", features=features)
    found = squared_discrepancy(x, y, _cubic)
    n = min(_units(x, prompts), _units(y, reference_prompts))
    return Measurement(found.value, id, n, found.interval(prompts, reference_prompts))


def subset_kernel_distance(
    one: np.ndarray,
    two: np.ndarray,
    features: str,
    subsets: int = 100,
    size: int = 1_000,
    seed: int = 0,
) -> Measurement:
    """The mean of :func:`kernel_distance` over random subsets, as published and as libraries print it.

    Args:
        one, two: ``(n, d)`` and ``(m, d)``.
        features: Names the vectors.
        subsets: How many.
        size: Vectors drawn without replacement from each set; fewer where a set is smaller.
        seed: Of the drawing.

    The interval is that of the mean of subsets, 1.96 standard errors: it says how much another drawing of subsets
    would change, not another drawing of pictures.
    """
    x, y = _pair(one, two, "the kernel distance")
    if subsets < 2 or size < 2:
        raise InputError(
            f"{subsets} subsets of {size} were asked for; allowed are at least 2 of at least 2"
        )
    drawn = min(len(x), len(y), size)
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(subsets):
        a, b = (rows[generator.choice(len(rows), drawn, replace=False)] for rows in (x, y))
        found.append(squared_discrepancy(a, b, _cubic).value)
    value, half = float(np.mean(found)), 1.96 * float(np.std(found, ddof=1)) / subsets**0.5
    id = full_id("kid/cubic-polynomial-subsets", features=features, subsets=subsets, size=drawn)
    return Measurement(value, id, min(len(x), len(y)), (value - half, value + half))


def clip_distance(
    one: np.ndarray,
    two: np.ndarray,
    features: str,
    sigma: float = 10.0,
    scale: float = 1_000.0,
    unbiased: bool = False,
    prompts: Sequence[Hashable] = (),
    reference_prompts: Sequence[Hashable] = (),
) -> Measurement:
    """CMMD of picture embeddings ``(n, d)`` and ``(m, d)``, which are first scaled to unit length.

    Args:
        one, two: Embeddings.
        features: Names the CLIP.
        sigma: Width of the Gaussian kernel.
        scale: What the squared discrepancy is multiplied by.
        unbiased: Leave the diagonals out; the authors keep them.
        prompts, reference_prompts: As of :func:`kernel_distance`.

    The interval is around the value; that of the authors' form does not know its bias.
    """
    if not sigma > 0 or not scale > 0:
        raise InputError(f"sigma is {sigma} and scale {scale}; allowed are positive numbers")
    x, y = _pair(one, two, "CMMD")
    x, y = (
        rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (x, y)
    )

    def gaussian(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        squares = (a * a).sum(1)[:, None] + (b * b).sum(1)[None, :] - 2 * a @ b.T
        return np.exp(-np.clip(squares, 0, None) / (2 * sigma**2))

    found = squared_discrepancy(x, y, gaussian, diagonal=not unbiased)
    changed = {"sigma": f"{sigma:g}"} if sigma != 10 else {}
    changed |= {"scale": f"{scale:g}"} if scale != 1_000 else {}
    id = full_id(f"cmmd/gaussian-{'un' * unbiased}biased", features=features, **changed)
    if not unbiased:
        # With the diagonal the value depends on how many there are, as the Frechet distance does.
        id += f"/n={len(x)}" if len(x) == len(y) else f"/n={len(x)},{len(y)}"
    n = min(_units(x, prompts), _units(y, reference_prompts))
    interval = found.interval(prompts, reference_prompts, scale)
    return Measurement(scale * found.value, id, n, interval)


class Distance(Metric):
    """A distance of streamed outputs to a reference, on named features.

    Args:
        kind: One of :data:`KINDS`.
        features: Named features.
        reference: uint8 pictures ``(n, h, w, 3)``, or what another metric of the same kind and features took in,
            with its prompts if it was told them.
        batch: Pictures at a time.

    Raises:
        SettingError: Another kind.
        InputError: The reference is of other features or another kind.
    """

    def __init__(
        self, kind: str, features: Features, reference: Outputs | Distance, batch: int = 256
    ) -> None:
        if kind not in KINDS:
            raise SettingError(f"distance {kind!r} is unknown{nearest(kind, KINDS)}")
        self.kind, self.features, self.batch = kind, features, batch
        self.seen: Moments | Rows = self._empty()
        if isinstance(reference, Distance):
            same = type(reference.seen) is type(self.seen)
            if not same or reference.features.name != features.name:
                raise InputError(f"the reference holds {reference.kind} on {reference.features.name!r}, "
                                 f"not {kind} on {features.name!r}")  # fmt: skip
            self.reference: Moments | Rows = reference.seen
        else:
            self.reference = self._empty()
            self._take(self.reference, reference)

    @property
    def protocol(self) -> str:  # type: ignore[override]
        """The id of what :meth:`compute` gives for what was taken in."""
        return self.compute().protocol

    def _empty(self) -> Moments | Rows:
        return Moments() if self.kind == "frechet" else Rows()

    def _take(self, into: Moments | Rows, outputs: Outputs, texts: Sequence[str] = ()) -> None:
        if len(texts) not in (0, len(outputs)):
            raise InputError(f"{len(outputs)} pictures came with {len(texts)} prompts")
        for start in range(0, len(outputs), self.batch):
            part = slice(start, start + self.batch)
            rows = self.features(outputs[part])
            if isinstance(into, Rows):
                into.update(rows, texts[part])
            else:
                into.update(rows)

    def update(self, outputs: Outputs, prompts: Sequence[Prompt | str] = ()) -> None:
        """Take in a batch of pictures; the texts of their prompts are the units of a kernel distance's interval."""
        self._take(self.seen, outputs, [p if isinstance(p, str) else p.text for p in prompts])

    def merge(self, other: Distance) -> Distance:
        """Take in everything a metric of the same kind and features has taken in."""
        if (other.kind, other.features.name) != (self.kind, self.features.name):
            raise InputError(f"{other.kind} on {other.features.name!r} does not merge into "
                             f"{self.kind} on {self.features.name!r}")  # fmt: skip
        self.seen.merge(other.seen)  # type: ignore[arg-type]
        return self

    def compute(self) -> Measurement:
        """The distance of everything taken in so far."""
        name = self.features.name
        if isinstance(self.seen, Moments) and isinstance(self.reference, Moments):
            return frechet_of(self.seen, self.reference, name)
        assert isinstance(self.seen, Rows) and isinstance(self.reference, Rows)
        one, two = self.seen.matrix(), self.reference.matrix()
        units = self.seen.prompts, self.reference.prompts
        if self.kind == "kid":
            return kernel_distance(one, two, name, *units)
        if self.kind == "kid-subsets":
            return subset_kernel_distance(one, two, name)
        unbiased = self.kind == "cmmd-unbiased"
        return clip_distance(
            one, two, name, unbiased=unbiased, prompts=units[0], reference_prompts=units[1]
        )


def _cubic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.asarray((a @ b.T / a.shape[1] + 1) ** 3)


def _units(rows: np.ndarray, prompts: Sequence[Hashable]) -> int:
    """How many independent units there are: prompts where they are known, else rows."""
    return len(set(prompts)) if len(prompts) else len(rows)


def _pair(one: np.ndarray, two: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
    x, y = _matrix(one), _matrix(two)
    if min(len(x), len(y)) < 2 or x.shape[1] != y.shape[1]:
        raise InputError(
            f"{what} needs two sets of at least 2 equally wide vectors, got {x.shape}, {y.shape}"
        )
    return x, y


def _matrix(features: np.ndarray | Iterable[Iterable[float]]) -> np.ndarray:
    rows = np.asarray(features, np.float64)
    if rows.ndim != 2:
        raise InputError(f"features must be a matrix (n, d), got shape {rows.shape}")
    if not np.isfinite(rows).all():
        raise InputError("features hold NaN or infinity")
    return rows
