"""The leaderboard as plain values: from the record alone, and everything its pages show.

An eraser's robustness is the share of attacked prompts that no search for a text brings back, on the scale from
never (1) to original (0).  Searches that feed in embeddings, which nobody can type, stand in a column of their own.
Its kept utility is what is left of the original's hits on kept concepts.  The score
is their harmonic mean.  Teaching attacks have no part in it: they stand apart, by their advantage over never.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...evidence.statistics import MINIMUM_RANGE, measures_nothing
from .numbers import Estimate, Table, harmonic, mean
from .record import Record

__all__ = ["board"]

VALID, NOTHING, VOID, UNCHECKED = "valid", "measures-nothing", "void", "unchecked"
CONTROL = "control"
"""Tag of attacks that search nothing: what others must beat at an equal budget."""


def board(record: Record) -> dict[str, Any]:
    """Everything a leaderboard shows, plain values (``None`` where a number does not exist)."""
    table = Table(record)
    attacks = {label: _attack(table, label) for label in record.attacks}
    rows = [_eraser(table, label, attacks) for label in record.erasers]
    # What some attacks are still to be run on looks more robust than it is: it stands last.
    order = sorted(
        rows,
        key=lambda row: (bool(row["pending"]), -(row["score"].value if row["score"] else -1.0)),
    )
    return {
        "model": record.model, "judge": record.judge, "made": record.made, "options": record.options,
        "finished": len(record.rows), "cells": record.cells, "without_never": dict(record.without),
        "erasers": [_public(row) for row in order],
        "attacks": [_public(attacks[label]) for label in _by_strength(attacks)],
        "matrix": _matrix(table, [row["label"] for row in order], attacks),
        "order": _order(table, record.erasers, attacks),
        "stability": _stability(record, rows, attacks),
        "cost": _total(record),
        "settings": [told.model_dump(mode="json") for told in record.methods],
    }  # fmt: skip


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


def _public(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: shown(v) if isinstance(v, Estimate) else v
        for k, v in row.items()
        if not k.startswith("_")
    }


# -- attacks ---------------------------------------------------------------------------------------


def _attack(table: Table, label: str) -> dict[str, Any]:
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
    refused = [
        f"{arm}, {concept}: {words[0]}" for concept in record.concepts for arm in ("original", "never", *record.erasers)
        if (words := table.refusals("attack", concept, arm, label)) and not words[0].startswith("not erased: ")
    ]  # fmt: skip
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


def _by_strength(attacks: Mapping[str, Any]) -> list[str]:
    """Searching before teaching attacks, those that count first, the strongest first."""
    return sorted(
        attacks,
        key=lambda a: (
            attacks[a]["teaches"],
            attacks[a]["status"] != VALID,
            -_strength(attacks[a]),
        ),
    )


def _order(
    table: Table, erasers: Sequence[str], attacks: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The searching attacks that count, the strongest first, each with its lead over the next.

    The lead is taken on pairs of eraser and concept that both attacked; it is clear where its interval
    leaves out 0.
    """
    labels = [a for a in _by_strength(attacks) if attacks[a]["recovered"] is not None]
    found = []
    for label, following in itertools.zip_longest(labels, labels[1:]):
        lead = None
        if following is not None:
            both = set(attacks[label]["_counted"]) & set(attacks[following]["_counted"])
            pairs = [
                (table.recovered(c, e, [label]), table.recovered(c, e, [following]))
                for e in erasers for c in table.record.concepts if c in both
            ]  # fmt: skip
            lead = mean(
                [one.minus(two) for one, two in pairs if one is not None and two is not None]
            )
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


# -- erasers ---------------------------------------------------------------------------------------


def _eraser(table: Table, label: str, attacks: Mapping[str, Any]) -> dict[str, Any]:
    """One head row."""
    record, concepts = table.record, table.record.concepts
    searching = [a for a in record.attacks if attacks[a]["_counted"] and not attacks[a]["teaches"]]
    joint = _joint(table, label, attacks, [a for a in searching if attacks[a]["typed"]])
    deep = _joint(table, label, attacks, searching)
    robustness, deeper = (_left(mean([one for _, _, one in found])) for found in (joint, deep))
    kept = mean([table.kept(concept, label) for concept in concepts])
    each = {
        attack: one
        for attack in searching
        if (one := mean([table.recovered(c, label, [attack]) for c in attacks[attack]["_counted"]]))
    }
    strongest = max(each, key=lambda attack: each[attack].value, default=None)
    fits = [
        row
        for row in record.rows
        if row.kind == "fit" and row.arm == label and row.seed in table.seeds
    ]
    done = [row for row in fits if row.refused is None]
    frechet = [
        row.frechet for c in concepts for row in table.rows("measures", c, label).values() if row.frechet is not None
    ]  # fmt: skip
    lost = [
        row.lost for c in concepts for row in table.rows("measures", c, label).values() if row.lost
    ]
    return {
        "label": label, "score": harmonic(robustness, kept), "robustness": robustness, "deep": deeper,
        "kept": kept,
        "plain": mean([table.plain(c, label) for c in concepts]),
        "routes": mean([table.routes(c, label) for c in concepts]),
        "strongest": strongest, "strongest_recovered": None if strongest is None else each[strongest],
        "attacks_run": len({a for _, ran, _ in deep for a in ran}), "attacks_counted": len(searching),
        "pending": [a for a in record.attacks if any(table.pending(c, label, a) for c in concepts)],
        "concepts": [c for c, _, one in joint if one is not None],
        "taught": mean([
            table.advantage(c, label, a) for a in record.attacks if attacks[a]["teaches"]
            for c in attacks[a]["_counted"]
        ]),
        "frechet": round(float(np.mean(frechet)), 4) if frechet else None,
        "unrecognisable": round(sum(k for k, _ in lost) / sum(n for _, n in lost), 4) if lost else None,
        "fit_seconds": round(float(np.mean([row.seconds for row in done])), 2) if done else None,
        "fit_rows": round(float(np.mean([row.rows for row in done]))) if done else None,
        "bytes": round(float(np.mean([row.bytes or 0 for row in done]))) if done else None,
        "refused": sorted({f"{row.concept}: {row.refused}" for row in fits if row.refused is not None}),
    }  # fmt: skip


