"""Concept ablation's claims on the world.

    python -m pytest tests/claims/test_concept_ablation.py -m claims

Ordinal claims (arXiv 2303.13516), object "star" with anchor "circle", preset ``world``, test prompts, edits of
three training seeds:

    anchor        prompts of star show the anchor in at least 80 % of the pictures, and star in at most 20 %
    keeps         untold neighbours within 5 points of the original
    like-anchors  pictures for star prompts with the anchor's word exchanged cannot be told from the anchor's own by a
                  classifier on the oracle's features (accuracy at most 60 %, chance 50 %); the original's can
    model-based   beats the noise-based loss at equal steps: less star left
    prior         without the prior term the anchor drifts more
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

from expunge.core.mentions import exchanged
from expunge.erase.diffusion.concept_ablation import ConceptAblation

from . import setup

pytestmark = pytest.mark.claims

ARMS = {"ablated": {}, "noise": {"loss": "noise"}, "prior": {"prior_weight": 1.0}}


def edited(arm: str, seed: int):
    settings = {} if arm == "original" else ARMS[arm]
    return setup.arm("original" if arm == "original" else "concept-ablation", seed, **settings)


@functools.cache
def shown(arm: str, name: str) -> np.ndarray:
    """Whether prompts of star show ``name``, a share of every seed on that seed's edit."""
    judge, concept, found = setup.judge(), setup.world().companions.concept(name), []
    for seed in setup.SEEDS:
        make = setup.world().companions.prompts
        listed = list(make("star", setup.PICTURES, seed=seed, split="test"))
        with edited(arm, seed) as model:
            found.append(judge.judge(setup.drawn(model, listed), concept, listed).hit)
    return np.concatenate(found)


@functools.cache
def kept(arm: str) -> np.ndarray:
    return setup.kept_of(lambda seed: edited(arm, seed))


def test_the_anchor_takes_the_concepts_place() -> None:
    arms = {f"{a}, {n}": shown(a, n) for a in ("original", "ablated") for n in ("star", "circle")}
    holds = arms["ablated, circle"].mean() >= 0.8 and arms["ablated, star"].mean() <= 0.2
    note = "Prompts of star: the anchor in at least 80 %, star in at most 20 %."
    assert setup.settle(ConceptAblation, "anchor-takes-its-place", holds, arms, note)


def test_untold_neighbours_are_kept() -> None:
    arms = {arm: kept(arm) for arm in ("original", "ablated")}
    holds = abs(arms["original"].mean() - arms["ablated"].mean()) <= 0.05
    note = "Within 5 points of the original."
    assert setup.settle(ConceptAblation, "keeps-untold-neighbours", holds, arms, note)


def test_pictures_look_like_the_anchors() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import cross_val_predict

    def told_apart(arm: str) -> np.ndarray:
        judge, features, labels = setup.judge(), [], []
        for seed in setup.SEEDS:
            make = setup.world().companions.prompts
            own = list(make("star", setup.PICTURES, seed=seed, split="test"))
            names = setup.star().names
            other = [type(p)(exchanged(p.text, names, "circle")[0], p.seed + 10**6) for p in own]
            with edited(arm, seed) as model:
                drawn = [setup.drawn(model, listed) for listed in (own, other)]
            features += [judge.features(pictures) for pictures in drawn]
            labels += [np.zeros(len(own)), np.ones(len(other))]
        rows, wanted = np.concatenate(features), np.concatenate(labels)
        rows = (rows - rows.mean(0)) / (rows.std(0) + 1e-6)
        guess = cross_val_predict(LogisticRegression(C=0.01, max_iter=500), rows, wanted, cv=5)
        return guess == wanted

    arms = {arm: told_apart(arm) for arm in ("original", "ablated")}
    holds = arms["ablated"].mean() <= 0.6 and arms["original"].mean() > arms["ablated"].mean()
    note = "Cross-validated accuracy of a classifier between star prompts and the same prompts with the anchor."
    assert setup.settle(ConceptAblation, "looks-like-the-anchor", holds, arms, note)


def test_the_model_based_loss_beats_the_noise_based_one() -> None:
    arms = {arm: shown(arm, "star") for arm in ("ablated", "noise")}
    holds = arms["ablated"].mean() < arms["noise"].mean()
    note = "Star left after equal steps."
    assert setup.settle(ConceptAblation, "model-based-beats-noise-based", holds, arms, note)


def test_without_the_prior_the_anchor_drifts_more() -> None:
    def changed(arm: str) -> float:
        settings = tuple(sorted(ARMS[arm].items()))
        edits = [setup._edit("concept-ablation", seed, settings) for seed in setup.SEEDS]
        return float(np.mean([edit.manifest.report["anchor_change"] for edit in edits]))

    drift = {arm: changed(arm) for arm in ("ablated", "prior")}
    holds = drift["prior"] < drift["ablated"]
    note = "Mean squared change of the predictions for anchor prompts, three edits; prior: with the prior term."
    assert setup.settle(ConceptAblation, "prior-holds-the-anchor", holds, {}, note, **drift)
