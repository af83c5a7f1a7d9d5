"""Perceptual distance of two outputs made with the same prompt and seed.

Published work uses LPIPS, an AlexNet's layers.  Here any judge's features serve: each vector is scaled
to unit length, and the distance of a pair is ``1 - cosine``, 0 for equal features, 1 for unrelated ones.
The protocol names the features, so that it is never read as LPIPS.
"""

from __future__ import annotations

import numpy as np

from ..errors import InputError

__all__ = ["perceptual_distance", "protocol"]


def protocol(features: str) -> str:
    """Protocol id of the distance on named features."""
    return f"perceptual/1-cosine-equal-seeds/features={features}"


def perceptual_distance(one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Distance ``(n,)`` of ``n`` pairs of feature vectors ``(n, d)``; two zero vectors are equal."""
    x, y = np.asarray(one, np.float64), np.asarray(two, np.float64)
    if x.shape != y.shape or x.ndim != 2:
        raise InputError(
            f"pairs of features must have one shape (n, d), got {x.shape} and {y.shape}"
        )
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    cosine = np.divide((x * y).sum(axis=1), norms, out=np.zeros(len(x)), where=norms > 0)
    same = (x == y).all(axis=1)
    return np.where(same, 0.0, 1.0 - np.clip(cosine, -1, 1))
