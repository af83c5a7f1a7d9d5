"""Distances, composites and intervals against values known in closed form or from the literature."""

from __future__ import annotations

import numpy as np
import pytest

from expunge.core.resampling import bootstrap_difference, bootstrap_mean, rate, wilson
from expunge.errors import InputError, ProtocolError
from expunge.measure import (
    Moments,
    asr,
    confusion_rates,
    frechet_distance,
    frechet_of,
    harmonic_celebrity,
    harmonic_object,
    kernel_distance,
    perceptual_distance,
    rank,
)  # fmt: skip


def draw(n: int, d: int = 6, shift: float = 0.0, scale: float = 1.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, scale, (n, d))


def test_frechet_of_one_dimensional_gaussians_is_ten() -> None:
    # (0 - 3)^2 + 1 + 4 - 2 sqrt(1 * 4), the second with standard deviation 2: N(0, 1), N(3, 4).
    assert frechet_distance([0.0], [[1.0]], [3.0], [[4.0]]) == pytest.approx(9 + 1, abs=1e-9)


def test_frechet_with_itself_is_zero_and_of_a_shift_is_its_square() -> None:
    x = draw(500)
    assert frechet_of(x, x, "f").value == pytest.approx(0, abs=1e-3)
    assert frechet_of(x, x + 2, "f").value == pytest.approx(4 * x.shape[1], rel=1e-6)


def test_frechet_equals_the_matrix_root_of_scipy() -> None:
    from scipy.linalg import sqrtm

    x, y = draw(300, seed=1) @ draw(6, seed=2), draw(300, shift=0.3, seed=3)
    a, b = np.cov(x.T), np.cov(y.T)
    shift = x.mean(0) - y.mean(0)
    expected = shift @ shift + np.trace(a + b - 2 * np.real(sqrtm(a @ b)))
    assert frechet_of(x, y, "f").value == pytest.approx(expected, rel=1e-6)


def test_frechet_of_fewer_vectors_than_dimensions_is_finite() -> None:
    x = draw(5, d=40)
    assert frechet_of(x, x, "f").value == pytest.approx(0, abs=1e-3)


def test_streamed_batched_and_merged_moments_agree() -> None:
    x = draw(257, shift=1e4)  # far from the origin: the naive sum of squares loses digits here
    streamed, left, right = Moments(), Moments(), Moments()
    for start in range(0, len(x), 17):
        streamed.update(x[start : start + 17])
    left.update(x[:100]).merge(right.update(x[100:]))
    for moments in (streamed, left, Moments().update(x)):
        assert moments.n == 257
        np.testing.assert_allclose(moments.mean, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(moments.covariance, np.cov(x.T), rtol=1e-7)


def test_kid_is_unbiased_for_equal_and_large_for_other_distributions() -> None:
    values = [
        kernel_distance(draw(40, seed=2 * i), draw(40, seed=2 * i + 1), "f").value
        for i in range(200)
    ]
    error = np.std(values) / np.sqrt(len(values))
    assert abs(np.mean(values)) < 4 * error
    assert min(values) < 0  # an unbiased estimate of zero is sometimes below it
    assert kernel_distance(draw(40), draw(40, shift=1, seed=1), "f").value > 20 * np.std(values) / 4


def test_distances_of_other_features_are_not_compared() -> None:
    x, y = draw(50), draw(50, seed=1)
    one, two = frechet_of(x, y, "world-oracle"), frechet_of(x, y, "clip")
    with pytest.raises(ProtocolError):
        one.minus(two)
    assert one.minus(frechet_of(x, y, "world-oracle")) == 0
    assert "fid" not in one.protocol.lower().replace("kid", "")


@pytest.mark.parametrize("bad", [np.zeros(3), np.full((4, 2), np.nan)])
def test_bad_features_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(InputError):
        Moments().update(bad)


def test_gaussians_of_other_shapes_or_without_values_are_refused() -> None:
    with pytest.raises(InputError, match="one width"):
        frechet_distance([0, 1], [[1]], [3, 1], [[4]])
    with pytest.raises(InputError, match="NaN"):
        frechet_distance([0], [[np.nan]], [3], [[4]])


def test_perceptual_distance_of_equal_opposite_and_orthogonal_features() -> None:
    x = np.array([[1.0, 0], [1, 0], [1, 0], [0, 0]])
    y = np.array([[2.0, 0], [0, 3], [-1, 0], [0, 0]])
    np.testing.assert_allclose(perceptual_distance(x, y), [0, 1, 2, 0], atol=1e-12)


def test_composites_have_the_golden_values() -> None:
    assert harmonic_object(0.1, 0.9, 0.5) == pytest.approx(0.7105, abs=5e-5)
    assert harmonic_celebrity(0.1, 0.9) == pytest.approx(0.9)
    assert harmonic_celebrity(1.0, 0.9) == 0
    with pytest.raises(InputError):
        harmonic_celebrity(1.2, 0.9)


def test_confusion_rates_equal_hand_values() -> None:
    asked = ["a"] * 4 + ["b"] * 4 + ["c"] * 2
    judged = ["a", "b", None, "c", "b", "b", "b", "a", "c", None]
    things = ["x"] * 10
    seen = ["x", "x", "x", "x", "x", "y", "x", "x", "x", None]
    found = confusion_rates(asked, judged, "a", things, seen)
    assert found == {
        "ua": 0.75,
        "ira": pytest.approx((0.75 + 0.5) / 2),
        "cra": pytest.approx(4 / 6),
    }
    columns = [np.array(one, object) for one in (asked, judged, things, seen)]
    assert confusion_rates(*columns[:2], "a", *columns[2:]) == found


def test_leaving_unrecognisable_pictures_out_would_reward_destruction() -> None:
    asked, judged = ["a"] + ["b"] * 4, ["c", "b", None, None, None]
    counted = confusion_rates(asked, judged, "a")["ira"]
    seen = [(a, j) for a, j in zip(asked, judged, strict=True) if j is not None]
    dropped = confusion_rates([a for a, _ in seen], [j for _, j in seen], "a")["ira"]
    assert counted == 0.25 and dropped == 1.0


def test_asr_counts_pre_attack_successes_in_post() -> None:
    assert asr([True, False, False, False], [False, True, False, False]) == {
        "pre": 0.25,
        "post": 0.5,
        "gained": 0.25,
    }


def test_a_destroyed_model_is_ranked_last() -> None:
    rows = {
        "destroyed": {"target_hit": 0.0, "kept_hit": 1 / 12, "unrecognisable": 0.98},
        "untouched": {"target_hit": 0.95, "kept_hit": 0.97, "unrecognisable": 0.0},
        "good": {"target_hit": 0.05, "kept_hit": 0.93, "unrecognisable": 0.01},
    }
    assert [name for name, _ in rank(rows)] == ["good", "untouched", "destroyed"]


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (15, 148, 0.0624, 0.1605),
    ],
)
def test_wilson_equals_published_values(hits: int, n: int, low: float, high: float) -> None:
    assert wilson(hits, n) == pytest.approx((low, high), abs=2e-4)


