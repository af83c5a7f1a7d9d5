"""What is compared: methods by their catalogue ids, sets of concepts and prompts, and the records of cells."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ... import catalogue
from ...concept import Concept, safe_name
from ...core.sampling import prompts_digest
from ...edit.files import atomic_write
from ...errors import ExpungeError, PromptError, SettingError, nearest
from ...evidence.prompts import ROUTES
from ...method import Prompt
from .. import results
from ..choices import Choice, key, plain

__all__ = [
    "ATTACKS", "CONTROLS", "FOLDER", "Case", "Choice", "agrees", "closed_forms", "default_methods", "key", "many_case",
    "plain", "read", "record", "recorded", "table_case",
]  # fmt: skip

FOLDER = "comparison"
CONTROLS = ("original", "never")
"""Arms without an edit: the upper and the lower end of every scale."""

ATTACKS = "closed-form@100,ring-a-bell:form=soft@100,unlearndiffatk@10,random-tokens@10"
"""Attacks and how many prompts each is given: the two that search pay about 2,000 denoiser rows a prompt."""

TOLD = 3
STAGE = "stage2"
"""Methods with a switch of this name are compared without their second stage too."""

UNNAMED = "implicit-concepts"
"""Methods of this tag are for what no prompt names, and no concept of the tables is."""


# -- methods ---------------------------------------------------------------------------------------


def closed_forms() -> list[Choice]:
    """The catalogue's closed forms for pictures; those with a second stage also without it."""
    found = []
    for entry in catalogue.systems("erase", "diffusion", "closed-form"):
        if entry.class_path is not None:
            fields = {field.name for field in dataclasses.fields(catalogue.resolve(entry.id))}
            if STAGE in fields:
                found.append(Choice(entry.id, ((STAGE, "false"),)))
        found.append(Choice(entry.id))
    return found


def default_methods() -> list[Choice]:
    """The closed forms, then the implemented fine-tunes that erase what a prompt names."""
    found = closed_forms()
    known = {choice.id for choice in found}
    return found + [
        Choice(entry.id)
        for entry in catalogue.systems("erase", "diffusion", "finetune")
        if entry.class_path is not None and entry.id not in known and UNNAMED not in entry.tags
    ]


