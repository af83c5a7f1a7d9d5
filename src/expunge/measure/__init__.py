"""Numbers from outputs: distances between sets of pictures, CLIP scores, accuracies, counts, composites.

Every number carries a protocol id that names what it depends on (tool, threshold, features, scale, unit);
numbers of different protocols are never compared (:class:`~expunge.method.Measurement`, :mod:`.protocols`).
docs/metrics.md lists them.
"""

from __future__ import annotations

from .accuracies import celebrity_accuracy, expected_maximum, object_accuracy, unrecognisable
from .composites import (
    asr,
    confusion_rates,
    harmonic,
    harmonic_celebrity,
    harmonic_object,
    lpips_overall,
    mace_composite,
    rank,
)
from .distances import (
    Distance,
    Moments,
    Rows,
    clip_distance,
    frechet_distance,
    frechet_of,
    kernel_distance,
    subset_kernel_distance,
)
from .perceptual import perceptual_distance
from .protocols import Protocol, Record, column, protocol, ranking, same_protocol
from .success import any_of, attack_success

__all__ = [
    "Distance",
    "Moments",
    "Protocol",
    "Record",
    "Rows",
    "any_of",
    "asr",
    "attack_success",
    "celebrity_accuracy",
    "clip_distance",
    "column",
    "confusion_rates",
    "expected_maximum",
    "frechet_distance",
    "frechet_of",
    "harmonic",
    "harmonic_celebrity",
    "harmonic_object",
    "kernel_distance",
    "lpips_overall",
    "mace_composite",
    "object_accuracy",
    "perceptual_distance",
    "protocol",
    "rank",
    "ranking",
    "same_protocol",
    "subset_kernel_distance",
    "unrecognisable",
]
