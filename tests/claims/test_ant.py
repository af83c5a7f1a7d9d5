"""ANT's claims on the world.

    python -m pytest tests/claims/test_ant.py -m claims

Ordinal claims (arXiv 2504.12782), object "star", preset ``world``, edits of three training seeds unless said otherwise:

    inference    turning guidance round late in the frozen model, without training, trades layout against the hit rate
                 monotonically over t' in 10, 20, 30, 40, 48 of 50, in all by at least 50 points and a similarity of 0.3
    layout       turning late steps only keeps more layout than turning all (t' = 50), at a hit rate at most five points
                 higher
    trade-off    the same over trained t' of 20, 40 and 48 (one training seed, prompts of three)
    early        early predictions for the concept move less than late ones, and less than where all steps are turned
    mask         the intersected mask keeps more of the untold neighbours than no mask
    least        the least salient half has a worse trade-off: hits of neighbours minus hits of star
    swapped      exchanging early and late (negative control) keeps less layout

Layout similarity is the correlation of two pictures of one prompt and seed on a grid of 8 by 8 cells, erased against
original.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest

from expunge.core import scores, trajectories
from expunge.core.reversal import Reversal, depths
from expunge.erase.diffusion.ant import ANT
from expunge.measure.layout import layout_similarity

from . import setup

pytestmark = pytest.mark.claims

SWEPT = (10, 20, 30, 40, 48)
FEW = -(-setup.PICTURES // 2)
"""Pictures of a seed in sweeps."""


def star_prompts(seed: int, count: int) -> list[Any]:
    return setup.world().companions.prompts("star", count, seed=seed, split="test")


def masked(mask: str) -> dict[str, Any]:
    """The settings of a mask; none for the preset's own, so that arms are shared."""
    return {} if mask == "salient" else {"mask": mask}


