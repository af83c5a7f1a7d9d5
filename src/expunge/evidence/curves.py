"""What teaching attacks bring back along their budget: the advantage over never, point by point.

Such attacks record each item at several points (``details["curve"]``, point -> hit).  A point that an arm lacks,
because it stopped with an error there, is null for that arm; nothing is said of a point that the erased model lacks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..method import Attempts
from .schema import ARMS, CurvePoint
from .statistics import bootstrap_difference, recovered

__all__ = ["advantage_curve"]


def advantage_curve(attempts: Mapping[str, Attempts]) -> tuple[str | None, list[CurvePoint]]:
    """What the points count, and the points, ascending; nothing where the attack keeps no curve.

    Args:
        attempts: Arm -> what one attack did to it, on the same prompts.
    """
    erased = attempts.get("erased")
    if erased is None or not erased.items or "curve" not in erased.items[0].details:
        return None, []
    units = [item.prompt.text for item in erased.items]
    unit = erased.items[0].details.get("curve_of")
    found = []
    for point in sorted(_points(erased), key=float):
        hits = {arm: _hits(attempts[arm], point) for arm in ARMS if arm in attempts}
        found.append(_point(float(point), {a: h for a, h in hits.items() if h is not None}, units))
    return unit, found


def _points(attempts: Attempts) -> set[str]:
    """Points that every item has."""
    return set.intersection(*(set(item.details.get("curve", {})) for item in attempts.items))


def _hits(attempts: Attempts, point: str) -> list[bool] | None:
    if not attempts.items or point not in _points(attempts):
        return None
    return [bool(item.details["curve"][point]) for item in attempts.items]


def _point(at: float, hits: Mapping[str, list[bool]], units: Sequence[str]) -> CurvePoint:
    made: dict[str, Any] = {f"hit_{arm}": sum(own) / len(own) for arm, own in hits.items()}
    if "never" in hits:
        one, two = ([float(hit) for hit in hits[arm]] for arm in ("erased", "never"))
        made["advantage"], made["interval"], _ = bootstrap_difference(one, two, units)
        if "original" in hits:
            made["recovered"] = recovered(hits["erased"], hits["original"], hits["never"], units)[0]
    return CurvePoint(at=at, **made)