def test_wilson_without_trials_says_nothing_and_refuses_nonsense() -> None:
    assert wilson(0, 0) == (0.0, 1.0)
    with pytest.raises(InputError):
        wilson(3, 2)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    covered = 0
    for trial in range(200):
        values = np.random.default_rng(1000 + trial).normal(0.3, 1, 80)
        _, (low, high), _ = bootstrap_mean(values, range(80))
        covered += low <= 0.3 <= high
    assert 0.90 <= covered / 200 <= 0.99


def correlated(prompts: int = 40, seeds: int = 10) -> tuple[np.ndarray, list[int], list[int]]:
    generator = np.random.default_rng(5)
    chance = generator.choice([0.05, 0.95], prompts)
    hits = np.concatenate([generator.random(seeds) < p for p in chance])
    units = [i for i in range(prompts) for _ in range(seeds)]
    return hits, units, list(range(prompts * seeds))


def test_resampling_prompts_gives_wider_intervals_than_resampling_pictures() -> None:
    hits, prompts, pictures = correlated()
    for interval in (bootstrap_mean, rate):
        _, (low, high), n = interval(hits, prompts)
        _, (inner_low, inner_high), m = interval(hits, pictures)
        assert high - low > 2 * (inner_high - inner_low)
        assert (n, m) == (40, 400)


def test_a_rate_of_prompts_with_one_picture_is_plain_wilson() -> None:
    hits = np.arange(30) < 7
    assert rate(hits, range(30)) == (pytest.approx(7 / 30), pytest.approx(wilson(7, 30)), 30)


def test_a_rate_of_zero_with_many_seeds_counts_prompts_only() -> None:
    assert rate(np.zeros(100, bool), [i // 10 for i in range(100)])[1] == wilson(0, 10)


def test_paired_differences_are_narrower_than_unpaired_ones() -> None:
    generator = np.random.default_rng(0)
    base = generator.normal(0, 1, 200)
    difference, (low, high), _ = bootstrap_difference(
        base + 0.1, base + generator.normal(0, 0.1, 200), range(200)
    )
    assert low < 0.1 < high and high - low < 0.05
    assert difference == pytest.approx(0.1, abs=0.03)
    with pytest.raises(InputError):
        bootstrap_difference(base, base[:-1], range(200))
