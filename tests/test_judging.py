"""Calibration: counts by hand, intervals, and that it stays with the protocol it was made under."""

from __future__ import annotations

import numpy as np
import pytest

from expunge.concept import Concept
from expunge.errors import InputError, ProtocolError
from expunge.method import Calibration, Judge, Verdicts

STAR = Concept("star", phrases=("pentagram",))


class Fixed(Judge):
    id, threshold = "fixed", 0.5

    def __init__(self, hits, protocol="fixed/1"):
        self.hits, self.protocol = np.array(hits, bool), protocol

    def judge(self, outputs, concept, prompts):
        assert len(prompts) == len(outputs)
        return Verdicts(self.hits, self.hits.astype(float), np.arange(len(outputs)) != 0)


def test_rates_f1_and_kappa_equal_the_hand_values():
    # 10 outputs: 4 show it, of which 3 are found; 6 do not, of which 2 are mistaken.
    truth = [True] * 4 + [False] * 6
    hits = [True, True, True, False, True, True, False, False, False, False]
    judge = Fixed(hits)
    made = judge.calibrate([None] * 10, truth, STAR, source="by hand")
    assert (
        made.true_positives,
        made.false_positives,
        made.true_negatives,
        made.false_negatives,
    ) == (3, 2, 4, 1)
    assert made.true_positive_rate == 0.75 and made.false_positive_rate == pytest.approx(1 / 3)
    assert made.accuracy == 0.7 and made.f1 == pytest.approx(6 / 9) and made.unrecognisable == 1
    # Chance: said 5 of 10, truly 4 of 10: (5 * 4 + 5 * 6) / 100 = 0.5.
    assert made.kappa == pytest.approx((0.7 - 0.5) / 0.5)
    low, high = made.intervals["false_positive_rate"]
    assert low < 1 / 3 < high and (low, high) == (
        pytest.approx(0.0968, abs=1e-3),
        pytest.approx(0.7000, abs=1e-3),
    )
    assert judge.calibrations == {"star": made} and Judge.calibrations == {}


def test_sklearn_agrees():
    from sklearn.metrics import cohen_kappa_score, f1_score

    rng = np.random.default_rng(0)
    truth, hits = rng.random(200) < 0.3, rng.random(200) < 0.4
    made = Fixed(hits).calibrate([None] * 200, list(truth), STAR)
    assert made.f1 == pytest.approx(f1_score(truth, hits))
    assert made.kappa == pytest.approx(cohen_kappa_score(truth, hits))


def test_labels_may_be_names():
    made = Fixed([True, True, False, False]).calibrate(
        [0] * 4, ["Star", None, "pentagram", "ring"], STAR
    )
    assert (
        made.true_positives,
        made.false_positives,
        made.false_negatives,
        made.true_negatives,
    ) == (1, 1, 1, 1)


def test_one_sided_truth_leaves_a_rate_open():
    made = Fixed([False, False]).calibrate([0, 0], [0, 0], STAR)
    assert made.true_positive_rate is None and made.false_positive_rate == 0 and made.kappa is None
    assert "true_positive_rate" not in made.intervals and made.f1 == 0


def test_it_round_trips_and_holds_for_its_protocol_only():
    judge = Fixed([True, False])
    made = judge.calibrate([0, 0], [True, True], STAR)
    again = Calibration.from_dict(made.to_dict())
    assert again == made
    assert Fixed([True]).calibrated(again) is again
    with pytest.raises(ProtocolError, match="says nothing about"):
        Fixed([True], "fixed/2").calibrated(again)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"true_positves": 1}, "did you mean 'true_positives'"),
        ({"true_positives": -1}, "a count is needed"),
        ({"protocol": ...}, "'protocol' is missing"),
        ({"true_positives": 0}, "at least one is needed"),
    ],
)
def test_bad_records_are_refused(change, words):
    data = Fixed([True]).calibrate([0], [True], STAR).to_dict() | change
    with pytest.raises(InputError, match=words):
        Calibration.from_dict({k: v for k, v in data.items() if v is not ...})


@pytest.mark.parametrize(
    ("outputs", "labels", "words"),
    [
        ([], [], "at least one"),
        ([0], [True, False], "one label each"),
        ([0], [0.5], "no truth value"),
    ],
)
def test_bad_labels_are_refused(outputs, labels, words):
    with pytest.raises(InputError, match=words):
        Fixed([True]).calibrate(outputs, labels, STAR)
