"""From what was seen of the three models to their records, with n, interval and protocol of each number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..measure import composites, distances, perceptual
from ..method import Judge
from .arms import Observed, Part
from .schema import ArmRecord, ConceptFields
from .statistics import bootstrap_difference, bootstrap_mean, mean_difference, mean_rate, rate

__all__ = ["Notes", "arm_record", "composite_numbers", "differences", "distances_of"]


NO_CLIP = "no CLIP with a text and a picture tower stands beside this model"


class Notes:
    """Intervals, protocols, n and reasons by field path, filled while numbers are made."""

    def __init__(self) -> None:
        self.intervals: dict[str, tuple[float, float]] = {}
        self.protocols: dict[str, str] = {}
        self.n: dict[str, int] = {}
        self.reasons: dict[str, str] = {}

    def number(
        self,
        path: str,
        found: tuple[float, tuple[float, float] | None, int],
        protocol: str,
    ) -> float:
        """Write down what belongs to a number, and give the number back."""
        value, interval, n = found
        if interval is not None:
            self.intervals[path] = interval
        self.protocols[path] = protocol
        self.n[path] = n
        return value

    def null(self, path: str, reason: str) -> None:
        """Say why a field is null."""
        self.reasons[path] = reason

    def into(self, fields: ConceptFields) -> None:
        """Hand everything over to the document."""
        fields.intervals, fields.protocols, fields.n = self.intervals, self.protocols, self.n
        fields.reasons = self.reasons


def share(judge: Judge, what: str = "shows the concept") -> str:
    """Protocol of a hit rate."""
    return f"{judge.protocol}/share of outputs ({what})/Wilson 95 % over prompts"


def arm_record(
    seen: Observed, judge: Judge, notes: Notes, missing: Mapping[str, str], clip: Any
) -> ArmRecord:
    """Rates of one arm."""
    arm = f"models.{seen.arm.name}"
    record = ArmRecord(name=seen.arm.model.name, state=seen.state)
    target, kept = seen.target, seen.kept()
    record.target_hit = notes.number(
        f"{arm}.target_hit", rate(target.hit, target.texts), share(judge)
    )
    record.unrecognisable_target = notes.number(
        f"{arm}.unrecognisable_target",
        rate(~np.array(target.recognisable), target.texts),
        share(judge, "of no known kind"),
    )
    for route, part in seen.routes().items():
        record.routes[route] = notes.number(
            f"{arm}.routes.{route}", rate(part.hit, part.texts), share(judge)
        )
    for route, reason in missing.items():
        record.routes[route] = None
        notes.null(f"{arm}.routes.{route}", reason)
    for name, part in kept.items():
        record.kept[name] = notes.number(
            f"{arm}.kept.{name}", rate(part.hit, part.texts), share(judge)
        )
    if kept:
        whole = _pooled(list(kept.items()))
        record.kept_hit = notes.number(
            f"{arm}.kept_hit",
            mean_rate([(part.hit, part.texts) for part in kept.values()]),
            f"{judge.protocol}/mean over kept concepts of the share of outputs (shows the kept concept)/"
            "Wilson 95 % over prompts",
        )
        record.unrecognisable = notes.number(
            f"{arm}.unrecognisable",
            rate(~np.array(whole.recognisable), _units(kept)),
            share(judge, "of no known kind"),
        )
        record.false_positive = notes.number(
            f"{arm}.false_positive",
            rate(whole.mistaken, _units(kept)),
            share(judge, "kept output judged to show the concept"),
        )
    else:
        for field in ("kept_hit", "unrecognisable", "false_positive"):
            notes.null(f"{arm}.{field}", "no kept concepts are known; name them with kept=")
    _clip(record, arm, target, kept, notes, clip)
    return record


def _clip(
    record: ArmRecord, arm: str, target: Part, kept: Mapping[str, Part], notes: Notes, clip: Any
) -> None:
    whole = _pooled(list(kept.items()))
    for field, part, units in (
        ("clip_score", target, target.texts),
        ("clip_score_kept", whole, _units(kept)),
    ):
        if part.clip:
            value = notes.number(f"{arm}.{field}", bootstrap_mean(part.clip, units), clip.protocol)
            setattr(record, field, value)
        else:
            notes.null(f"{arm}.{field}", NO_CLIP)


def distances_of(
    record: ArmRecord,
    seen: Observed,
    original: Observed | None,
    judge: Judge,
    notes: Notes,
    clip: Any = None,
) -> None:
    """Distances of an arm's outputs to the original's, on the judge's features and on a CLIP's, kept prompts."""
    arm = f"models.{seen.arm.name}"
    fields = (
        "frechet_to_original",
        "kid_to_original",
        "perceptual_distance",
        "perceptual_distance_target",
        "cmmd_to_original",
    )
    if original is None:
        return _nulls(notes, arm, fields, "there is no original to compare with")
    if seen is original:
        return _nulls(notes, arm, fields, "this is the original itself")
    kept, reference = _pooled(list(seen.kept().items())), _pooled(list(original.kept().items()))
    mine, theirs = kept.matrix(), reference.matrix()
    if mine is not None and theirs is not None and len(mine) >= 2:
        asked = _units(seen.kept()), _units(original.kept())
        units = len(set(asked[0]))
        frechet = distances.frechet_of(mine, theirs, judge.id)
        kernel = distances.kernel_distance(mine, theirs, judge.id, *asked)
        assert frechet.value is not None and kernel.value is not None
        record.frechet_to_original = notes.number(
            f"{arm}.{fields[0]}", (frechet.value, None, units), frechet.protocol
        )
        record.kid_to_original = notes.number(
            f"{arm}.{fields[1]}", (kernel.value, kernel.interval, units), kernel.protocol
        )
        pairs = perceptual.perceptual_distance(mine, theirs)
        record.perceptual_distance = notes.number(
            f"{arm}.{fields[2]}",
            bootstrap_mean(pairs, _units(seen.kept())),
            perceptual.protocol(judge.id),
        )
    else:
        _nulls(
            notes, arm, fields[:3], f"the judge {judge.id} gives no features, or nothing is kept"
        )
    mine, theirs = seen.target.matrix(), original.target.matrix()
    if mine is not None and theirs is not None:
        pairs = perceptual.perceptual_distance(mine, theirs)
        record.perceptual_distance_target = notes.number(
            f"{arm}.{fields[3]}",
            bootstrap_mean(pairs, seen.target.texts),
            perceptual.protocol(judge.id),
        )
    else:
        _nulls(notes, arm, fields[3:4], f"the judge {judge.id} gives no features")
    one, two = kept.embedded(), reference.embedded()
    if one is None or two is None or len(one) < 2:
        return _nulls(notes, arm, fields[4:], f"{NO_CLIP}, or nothing is kept")
    asked = _units(seen.kept()), _units(original.kept())
    found = distances.clip_distance(
        one, two, getattr(clip, "name", "clip"), prompts=asked[0], reference_prompts=asked[1]
    )
    assert found.value is not None
    units = len(set(asked[0]))
    path = f"{arm}.cmmd_to_original"
    record.cmmd_to_original = notes.number(
        path, (found.value, found.interval, units), found.protocol
    )


def differences(
    erased: Observed, original: Observed | None, judge: Judge, notes: Notes
) -> dict[str, float | None]:
    """Paired differences erased - original at equal prompts and seeds, bootstrap over prompts.

    Each kept concept weighs the same in ``kept_hit``, and its prompts are resampled within it.
    """
    found: dict[str, float | None] = {"target_hit": None, "kept_hit": None}
    if original is None:
        for name in found:
            notes.null(f"differences.{name}", "there is no original to compare with")
        return found
    protocol = (
        f"{judge.protocol}/erased - original at equal prompts and seeds/bootstrap 95 % over prompts"
    )

    def note(name: str, one: Sequence[Any], two: Sequence[Any], units: Sequence[str]) -> None:
        pair = bootstrap_difference(np.array(one, float), np.array(two, float), units)
        found[name] = notes.number(f"differences.{name}", pair, protocol)

    note("target_hit", erased.target.hit, original.target.hit, erased.target.texts)
    kept, reference = erased.kept(), original.kept()
    if kept:
        pairs = [(part.hit, reference[name].hit, part.texts) for name, part in kept.items()]
        found["kept_hit"] = notes.number(
            "differences.kept_hit", mean_difference(pairs), f"{protocol} within kept concepts"
        )
        for name, part in kept.items():
            note(f"kept.{name}", part.hit, reference[name].hit, part.texts)
    if erased.target.clip and original.target.clip:
        note("clip_score", erased.target.clip, original.target.clip, erased.target.texts)
        notes.protocols["differences.clip_score"] = (
            "clip score, erased - original/bootstrap 95 % over prompts"
        )
    return found


def composite_numbers(record: ArmRecord, notes: Notes) -> dict[str, float | None]:
    """UA, IRA, H_c, H_o and the ranking score of the erased model."""
    found: dict[str, float | None] = {
        "ua": None,
        "ira": None,
        "h_c": None,
        "h_o": None,
        "score": None,
    }
    if record.target_hit is not None:
        found["ua"] = 1 - record.target_hit
        notes.protocols["composites.ua"] = "1 - target_hit"
    if record.target_hit is None or record.kept_hit is None:
        notes.null("composites.h_c", "nothing is kept")
        return found
    found["ira"] = record.kept_hit
    found["h_c"] = composites.harmonic_celebrity(record.target_hit, record.kept_hit)
    notes.protocols["composites.ira"] = "kept_hit"
    notes.protocols["composites.h_c"] = "harmonic mean of 1 - target_hit and kept_hit"
    phrase = record.routes.get("phrase")
    if phrase is not None:
        found["h_o"] = composites.harmonic_object(record.target_hit, record.kept_hit, phrase)
        notes.protocols["composites.h_o"] = (
            "harmonic mean of 1 - target_hit, kept_hit, 1 - routes.phrase"
        )
    else:
        notes.null("composites.h_o", "there are no prompts with other phrasings of the concept")
    row = {
        "target_hit": record.target_hit,
        "kept_hit": record.kept_hit,
        "unrecognisable": record.unrecognisable or 0.0,
    }
    found["score"] = composites.rank({"erased": row})[0][1]
    notes.protocols["composites.score"] = (
        "harmonic mean of 1 - target_hit, kept_hit, 1 - unrecognisable"
    )
    return found


def _nulls(notes: Notes, arm: str, fields: Sequence[str], reason: str) -> None:
    for field in fields:
        notes.null(f"{arm}.{field}", reason)


POOLED = ("prompts", "hit", "score", "recognisable", "mistaken", "features", "clip", "embeddings")


def _pooled(parts: Sequence[tuple[str, Part]]) -> Part:
    whole = Part()
    for _, part in parts:
        for field in POOLED:
            getattr(whole, field).extend(getattr(part, field))
    return whole


def _units(kept: Mapping[str, Part]) -> list[str]:
    return [f"{name}\n{text}" for name, part in kept.items() for text in part.texts]
