"""Sparse autoencoders on activations whose true atoms are known: recorded claims.

256 unit atoms in 64 dimensions, 8 active in a row without repetition, drawn with Zipf weights, coefficients uniform
from 0.5 to 1.5, noise 0.02, 200,000 rows of which a tenth is held out.  Step size, penalties and the window after which
a unit is dead were chosen on one draw of the data (development, seed 100); the claims run on three others.

A linear encoder cannot tell eight such atoms apart without error: with the TRUE atoms, the eight largest correlations
and the best coefficients for them reach an R2 of 0.81 (development).  The target of 0.95 is kept and recorded as it is.
"""

from __future__ import annotations

import functools
import itertools
import os
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from expunge.core.sparse_autoencoder import (
    SparseAutoencoder,
    SparseAutoencoderConfig,
    fit,
    recovery,
    stability,
)
from expunge.models.base import noise_generator
from expunge.run import results

pytestmark = pytest.mark.claims

SEEDS = (0, 1, 2)
WIDTH, ATOMS, ACTIVE, HELD_OUT = 64, 256, 8, 20_000
STEPS = int(os.environ.get("EXPUNGE_CLAIM_STEPS", "5000"))
ROWS = int(os.environ.get("EXPUNGE_CLAIM_ROWS", "200000"))
PENALISED = {"auxiliary": "none", "sparsity_warm_up": 200}
ARMS: dict[str, dict[str, Any]] = {
    "topk": {},
    "topk, 512 units": {"units": 512},
    "topk, 512 units, no auxk": {"units": 512, "auxiliary": "none"},
    "batch-topk": {"variant": "batch-topk"},
    "jump-relu": {
        "variant": "jump-relu", "l0_target": 8.0, "bandwidth": 0.1, "threshold": 0.1, "log_threshold": False,
        **PENALISED,
    },
    "vanilla": {"variant": "vanilla", "l1": 0.45, "encoder_norm": 0.1, **PENALISED},
    "relaxed archetypal topk": {"dictionary": "relaxed-archetypal", "candidates": 1024},
}  # fmt: skip


@functools.cache
def planted(seed: int) -> tuple[Tensor, Tensor]:
    """Rows and the atoms they are made of."""
    generator = noise_generator(seed, "claim data")
    true = functional.normalize(torch.randn(ATOMS, WIDTH, generator=generator), dim=1)
    weights, made = -torch.log(torch.arange(1, ATOMS + 1.0)), []
    for size in torch.arange(ROWS).split(20_000):
        uniform = torch.rand(len(size), ATOMS, generator=generator).clamp(1e-9, 1 - 1e-7)
        # The largest of log weight + Gumbel noise are a draw without repetition.
        on = (weights - torch.log(-torch.log(uniform))).topk(ACTIVE, 1).indices
        coefficients = torch.rand(len(size), ACTIVE, generator=generator) + 0.5
        code = torch.zeros(len(size), ATOMS).scatter_(1, on, coefficients)
        made.append(code @ true + 0.02 * torch.randn(len(size), WIDTH, generator=generator))
    return torch.cat(made), true


