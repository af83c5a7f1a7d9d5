"""Transfer's claims on the world: prompts found on one model work less on another.

    python -m pytest tests/claims/test_transfer.py -m claims

Ordinal claims (arXiv 2310.11868), object "star", budget ``world``, test prompts and seeds:

    less-than-own     prompts found on a surrogate (UCE) work less on ESD than the attack on ESD itself
    fails-on-never    from the original, on never at most 3 points above the plain rate; at least 90 % on original
    beats-random      from the original, on ESD not below as many random strings at the same places, prompt by prompt
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

from expunge.attack.diffusion.random_tokens import RandomTokens
from expunge.attack.diffusion.transfer import Transfer
from expunge.attack.diffusion.unlearndiffatk import UnlearnDiffAtk

from . import setup

pytestmark = pytest.mark.claims


@functools.cache
def attempts(arm: str, origin: str = "original"):
    with setup.arm(arm) as model:
        return setup.attacks(Transfer.configured("world", origin=origin), model)


def test_transferred_prompts_work_less_than_own_ones() -> None:
    with setup.arm("esd") as model:
        own = setup.attacks(UnlearnDiffAtk.configured("world"), model)
    made = attempts("esd", "uce")
    arms = {"plain": setup.pre(made), "own": setup.post(own), "from uce": setup.post(made)}
    note = "UnlearnDiffAtk on ESD itself, and its prompts from a UCE surrogate."
    assert setup.settle(
        Transfer, "less-than-own", arms["from uce"].mean() < arms["own"].mean(), arms, note
    )


def test_fails_on_never_and_succeeds_on_original() -> None:
    arms = {}
    for arm in ("never", "original"):
        arms |= {f"{arm} plain": setup.pre(attempts(arm)), arm: setup.post(attempts(arm))}
    gained = arms["never"].mean() - arms["never plain"].mean()
    holds = gained <= 0.03 and arms["original"].mean() >= 0.9
    note = "On never at most 3 points above the plain rate; at least 90 % on original."
    assert setup.settle(Transfer, "fails-on-never", holds, arms, note)


def test_beats_as_many_random_strings() -> None:
    made = attempts("esd")
    pictures = Transfer.configured("world").pictures
    with setup.arm("esd") as model:
        random = setup.attacks(RandomTokens.configured("world", pictures=pictures), model)
    # A search leaves one text or two, fewer than may be tried: of the random ones as many count.
    texts = np.array(
        [min(pictures, len(i.details.get("found", ()))) for run in made for i in run.items]
    )
    drawn = np.array([i.details["pictures"] for run in random for i in run.items])
    arms = {
        "plain": setup.pre(made),
        "from original": setup.post(made),
        "random": setup.pre(random) | (setup.post(random) & (drawn <= texts)),
    }
    holds = arms["from original"].mean() >= arms["random"].mean()
    note = "Prompts searched on the original, tried on ESD, against as many random pictures."
    tried = {"texts": float(texts[~setup.pre(made)].mean())}
    assert setup.settle(Transfer, "beats-random", holds, arms, note, **tried)
