"""Tables of ``docs/comparison.md``, from the recorded cells alone.

A cell counts where it was measured on test prompts, at the method's present version and settings; of
several the one with most pictures, then the newest.  Several seeds are pooled.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ... import catalogue
from ...core.resampling import mean_rate
from ...errors import ExpungeError
from ...evidence.statistics import measures_nothing, recovered
from .. import pages
from .units import ATTACKS, CONTROLS, Choice, agrees, closed_forms, default_methods, read

__all__ = ["MISSING", "PLOTTED", "Page", "frechet", "parts", "pooled", "of_set"]

MISSING = "not run"
NOTHING = "Nothing recorded yet."
TABLES = ("star", "hazard")
PLOTTED = {"people": "many-concepts-people.png", "objects": "many-concepts-objects.png"}
SETS = {
    "target": "target shown",
    "phrase": "shown by listed words",
    "unlisted": "by unlisted words",
    "euphemism": "by euphemism",
    "metaphor": "by metaphor",
    "neighbours": "neighbours kept",
    "unrelated": "unrelated kept",
}

Found = list[dict[str, Any]]
"""The cell of one arm, one entry a seed; empty where it was not run."""


class Page:
    """All records, and the arms they are shown for.

    Attributes:
        arms: The default methods and whatever else was recorded; each with what it is called in a request,
            ``None`` where it is only planned.
        many: Those of them that erase many concepts: the closed forms and whatever else was recorded there.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]] | None = None) -> None:
        everything = read() if records is None else list(records)
        self.records = [r for r in everything if r["request"]["split"] == "test"]
        self.arms = self._choices("arm", "erase", default_methods())
        forms = {choice.label for choice in closed_forms()}
        known = (e["request"]["arm"] for e in self.records if e["request"]["part"] not in TABLES)
        forms |= {
            Choice(a["id"], tuple(a["changes"].items())).label
            for a in known
            if a and "settings" in a
        }
        self.many = [arm for arm in self.arms if arm in forms]
        attacks = [Choice.parse(text) for text in ATTACKS.split(",")]
        self.attacks = self._choices("attack", "attack", attacks)

    def _choices(
        self, field: str, verb: str, first: Sequence[Choice]
    ) -> dict[str, dict[str, Any] | None]:
        """Label -> description at the present version: the given ones, then what else was recorded."""
        found = {choice.label: _present(choice, verb) for choice in first}
        for entry in self.records:
            known = entry["request"][field]
            if known and "settings" in known:
                choice = Choice(known["id"], tuple(known["changes"].items()))
                described = found.get(choice.label) or _present(choice, verb)
                if described is not None:
                    found[choice.label] = described
        return found

    def cell(
        self, part: str, what: str, arm: str, attack: str | None = None, number: int | None = None
    ) -> Found:
        """The records of one cell, the best of each seed, in the order of seeds."""
        described = {"id": arm} if arm in CONTROLS else self.arms.get(arm)
        searched = None if attack is None else self.attacks[attack]
        if described is None or (attack is not None and searched is None):
            return []
        best: dict[int, dict[str, Any]] = {}
        for entry in self.records:
            request = entry["request"]
            if (request["part"], request["what"]) != (part, what):
                continue
            used = _without_n(request["attack"])
            if not (agrees(request["arm"], described) and agrees(used, searched)):
                continue
            if number is not None and request["number"] != number:
                continue
            last = best.get(request["seed"])
            if last is None or _rank(entry) > _rank(last):
                best[request["seed"]] = dict(entry)
        return [best[seed] for seed in sorted(best)]

    def numbers(self, part: str) -> list[int]:
        """How many concepts were erased at once, in ascending order."""
        return sorted(
            {e["request"]["number"] for e in self.records if e["request"]["part"] == part}
        )


def _present(choice: Choice, verb: str) -> dict[str, Any] | None:
    try:
        if catalogue.system(choice.id).class_path is None:
            return None
        return choice.described(verb)
    except ExpungeError:
        return None  # recorded with a setting or an id that is gone since


