"""The squared discrepancy and its interval: held against brute force, derivatives, and simulations."""

from __future__ import annotations

import numpy as np
import pytest

from expunge.core import discrepancy
from expunge.core.discrepancy import squared_discrepancy
from expunge.errors import InputError
from expunge.method.intervals import Z


def gaussian(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    squares = ((a[:, None] - b[None]) ** 2).sum(-1)
    return np.exp(-squares / 2)


def cubic(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1) ** 3


def draw(n: int, shift: float = 0.0, seed: int = 0, d: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (n, d))


def truth(shift: float, d: int = 2) -> float:
    """Squared discrepancy of N(0, I) and N(shift, I): x - y is N(mu, 2 I), so E k = 3^(-d/2) exp(-d mu^2 / 6)."""
    return float(2 * 3 ** (-d / 2) * (1 - np.exp(-d * shift**2 / 6)))


@pytest.mark.parametrize("kernel", [gaussian, cubic])
@pytest.mark.parametrize("diagonal", [False, True])
def test_six_points_against_loops(kernel, diagonal, monkeypatch) -> None:
    x, y = draw(6), draw(4, 0.5, seed=1)
    one = lambda a, b: float(kernel(a[None], b[None])[0, 0])  # noqa: E731

    def mean(pairs):
        return np.mean([one(a, b) for a, b in pairs])

    def within(rows, i=None):
        pairs = [(j, k) for j in range(len(rows)) for k in range(len(rows)) if diagonal or j != k]
        return mean((rows[j], rows[k]) for j, k in pairs if i is None or j == i)

    value = within(x) + within(y) - 2 * mean((a, b) for a in x for b in y)
    h_x = [2 * (within(x, i) - mean((x[i], b) for b in y)) for i in range(6)]
    h_y = [2 * (within(y, j) - mean((a, y[j]) for a in x)) for j in range(4)]
    error = (np.var(h_x, ddof=1) / 6 + np.var(h_y, ddof=1) / 4) ** 0.5
    for block in (2_048, 3):
        monkeypatch.setattr(discrepancy, "BLOCK", block)
        found = squared_discrepancy(x, y, kernel, diagonal)
        assert found.value == pytest.approx(value, rel=1e-12)
        assert found.x == pytest.approx(h_x, rel=1e-12) and found.y == pytest.approx(h_y, rel=1e-12)
        assert found.standard_error() == pytest.approx(error, rel=1e-12)
        assert found.interval(scale=10.0) == pytest.approx(
            (10 * (value - Z * error), 10 * (value + Z * error)), rel=1e-12
        )


def test_influence_is_the_derivative_by_the_weight_of_a_row() -> None:
    """The infinitesimal jackknife: n dT / dw_i of the weighted statistic is what the row adds to the mean."""
    x, y = draw(6), draw(6, 0.5, seed=1)
    found = squared_discrepancy(x, y, gaussian)

    def weighted(w: np.ndarray, v: np.ndarray) -> float:
        total = 0.0
        for rows, own in ((x, w), (y, v)):
            pairs = np.outer(own, own) * (1 - np.eye(6))
            total += (pairs * gaussian(rows, rows)).sum() / pairs.sum()
        across = np.outer(w, v)
        return float(total - 2 * (across * gaussian(x, y)).sum() / across.sum())

    ones, step = np.ones(6), 1e-5
    assert found.value == pytest.approx(weighted(ones, ones), rel=1e-12)
    for i in range(6):
        up, down = ones.copy(), ones.copy()
        up[i], down[i] = 1 + step, 1 - step
        slope = 6 * (weighted(up, ones) - weighted(down, ones)) / (2 * step)
        assert slope == pytest.approx(found.x[i] - found.x.mean(), abs=1e-7)
        slope = 6 * (weighted(ones, up) - weighted(ones, down)) / (2 * step)
        assert slope == pytest.approx(found.y[i] - found.y.mean(), abs=1e-7)


@pytest.mark.parametrize(("n", "m", "shift"), [(30, 30, 1.0), (40, 25, 0.7)])
def test_intervals_cover_the_truth_about_as_often_as_they_say(n, m, shift) -> None:
    generator, repeats = np.random.default_rng(0), 300
    covered, values, errors = 0, [], []
    for _ in range(repeats):
        x, y = generator.normal(0, 1, (n, 2)), generator.normal(shift, 1, (m, 2))
        found = squared_discrepancy(x, y, gaussian)
        low, high = found.interval()
        covered += low <= truth(shift) <= high
        values.append(found.value)
        errors.append(found.standard_error())
    # 0.95 within three standard errors of 300 draws, and a little less for so few rows.
    assert 0.89 <= covered / repeats <= 0.985
    assert np.mean(values) == pytest.approx(truth(shift), abs=4 * np.std(values) / repeats**0.5)
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.15)


