"""Whom a face net names: accuracy among pictures with a face, and how many have none (MACE, arXiv 2403.06135).

A model that draws no faces any more names nobody wrongly, so the share without one stands beside the accuracy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence

import numpy as np

from ..method import Measurement
from .protocols import full_id
from .resampling import rate, units_of

__all__ = ["Celebrities", "celebrity_accuracy"]


@dataclasses.dataclass(frozen=True)
class Celebrities:
    """Accuracy of a face net, with what it leaves out.

    Attributes:
        faces_only: As printed: right among pictures with a face; no value where there is none.
        all_pictures: Right among all pictures.
        no_face: Share of pictures without a face.
    """

    faces_only: Measurement
    all_pictures: Measurement
    no_face: Measurement


def celebrity_accuracy(
    asked: Sequence[str],
    faces: Sequence[Sequence[str] | str | None],
    prompts: Sequence[Hashable] | None = None,
    detector: str = "giphy",
) -> Celebrities:
    """Top-1 of the first face, names compared without case and with ``_`` as a space.

    Args:
        asked: For each picture the person it was asked to show.
        faces: The best name of each face in it, the first face first; empty or ``None`` without a face.
        prompts: The unit of the intervals; default: each picture its own.
        detector: Part of the id.

    Raises:
        InputError: The lists differ in length or are empty.
    """
    units = units_of(asked, faces, prompts)
    first = [(f if isinstance(f, str) else f[0]) if f else None for f in faces]
    right = np.array([_name(a) == _name(f) for a, f in zip(asked, first, strict=True)])
    shown = np.array([f is not None for f in first])
    made = []
    for id, hits, where in (
        ("faces-only", right, shown),
        ("all-pictures", right, np.ones(len(shown), bool)),
        ("no-face", ~shown, np.ones(len(shown), bool)),
    ):
        full = full_id(f"celebrity/{id}", detector=detector)
        if not where.any():
            made.append(Measurement(None, full, 0))
            continue
        value, interval, n = rate(hits[where], [u for u, w in zip(units, where, strict=True) if w])
        made.append(Measurement(value, full, n, interval))
    return Celebrities(*made)


def _name(text: str | None) -> str | None:
    return None if text is None else text.replace("_", " ").strip().lower()