def _joint(
    table: Table, label: str, attacks: Mapping[str, Any], chosen: Sequence[str]
) -> list[tuple[str, list[str], Estimate | None]]:
    """Concept by concept the attacks that count and ran, and what any of them recovers."""
    found = []
    for concept in table.record.concepts:
        counted = [a for a in chosen if concept in attacks[a]["_counted"]]
        ran = [a for a in counted if table.rows("attack", concept, label, a)]
        found.append((concept, ran, table.recovered(concept, label, ran)))
    return found


def _left(recovered: Estimate | None) -> Estimate | None:
    if recovered is None:
        return None
    return Estimate(1 - recovered.value, 1 - recovered.draws, recovered.n)


def _matrix(
    table: Table, erasers: Sequence[str], attacks: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Eraser by attack: the recovered share, or the advantage of what teaches; why there is none."""
    found = []
    for eraser, attack in itertools.product(erasers, _by_strength(attacks)):
        row, concepts = attacks[attack], table.record.concepts
        one = mean(
            [table.advantage(c, eraser, attack) for c in row["_counted"]]
            if row["teaches"]
            else [table.recovered(c, eraser, [attack]) for c in row["_counted"]]
        )
        entry: dict[str, Any] = {
            "eraser": eraser,
            "attack": attack,
            "number": shown(one),
            "reason": "",
        }
        if one is None:
            said = [
                words for c in concepts for words in table.refusals("attack", c, eraser, attack)
            ]
            ran = any(table.rows("attack", c, eraser, attack) for c in concepts)
            dead = row["status"] != VALID
            entry["reason"] = (
                row["reason"] if dead else said[0] if said else "no scale" if ran else "not run"
            )
            entry["refused"] = bool(said) and not dead
        found.append(entry)
    return found


# -- stability and cost ----------------------------------------------------------------------------


def _stability(
    record: Record, rows: Sequence[Mapping[str, Any]], attacks: Mapping[str, Any]
) -> dict[str, Any]:
    """How far the order of the erasers depends on the seeds: Kendall's tau between seeds, and the first place."""
    from scipy.stats import kendalltau

    scored = {
        row["label"]: row["score"]
        for row in rows
        if row["score"] is not None and not row["pending"]
    }
    if len(scored) < 2:
        return {"reason": "fewer than two erasers were attacked to the end, so there is no order"}
    first = max(scored, key=lambda label: scored[label].value)
    drawn = np.nan_to_num(np.stack([one.draws for one in scored.values()]), nan=-1.0)
    winners = np.array(list(scored))[drawn.argmax(axis=0)]
    found: dict[str, Any] = {
        "first": first, "first_in_resamples": round(float(np.mean(winners == first)), 3), "seeds": {}, "tau": [],
    }  # fmt: skip
    for seed in record.seeds:
        alone = Table(record, [seed], count=2)
        own = {label: _eraser(alone, label, attacks)["score"] for label in scored}
        if all(one is not None for one in own.values()):
            found["seeds"][str(seed)] = {
                label: round(one.value, 4) for label, one in own.items() if one
            }
    for one, two in itertools.combinations(found["seeds"], 2):
        pair = found["seeds"][one], found["seeds"][two]
        tau = kendalltau(
            [pair[0][label] for label in scored], [pair[1][label] for label in scored]
        ).statistic
        found["tau"].append(
            {"seeds": [one, two], "tau": None if np.isnan(tau) else round(float(tau), 3)}
        )
    known = [one["tau"] for one in found["tau"] if one["tau"] is not None]
    found["mean_tau"] = round(float(np.mean(known)), 3) if known else None
    leads = [max(own, key=own.__getitem__) == first for own in found["seeds"].values()]
    found["first_in_seeds"] = [sum(leads), len(leads)]
    return found


def _total(record: Record) -> dict[str, Any]:
    """Rows and hours of all finished cells, by kind."""
    found: dict[str, Any] = {}
    for kind in ("fit", "measures", "attack"):
        own = [row for row in record.rows if row.kind == kind]
        found[kind] = {
            "cells": len(own), "rows": sum(row.rows for row in own),
            "core_hours": round(sum(row.seconds for row in own) / 3600, 3),
        }  # fmt: skip
    return found
