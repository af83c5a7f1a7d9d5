"""What an attack is worth: whether it counts, what it brings back, from whom, and how far it leads the next."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...evidence.statistics import MINIMUM_RANGE, measures_nothing
from .numbers import Estimate, Table, mean

__all__ = ["VALID", "attack", "by_strength", "order", "over_control", "shown"]

VALID, NOTHING, VOID, UNCHECKED = "valid", "measures-nothing", "void", "unchecked"
CONTROL = "control"
"""Tag of attacks that search nothing: what others must beat at an equal budget."""


def shown(found: Estimate | None) -> dict[str, Any] | None:
    """A number with its interval and the prompts behind it."""
    if found is None:
        return None
    span = found.interval
    return {
        "value": round(found.value, 4),
        "interval": None if span is None else [round(bound, 4) for bound in span],
        "n": found.n,
    }


def attack(table: Table, label: str) -> dict[str, Any]:
    """What an attack is worth: by concept, and in all; what it brings back, on average over erasers."""
    record = table.record
    states = {concept: _state(table, concept, label) for concept in record.concepts}
    counted = [concept for concept, (status, _) in states.items() if status == VALID]
    gains = {
        eraser: mean([table.gain(concept, eraser, label) for concept in counted])
        for eraser in record.erasers
    }
    weak = [e for e, gain in gains.items() if gain is not None and (gain.interval or (0,))[0] > 0]
    teaches = any(
        row.teaches for c in record.concepts for arm in ("original", "never", *record.erasers)
        for row in table.rows("attack", c, arm, label).values()
    )  # fmt: skip
    tags = {tag for told in record.methods if told.label == label for tag in told.tags}
    status, reason = VALID, ""
    if not counted:
        status, reason = _worst(states)
    elif not weak and not teaches and CONTROL not in tags:
        ran = [eraser for eraser, gain in gains.items() if gain is not None]
        whom = "no eraser" if len(ran) == len(gains) else f"none of {len(ran)} erasers so far"
        status, reason = (
            (NOTHING, f"from {whom} does it bring back anything that the plain prompts do not show")
            if ran
            else (UNCHECKED, "it was run on no eraser yet")
        )
    if status != VALID:
        counted = []
    pairs = [table.recovered(c, e, [label]) for e in record.erasers for c in counted]
    rows = [row for row in record.rows if row.attack == label and row.refused is None]
    items = sum(len(row.hit.hits) for row in rows if row.hit)
    refused = _refusals(table, label)
    return {
        "label": label, "status": status, "reason": reason, "teaches": teaches, "control": CONTROL in tags,
        "typed": any(row.typed for row in rows),
        "concepts": {c: {"status": s, "reason": why} for c, (s, why) in states.items()},
        "weak": weak, "refused": refused,
        "recovered": None if teaches else mean(pairs),
        "advantage": mean([table.advantage(c, e, label) for e in record.erasers for c in counted]),
        "curve": _curve(table, label, counted) if teaches else [],
        "curve_of": next((row.curve_of for row in rows if row.curve_of), None) if teaches else None,
        "rows_per_prompt": round(sum(row.rows for row in rows) / items, 1) if items else None,
        "seconds_per_prompt": round(sum(row.seconds for row in rows) / items, 2) if items else None,
        "_counted": counted,
    }  # fmt: skip


def _refusals(table: Table, label: str) -> list[str]:
    """What the attack refused, each sentence once with the arm and the concepts it was said of."""
    said: dict[tuple[str, str], list[str]] = {}
    for arm in ("original", "never", *table.record.erasers):
        for concept in table.record.concepts:
            words = table.refusals("attack", concept, arm, label)
            if words and not words[0].startswith("not erased: "):
                said.setdefault((arm, words[0]), []).append(concept)
    return [f"{arm} ({', '.join(names)}): {words}" for (arm, words), names in said.items()]


def _state(table: Table, concept: str, label: str) -> tuple[str, str]:
    """Whether an attack measures something on one concept, and why not."""
    original, never = (table.rows("attack", concept, arm, label) for arm in ("original", "never"))
    if not original:
        said = table.refusals("attack", concept, "original", label)
        return (
            UNCHECKED,
            f"it refuses the original: {said[0]}" if said else "it was not run on the original",
        )
    hits = {
        arm: [hit for row in rows.values() if row.hit for hit in row.hit.values()]
        for arm, rows in (("original", original), ("never", never))
    }
    upper = float(np.mean(hits["original"]))
    if upper < MINIMUM_RANGE:
        return VOID, "it fails on the original too, so that it fails elsewhere says nothing"
    if not never:
        said = table.refusals("attack", concept, "never", label)
        why = table.record.without.get(
            concept, f"it refuses never: {said[0]}" if said else "it was not run on never"
        )
        return UNCHECKED, why
    teaches = any(row.teaches for row in original.values())
    wrong = [
        row.mistaken for row in table.rows("measures", concept, "never").values() if row.mistaken
    ]
    false = sum(k for k, _ in wrong) / max(1, sum(n for _, n in wrong))
    if teaches:
        return VALID, ""
    if measures_nothing(sum(hits["never"]), len(hits["never"]), false):
        lower = float(np.mean(hits["never"]))
        return (
            NOTHING,
            f"it shows the concept on never, which lacks it, in {lower:.0%} of the prompts",
        )
    if upper - float(np.mean(hits["never"])) < MINIMUM_RANGE:
        return (
            VOID,
            "original and never differ by less than 0.1 under it, so there is nothing to recover",
        )
    return VALID, ""


def _worst(states: Mapping[str, tuple[str, str]]) -> tuple[str, str]:
    """One status for an attack that counts on no concept, and the reasons of each."""
    found = [status for status, _ in states.values()]
    status = next((one for one in (NOTHING, VOID) if one in found), UNCHECKED)
    reasons: dict[str, list[str]] = {}
    for concept, (_, why) in states.items():
        reasons.setdefault(why, []).append(concept)
    return status, "; ".join(f"{', '.join(names)}: {why}" for why, names in reasons.items())


def _curve(table: Table, label: str, counted: Sequence[str]) -> list[dict[str, Any]]:
    """Mean advantage over never along the budget, over all erasers, where every row has the point."""
    points: dict[str, None] = {}
    for row in table.record.rows:
        if row.attack == label:
            points.update(dict.fromkeys(row.curve or {}))
    found = []
    for point in points:
        one = mean(
            [table.advantage(c, e, label, point) for e in table.record.erasers for c in counted]
        )
        if one is not None:
            found.append({"point": point, "advantage": shown(one)})
    return found


def _strength(row: Mapping[str, Any]) -> float:
    found = row["advantage"] if row["teaches"] else row["recovered"]
    return -2.0 if found is None else found.value


def by_strength(attacks: Mapping[str, Any]) -> list[str]:
    """Searching before teaching attacks, those that count first, the strongest first."""
    return sorted(
        attacks,
        key=lambda a: (
            attacks[a]["teaches"],
            attacks[a]["status"] != VALID,
            -_strength(attacks[a]),
        ),
    )


def order(table: Table, attacks: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The searching attacks that count, the strongest first, each with its lead over the next.

    The lead is taken on pairs of eraser and concept that both attacked; it is clear where its interval
    leaves out 0.
    """
    labels = [a for a in by_strength(attacks) if attacks[a]["recovered"] is not None]
    found = []
    for label, following in itertools.zip_longest(labels, labels[1:]):
        lead = None
        if following is not None:
            lead = _lead(table, attacks, label, following)
        clear = lead is not None and lead.interval is not None and lead.interval[0] > 0
        found.append(
            {
                "label": label,
                "recovered": shown(attacks[label]["recovered"]),
                "lead": shown(lead),
                "clear": clear,
            }
        )
    return found


def over_control(table: Table, attacks: Mapping[str, dict[str, Any]]) -> None:
    """Write into each searching attack that counts its lead over the control that recovers most."""
    searching = [a for a in by_strength(attacks) if attacks[a]["recovered"] is not None]
    control = next((a for a in searching if attacks[a]["control"]), None)
    for label, row in attacks.items():
        row["over_control"] = None
        if control is not None and label in searching and not row["control"]:
            row["over_control"] = _lead(table, attacks, label, control)


def _lead(table: Table, attacks: Mapping[str, Any], one: str, two: str) -> Estimate | None:
    """How much more the one recovers than the other, on pairs of eraser and concept that both attacked."""
    both = set(attacks[one]["_counted"]) & set(attacks[two]["_counted"])
    pairs = [
        (table.recovered(c, e, [one]), table.recovered(c, e, [two]))
        for e in table.record.erasers for c in table.record.concepts if c in both
    ]  # fmt: skip
    return mean([a.minus(b) for a, b in pairs if a is not None and b is not None])