@functools.cache
def trained(arm: str, seed: int, data: int) -> SparseAutoencoder:
    """One arm, trained with a seed on a draw of the data."""
    rows, _ = planted(data)
    settings = {
        "width": WIDTH, "units": ATOMS, "k": ACTIVE, "steps": STEPS, "batch": 512, "lr": 5e-3, "schedule": "linear",
        "warm_up": 100, "clip": 1.0, "dead_tokens": 50_000, "threshold_after": 100,
    }  # fmt: skip
    config = SparseAutoencoderConfig(**{**settings, **ARMS[arm]})
    held_out = min(HELD_OUT, ROWS // 10)
    return fit(rows[:-held_out], config, seed=seed, held_out=rows[-held_out:])


def of_seeds(name: str, arm: str) -> list[float]:
    """A number of the quality table, or ``recovery``, of each seed's autoencoder on each seed's data."""
    models = [trained(arm, seed, seed) for seed in SEEDS]
    if name == "recovery":
        pairs = zip(SEEDS, models, strict=True)
        return [recovery(planted(seed)[1], model.dictionary()) for seed, model in pairs]
    return [float(model.quality[name]) for model in models]


def settle(claim: str, found: dict[str, list[float]], holds: bool, note: str) -> bool:
    """Record the means over seeds with Student's interval."""
    half = {n: 4.303 * float(np.std(v, ddof=1)) / len(v) ** 0.5 for n, v in found.items()}
    means = {name: float(np.mean(v)) for name, v in found.items()}
    results.record(
        claim, SparseAutoencoderConfig.id, SparseAutoencoderConfig.version, means, bool(holds), HELD_OUT, list(SEEDS),
        interval={n: [means[n] - half[n], means[n] + half[n]] for n in found}, note="" if holds else note,
    )  # fmt: skip
    return bool(holds)


def mean(values: list[float]) -> float:
    return float(np.mean(values))


def test_topk_reconstructs() -> None:
    r2 = of_seeds("r2", "topk")
    note = (
        "the true atoms with the eight largest correlations and the best coefficients reach 0.81: eight of 256 atoms "
        "in 64 dimensions are not told apart by one linear step"
    )
    assert settle("topk-reaches-r2-of-095", {"topk r2": r2}, mean(r2) >= 0.95, note)


def test_topk_recovers_the_true_atoms() -> None:
    found = {
        "recovery": of_seeds("recovery", "topk"), "dead share": of_seeds("dead_share", "topk"),
        "r2": of_seeds("r2", "topk"),
    }  # fmt: skip
    holds = mean(found["recovery"]) >= 0.85 and mean(found["dead share"]) < 0.1
    assert settle(
        "topk-recovers-true-atoms-with-few-dead",
        found,
        holds,
        "too short a training, or too many dead units",
    )


def test_without_auxk_the_dead_share_doubles() -> None:
    arms = {"auxk": "topk, 512 units", "no auxk": "topk, 512 units, no auxk"}
    found = {
        f"{what}, {label}": of_seeds(name, arm)
        for label, arm in arms.items()
        for what, name in (("dead share", "dead_share"), ("r2", "r2"), ("recovery", "recovery"))
    }
    holds = mean(found["dead share, no auxk"]) >= 2 * mean(found["dead share, auxk"])
    note = "half of the 512 units have no true atom to find: auxk improves what is found and leaves the rest unused"
    assert settle("without-auxk-dead-share-doubles", found, holds, note)


def test_shrinkage_costs_the_l1_autoencoder() -> None:
    arms = ("topk", "batch-topk", "jump-relu", "vanilla")
    r2 = {f"r2, {arm}": of_seeds("r2", arm) for arm in arms}
    l0 = {f"l0, {arm}": of_seeds("l0", arm) for arm in arms}
    comparable = all(abs(mean(v) - ACTIVE) <= 1 for v in l0.values())
    worst = min(mean(r2[f"r2, {arm}"]) for arm in arms[:3])
    holds = comparable and worst >= mean(r2["r2, vanilla"]) + 0.02
    assert settle(
        "shrinkage-costs-vanilla-2-points-of-r2",
        r2 | l0,
        holds,
        "see the numbers of L0, 8 +- 1 is needed",
    )


def test_archetypal_dictionaries_are_more_stable() -> None:
    found: dict[str, list[float]] = {}
    for arm in ("topk", "relaxed archetypal topk"):
        models = [trained(arm, seed, 0) for seed in SEEDS]
        pairs = itertools.combinations(models, 2)
        found[f"stability, {arm}"] = [stability(a.dictionary(), b.dictionary()) for a, b in pairs]
        found[f"r2, {arm}"] = [float(model.quality["r2"]) for model in models]
    gain = mean(found["stability, relaxed archetypal topk"]) - mean(found["stability, topk"])
    loss = mean(found["r2, topk"]) - mean(found["r2, relaxed archetypal topk"])
    note = "the true atoms lie outside the hull of sums of eight atoms, where the reverse is legitimate"
    assert settle("relaxed-archetypal-is-more-stable", found, gain >= 0.1 and loss <= 0.05, note)