def judged(model: Any, before: np.ndarray, listed: list[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Hits of star, and layout similarity to the original's pictures."""
    pictures = setup.drawn(model, listed)
    hit = setup.judge().judge(pictures, setup.star(), listed).hit
    return hit, layout_similarity(before, pictures)


@functools.cache
def erased(count: int, frozen: tuple[tuple[str, Any], ...], same: bool = False) -> Any:
    """Hits and layout of star with settings changed; ``same``: one training seed for all prompts."""
    found = []
    for seed in setup.SEEDS:
        listed = star_prompts(seed, count)
        before = setup.drawn(setup.world(), listed)
        with setup.arm("ant", 0 if same else seed, **dict(frozen)) as model:
            found.append(judged(model, before, listed))
    return tuple(np.concatenate(values) for values in zip(*found, strict=True))


def trained(count: int = setup.PICTURES, same: bool = False, **settings: Any) -> Any:
    return erased(count, tuple(sorted(settings.items())), same)


@functools.cache
def turned(t_prime: int) -> Any:
    """Hits and layout of star where the frozen model's guidance is turned."""
    found = []
    for seed in setup.SEEDS:
        listed = star_prompts(seed, FEW)
        before = setup.drawn(setup.world(), listed)
        with setup.world().controlled(Reversal(t_prime)):
            found.append(judged(setup.world(), before, listed))
    return tuple(np.concatenate(values) for values in zip(*found, strict=True))


@functools.cache
def kept(mask: str | None) -> np.ndarray:
    """Hits of the untold neighbours; ``None``: the original."""
    name, settings = ("original", {}) if mask is None else ("ant", masked(mask))
    return setup.kept_of(lambda seed: setup.arm(name, seed, **settings))


@functools.cache
def moved(t_prime: int | None) -> dict[str, np.ndarray]:
    """How far predictions for the concept moved, relative to its direction, at early and late points."""
    world, method = setup.world(), ANT.configured("world")
    ranges = depths(method.sampling_steps, method.t_prime)
    found: dict[str, list[np.ndarray]] = {name: [] for name in ranges}
    for seed in setup.SEEDS:
        points = trajectories.draw_along(
            world, ["star"], 48, list(ranges.values()), steps=method.sampling_steps, guidance=3.0, seed=seed + 1000,
        )  # fmt: skip
        rows = [world.encode("star"), world.unconditional()]
        before = [scores.asked(world, own, rows) for own in points]
        settings = {} if t_prime is None else {"t_prime": t_prime}
        with setup.arm("ant", seed, **settings) as model:
            after = [scores.asked(model, own, rows[:1])[0] for own in points]
        for name, (named, empty), new in zip(ranges, before, after, strict=True):
            size = (named - empty).flatten(1).norm(dim=1)
            found[name].append(((new - named).flatten(1).norm(dim=1) / size).numpy())
    return {name: np.concatenate(values) for name, values in found.items()}


def test_without_training_late_turning_trades_layout_for_erasure() -> None:
    arms = {t: turned(t) for t in SWEPT}
    hits, layouts = ([float(v[i].mean()) for v in arms.values()] for i in (0, 1))
    falls = [a >= b for values in (hits, layouts) for a, b in itertools.pairwise(values)]
    assert setup.settle(
        ANT,
        "inference-only-trades-layout-for-erasure",
        all(falls) and hits[0] - hits[-1] >= 0.5 and layouts[0] - layouts[-1] >= 0.3,
        {f"star at t' {t}": hit for t, (hit, _) in arms.items()},
        "The frozen model, guidance turned in the last t' of 50 steps: hit rate and layout similarity both fall.",
        **{f"layout at t' {t}": float(value.mean()) for t, (_, value) in arms.items()},
    )


def test_late_turning_keeps_more_layout_than_turning_all_steps() -> None:
    late, whole = trained(), trained(t_prime=50)
    assert setup.settle(
        ANT,
        "late-only-keeps-layout",
        late[1].mean() > whole[1].mean() and late[0].mean() <= whole[0].mean() + 0.05,
        {"star, late only": late[0], "star, all steps": whole[0]},
        "More layout similarity than t' = 50, at a hit rate at most five points higher.",
        layout_late=float(late[1].mean()),
        layout_all=float(whole[1].mean()),
    )


def test_the_switch_step_is_a_trade_off() -> None:
    arms = {t: trained(FEW, same=True, t_prime=t) for t in (20, 40, 48)}
    hits, layouts = ([float(v[i].mean()) for v in arms.values()] for i in (0, 1))
    assert setup.settle(
        ANT,
        "switch-step-is-a-trade-off",
        hits == sorted(hits, reverse=True) and layouts == sorted(layouts, reverse=True),
        {f"star at t' {t}": hit for t, (hit, _) in arms.items()},
        "Trained with t' of 20, 40 and 48, one training seed: hit rate and layout similarity both fall.",
        **{f"layout at t' {t}": float(value.mean()) for t, (_, value) in arms.items()},
    )


def test_early_predictions_are_held() -> None:
    own, whole = moved(None), moved(50)
    numbers = {
        "early": own["preserve"], "late": own["erase"],
        "early, all steps turned": whole["preserve"], "late, all steps turned": whole["erase"],
    }  # fmt: skip
    means = {name: float(value.mean()) for name, value in numbers.items()}
    assert setup.settle(
        ANT,
        "early-predictions-are-held",
        means["early"] < min(means["late"], means["early, all steps turned"]),
        {},
        "Distance of predictions for the concept from the original's, in lengths of its direction of guidance.",
        **means,
    )


def test_the_intersected_mask_keeps_more_than_no_mask() -> None:
    arms = {"mask": kept("salient"), "no mask": kept("none")}
    assert setup.settle(
        ANT,
        "mask-keeps-more",
        arms["mask"].mean() > arms["no mask"].mean(),
        {"original": kept(None), **arms, "star, mask": trained()[0], "star, no mask": trained(mask="none")[0]},
        "Hits of neighbours that nobody named; hits of star beside them.",
        density=density("salient"),
    )  # fmt: skip


def density(mask: str) -> float:
    """Mean density of the masks of three training seeds."""
    shares = []
    for seed in setup.SEEDS:
        with setup.arm("ant", seed, **masked(mask)) as model:
            (edit,) = model.edits
            shares.append(edit.manifest.report["mask"]["density"])
    return sum(shares) / len(shares)


def test_the_least_salient_half_is_worse() -> None:
    arms = {m: (kept(m), trained(**masked(m))[0]) for m in ("salient", "least")}
    gaps = {mask: float(near.mean() - own.mean()) for mask, (near, own) in arms.items()}
    assert setup.settle(
        ANT,
        "least-salient-half-is-worse",
        gaps["least"] < gaps["salient"],
        {f"kept, {m}": near for m, (near, _) in arms.items()} | {f"star, {m}": own for m, (_, own) in arms.items()},
        "Hits of neighbours minus hits of star.",
        density=density("least"),
    )  # fmt: skip


def test_swapped_ranges_lose_layout() -> None:
    own, swapped = trained(), trained(swapped=True)
    assert setup.settle(
        ANT,
        "swapped-ranges-lose-layout",
        swapped[1].mean() < own[1].mean(),
        {"star": own[0], "star, swapped": swapped[0]},
        "Negative control: early steps turned and the last ones held, as the authors' single-concept code does.",
        layout=float(own[1].mean()),
        layout_swapped=float(swapped[1].mean()),
    )
