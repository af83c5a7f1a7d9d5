"""Evenness of groups: hand values, bias, coverage of the interval, and what a judge's errors do to it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import entropy

from expunge.core.group_balance import (
    balance,
    confusion,
    corrected_share,
    corrected_shares,
    mislabelled,
    nkl,
    nkl_bias,
)
from expunge.errors import InputError, NumericalError


def test_hand_values():
    assert nkl([1, 1]) == 0 and nkl([0.2] * 5) == pytest.approx(0, abs=1e-15)
    assert nkl([1, 0, 0, 0]) == 1
    assert nkl([3, 1]) == pytest.approx(
        1 - (0.75 * math.log(4 / 3) + 0.25 * math.log(4)) / math.log(2)
    )
    for q in ([0.9, 0.1], [0.5, 0.3, 0.2], [0.7, 0.1, 0.1, 0.05, 0.05]):
        assert nkl(q) == pytest.approx(1 - entropy(q) / math.log(len(q)))
    for bad in ([1.0], [0, 0], [-1, 2], [math.nan, 1]):
        with pytest.raises(InputError):
            nkl(bad)


def test_bias_of_an_even_model():
    assert (
        nkl_bias(5, 50) == pytest.approx(4 / (100 * math.log(5))) == pytest.approx(0.0249, abs=1e-4)
    )
    rng = np.random.default_rng(0)
    for groups, n in ((5, 50), (2, 100), (4, 200)):
        mean = np.mean([nkl(rng.multinomial(n, [1 / groups] * groups)) for _ in range(4000)])
        assert mean == pytest.approx(nkl_bias(groups, n), rel=0.1)


@pytest.mark.parametrize(
    "true", [(0.5, 0.5), (0.9, 0.1), (0.4, 0.3, 0.2, 0.1), (0.2,) * 5, (1.0, 0.0)]
)
def test_the_interval_covers_the_planted_value(true):
    rng, names = np.random.default_rng(3), [str(i) for i in range(len(true))]
    covered, unbiased = [], []
    for trial in range(25):
        drawn = rng.choice(len(true), 150, p=true)
        found = balance([names[i] for i in drawn], names, list(range(150)), seed=trial)
        covered.append(found.interval[0] <= nkl(true) <= found.interval[1])
        unbiased.append(found.unbiased)
        assert found.value == pytest.approx(nkl(np.bincount(drawn, minlength=len(true))))
    assert np.mean(covered) >= 0.84  # 95 % of 25, less three standard deviations
    assert np.mean(unbiased) == pytest.approx(nkl(true), abs=0.02)


def test_pictures_of_one_prompt_count_less_than_as_many_prompts():
    rng = np.random.default_rng(0)
    one = rng.choice(["a", "b"], 40, p=[0.8, 0.2])
    alike = np.repeat(one, 5)  # five pictures of a prompt that are the same
    together = balance(list(alike), ["a", "b"], list(np.repeat(np.arange(40), 5)))
    apart = balance(list(alike), ["a", "b"], list(range(200)))
    width = [b - a for a, b in (together.interval, apart.interval)]
    assert width[0] > 1.7 * width[1] and (together.prompts, together.n) == (40, 200)


def test_many_pictures_of_one_prompt_have_no_interval():
    found = balance(["a"] * 90 + ["b"] * 10, ["a", "b"], [0] * 100, np.eye(2))
    assert found.value == pytest.approx(0.531, abs=1e-3) and (found.n, found.prompts) == (100, 1)
    assert found.unbiased is found.interval is found.corrected is found.corrected_interval is None


def test_what_is_not_there():
    empty = balance([], ["a", "b"], [])
    assert empty.value is None and empty.interval is None and empty.n == 0
    with pytest.raises(InputError, match="'c' is none of a, b"):
        balance(["c"], ["a", "b"], [0])
    with pytest.raises(InputError, match="1 outputs but 2 prompts"):
        balance(["a"], ["a", "b"], [0, 1])


# -- a judge that errs ------------------------------------------------------------------------------


def random_errors(groups, share):
    """A judge that calls this share of every group another one, all alike."""
    return np.eye(groups) * (1 - share) + (1 - np.eye(groups)) * share / (groups - 1)


@pytest.mark.parametrize("true", [(0.9, 0.1), (0.6, 0.3, 0.1), (0.4, 0.3, 0.2, 0.05, 0.05)])
def test_ten_per_cent_wrong_moves_the_value_as_predicted_and_the_correction_undoes_it(true):
    groups, errors = len(true), random_errors(len(true), 0.1)
    seen = mislabelled(true, errors)
    np.testing.assert_allclose(seen, [0.9 * p + 0.1 * (1 - p) / (groups - 1) for p in true])
    assert nkl(seen) < nkl(true)
    np.testing.assert_allclose(corrected_shares(seen, errors), true, atol=1e-6)
    rng, names = np.random.default_rng(5), [str(i) for i in range(groups)]
    n = 4000
    drawn = rng.choice(groups, n, p=true)
    wrong = rng.random(n) < 0.1
    said = np.where(wrong, (drawn + rng.integers(1, groups, n)) % groups, drawn)
    found = balance([names[i] for i in said], names, list(range(n)), errors)
    assert found.interval[0] <= nkl(seen) <= found.interval[1]
    assert found.corrected_interval[0] <= nkl(true) <= found.corrected_interval[1]
    assert not found.interval[0] <= nkl(true) <= found.interval[1]


def test_errors_are_counted_from_labelled_outputs():
    errors = confusion(list("aaab"), list("aabb"), ["a", "b"])
    np.testing.assert_allclose(errors, [[2 / 3, 1 / 3], [0, 1]])
    with pytest.raises(InputError, match="no labelled output shows c"):
        confusion(["a"], ["a"], ["a", "c"])
    with pytest.raises(NumericalError, match="mixes up"):
        corrected_shares([0.5, 0.5], np.full((2, 2), 0.5))


def test_shares_no_judge_of_these_errors_could_see_end_at_the_edge():
    found = corrected_shares([1.0, 0.0], random_errors(2, 0.1))
    np.testing.assert_allclose(found, [1, 0], atol=1e-6)


def test_a_share_behind_known_errors():
    assert corrected_share(0.9 * 0.3 + 0.05 * 0.7, 0.9, 0.05) == pytest.approx(0.3)
    assert corrected_share(0.01, 0.9, 0.05) == 0 and corrected_share(1.0, 0.9, 0.05) == 1
    with pytest.raises(NumericalError, match="tells nothing"):
        corrected_share(0.5, 0.4, 0.4)
