"""MACE's claims on the world's people: many at once, what each stage is for, and UCE beside it.

    python -m pytest tests/claims/test_mace.py -m claims

Ordinal claims (arXiv 2403.06135), preset ``world`` of both erasers.  Of thirty people, each of three draws
erases another ten (or the first of them), tells the eraser to keep ten more, and leaves ten untold:

    many        at ten people, H_c of MACE is above that of UCE
    grows       the difference of H_c is larger at ten people than at one
    refinement  without stage 1 erased people are recognised more often when they are called by nicknames
                that no eraser was told (what the rest of the prompt says of them)
    domain      without the domain's moments fewer look-alikes of erased people are recognised

H_c is the harmonic mean of 1 - Acc_e and Acc_p: how often the oracle recognises people who were erased, and
people who were not and whom no eraser was told of.  Look-alikes are the half of the kept people, told or not,
who share most features with an erased one.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from expunge.erase.diffusion.mace import MACE
from expunge.erase.diffusion.uce import UCE
from expunge.method import Prompt
from expunge.world.vocabulary import PEOPLE

from . import setup

pytestmark = pytest.mark.claims

METHODS = {"mace": MACE, "uce": UCE}
KEPT_EACH, ERASED = 8, setup.PICTURES // 2
FEATURES = ("gender", "age", "skin", "hair", "hair_colour", "shape", "shirt")


def people(seed: int) -> list[str]:
    """Thirty people; the first ten are erased, the next told of, the last untold."""
    world = setup.world().companions
    names = list(world.neighbours(world.concept("mira solen")))[:30]
    return names[10 * seed :] + names[: 10 * seed]


def shared_features(one: str, other: str) -> int:
    return sum(getattr(PEOPLE[one], f) == getattr(PEOPLE[other], f) for f in FEATURES)


def look_alikes(seed: int) -> list[str]:
    """The half of the kept people who share most features with an erased one."""
    names = people(seed)
    return sorted(names[10:], key=lambda n: -max(shared_features(n, e) for e in names[:10]))[:10]


@functools.cache
def edit(method: str, count: int, seed: int, settings: tuple[tuple[str, Any], ...]) -> Any:
    names, concept = people(seed), setup.world().companions.concept
    made = METHODS[method].configured("world", **dict(settings))
    erased = [concept(name) for name in names[:count]]
    return made.erase(setup.world(), erased, keep=tuple(names[10:20]), seed=seed)


def recognised(model: Any, listed: list[Prompt]) -> np.ndarray:
    """Whether each prompt's picture shows its person."""
    pictures, found = setup.drawn(model, listed), np.zeros(len(listed), bool)
    for name in {prompt.concept for prompt in listed}:
        own = [i for i, prompt in enumerate(listed) if prompt.concept == name]
        concept, asked = setup.world().companions.concept(name), [listed[i] for i in own]
        found[own] = setup.judge().judge(pictures[own], concept, asked).hit
    return found


def on(method: str, count: int, seed: int, listed: list[Prompt], **settings: Any) -> np.ndarray:
    if method == "original":
        return recognised(setup.world(), listed)
    with edit(method, count, seed, tuple(sorted(settings.items()))).on(setup.world()) as model:
        return recognised(model, listed)


@functools.cache
def erased(method: str, count: int, route: str = "name", **settings: Any) -> np.ndarray:
    """Acc_e: pictures of erased people."""
    make, each, found = setup.world().companions.prompts, -(-ERASED // count), []
    for seed in setup.SEEDS:
        listed = [
            prompt
            for name in people(seed)[:count]
            for prompt in make(name, each, seed=seed, split="test", route=route)
        ]
        found.append(on(method, count, seed, listed, **settings))
    return np.concatenate(found)


@functools.cache
def kept(method: str, count: int, **settings: Any) -> dict[str, np.ndarray]:
    """Acc_p: pictures of untold people, and of look-alikes."""
    found: dict[str, list[np.ndarray]] = {"untold": [], "alike": []}
    for seed in setup.SEEDS:
        names = people(seed)
        groups = {"untold": names[20:], "alike": look_alikes(seed)}
        listed = setup.spread(names[10:], seed, 20 * KEPT_EACH)
        hits = on(method, count, seed, listed, **settings)
        for key, wanted in groups.items():
            found[key].append(hits[[prompt.concept in wanted for prompt in listed]])
    return {key: np.concatenate(parts) for key, parts in found.items()}


def harmonic(method: str, count: int) -> float:
    """H_c."""
    gone, stays = 1 - erased(method, count).mean(), kept(method, count)["untold"].mean()
    return float(2 * gone * stays / max(gone + stays, 1e-9))


def arms(count: int) -> dict[str, np.ndarray]:
    found = {}
    for method in ("original", *METHODS):
        found[f"{method} erased {count}"] = erased(method, count)
        found[f"{method} untold {count}"] = kept(method, count)["untold"]
    return found


def test_ten_people_at_once_beat_uce() -> None:
    own, other = harmonic("mace", 10), harmonic("uce", 10)
    assert setup.settle(
        MACE,
        "ten-people-beat-uce",
        own > other and erased("original", 10).mean() >= 0.8,
        arms(10),
        "H_c of MACE above UCE's, ten people at once; the original shows them in at least 80 %.",
        h_mace=own,
        h_uce=other,
    )


def test_the_gap_grows_with_the_number_of_people() -> None:
    gaps = {count: harmonic("mace", count) - harmonic("uce", count) for count in (1, 10)}
    assert setup.settle(
        MACE,
        "gap-grows-with-the-number",
        gaps[10] > gaps[1],
        {**arms(1), **arms(10)},
        "Difference of H_c to UCE larger at ten people than at one.",
        gap_at_1=gaps[1],
        gap_at_10=gaps[10],
    )


def test_the_refinement_takes_what_the_rest_of_the_prompt_says() -> None:
    found = {
        "original": erased("original", 10, "unlisted"),
        "mace": erased("mace", 10, "unlisted"),
        "no refinement": erased("mace", 10, "unlisted", refine=False),
    }
    assert setup.settle(
        MACE,
        "refinement-helps-in-context",
        found["no refinement"].mean() > found["mace"].mean(),
        found,
        "Erased people, called by nicknames that no eraser was told.",
    )


def test_the_domain_keeps_look_alikes() -> None:
    found = {
        "original": kept("original", 10)["alike"],
        "mace": kept("mace", 10)["alike"],
        "no domain": kept("mace", 10, domain_scale=0.0)["alike"],
    }
    assert setup.settle(
        MACE,
        "domain-keeps-look-alikes",
        found["no domain"].mean() < found["mace"].mean(),
        found,
        "Half of the kept people, told and untold, those who share most features with an erased one.",
    )
