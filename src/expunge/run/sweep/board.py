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

from . import worth
from .numbers import Estimate, Table, harmonic, mean
from .record import Record

__all__ = ["board"]


def board(record: Record) -> dict[str, Any]:
    """Everything a leaderboard shows, plain values (``None`` where a number does not exist)."""
    found, rows, attacks = _standing(record)
    alone = {}
    if len(record.concepts) > 1:
        alone = {concept: _standing(_only(record, concept))[:2] for concept in record.concepts}
    return {
        "model": record.model, "judge": record.judge, "made": record.made, "options": record.options,
        "finished": len(record.rows), "cells": record.cells, "without_never": dict(record.without),
        **found,
        "by_concept": {concept: one for concept, (one, _) in alone.items()},
        "stability": _stability(record, rows, attacks, {c: own for c, (_, own) in alone.items()}),
        "cost": _total(record),
        "settings": [told.model_dump(mode="json") for told in record.methods],
    }  # fmt: skip


def _standing(
    record: Record,
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """What the record says of erasers and attacks: as plain values, and both with their resamples."""
    table = Table(record)
    attacks = {label: worth.attack(table, label) for label in record.attacks}
    worth.over_control(table, attacks)
    rows = [_eraser(table, label, attacks) for label in record.erasers]
    # What some attacks are still to be run on looks more robust than it is: it stands last.
    ranked = sorted(
        rows,
        key=lambda row: (
            bool(row["pending"]),
            *(-round(row[k].value, 4) if row[k] else 1.0 for k in ("score", "robustness", "kept")),
        ),
    )
    found = {
        "erasers": [_public(row) for row in ranked],
        "attacks": [_public(attacks[one]) for one in worth.by_strength(attacks)],
        "matrix": _matrix(table, [row["label"] for row in ranked], attacks),
        "order": worth.order(table, attacks),
    }
    return found, rows, attacks


def _only(record: Record, concept: str) -> Record:
    """The same record of one concept."""
    return record.model_copy(
        update={
            "options": {**record.options, "concepts": [concept]},
            "rows": tuple(row for row in record.rows if row.concept == concept),
        }
    )


def _public(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        k: worth.shown(v) if isinstance(v, Estimate) else v
        for k, v in row.items()
        if not k.startswith("_")
    }


# -- erasers ---------------------------------------------------------------------------------------


def _eraser(table: Table, label: str, attacks: Mapping[str, Any]) -> dict[str, Any]:
    """One head row."""
    record, concepts = table.record, table.record.concepts
    searching = [a for a in record.attacks if attacks[a]["_counted"] and not attacks[a]["teaches"]]
    joint = _joint(table, label, attacks, [a for a in searching if attacks[a]["typed"]])
    deep = _joint(table, label, attacks, searching)
    robustness, deeper = (
        back.left() if (back := mean([one for _, _, one in found])) is not None else None
        for found in (joint, deep)
    )
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


def _matrix(
    table: Table, erasers: Sequence[str], attacks: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Eraser by attack: the recovered share, or the advantage of what teaches; why there is none."""
    found = []
    for eraser, attack in itertools.product(erasers, worth.by_strength(attacks)):
        row, concepts = attacks[attack], table.record.concepts
        one = mean(
            [table.advantage(c, eraser, attack) for c in row["_counted"]]
            if row["teaches"]
            else [table.recovered(c, eraser, [attack]) for c in row["_counted"]]
        )
        entry: dict[str, Any] = {
            "eraser": eraser,
            "attack": attack,
            "number": worth.shown(one),
            "reason": "",
        }
        if one is None:
            said = [
                words for c in concepts for words in table.refusals("attack", c, eraser, attack)
            ]
            ran = any(table.rows("attack", c, eraser, attack) for c in concepts)
            dead = row["status"] != worth.VALID
            entry["reason"] = (
                row["reason"] if dead else said[0] if said else "no scale" if ran else "not run"
            )
            entry["refused"] = bool(said) and not dead
        found.append(entry)
    return found


# -- stability and cost ----------------------------------------------------------------------------


def _stability(
    record: Record,
    rows: Sequence[Mapping[str, Any]],
    attacks: Mapping[str, Any],
    alone: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    """How far the order of the erasers depends on prompts, seeds and concepts."""
    scored = _scores(rows)
    if len(scored) < 2:
        return {"reason": "fewer than two erasers were attacked to the end, so there is no order"}
    first = max(scored, key=lambda label: scored[label].value)
    drawn = np.nan_to_num(np.stack([one.draws for one in scored.values()]), nan=-1.0)
    winners = np.array(list(scored))[drawn.argmax(axis=0)]
    seeds = {}
    for seed in record.seeds:
        table = Table(record, [seed], count=2)
        seeds[str(seed)] = {label: _eraser(table, label, attacks)["score"] for label in scored}
    return {
        "first": first,
        "first_in_resamples": round(float(np.mean(winners == first)), 3),
        "seeds": _agreement(seeds, list(scored), first),
        "concepts": _agreement({c: _scores(own) for c, own in alone.items()}, list(scored), first),
    }


def _scores(rows: Sequence[Mapping[str, Any]]) -> dict[str, Estimate]:
    """Label -> score of what was attacked to the end."""
    return {
        row["label"]: row["score"]
        for row in rows
        if row["score"] is not None and not row["pending"]
    }


def _agreement(
    parts: Mapping[str, Mapping[str, Estimate | None]], labels: Sequence[str], first: str
) -> dict[str, Any]:
    """How far the parts that scored every eraser agree: Kendall's tau of each two, and who is first in each."""
    from scipy.stats import kendalltau

    scores: dict[str, dict[str, float]] = {}
    for part, own in parts.items():
        values = {label: one.value for label in labels if (one := own.get(label)) is not None}
        if len(values) == len(labels):
            scores[part] = {label: round(value, 4) for label, value in values.items()}
    pairs: list[dict[str, Any]] = []
    for a, b in itertools.combinations(scores, 2):
        tau = kendalltau(*([scores[part][label] for label in labels] for part in (a, b))).statistic
        pairs.append({"of": [a, b], "tau": None if np.isnan(tau) else round(float(tau), 3)})
    known = [tau for pair in pairs if (tau := pair["tau"]) is not None]
    leads = [max(own, key=own.__getitem__) == first for own in scores.values()]
    return {
        "scores": scores, "tau": pairs, "mean_tau": round(float(np.mean(known)), 3) if known else None,
        "first_in": [sum(leads), len(leads)],
    }  # fmt: skip


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
