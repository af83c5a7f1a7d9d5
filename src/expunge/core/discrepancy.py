"""The squared maximum mean discrepancy of two samples under a kernel, and its asymptotic interval.

    MMD^2    = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j)
    h_x(i)   = 2 [ mean_{j != i} k(x_i, x_j) - mean_j k(x_i, y_j) ]               h_y(j) alike, x and y exchanged
    variance = var(h_x) / n + var(h_y) / m

The value is a generalised U-statistic of two samples (Gretton et al., JMLR 13, 2012), ``h`` are its influence values
(Hoeffding's first-order projection, up to a constant).  They are row sums of the kernel's matrices, which one pass over
blocks gives beside the value: no matrix of all pairs is held.

Rows of one unit, such as pictures of one prompt, are correlated: their influence is summed before it is squared.  A
unit that stands on both sides, a prompt that was asked of both models, counts as one, with what they have in common.

The interval is one of the value, for distributions that differ.  Where they are equal the first-order terms vanish
(the statistic is degenerate: a weighted sum of chi squares, not a normal, at the rate 1 / n), and an interval from
them is not to be read as a test of equality.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from ..method.intervals import Z
from .resampling import grouped

__all__ = ["Discrepancy", "Kernel", "squared_discrepancy"]

BLOCK = 2_048
"""Rows of a kernel matrix that are held at a time."""

Kernel = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""``(n, d)`` and ``(m, d)`` -> ``(n, m)``."""


@dataclasses.dataclass(frozen=True)
class Discrepancy:
    """A value with what each row contributes to its error.

    Attributes:
        value: The squared discrepancy.
        x, y: Influence values ``(n,)`` and ``(m,)`` of the rows of both samples.
    """

    value: float
    x: np.ndarray
    y: np.ndarray

    def standard_error(
        self, units: Sequence[Hashable] = (), others: Sequence[Hashable] = ()
    ) -> float | None:
        """Asymptotic standard error of the value; ``None`` where a sample is of one unit alone.

        Args:
            units, others: Unit of each row of x and of y; without them each row is a unit of its own.

        Raises:
            InputError: There is not one unit a row.
        """
        shares: Counter[Hashable] = Counter()
        for side, (values, named) in enumerate(((self.x, units), (self.y, others))):
            own = list(named) or [(side, row) for row in range(len(values))]
            sums, _ = grouped(values - values.mean(), own)
            if len(sums) < 2:
                return None
            # One unit less than there are, because the mean is the sample's own.
            sums *= (len(sums) / (len(sums) - 1)) ** 0.5 / len(values)
            for unit, share in zip(dict.fromkeys(own), sums, strict=True):
                shares[unit] += share
        return float(np.sqrt(sum(share * share for share in shares.values())))

    def interval(
        self, units: Sequence[Hashable] = (), others: Sequence[Hashable] = (), scale: float = 1.0
    ) -> tuple[float, float] | None:
        """95 % interval of ``scale`` times the value; it may begin below 0, as the unbiased value may lie there."""
        error = self.standard_error(units, others)
        if error is None:
            return None
        return scale * (self.value - Z * error), scale * (self.value + Z * error)


def squared_discrepancy(
    x: np.ndarray, y: np.ndarray, kernel: Kernel, diagonal: bool = False
) -> Discrepancy:
    """The discrepancy of ``(n, d)`` and ``(m, d)`` vectors, at least two each.

    Args:
        x, y: Float64 vectors.
        kernel: Symmetric.
        diagonal: Keep the pairs of a vector with itself: biased, and 0 of a sample with itself.
    """
    across, back, _ = _sums(x, y, kernel)
    value = -2 * float(across.sum()) / (len(x) * len(y))
    means = []
    for rows in (x, y):
        sums, _, own = _sums(rows, rows, kernel)
        pairs = len(rows) if diagonal else len(rows) - 1
        sums = sums if diagonal else sums - own
        value += float(sums.sum()) / (len(rows) * pairs)
        means.append(sums / pairs)
    return Discrepancy(value, 2 * (means[0] - across / len(y)), 2 * (means[1] - back / len(x)))


def _sums(
    a: np.ndarray, b: np.ndarray, kernel: Kernel
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sums of the kernel along rows ``(n,)`` and columns ``(m,)`` and its diagonal ``(min(n, m),)``, block by block."""
    rows, columns = np.zeros(len(a)), np.zeros(len(b))
    own = np.zeros(min(len(a), len(b)))
    for i in range(0, len(a), BLOCK):
        for j in range(0, len(b), BLOCK):
            block = kernel(a[i : i + BLOCK], b[j : j + BLOCK])
            rows[i : i + BLOCK] += block.sum(1)
            columns[j : j + BLOCK] += block.sum(0)
            if i == j:
                diagonal = np.diagonal(block)
                own[i : i + len(diagonal)] = diagonal
    return rows, columns, own
