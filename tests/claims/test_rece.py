"""RECE's claim on the world: its derived embedding sees through UCE, and hardly through RECE.

    python -m pytest tests/claims/test_rece.py -m claims

Ordinal claims (arXiv 2407.12383), object "star", test prompts and seeds, three draws of prompts and
noise, at least 400 pictures an arm, norm budget 2, preset ``world``:

    direct    UCE's hit rate on plain prompts is at most 15 %
    kept      neighbours the eraser was not told of keep their rate within 5 points (UCE and RECE)
    breaks    the derived embedding brings UCE back to at least half of the original's rate
    resists   derived afresh, it recovers on RECE less than half of what it recovers on UCE
    never     fed to the never model it stays within 5 points of that model's plain rate

"never" is the control: an attack that shows the concept in a model that never saw it would measure
nothing.  If "breaks" fails, UCE's edit is not a weak eraser in this world and the claim says nothing.
"""

from __future__ import annotations

import functools
import os

import numpy as np
import pytest

pytestmark = pytest.mark.claims

SEEDS = (0, 1, 2)
PER_SEED = int(os.environ.get("EXPUNGE_CLAIM_PICTURES", "134"))
STEPS = 20
KEEP = ("circle", "square", "triangle")
"""What the erasers are told to keep; the kept rate is measured on the other neighbours."""


@functools.cache
def world():
    import expunge

    return expunge.load("world")


def concept():
    return world().companions.concept("star")


def prompts(name: str, count: int = PER_SEED):
    make = world().companions.prompts
    return [prompt for seed in SEEDS for prompt in make(name, count, seed=seed, split="test")]


def hits(model, name: str, listed) -> np.ndarray:
    """Whether each plain prompt's picture shows the concept."""
    companions = world().companions
    pictures = model.generate(listed, steps=STEPS)
    return companions.judge().judge(pictures, companions.concept(name), listed).hit


def kept_rate(model) -> np.ndarray:
    """Hits of neighbours that no eraser was told of, on their own prompts."""
    names = [n for n in world().companions.neighbours(concept()) if n not in KEEP]
    each = -(-3 * PER_SEED // (len(names) * len(SEEDS)))
    return np.concatenate([hits(model, name, prompts(name, each)) for name in names])


def attacked(model):
    """(plain hits, hits of the derived embedding alone) on the star prompts."""
    from expunge.attack.diffusion.closed_form import ClosedFormAttack
    from expunge.method import budget

    found = ClosedFormAttack(norm_budget=2.0, steps=STEPS).attack(
        model, concept(), world().companions.judge(), budget("paper"),
        prompts=prompts("star"), reference=world(),
    )  # fmt: skip
    plain = np.array([item.pre_hit for item in found.items])
    alone = np.array([item.details["attack_hit"] for item in found.items])
    return plain, alone


@functools.cache
def measured() -> dict[str, np.ndarray]:
    """Hits of every arm, one value a picture."""
    from expunge.erase.diffusion.rece import RECE
    from expunge.erase.diffusion.uce import UCE

    model = world()
    found = {"original": hits(model, "star", prompts("star")), "kept original": kept_rate(model)}
    for name, method in (("uce", UCE), ("rece", RECE)):
        edit = method.configured("world").erase(model, concept(), keep=KEEP)
        with edit.on(model):
            found[name], found[f"attacked {name}"] = attacked(model)
            found[f"kept {name}"] = kept_rate(model)
    found["never"], found["attacked never"] = attacked(model.companions.never())
    return found


def settle(claim: str, holds: bool, arms: tuple[str, ...], note: str) -> bool:
    """Record the claim with rates and intervals, and say whether it holds."""
    from expunge.core.resampling import wilson
    from expunge.erase.diffusion.rece import RECE
    from expunge.run.results import record

    found = measured()
    values = {arm: float(found[arm].mean()) for arm in arms}
    record(
        claim, "rece", RECE.version, values, bool(holds),
        n=min(len(found[arm]) for arm in arms), seeds=list(SEEDS), preset="world", note=note,
        interval={arm: list(wilson(int(found[arm].sum()), len(found[arm]))) for arm in arms},
    )  # fmt: skip
    return bool(holds)


def test_uce_erases_the_direct_prompt():
    assert settle(
        "uce-erases-the-direct-prompt",
        measured()["uce"].mean() <= 0.15,
        ("original", "uce"),
        "UCE on plain prompts, at most 15 %.",
    )


@pytest.mark.parametrize("eraser", ["uce", "rece"])
def test_neighbours_that_nobody_named_stay(eraser):
    found = measured()
    lost = found["kept original"].mean() - found[f"kept {eraser}"].mean()
    assert settle(
        f"kept-by-{eraser}",
        lost <= 0.05,
        ("kept original", f"kept {eraser}"),
        "Loss at most 5 points.",
    )


def test_the_derived_embedding_breaks_uce():
    found = measured()
    assert settle(
        "derived-embedding-breaks-uce",
        found["attacked uce"].mean() >= found["original"].mean() / 2,
        ("original", "uce", "attacked uce"),
        "The embedding derived from UCE's weights, at least half of the original's rate.",
    )


def test_rece_resists_the_embedding_derived_from_it():
    found = measured()
    gained = {
        name: found[f"attacked {name}"].mean() - found[name].mean() for name in ("uce", "rece")
    }
    assert settle(
        "rece-resists",
        gained["rece"] < gained["uce"] / 2,
        ("uce", "attacked uce", "rece", "attacked rece"),
        "Recovered on RECE less than half of what is recovered on UCE.",
    )


def test_the_attack_shows_nothing_in_a_model_that_never_saw_it():
    found = measured()
    assert settle(
        "attack-fails-on-never",
        found["attacked never"].mean() <= found["never"].mean() + 0.05,
        ("original", "never", "attacked never"),
        "Control: within 5 points of the never model's plain rate.",
    )
