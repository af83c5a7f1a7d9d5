"""Numbers from outputs: distances between sets of pictures, CLIP score, composites.

Every number carries a protocol id that names what it depends on (features, scale, unit); numbers of
different protocols are never compared (:class:`~expunge.method.Measurement`).
"""

from __future__ import annotations

from .composites import asr, confusion_rates, harmonic, harmonic_celebrity, harmonic_object, rank
from .distances import Moments, frechet_distance, frechet_of, kernel_distance
from .perceptual import perceptual_distance

__all__ = [
    "Moments",
    "asr",
    "confusion_rates",
    "frechet_distance",
    "frechet_of",
    "harmonic",
    "harmonic_celebrity",
    "harmonic_object",
    "kernel_distance",
    "perceptual_distance",
    "rank",
]
