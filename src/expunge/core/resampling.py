"""Intervals: Wilson for a rate, bootstrap over prompts for means and differences.

Pictures of one prompt with several seeds are correlated, so the unit is the prompt: the bootstrap
resamples prompts with all their pictures, and a Wilson interval is taken at an effective number of
pictures (all of them when they are independent, the number of prompts when they are not at all).
All randomness is private and fixed, so that the same numbers give the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import numpy as np

from ..errors import InputError
from ..method.intervals import Z, wilson

__all__ = [
    "Z",
    "bootstrap_difference",
    "bootstrap_mean",
    "expected_maximum",
    "grouped",
    "layered",
    "mean_difference",
    "mean_rate",
    "rate",
    "reaching",
    "resampled_sums",
    "resamples",
    "unseen",
    "unseen_difference",
    "units_of",
    "wilson",
]

Hits = Sequence[bool] | np.ndarray
Span = tuple[float, float]

RESAMPLES = 2_000

HELD = 4_000_000
"""Numbers of a matrix of resamples that are held at a time."""


def grouped(
    values: Sequence[float] | np.ndarray, groups: Sequence[Hashable]
) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts of ``values`` for each distinct group, in order of first appearance."""
    values = np.asarray(values, np.float64)
    if len(values) != len(groups):
        raise InputError(f"{len(values)} values but {len(groups)} prompts")
    place: dict[Hashable, int] = {}
    index = np.array([place.setdefault(group, len(place)) for group in groups], int)
    sums = np.bincount(index, weights=values, minlength=len(place))
    return sums, np.bincount(index, minlength=len(place)).astype(float)


def rate(
    hits: Sequence[bool] | np.ndarray, prompts: Sequence[Hashable]
) -> tuple[float, tuple[float, float], int]:
    """Hit rate, its 95 % Wilson interval at the effective sample size, and the number of prompts."""
    share, effective, groups = _share(hits, prompts)
    return share, wilson(share * effective, effective), groups


def mean_rate(
    groups: Sequence[tuple[Hits, Sequence[Hashable]]],
) -> tuple[float, tuple[float, float], int]:
    """Mean of the hit rates of several groups (hits, prompts), each weighing the same.

    Its 95 % Wilson interval is taken at the effective sample size of an equally weighted mean of ``k``
    rates, ``k^2 / sum 1 / n_i``: few prompts in one group widen it.  The third value is the number of
    prompts of all groups.
    """
    found = [_share(hits, prompts) for hits, prompts in groups]
    if not found:
        raise InputError("a mean of rates needs at least one rate")
    share = float(np.mean([one[0] for one in found]))
    effective = len(found) ** 2 / sum(1 / one[1] for one in found)
    return share, wilson(share * effective, effective), sum(one[2] for one in found)


def _share(hits: Hits, prompts: Sequence[Hashable]) -> tuple[float, float, int]:
    """Hit rate, effective number of independent outputs, and the number of prompts."""
    values = np.asarray(hits, float)
    sums, counts = grouped(values, prompts)
    total, groups = counts.sum(), len(counts)
    if total == 0:
        raise InputError("a rate needs at least one output")
    share = float(sums.sum() / total)
    effective = float(groups)
    binomial = share * (1 - share) / total
    if groups > 1 and binomial > 0:
        # Variance of the share between prompts, against what independent pictures would have.
        residual = sums - share * counts
        clustered = (residual @ residual) * groups / (groups - 1) / total**2
        effective = float(np.clip(total * binomial / max(clustered, 1e-12), groups, total))
    elif groups == total:
        effective = float(total)
    return share, effective, groups


def units_of(
    one: Sequence[object], two: Sequence[object], prompts: Sequence[Hashable] | None
) -> list[Hashable]:
    """The unit of each picture: its prompt, or itself where none are told.

    Raises:
        InputError: The lists differ in length or are empty.
    """
    units: list[Hashable] = list(range(len(one))) if prompts is None else list(prompts)
    if not len(one) == len(two) == len(units) or not len(one):
        raise InputError(
            f"an accuracy needs what was asked, seen and prompted for each of at least one picture, got {len(one)}, "
            f"{len(two)} and {len(units)}"
        )
    return units


