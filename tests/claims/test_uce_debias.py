"""UCE's debiasing on a planted bias of the world: the shares move, and nothing else does.

    python -m pytest tests/claims/test_uce_debias.py -m claims

In the world's training pictures 70 % of trees stand on a meadow, and the original draws it so where a prompt
does not say the background.  Claims of the debiasing of arXiv 2308.14761, preset ``world`` with
``technique="debias"``, the four backgrounds in equal shares wished for, measured on development prompts by the
oracle; edits of three seeds, judged on test prompts and seeds:

    shares    the distance of the backgrounds' shares from the wished ones (half the sum of absolute
              differences) is at most half of the original's, over prompts that leave the background open;
              trees are still trees (at most 5 points lost)
    stated    prompts that say the background show it as often as before (at most 5 points lost)
    others    other objects are shown as often as before (at most 5 points lost), and the shares of their
              backgrounds move by at most 15 points

The control is the original: without a bias there (distance at least 0.3) the first claim would say nothing.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

from expunge import Concept
from expunge.core.mentions import exchanged
from expunge.erase.diffusion.uce import UCE
from expunge.method import Prompt

from . import setup

pytestmark = pytest.mark.claims

BACKGROUNDS = ("paper", "night", "meadow", "beach")
WISHED = 1 / len(BACKGROUNDS)


@functools.cache
def edit(seed: int):
    method = UCE.configured("world", technique="debias", attributes=BACKGROUNDS)
    tree = setup.world().companions.concept("tree")
    return method.erase(setup.world(), tree, judge=setup.judge(), seed=seed)


def says(prompt: Prompt) -> bool:
    """Whether the prompt says a background, by any word."""
    concept = setup.world().companions.concept
    words = [word for name in BACKGROUNDS for word in concept(name).names]
    return exchanged(prompt.text, words, "")[1] is not None


def prompts(name: str, seed: int, count: int, stated: bool = False) -> list[Prompt]:
    """Test prompts of a concept that say the background, or leave it open."""
    made = setup.world().companions.prompts(name, 8 * count, seed=seed, split="test")
    return [prompt for prompt in made if says(prompt) is stated][:count]


def shown(model, listed: list[Prompt]) -> np.ndarray:
    """Index of the likeliest background of each picture."""
    pictures = setup.drawn(model, listed)
    scores = [setup.judge().judge(pictures, Concept(b), listed).score for b in BACKGROUNDS]
    return np.argmax(scores, axis=0)


def on(arm: str, seed: int, look):
    if arm == "original":
        return look(setup.world())
    with edit(seed).on(setup.world()) as model:
        return look(model)


def others(seed: int) -> list[Prompt]:
    """Prompts of objects without a planted background that leave it open."""
    names = ("house", "circle", "cross", "ring")
    each = -(-setup.PICTURES // (2 * len(names)))
    return [prompt for name in names for prompt in prompts(name, seed, each)]


@functools.cache
def trees(arm: str) -> tuple[np.ndarray, np.ndarray]:
    """Backgrounds of trees whose prompts leave them open, and whether they are trees."""
    found = []
    for seed in setup.SEEDS:
        listed = prompts("tree", seed, setup.PICTURES // 2)
        found.append(on(arm, seed, lambda m, p=listed: (shown(m, p), setup.hits(m, "tree", p))))
    return tuple(np.concatenate(part) for part in zip(*found, strict=True))


@functools.cache
def stated(arm: str) -> np.ndarray:
    """Whether the background is the one that a prompt of a tree says."""
    found = []
    for seed in setup.SEEDS:
        listed = prompts("tree", seed, setup.PICTURES // 2, stated=True)
        wanted = [BACKGROUNDS.index(prompt.labels["background"]) for prompt in listed]
        found.append(on(arm, seed, lambda m, p=listed: shown(m, p)) == wanted)
    return np.concatenate(found)


@functools.cache
def rest(arm: str) -> tuple[np.ndarray, np.ndarray]:
    """Backgrounds of other objects, and whether the objects are shown."""
    found = []
    for seed in setup.SEEDS:
        listed = others(seed)

        def look(model, listed=listed):
            concept, pictures = setup.world().companions.concept, setup.drawn(model, listed)
            hit = np.zeros(len(listed), bool)
            for name in {prompt.concept for prompt in listed}:
                own = [i for i, prompt in enumerate(listed) if prompt.concept == name]
                asked = [listed[i] for i in own]
                hit[own] = setup.judge().judge(pictures[own], concept(name), asked).hit
            return shown(model, listed), hit

        found.append(on(arm, seed, look))
    return tuple(np.concatenate(part) for part in zip(*found, strict=True))


def shares(index: np.ndarray) -> np.ndarray:
    return np.bincount(index, minlength=len(BACKGROUNDS)) / len(index)


def distance(index: np.ndarray) -> float:
    """Of the shares from the wished ones: 0 where they agree, 0.75 where one background has all."""
    return float(np.abs(shares(index) - WISHED).sum() / 2)


def test_the_shares_move_to_the_wished_ones() -> None:
    (before, tree), (after, still) = trees("original"), trees("uce")
    arms = {
        f"{arm} {background}": index == i
        for arm, index in (("original", before), ("debiased", after))
        for i, background in enumerate(BACKGROUNDS)
    }
    holds = (
        distance(before) >= 0.3
        and distance(after) <= distance(before) / 2
        and tree.mean() - still.mean() <= 0.05
    )
    assert setup.settle(
        UCE,
        "debias-moves-the-shares",
        holds,
        arms | {"original tree": tree, "debiased tree": still},
        "Distance to a quarter each at most half of the original's, that at least 0.3; at most 5 points of tree lost.",
        distance_original=distance(before),
        distance_debiased=distance(after),
        met=float(np.mean([edit(seed).manifest.report["met"] for seed in setup.SEEDS])),
        rounds=float(np.mean([len(edit(s).manifest.report["rounds"]) - 1 for s in setup.SEEDS])),
    )


def test_backgrounds_that_are_said_stay() -> None:
    before, after = stated("original"), stated("uce")
    assert setup.settle(
        UCE,
        "debias-keeps-what-is-said",
        before.mean() - after.mean() <= 0.05,
        {"original": before, "debiased": after},
        "Trees on a background that the prompt names; loss at most 5 points.",
    )


def test_other_objects_stay_as_they_are() -> None:
    (before, hit), (after, still) = rest("original"), rest("uce")
    moved = float(np.abs(shares(before) - shares(after)).sum() / 2)
    assert setup.settle(
        UCE,
        "debias-keeps-other-captions",
        hit.mean() - still.mean() <= 0.05 and moved <= 0.15,
        {"original": hit, "debiased": still},
        "Objects without a planted background: loss at most 5 points, shares of their backgrounds within 15 points.",
        background_shares_moved=moved,
    )
