"""DoCo's claims on the world.

    python -m pytest tests/claims/test_doco.py -m claims

Ordinal claims (arXiv 2405.15304), object "star" with anchor "circle", preset ``world`` with the name alone in training
(``phrases=False``), test prompts, edits of three training seeds.  "Matching" is concept ablation's loss on the same
anchors, with as many steps of the student, the same layers, learning rate and batch:

    unseen        star on unseen phrasings (listed words that training did not use, and unlisted ones) lower than under
                  matching, while untold neighbours are kept at least as well minus 5 points
    surgery       neighbours are kept at least as well as without surgery, and at most 5 points more star is left
    untrained     with a random discriminator that never learns more star is left
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from expunge.erase.diffusion.doco import DoCo

from . import setup

pytestmark = pytest.mark.claims

WORLD = DoCo.presets["world"]
SAME = {name: WORLD[name] for name in ("lr", "batch", "pictures", "sampling_steps")}
ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "original": ("original", {}),
    "doco": ("doco", {"phrases": False}),
    "matching": (
        "concept-ablation",
        {**SAME, "steps": WORLD["steps"] - WORLD["warm_up"], "phrases": False, "clip": 0.0},
    ),
    "no surgery": ("doco", {"phrases": False, "surgery": False}),
    "untrained": ("doco", {"phrases": False, "discriminator": "frozen"}),
}


@functools.cache
def shown(arm: str, *routes: str) -> np.ndarray:
    """Whether prompts of some routes show star, every seed's on that seed's edit."""
    name, settings = ARMS[arm]
    found = []
    for seed in setup.SEEDS:
        make = setup.world().companions.prompts
        each = -(-setup.PICTURES // len(routes))
        listed = [p for r in routes for p in make("star", each, seed=seed, split="test", route=r)]
        with setup.arm(name, seed, **settings) as model:
            found.append(setup.judge().judge(setup.drawn(model, listed), setup.star(), listed).hit)
    return np.concatenate(found)


@functools.cache
def kept(arm: str) -> np.ndarray:
    name, settings = ARMS[arm]
    return setup.kept_of(lambda seed: setup.arm(name, seed, **settings))


UNSEEN = ("phrase", "unlisted")


def test_reaches_unseen_phrasings_further_than_matching() -> None:
    arms = {arm: shown(arm, *UNSEEN) for arm in ("original", "doco", "matching")}
    arms |= {f"{arm}, kept": kept(arm) for arm in ("doco", "matching")}
    lower = arms["doco"].mean() < arms["matching"].mean()
    holds = lower and arms["doco, kept"].mean() >= arms["matching, kept"].mean() - 0.05
    note = (
        "Star by words training did not use; neighbours kept no worse than 5 points below matching."
    )
    assert setup.settle(DoCo, "reaches-unseen-phrasings", holds, arms, note)


def test_surgery_keeps_neighbours_and_costs_little() -> None:
    arms = {arm: shown(arm, "name") for arm in ("original", "doco", "no surgery")}
    arms |= {f"{arm}, kept": kept(arm) for arm in ("original", "doco", "no surgery")}
    keeps = arms["doco, kept"].mean() >= arms["no surgery, kept"].mean()
    holds = keeps and arms["doco"].mean() <= arms["no surgery"].mean() + 0.05
    note = "Kept at least as well as without surgery; at most 5 points more star left."
    assert setup.settle(DoCo, "surgery-keeps", holds, arms, note)


def test_an_untrained_discriminator_erases_less() -> None:
    arms = {arm: shown(arm, "name") for arm in ("doco", "untrained")}
    holds = arms["doco"].mean() < arms["untrained"].mean()
    note = "A random discriminator that never learns leaves more star."
    assert setup.settle(DoCo, "untrained-discriminator-is-worse", holds, arms, note)
