"""The judge's own errors stand in the evidence, and warn where they are large."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from expunge import audit
from expunge.errors import ConceptError, SettingError
from expunge.evidence import Evidence
from expunge.evidence.calibrating import calibration_flags
from expunge.evidence.schema import JudgeRecord
from expunge.measure import judges
from expunge.method import Calibration, Judge, Verdicts
from expunge.models.base import Labelled

from .stubs import STAR, companions, triad


def labelled(name, n, seed=0, split="development"):
    """Red pictures show a star, and of the blue ones the first is red all the same (a mistake to be found)."""
    assert split == "development"
    pictures = np.zeros((2 * n, 8, 8, 3), np.uint8)
    pictures[:n] = (230, 60, 50)
    pictures[n] = (230, 60, 50)
    pictures[n + 1 :] = (60, 90, 220)
    return Labelled(pictures, np.arange(2 * n) < n)


def run(given=labelled, **options) -> Evidence:
    model, change, _ = triad()
    model.companions = dataclasses.replace(companions(), labelled=given)
    options = {"attacks": "none", "n": 6, "kept_n": 2, "cache": None, **options}
    return audit(model, [change], STAR, **options)


def test_the_worlds_own_judge_is_calibrated_by_itself(tmp_path):
    evidence = run()
    found = evidence.calibration
    assert (found.true_positives, found.false_positives, found.true_negatives) == (48, 1, 47)
    assert found.false_positive_rate == pytest.approx(1 / 48) and found.protocol == evidence.judge
    low, high = found.intervals["false_positive_rate"]
    assert low < 1 / 48 < high and "48 with and 48 without" in found.source
    assert not [flag for flag in evidence.flags if flag.code == "judge-errs"]
    evidence.save(tmp_path)
    assert Evidence.load(tmp_path).calibration == found
    page = (tmp_path / "report.html").read_text()
    assert "judge on labelled outputs" in page and "false positives 2.1" in page


class Careless(Judge):
    """Says yes to half of everything."""

    id, protocol, threshold = "careless", "careless/1", 0.5

    def __init__(self):
        self.asked = 0

    def judge(self, outputs, concept, prompts):
        self.asked += len(outputs)
        hit = np.arange(len(outputs)) % 2 == 0
        return Verdicts(hit, hit.astype(float), np.ones(len(outputs), bool))


def test_another_judge_is_calibrated_only_where_it_is_asked_for():
    evidence = run(judge=Careless())
    assert evidence.calibration is None and "not calibrated" in evidence.reasons["calibration"]
    evidence = run(judge=Careless(), calibrate=10)
    assert evidence.calibration.false_positive_rate == 0.5 and evidence.calibration.n == 20
    (flag,) = [flag for flag in evidence.flags if flag.code == "judge-errs"]
    assert (
        "50" in flag.message and "sees the concept" in flag.message and "misses it" in flag.message
    )
    assert run(calibrate=0).calibration is None


def test_a_reader_is_warned_from_the_limits_on():
    def codes(*counts):
        record = JudgeRecord.model_validate(Calibration("careless/1", "star", *counts).to_dict())
        return [flag.code for flag in calibration_flags(record)]

    assert codes(100, 5, 95, 0) == codes(80, 0, 100, 20) == ["judge-errs"]
    assert codes(100, 4, 96, 0) == codes(81, 0, 100, 19) == []


def test_a_calibration_the_judge_brings_is_kept():
    judge = Careless()
    made = judge.calibrate([0] * 4, [True, False, True, False], STAR, source="by hand")
    evidence = run(judge=judge, calibrate=10)
    assert evidence.calibration.source == "by hand" and evidence.calibration.n == made.n == 4


def test_a_concept_without_labelled_pictures_is_said():
    def none(name, n, seed=0, split=""):
        raise ConceptError(f"there is no {name}")

    evidence = run(none)
    assert evidence.calibration is None and "there is no star" in evidence.reasons["calibration"]


def test_a_judge_by_its_id():
    judges.register("careless", lambda model: Careless())
    try:
        assert run(judge="careless").judge == "careless/1"
        with pytest.raises(SettingError, match="did you mean 'careless'"):
            run(judge="carless")
    finally:
        judges._registered.clear()