# -- concepts and prompts --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """What one cell erases and what it is measured on.

    Attributes:
        concepts: Erased, in this order.
        keep: Names the eraser is told to preserve; nothing is measured on them.
        sets: Set name -> concept name -> prompts; every picture is judged by the concept it asks for.
        judged: Concept name -> the concept given to the judge.
    """

    concepts: tuple[Concept, ...]
    keep: tuple[str, ...]
    sets: Mapping[str, Mapping[str, list[Prompt]]]
    judged: Mapping[str, Concept]

    @property
    def pictures(self) -> int:
        """Pictures of one arm."""
        return sum(len(prompts) for one in self.sets.values() for prompts in one.values())

    def described(self) -> dict[str, Any]:
        """What names the case in a request."""
        prompts = [p for one in self.sets.values() for listed in one.values() for p in listed]
        return {
            "concepts": [plain(concept.to_dict()) for concept in self.concepts],
            "keep": list(self.keep),
            "prompts": prompts_digest(prompts),
        }


def table_case(companions: Any, name: str, seed: int, pictures: int) -> Case:
    """One concept: by name and by every other route there is, its neighbours, the unrelated set.

    The eraser is told of the first three neighbours; the others are measured.  ``pictures`` of each set.
    """
    concept = _concept(companions, name)
    others = [n for n in companions.neighbours(concept) if n != concept.name]
    told = tuple(others[:TOLD])
    sets = {"target": {concept.name: companions.prompts(concept.name, pictures, seed=seed)}}
    for route in ROUTES:
        try:
            listed = companions.prompts(concept.name, pictures, seed=seed, route=route)
        except (ExpungeError, ValueError):
            continue  # the world has no words of this kind for it
        sets[route] = {concept.name: listed}
    groups = {"neighbours": others[TOLD:], "unrelated": _unrelated(companions, concept.kind)}
    for group, names in groups.items():
        if names:
            sets[group] = _spread(companions, names, seed, pictures, ())
    return Case((concept,), told, sets, _judged(companions, sets))


def many_case(
    companions: Any, kind: str, count: int, seed: int, pictures: int, taken: bool = False
) -> Case:
    """``count`` concepts of a kind erased together, and the same kept sets at every count.

    The world's reference concept of the kind comes first, the others in the world's order (shuffled
    for seeds above 0).  Of the last three eighths (at least six) the last three are told to the eraser
    and the others measured, as long as they are not erased themselves.  The unrelated set holds no
    concept of the kind and no prompt that mentions one which a smaller number may erase; where
    the kind is not ``object``, it holds the objects too, so that something is left when all are erased.

    Args:
        taken: Add a set of its own for the concept in the middle, which a sequence takes back.
    """
    order = _order(companions, kind, seed)
    if not 1 <= count <= len(order):
        raise SettingError(
            f"{count} concepts of the kind {kind}; the world has 1 to {len(order)} of them"
        )
    names, reserve = order[:count], order[-max(2 * TOLD, 3 * len(order) // 8) :]
    told = tuple(n for n in reserve[-TOLD:] if n not in names)
    concepts = _anchored([_concept(companions, n) for n in names], told)
    sets = {"target": _spread(companions, names, seed, pictures, ())}
    if taken:
        middle = names[count // 2]
        extra = companions.prompts(middle, -(-pictures // 2), seed=seed + 1)
        sets["taken"] = {middle: extra}
    kept = [n for n in reserve[:-TOLD] if n not in names]
    if kept:
        sets["neighbours"] = _spread(companions, kept, seed, pictures, ())
    others = _unrelated(companions, kind)
    if kind != "object":
        others = list(dict.fromkeys([*_order(companions, "object", 0)[1:], *others]))
    banned = order if kind != "object" else order[: -len(reserve)]
    sets["unrelated"] = _spread(companions, others, seed, pictures, banned)
    return Case(concepts, told, sets, _judged(companions, sets))


def _concept(companions: Any, name: str) -> Concept:
    found: Concept | None = companions.concept(name)
    if found is None:
        raise SettingError(
            f"the world has no concept {name!r}{nearest(name, companions.never_lacks)}"
        )
    return found


def _order(companions: Any, kind: str, seed: int) -> list[str]:
    known = [companions.concept(name) for name in companions.never_lacks]
    first = next((c for c in known if c is not None and c.kind == kind), None)
    if first is None:
        raise SettingError(f"the world has no reference concept of the kind {kind!r}")
    rest = [name for name in companions.neighbours(first) if name != first.name]
    if seed:
        rest = [rest[i] for i in np.random.default_rng(seed).permutation(len(rest))]
    return [first.name, *rest]


def _anchored(concepts: Sequence[Concept], told: Sequence[str]) -> tuple[Concept, ...]:
    """The concepts with anchors that are not erased themselves: two that only change places are not gone."""
    gone = {word for concept in concepts for word in concept.names}
    return tuple(
        dataclasses.replace(c, anchor=told[i % len(told)] if told else None)
        if c.anchor in gone
        else c
        for i, c in enumerate(concepts)
    )


def _unrelated(companions: Any, kind: str) -> list[str]:
    found = {name: companions.concept(name) for name in companions.unrelated}
    return [
        name
        for name, concept in found.items()
        # Colours and the like are objects to a Concept; what the world calls neighbours decides.
        if concept is not None and name not in _of_kind(companions, kind)
    ]


def _of_kind(companions: Any, kind: str) -> set[str]:
    known = [companions.concept(name) for name in companions.never_lacks]
    return {
        n
        for c in known
        if c is not None and c.kind == kind
        for n in (c.name, *companions.neighbours(c))
    }


def _spread(
    companions: Any, names: Sequence[str], seed: int, pictures: int, banned: Iterable[str]
) -> dict[str, list[Prompt]]:
    """At least ``pictures`` prompts shared equally by the names, none of which mentions what is banned."""
    each, never = -(-pictures // len(names)), set(banned)
    found = {}
    for name in names:
        drawn = companions.prompts(name, each if not never else 8 * each, seed=seed)
        fit = [p for p in drawn if not never & {str(v) for v in p.labels.values()}]
        if fit:
            found[name] = fit[:each]
    if not found:
        raise PromptError(f"no prompt of {', '.join(names)} is free of what is erased")
    return found


def _judged(companions: Any, sets: Mapping[str, Mapping[str, Any]]) -> dict[str, Concept]:
    return {name: _concept(companions, name) for one in sets.values() for name in one}


# -- records ---------------------------------------------------------------------------------------


def _file(request: Mapping[str, Any]) -> Path:
    arm = safe_name(str(request["arm"]["id"]), "arm")
    return results.folder() / FOLDER / f"{request['part']}-{arm}-{key(request)}.json"


def agrees(old: Mapping[str, Any] | None, new: Mapping[str, Any] | None) -> bool:
    """Whether a recorded method or control is the wanted one: id, version, and every setting it had.

    A setting that a method got since, without a new version, leaves its results as they were.
    """
    if old is None or new is None:
        return old is new
    rest = [{k: v for k, v in one.items() if k != "settings"} for one in (old, new)]
    settings = new.get("settings", {})
    same = all(k in settings and settings[k] == v for k, v in old.get("settings", {}).items())
    return rest[0] == rest[1] and same


def recorded(request: Mapping[str, Any]) -> bool:
    """Whether the cell was measured before."""
    if _file(request).is_file():
        return True
    methods = ("arm", "attack")
    rest = {k: v for k, v in request.items() if k not in methods}
    return any(
        {k: v for k, v in old.items() if k not in methods} == rest
        and all(agrees(old[k], request[k]) for k in methods)
        for old in (entry["request"] for entry in read())
    )


def record(request: Mapping[str, Any], result: Mapping[str, Any], seconds: float) -> Path:
    """Write one cell, atomically; ``seconds`` is the wall time of all its work."""
    entry = {
        "request": request,
        "result": result,
        "seconds": round(seconds, 1),
        **results.provenance(),
    }
    file = _file(request)
    atomic_write(file, (json.dumps(entry, indent=1, default=float) + "\n").encode())
    return file


def read() -> list[dict[str, Any]]:
    """All recorded cells, in the order of their files' names."""
    folder = results.folder() / FOLDER
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    return [results.load(file, dict, "a comparison", "one recorded cell") for file in files]
