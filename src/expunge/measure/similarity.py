"""SSIM and PSNR of pictures of one prompt and seed: how much of the original's pixels is left.

SSIM (Wang et al., IEEE TIP 2004) with its authors' window: Gaussian, 11 x 11, sigma 1.5, K1 = 0.01, K2 = 0.03,
population variances, the borders left out, the mean over three channels.  PSNR is 10 log10(255^2 / mean squared
error) in decibels, at most 100 so that equal pictures have a number.

Both fall with every small shift that nobody would see: read them beside a distance on features.
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

from ..errors import InputError

__all__ = ["CAP", "PSNR", "SSIM", "psnr", "ssim"]

SSIM = "ssim/gaussian-11-rgb-equal-seeds"
PSNR = "psnr/capped-100-equal-seeds"

CAP = 100.0
SIGMA, RADIUS = 1.5, 5
C1, C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2


def ssim(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """SSIM ``(n,)`` of ``n`` pairs of pictures, uint8 ``(n, h, w, 3)`` with sides of at least 11; 1 for equal ones."""
    x, y = _pairs(one, two)
    if min(x.shape[1:3]) <= 2 * RADIUS:
        raise InputError(
            f"SSIM needs sides of at least {2 * RADIUS + 1} pixels, got {x.shape[1:3]}"
        )

    def blurred(pictures: np.ndarray) -> np.ndarray:
        made = gaussian_filter(pictures, SIGMA, truncate=RADIUS / SIGMA, axes=(1, 2))
        return np.asarray(made[:, RADIUS:-RADIUS, RADIUS:-RADIUS])

    a, b = blurred(x), blurred(y)
    variances = blurred(x * x) - a * a + blurred(y * y) - b * b
    covariance = blurred(x * y) - a * b
    local = (2 * a * b + C1) * (2 * covariance + C2) / ((a * a + b * b + C1) * (variances + C2))
    return np.asarray(local.mean((1, 2, 3)))


def psnr(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """PSNR ``(n,)`` in decibels of ``n`` pairs of pictures, uint8 ``(n, h, w, 3)``; at most 100."""
    x, y = _pairs(one, two)
    error = ((x - y) ** 2).mean((1, 2, 3))
    with np.errstate(divide="ignore"):
        return np.asarray(np.minimum(10 * np.log10(255**2 / error), CAP))


def _pairs(one: np.ndarray, two: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(one), np.asarray(two)
    if (
        x.shape != y.shape
        or x.ndim != 4
        or x.shape[-1] != 3
        or x.dtype != np.uint8
        or y.dtype != np.uint8
    ):
        raise InputError(f"pairs of pictures must be uint8 of one shape (n, h, w, 3), got {x.dtype} {x.shape} and "
                         f"{y.dtype} {y.shape}")  # fmt: skip
    return x.astype(np.float64), y.astype(np.float64)