def resamples(groups: int, count: int = RESAMPLES, seed: int | Sequence[int] = 0) -> np.ndarray:
    """How often each of ``groups`` prompts is drawn in each resample, ``(count, groups)``."""
    if groups < 1:
        raise InputError("a bootstrap needs at least one prompt")
    drawn = np.random.default_rng(seed).multinomial(groups, np.full(groups, 1 / groups), size=count)
    return drawn.astype(float)


def resampled_sums(
    columns: np.ndarray, count: int = RESAMPLES, seed: int | Sequence[int] = 0
) -> np.ndarray:
    """``resamples(groups) @ columns.T`` of columns ``(k, groups)``, ``(count, k)``, a part of the resamples at a time.

    The resamples are those of :func:`resamples`; for 30,000 prompts all of them at once would take a gigabyte.
    """
    groups = columns.shape[1]
    if groups < 1:
        raise InputError("a bootstrap needs at least one prompt")
    dice, shares = np.random.default_rng(seed), np.full(groups, 1 / groups)
    step = max(1, HELD // groups)
    parts = [
        dice.multinomial(groups, shares, size=min(step, count - start)).astype(float) @ columns.T
        for start in range(0, count, step)
    ]
    return np.concatenate(parts)


def layered(
    layers: Sequence[Sequence[Hashable]], count: int = RESAMPLES, seed: int | Sequence[int] = 0
) -> np.ndarray:
    """How often each item is drawn in each resample of two layers (seeds, and prompts within them).

    Args:
        layers: For each layer the group (prompt) of each of its items; a layer's items are drawn by group.
        count: Resamples.
        seed: Private seed.

    Returns:
        ``(count, items)``, the items of all layers one after another.  A layer that is drawn twice has its
        groups drawn anew both times; with one layer this is the bootstrap over its groups.
    """
    if not layers or not all(layers):
        raise InputError("a bootstrap needs at least one prompt in each layer")
    dice = np.random.default_rng(seed)
    chosen = dice.multinomial(len(layers), np.full(len(layers), 1 / len(layers)), size=count)
    parts = []
    for place, groups in enumerate(layers):
        known: dict[Hashable, int] = {}
        index = [known.setdefault(group, len(known)) for group in groups]
        shares = np.full(len(known), 1 / len(known))
        parts.append(dice.multinomial(chosen[:, place] * len(known), shares)[:, index])
    return np.concatenate(parts, axis=1).astype(float)


def unseen(hits: Hits, prompts: Sequence[Hashable]) -> Span:
    """How far below and above their share lies what prompts that all agree cannot show, ``(below, above)``.

    A bootstrap draws from what occurred, so that of such prompts its interval has no width.  Wilson's bounds at the
    number of prompts say what none of them excludes; where prompts differ, the bootstrap knows, and both are 0.
    Those of a difference or a mean follow by the square root of their squares' sum (MOVER, Zou and Donner 2008,
    doi 10.1002/sim.3095).
    """
    sums, counts = grouped(np.asarray(hits, float), prompts)
    share = float(sums.sum() / counts.sum())
    if 0 < share < 1:
        return 0.0, 0.0
    low, high = wilson(share * len(counts), len(counts))
    return share - low, high - share


def unseen_difference(one: Hits, two: Hits, prompts: Sequence[Hashable]) -> Span:
    """The same for ``one - two`` of paired hits, where the difference is the same on every prompt."""
    sums, counts = grouped(np.asarray(one, float) - np.asarray(two, float), prompts)
    each = sums / counts
    if np.ptp(each) > 0:
        return 0.0, 0.0
    if each[0] == 0:
        # None of the prompts tells the two apart; how many would is what they cannot show.
        rare = wilson(0, len(counts))[1]
        return rare, rare
    (below, above), (under, over) = unseen(one, prompts), unseen(two, prompts)
    return math.hypot(below, over), math.hypot(above, under)


def bootstrap_mean(
    values: Sequence[float] | np.ndarray, prompts: Sequence[Hashable], seed: int = 0
) -> tuple[float, Span | None, int]:
    """Mean, 95 % percentile interval over prompts, and the number of prompts.

    One prompt does not show how prompts differ: there is no interval, where a resample would give one of no width.
    """
    sums, counts = grouped(values, prompts)
    if len(counts) == 1:
        return float(sums.sum() / counts.sum()), None, 1
    drawn = resampled_sums(np.stack([sums, counts]), seed=seed)
    means = drawn[:, 0] / drawn[:, 1]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(sums.sum() / counts.sum()), (float(low), float(high)), len(counts)


def mean_difference(
    groups: Sequence[tuple[Hits, Hits, Sequence[Hashable]]], seed: int = 0
) -> tuple[float, Span | None, int]:
    """Mean over groups (one, two, prompts) of the mean of ``one - two``, each group weighing the same.

    The 95 % percentile interval resamples the prompts of each group within it, and reaches as far as
    :func:`unseen_difference` says; there is none where every group has one prompt.  The third value is the number of
    prompts of all groups.
    """
    if not groups:
        raise InputError("a mean of differences needs at least one difference")
    values, drawn, prompts = [], [], 0
    below: list[float] = []
    above: list[float] = []
    for place, (one, two, texts) in enumerate(groups):
        under, over = unseen_difference(one, two, texts)
        below.append(under)
        above.append(over)
        sums, counts = grouped(np.asarray(one, float) - np.asarray(two, float), texts)
        weights = resamples(len(counts), seed=(seed, place))
        values.append(sums.sum() / counts.sum())
        drawn.append((weights @ sums) / (weights @ counts))
        prompts += len(counts)
    if prompts == len(groups):
        return float(np.mean(values)), None, prompts
    low, high = np.percentile(np.mean(drawn, axis=0), [2.5, 97.5])
    value = float(np.mean(values))
    reach = (math.hypot(*side) / len(groups) for side in (below, above))
    return value, reaching(value, (float(low), float(high)), *reach), prompts


def bootstrap_difference(
    one: Sequence[float] | np.ndarray,
    two: Sequence[float] | np.ndarray,
    prompts: Sequence[Hashable],
    seed: int = 0,
) -> tuple[float, Span | None, int]:
    """Mean of ``one - two`` of hits of the same prompts and seeds, with its interval.

    Where the difference is the same on every prompt, the interval reaches as far as :func:`unseen_difference` says.
    """
    first, second = np.asarray(one, np.float64), np.asarray(two, np.float64)
    if first.shape != second.shape:
        raise InputError("a paired difference needs the same prompts and seeds on both sides")
    value, span, n = bootstrap_mean(first - second, prompts, seed)
    if span is None:
        return value, None, n
    return value, reaching(value, span, *unseen_difference(first, second, prompts)), n


def reaching(value: float, span: Span, below: float, above: float) -> Span:
    """An interval of ``value`` that reaches at least as far ``below`` and ``above`` it."""
    return min(span[0], value - below), max(span[1], value + above)


def expected_maximum(rates: Sequence[float], drawn: int = 25) -> float:
    """Expected largest of ``drawn`` of the rates, drawn without putting back; exact, by order statistics (I2P).

    Raises:
        InputError: There are fewer rates than are drawn.
    """
    n = len(rates)
    if drawn < 1 or n < drawn:
        raise InputError(f"an expected maximum over {drawn} prompts needs as many, got {n}")
    ordered = sorted(map(float, rates))
    whole = math.comb(n, drawn)
    # The i-th smallest is the largest of a draw when the others come from the i - 1 below it.
    return sum(
        rate * (math.comb(i - 1, drawn - 1) / whole)
        for i, rate in enumerate(ordered, 1)
        if i >= drawn
    )