def test_pictures_of_a_prompt_count_together() -> None:
    """Correlated rows: intervals over prompts cover, those over rows do not; a prompt of both sides is one unit."""
    generator, repeats, prompts, seeds = np.random.default_rng(1), 200, 30, 3
    covered = {"rows": 0, "prompts": 0, "shared": 0}
    place = np.repeat(np.arange(prompts), seeds)
    mine, theirs = [f"a{i}" for i in place], [f"b{i}" for i in place]
    for _ in range(repeats):
        centres = generator.normal(0, 0.7**0.5, (3, prompts, 2))
        noise = generator.normal(0, 0.3**0.5, (2, prompts * seeds, 2))
        x = centres[0][place] + noise[0]
        apart, same = 1 + centres[1][place] + noise[1], 1 + centres[0][place] + noise[1]
        found = squared_discrepancy(x, apart, gaussian)
        for name, one, two in (("rows", (), ()), ("prompts", mine, theirs)):
            low, high = found.interval(one, two)
            covered[name] += low <= truth(1.0) <= high
        low, high = squared_discrepancy(x, same, gaussian).interval(mine, mine)
        covered["shared"] += low <= truth(1.0) <= high
    assert covered["rows"] / repeats < 0.9 <= covered["prompts"] / repeats
    assert covered["shared"] / repeats >= 0.9


def test_duplicated_rows_give_no_narrower_interval_where_they_are_one_unit() -> None:
    x, y = draw(8), draw(7, 1.0, seed=1)
    units, others = [f"x{i}" for i in range(8)], [f"y{i}" for i in range(7)]
    single = squared_discrepancy(x, y, gaussian, diagonal=True)
    double = squared_discrepancy(np.tile(x, (2, 1)), np.tile(y, (2, 1)), gaussian, diagonal=True)
    assert double.value == pytest.approx(single.value, rel=1e-12)
    clustered = double.standard_error(units * 2, others * 2)
    assert clustered == pytest.approx(single.standard_error(), rel=1e-12)
    assert double.standard_error() < 0.75 * clustered
    # Each row a unit of its own is what no units mean; a reference may have none.
    assert single.standard_error(units, ()) == pytest.approx(single.standard_error(), rel=1e-12)


def test_units_of_both_sides_share_what_they_have_in_common() -> None:
    """By hand: with the same units on both sides their shares are added before they are squared."""
    x, y = draw(5), draw(5, 1.0, seed=1)
    found = squared_discrepancy(x, y, gaussian)
    units = list("abcde")
    both = (found.x - found.x.mean() + found.y - found.y.mean()) / 5
    assert found.standard_error(units, units) == pytest.approx((5 / 4 * both @ both) ** 0.5)
    apart = found.standard_error(units, [f"other {unit}" for unit in units])
    assert apart == pytest.approx(found.standard_error(), rel=1e-12)


def test_one_unit_alone_says_nothing_and_units_must_fit() -> None:
    found = squared_discrepancy(draw(3), draw(4, 1.0, seed=1), gaussian)
    assert found.standard_error(["a"] * 3) is None and found.interval(["a"] * 3) is None
    with pytest.raises(InputError, match="3 values but 2 prompts"):
        found.interval(["a", "b"])


def test_equal_samples_degenerate() -> None:
    """On the null all first-order terms vanish: a sample against itself has no width at all."""
    x = draw(9)
    found = squared_discrepancy(x, x, gaussian, diagonal=True)
    assert found.value == pytest.approx(0, abs=1e-12)
    assert found.standard_error() == pytest.approx(0, abs=1e-12)
