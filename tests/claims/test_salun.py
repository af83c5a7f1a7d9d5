"""SalUn's claims on the world.

    python -m pytest tests/claims/test_salun.py -m claims

Ordinal claims (arXiv 2310.12508), object "star", preset ``world``, edits of three training seeds:

    mask         forget/retain trade-off, hits of untold neighbours minus hits of star: with the mask better than
                 random relabelling without it
    least        the least salient half has a worse trade-off (negative control)
    relabels     what was called a star is drawn as its replacement, the circle, more often than as a star, and at least
                 twenty points more often than by the original
"""

from __future__ import annotations

import functools

import numpy as np
import pytest

from expunge.erase.diffusion.salun import SalUn

from . import setup

pytestmark = pytest.mark.claims


@functools.cache
def star(mask: str | None, shown: str = "star") -> np.ndarray:
    """Hits of a concept on prompts of star; ``None``: the original."""
    found = []
    for seed in setup.SEEDS:
        listed = setup.world().companions.prompts("star", setup.PICTURES, seed=seed, split="test")
        with arm(mask, seed) as model:
            found.append(setup.hits(model, shown, listed))
    return np.concatenate(found)


@functools.cache
def kept(mask: str | None) -> np.ndarray:
    """Hits of the untold neighbours on their own prompts."""
    return setup.kept_of(lambda seed: arm(mask, seed))


def arm(mask: str | None, seed: int):
    """The model of an arm; the preset's own mask is named by no setting, so that arms are shared."""
    if mask is None:
        return setup.arm("original")
    return setup.arm("salun", seed, **({} if mask == "salient" else {"mask": mask}))


def compared(claim: str, other: str, note: str) -> bool:
    gaps = {m: float(kept(m).mean() - star(m).mean()) for m in ("salient", other)}
    with arm("salient", 0) as model:
        (edit,) = model.edits
        density = edit.manifest.report["mask"]["density"]
    arms = {f"kept, {m}": kept(m) for m in gaps} | {f"star, {m}": star(m) for m in gaps}
    return setup.settle(
        SalUn,
        claim,
        gaps["salient"] > gaps[other],
        {"kept, original": kept(None), **arms},
        note,
        density=density,
        **{f"trade-off, {m}": gap for m, gap in gaps.items()},
    )


def test_the_mask_improves_the_trade_off() -> None:
    assert compared(
        "mask-beats-no-mask", "none", "Hits of neighbours minus hits of star, against no mask."
    )


def test_the_least_salient_half_is_worse() -> None:
    assert compared(
        "least-salient-half-is-worse",
        "least",
        "Hits of neighbours minus hits of star, against the least salient half.",
    )


def test_the_forgotten_name_yields_the_other_class() -> None:
    arms = {
        "star": star("salient"),
        "circle": star("salient", "circle"),
        "circle, original": star(None, "circle"),
        "star, original": star(None),
    }
    holds = (
        arms["circle"].mean() > arms["star"].mean()
        and arms["circle"].mean() >= arms["circle, original"].mean() + 0.2
    )
    assert setup.settle(
        SalUn,
        "forgotten-name-yields-the-other-class",
        holds,
        arms,
        "Prompts of star: circles more often than stars, and 20 points more often than by the original.",
    )
