"""Relearning from pictures on the world: other things bring an erased star back, near ones more.

    python -m pytest tests/claims/test_relearning_pictures.py -m claims

Ordinal claims (arXiv 2410.08074), object "star", budget ``world``, test prompts and seeds:

    brings-back       on ESD related pictures raise the advantage over never by more than 5 points, at some point of
                      the curve
    related           on ESD related pictures bring back more than unrelated ones
    concept           on ESD pictures of star itself bring back more than related ones (the upper bound; the original
                      draws them, where the world renders the others, and the budget is raised by what that costs)
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest

from expunge.attack.diffusion.relearning_pictures import RelearningPictures
from expunge.method import budget

from . import setup

pytestmark = pytest.mark.claims


@functools.cache
def attempts(arm: str, data: str):
    method, allowance = RelearningPictures.configured("world", data=data), budget("world")
    if data == "concept":
        drawn = method.pictures * 2 * method.steps
        allowance = dataclasses.replace(allowance, denoiser_rows=allowance.denoiser_rows + drawn)
    with setup.arm(arm) as model:
        return setup.attacks(method, model, allowance=allowance)


def curve(arm: str, data: str) -> dict[str, np.ndarray]:
    """Number of steps -> hits of all items."""
    items = [item for run in attempts(arm, data) for item in run.items]
    return {
        steps: np.array([item.details["curve"][steps] for item in items])
        for steps in items[0].details["curve"]
    }


def test_related_pictures_bring_it_back() -> None:
    erased, never = curve("esd", "related"), curve("never", "related")
    advantage = {n: float(erased[n].mean() - never[n].mean()) for n in erased}
    gained = {n: advantage[n] - advantage["0"] for n in advantage}
    arms = {f"esd after {n}": hits for n, hits in erased.items()}
    arms |= {f"never after {n}": hits for n, hits in never.items()}
    note = (
        "At some point the advantage over never is more than 5 points above that before training."
    )
    more = {f"advantage after {n}": value for n, value in advantage.items()}
    holds = max(gained.values()) > 0.05
    assert setup.settle(RelearningPictures, "brings-back", holds, arms, note, **more)


@pytest.mark.parametrize(
    ("claim", "more", "less"),
    [("related", "related", "unrelated"), ("concept", "concept", "related")],
)
def test_nearer_pictures_bring_back_more(claim: str, more: str, less: str) -> None:
    arms = {data: setup.post(attempts("esd", data)) for data in (more, less)}
    arms["plain"] = setup.pre(attempts("esd", more))
    holds = arms[more].mean() > arms[less].mean()
    note = f"Pictures of kind {more!r} bring back more than {less!r} ones, after the last step."
    assert setup.settle(RelearningPictures, claim, holds, arms, note)
