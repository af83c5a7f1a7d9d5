"""The interval of a share, which every record of the contracts carries beside it."""

from __future__ import annotations

import math

from ..errors import InputError

__all__ = ["Z", "wilson"]

Z = 1.959963984540054
"""Standard normal quantile of a two-sided 95 % interval."""


def wilson(hits: float, n: float) -> tuple[float, float]:
    """95 % Wilson score interval of ``hits`` out of ``n``; (0, 1) for n = 0.

    ``n`` may be an effective, fractional number of trials.
    """
    if n <= 0:
        return 0.0, 1.0
    if not 0 <= hits <= n:
        raise InputError(f"{hits} hits out of {n} is not a share")
    share = hits / n
    centre = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    low = 0.0 if hits == 0 else max(0.0, centre - half)
    high = 1.0 if hits == n else min(1.0, centre + half)
    return low, high