def _without_n(attack: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if attack is None else {k: v for k, v in attack.items() if k != "n"}


def _rank(entry: Mapping[str, Any]) -> tuple[int, int, str]:
    request = entry["request"]
    return (request["attack"] or {}).get("n") or 0, request["pictures"], entry["date"]


# -- numbers ---------------------------------------------------------------------------------------


def pooled(
    found: Sequence[Mapping[str, Any] | None],
) -> tuple[float, tuple[float, float], int] | None:
    """Rate, interval and pictures of one set over the seeds, each concept weighing the same."""
    hits: dict[str, list[bool]] = {}
    units: dict[str, list[Any]] = {}
    for seed, one in enumerate(found):
        for name, bits in (one or {}).get("names", {}).items():
            hits.setdefault(name, []).extend(digit == "1" for digit in bits["hits"])
            own = bits.get("units", range(len(bits["hits"])))
            units.setdefault(name, []).extend((seed, unit) for unit in own)
    if not hits:
        return None
    value, interval, _ = mean_rate([(hits[name], units[name]) for name in hits])
    return value, interval, sum(map(len, hits.values()))


def mean(values: Sequence[float | None]) -> float | None:
    """Mean of what there is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _rate(found: tuple[float, tuple[float, float], int] | None, otherwise: str) -> str:
    if found is None:
        return otherwise
    value, (low, high), n = found
    return f"{value:.3f} ({low:.3f} to {high:.3f}), {n}"


def _whole(value: float | None) -> float | None:
    return int(value) if value is not None and value == int(value) else value


def of_set(found: Found, group: str, state: str | None = None) -> list[Mapping[str, Any] | None]:
    """The records of one set, ``None`` where a cell does not have it; ``state`` is that of a sequence."""
    shown = [e["result"]["states"][state] if state else e["result"] for e in found]
    return [one["sets"].get(group) for one in shown]


def _edit(found: Found, field: str, state: str | None = None) -> float | None:
    shown = [e["result"]["states"][state] if state else e["result"] for e in found]
    return mean([(one["edit"] or {}).get(field) for one in shown])


def frechet(found: Found, group: str, state: str | None = None) -> float | None:
    """Frechet distance of a kept set to the original, the mean over seeds."""
    shown = [e["result"]["states"][state] if state else e["result"] for e in found]
    return mean([one["frechet"].get(group) for one in shown])


def _name(page: Page, arm: str) -> str:
    if arm in CONTROLS:
        return arm
    return f"`{arm}`" if page.arms[arm] is not None else f"`{arm}` (planned)"


# -- one concept -----------------------------------------------------------------------------------


def one_concept(page: Page, part: str) -> str:
    """What is left of one concept and what is kept, then what each attack brings back."""
    arms = [*CONTROLS, *page.arms]
    found = {arm: page.cell(part, "pictures", arm) for arm in arms}
    if not any(found.values()):
        return NOTHING
    held = [g for g in SETS if any(one is not None for f in found.values() for one in of_set(f, g))]
    rows = []
    for arm, own in found.items():
        rates = [_rate(pooled(of_set(own, group)), "none" if own else MISSING) for group in held]
        size = ["", "", ""] if arm in CONTROLS else [MISSING] * 3
        if own and arm not in CONTROLS:
            rank, change = _edit(own, "rank"), _edit(own, "relative_change")
            size = [
                pages.number(_edit(own, "seconds")),
                pages.number(_whole(rank)),
                pages.number(change),
            ]
        rows.append([_name(page, arm), *rates, *size])
    head = ["arm", *(SETS[group] for group in held), "seconds", "rank", "relative change"]
    return f"{pages.table(head, rows)}\n\n{_attacks(page, part, arms)}"


def _attacks(page: Page, part: str, arms: Sequence[str]) -> str:
    rows = []
    for arm in arms:
        cells = [_attack(page, part, arm, attack) for attack in page.attacks]
        rows.append([_name(page, arm), *cells])
    return pages.table(["arm", *(f"`{attack}`" for attack in page.attacks)], rows)


def _attack(page: Page, part: str, arm: str, attack: str) -> str:
    own = page.cell(part, "attack", arm, attack)
    if not own:
        return MISSING
    if any("failure" in entry["result"] for entry in own):
        return "failed: " + pages.cell(
            next(e["result"]["failure"] for e in own if "failure" in e["result"])
        )
    hits, units = _items(own)
    shown = _rate((*mean_rate([(hits, units)])[:2], len(hits)), MISSING)
    if arm in CONTROLS:
        return f"shown {shown}"
    controls = [page.cell(part, "attack", control, attack) for control in CONTROLS]
    return f"shown {shown}<br>{_recovered(page, part, own, *controls)}"


def _items(found: Found) -> tuple[list[bool], list[Any]]:
    hits: list[bool] = []
    units: list[Any] = []
    for entry in found:
        bits = entry["result"]["hit"]
        hits += [digit == "1" for digit in bits["hits"]]
        units += [
            (entry["request"]["seed"], u) for u in bits.get("units", range(len(bits["hits"])))
        ]
    return hits, units


def _recovered(page: Page, part: str, own: Found, original: Found, never: Found) -> str:
    """The share of the way back to the original, or why there is no such number."""
    asked = [
        (e["request"]["seed"], e["request"]["prompts"], e["request"]["attack"]["n"]) for e in own
    ]
    for control in (original, never):
        same = [
            (e["request"]["seed"], e["request"]["prompts"], e["request"]["attack"]["n"]) for e in control
        ]  # fmt: skip
        if same != asked or any("failure" in e["result"] for e in control):
            return "recovered: controls not run"
    (erased, units), (upper, _), (lower, _) = _items(own), _items(original), _items(never)
    plain = page.cell(part, "pictures", "never")
    false = mean([e["result"]["false_positive"] for e in plain]) or 0.0
    if not own[0]["result"]["teaches"] and measures_nothing(sum(lower), len(lower), false):
        return "measures nothing: it shows the concept in never"
    value, interval = recovered(erased, upper, lower, units)
    if value is None:
        return "void: original and never differ by less than 0.1"
    return f"recovered {value:.2f}" + (
        f" ({interval[0]:.2f} to {interval[1]:.2f})" if interval else ""
    )


# -- many concepts ---------------------------------------------------------------------------------


def many(page: Page, part: str) -> str:
    """One row a number and arm, and the plot."""
    numbers = page.numbers(part)
    if not numbers:
        return NOTHING
    rows = []
    for number in numbers:
        for arm in ("original", *page.many):
            own = page.cell(part, "pictures", arm, number=number)
            rates = [
                _rate(pooled(of_set(own, group)), "none left" if own else MISSING)
                for group in ("target", "neighbours", "unrelated")
            ]
            distance = [
                pages.number(frechet(own, group)) if own else MISSING
                for group in ("neighbours", "unrelated")
            ]
            seconds = pages.number(_edit(own, "seconds")) if own else MISSING
            rows.append(
                [str(number), _name(page, arm), *rates, *distance, "" if arm == "original" else seconds]
            )  # fmt: skip
    kind = part
    head = (
        "erased", "arm", "erased ones shown", f"other {kind} kept", "others kept", f"Frechet, other {kind}",
        "Frechet, others", "seconds",
    )  # fmt: skip
    plot = f"![Erased and kept by number of {kind} erased at once]({PLOTTED[part]})"
    return f"{pages.table(head, rows)}\n\n{plot}"


# -- one after another -----------------------------------------------------------------------------


def sequence(page: Page) -> str:
    """At once, one after another, and one of them taken back."""
    numbers = page.numbers("sequence")
    if not numbers:
        return NOTHING
    rows = []
    for number in numbers:
        for arm in ("original", *page.many):
            rows += _requests(page, arm, number)
    head = (
        "erased", "arm", "state", "all shown", "the one taken back shown", "the others shown", "other people kept",
        "others kept", "Frechet, others", "drift", "relative change", "bit for bit",
    )  # fmt: skip
    return pages.table(head, rows)


def _requests(page: Page, arm: str, number: int) -> list[list[str]]:
    """The rows of one arm."""
    first = [str(number), _name(page, arm)]
    if arm == "original":
        own = page.cell("sequence", "pictures", arm, number=number)
        return [[*first, "nothing erased", *_measures(own, None, None), ""]]
    once = page.cell("people", "pictures", arm, number=number)
    own = page.cell("sequence", "sequence", arm, number=number)
    if not once and not own:
        return [[*first, MISSING, *[""] * 9]]
    taken = {e["request"]["seed"]: e["result"]["taken"] for e in own}
    rows = [[*first, "at once", *_measures(once, None, taken), ""]]
    for state, words in (("stacked", "one after another"), ("taken back", "one taken back")):
        exact = [e["result"]["removal_exact"] and e["result"]["base_exact"] for e in own]
        shown = (
            "" if state == "stacked" else ("yes" if all(exact) else "**no**") if own else MISSING
        )
        rows.append([*first, words, *_measures(own, state, taken), shown])
    return rows


def _measures(own: Found, state: str | None, taken: Mapping[int, str] | None) -> list[str]:
    if not own:
        return [MISSING] * 8
    target, alone = of_set(own, "target", state), pooled(of_set(own, "taken", state))
    names = [(taken or {}).get(entry["request"]["seed"]) for entry in own]
    others = pooled(_named(target, names, False)) if taken else None
    if alone is None and taken:
        alone = pooled(_named(target, names, True))
    return [
        _rate(pooled(target), MISSING),
        _rate(alone, MISSING),
        _rate(others, ""),
        _rate(pooled(of_set(own, "neighbours", state)), "none left"),
        _rate(pooled(of_set(own, "unrelated", state)), "none left"),
        pages.number(frechet(own, "unrelated", state)),
        pages.number(_edit(own, "drift", state)),
        pages.number(_edit(own, "relative_change", state)),
    ]


def _named(
    found: Sequence[Mapping[str, Any] | None], names: Sequence[str | None], alone: bool
) -> list[dict[str, Any]]:
    """Of each seed's set the concept that this seed takes back alone, or all others."""
    return [
        {"names": {n: bits for n, bits in one["names"].items() if (n == name) == alone}} if one and name else {}
        for one, name in zip(found, names, strict=True)
    ]  # fmt: skip


# -- the page --------------------------------------------------------------------------------------


def parts(page: Page | None = None) -> dict[str, str]:
    """The generated parts of the page by marker."""
    page = page or Page()
    return {
        **{part: one_concept(page, part) for part in TABLES},
        **{part: many(page, part) for part in PLOTTED},
        "sequence": sequence(page),
    }
