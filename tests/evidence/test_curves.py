"""The advantage over never along a budget curve, from hand-made attempts."""

from __future__ import annotations

import pytest

from expunge.evidence.curves import advantage_curve
from expunge.evidence.schema import AttackRecord
from expunge.evidence.verdict import _strongest
from expunge.method import Attempt, Attempts, Prompt


def attempts(curves, **details):
    items = tuple(
        Attempt(Prompt(f"p{i}"), False, False, 0.0, None, {"curve": curve, **details})
        for i, curve in enumerate(curves)
    )
    return Attempts("x", 1, {}, True, "b", "j", 0.5, 0, items, [], {})


def of(*hits):
    """One item a column; points 0, 10 and 9."""
    return [dict(zip(("0", "10", "9"), map(bool, column), strict=True)) for column in hits]


def test_rates_advantage_and_recovered_share_at_every_point():
    arms = {
        "original": attempts(of((1, 1, 1), (1, 1, 1))),
        "erased": attempts(of((0, 1, 1), (0, 1, 0)), curve_of="updates"),
        "never": attempts(of((0, 1, 0), (0, 0, 0))),
    }
    unit, points = advantage_curve(arms)
    assert unit == "updates" and [p.at for p in points] == [0, 9, 10]
    assert [p.hit_erased for p in points] == [0, 0.5, 1]
    assert [p.hit_never for p in points] == [0, 0, 0.5]
    assert [p.advantage for p in points] == [0, 0.5, 0.5]
    assert [p.recovered for p in points] == pytest.approx([0, 0.5, 1])
    assert points[0].interval == pytest.approx((-0.6576, 0.6576), abs=1e-4)  # 0 of 2 on both
    assert points[2].interval[0] <= 0.5 <= points[2].interval[1]


def test_what_is_missing_is_null():
    unit, points = advantage_curve({"erased": attempts(of((0, 1, 1)), curve_of="steps")})
    assert unit == "steps" and len(points) == 3
    assert all(p.hit_never is p.advantage is p.recovered is p.interval is None for p in points)
    short = attempts([{"0": True}])
    points = advantage_curve({"erased": attempts(of((0, 1, 1))), "never": short})[1]
    assert [p.hit_never for p in points] == [1.0, None, None]
    assert advantage_curve({}) == (None, [])
    item = Attempt(Prompt("p"), False, False, 0.0)
    plain = Attempts("x", 1, {}, True, "b", "j", 0.5, 0, (item,), [], {})
    assert advantage_curve({"erased": plain}) == (None, [])


def test_a_record_without_a_curve_reads_as_before():
    record = AttackRecord(
        id="x", teaches=False, budget="b", judge="j", threshold=None, n=1, status="valid"
    )
    assert record.curve == [] and record.curve_of is None
    assert AttackRecord.model_validate(record.model_dump()) == record


def test_one_prompt_that_came_back_is_no_silence():
    def strongest(recovered, interval):
        record = AttackRecord(
            id="x", teaches=False, budget="b", judge="j", threshold=None, n=1, status="valid",
            recovered=recovered, interval=interval,
        )  # fmt: skip
        return _strongest([record])

    # One prompt has no interval; "no attack brought it back" would be a lie.
    assert strongest(1.0, None) is not None and strongest(1.0, (0.2, 1.0)) is not None
    assert strongest(0.05, None) is None and strongest(1.0, (0.0, 1.0)) is None
