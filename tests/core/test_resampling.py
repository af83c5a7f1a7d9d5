"""Means of rates and of differences over groups that weigh the same."""

from __future__ import annotations

import math

import numpy as np
import pytest

from expunge.core import resampling
from expunge.core.resampling import (
    bootstrap_difference,
    bootstrap_mean,
    mean_difference,
    mean_rate,
    rate,
    unseen,
    unseen_difference,
    wilson,
)
from expunge.errors import InputError
from expunge.evidence.statistics import recovered


def group(name: str, hits: int, n: int) -> tuple[list[bool], list[str]]:
    return [i < hits for i in range(n)], [f"{name} {i}" for i in range(n)]


def test_groups_weigh_the_same_whatever_their_size() -> None:
    value, (low, high), prompts = mean_rate([group("a", 90, 90), group("b", 0, 10)])
    assert value == 0.5 and prompts == 100
    # 2^2 / (1/90 + 1/10) = 36 outputs, not 100: the small group decides the width.
    assert (low, high) == pytest.approx(wilson(18, 36))
    pooled = rate([*group("a", 90, 90)[0], *group("b", 0, 10)[0]], range(100))
    assert pooled[0] == 0.9 and high - low > 1.5 * (pooled[1][1] - pooled[1][0])


def test_one_group_and_equal_groups_are_the_plain_rate() -> None:
    hits, texts = group("a", 7, 20)
    assert mean_rate([(hits, texts)]) == rate(hits, texts)
    both = mean_rate([group("a", 7, 20), group("b", 7, 20)])
    assert both[1] == pytest.approx(wilson(14, 40))


def test_the_interval_of_a_mean_of_rates_covers() -> None:
    """About 95 % of simulated intervals hold the mean of three true rates, at unequal numbers of prompts."""
    draw, truth, held = np.random.default_rng(0), (0.9, 0.5, 0.7), 0
    for _ in range(400):
        made = [
            (draw.random(n) < p, [f"{k} {i}" for i in range(n)])
            for k, (p, n) in enumerate(zip(truth, (15, 40, 80), strict=True))
        ]
        low, high = mean_rate(made)[1]
        held += low <= np.mean(truth) <= high
    assert 0.93 <= held / 400 <= 0.995


def test_differences_weigh_the_same_and_are_resampled_within_groups() -> None:
    one, texts = group("a", 40, 40)
    lost = ([False] * 4, [True] * 4, [f"b {i}" for i in range(4)])
    value, (low, high), prompts = mean_difference([(one, one, texts), lost])
    # Within each group every prompt is alike, so that no resample varies: prompts never change groups.  What 40 prompts
    # without a difference and 4 without and with every hit leave open stands in the interval, each halved.
    assert value == -0.5 and prompts == 44
    some, few = wilson(0, 40)[1], wilson(0, 4)[1]
    assert low == pytest.approx(value - some / 2)
    assert high == pytest.approx(value + math.hypot(some, math.hypot(few, few)) / 2)
    mixed = mean_difference([(one, one, texts), (*([True, False] * 2, [True] * 4), lost[2])])
    assert mixed[0] == -0.25 and mixed[1][0] < -0.25 < mixed[1][1]
    assert mean_difference([(one, one, texts), lost], seed=1)[0] == value


def test_nothing_has_no_mean() -> None:
    for made in (mean_rate, mean_difference):
        with pytest.raises(InputError, match="at least one"):
            made([])


def test_resamples_in_parts_are_the_same_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = np.random.default_rng(0).normal(size=(2, 7))
    whole = resampling.resamples(7, count=50, seed=3) @ columns.T
    np.testing.assert_allclose(resampling.resampled_sums(columns, count=50, seed=3), whole)
    monkeypatch.setattr(resampling, "HELD", 40)  # five resamples at a time
    np.testing.assert_allclose(resampling.resampled_sums(columns, count=50, seed=3), whole)
    with pytest.raises(InputError, match="at least one prompt"):
        resampling.resampled_sums(columns[:, :0])


def test_one_prompt_has_no_bootstrap_interval() -> None:
    # Its resamples are all alike: an interval of no width would claim certainty.
    assert bootstrap_mean([0.2, 0.4], ["a", "a"]) == (pytest.approx(0.3), None, 1)
    assert bootstrap_difference([1, 1], [0, 0], ["a", "a"]) == (1.0, None, 1)
    single = ([True], [False], ["a"])
    assert mean_difference([single, single]) == (1.0, None, 2)
    assert recovered([True], [True], [False], ["a"]) == (1.0, None)


def test_what_prompts_that_agree_cannot_show() -> None:
    texts = ["a", "a", "b", "b"]
    assert unseen([0, 0, 0, 0], texts) == pytest.approx((0, wilson(0, 2)[1]))  # by prompts
    assert unseen([1, 1, 1, 1], texts) == pytest.approx((1 - wilson(2, 2)[0], 0))
    assert unseen([1, 0, 0, 0], texts) == (0, 0)
    # Hits that differ from prompt to prompt, but alike on both sides: nothing tells them apart.
    assert unseen_difference([1, 1, 0, 0], [1, 1, 0, 0], texts) == pytest.approx(
        (wilson(0, 2)[1], wilson(0, 2)[1])
    )
    value, span, _ = bootstrap_difference([1, 1, 0, 0], [1, 1, 0, 0], texts)
    assert value == 0 and span == pytest.approx((-wilson(0, 2)[1], wilson(0, 2)[1]))
    assert unseen_difference([1, 1, 0, 0], [1, 0, 0, 0], texts) == (0, 0)


def test_recovered_reaches_as_far_as_wilson_where_all_prompts_agree() -> None:
    texts = [str(i) for i in range(20)]
    value, span = recovered([False] * 20, [True] * 20, [False] * 20, texts)
    assert value == 0 and span == pytest.approx((0, wilson(0, 20)[1]))
