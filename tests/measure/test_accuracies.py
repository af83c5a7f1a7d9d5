"""Objects, celebrities, I2P and composites, against values worked out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from expunge.errors import InputError, ProtocolError
from expunge.measure import lpips_overall, mace_composite, rank
from expunge.measure.accuracies import (
    celebrity_accuracy,
    expected_maximum,
    inappropriate,
    object_accuracy,
    unrecognisable,
)
from expunge.method import Measurement


def test_objects_of_the_erased_class_and_of_the_others() -> None:
    asked = ["church"] * 4 + ["tench"] * 2 + ["horn"] * 4
    seen = ["church", "horn", None, None, "tench", "tench", "horn", "horn", None, "tench"]
    made = object_accuracy(asked, seen, "church", classifier="resnet-50/v2")
    assert made.erased.value == 0.25
    assert made.others.value == pytest.approx((1 + 0.5) / 2)  # classes weigh the same
    assert made.per_class == {"church": 0.25, "tench": 1, "horn": 0.5}
    assert made.unrecognisable.value == 0.3
    other = object_accuracy(asked, seen, "church", classifier="microsoft/resnet-50")
    with pytest.raises(ProtocolError):
        made.erased.minus(other.erased)
    with pytest.raises(InputError, match="curch"):
        object_accuracy(asked, seen, "curch")
    assert object_accuracy(["a"], ["a"], "a").others is None


def test_dropping_faces_rewards_a_model_that_destroys_them() -> None:
    asked = ["anna_cole"] * 10
    whole = celebrity_accuracy(asked, [["Anna Cole", "x"]] * 6 + [["x"]] * 4)
    broken = celebrity_accuracy(asked, [["anna cole"]] * 2 + [[]] * 4 + [None] * 4)
    assert whole.faces_only.value == whole.all_pictures.value == 0.6
    assert whole.no_face.value == 0
    # Two faces are left, both right: the printed number rises, the honest one falls.
    assert broken.faces_only.value == 1.0 and broken.faces_only.n == 2
    assert broken.all_pictures.value == 0.2 and broken.no_face.value == 0.8
    with pytest.raises(ProtocolError):
        broken.faces_only.minus(broken.all_pictures)


def test_a_model_without_any_face_has_no_accuracy_but_a_share() -> None:
    made = celebrity_accuracy(["a", "a"], [None, ""])
    assert made.faces_only.value is None and made.no_face.value == 1
    with pytest.raises(InputError, match="at least one picture"):
        celebrity_accuracy([], [])


def test_dropping_unrecognisable_pictures_raises_the_accuracy() -> None:
    asked, seen = ["a"] + ["b"] * 4, ["c", "b", None, None, None]
    kept = [(a, s) for a, s in zip(asked, seen, strict=True) if s is not None]
    counted = object_accuracy(asked, seen, "a").others.value
    dropped = object_accuracy([a for a, _ in kept], [s for _, s in kept], "a").others.value
    assert counted == 0.25 < dropped == 1.0
    made = unrecognisable([s is not None for s in seen], range(5), "oracle")
    assert made.value == 0.6 and made.protocol == "unrecognisable/share/judge=oracle"


def test_the_expected_maximum_equals_an_enumeration_of_all_draws() -> None:
    hits = [1, 0, 0, 0, 1, 1, 0, 0, 0, 1]
    prompts = ["a", "a", "b", "b", "c", "c", "d", "d", "e", "e"]
    shares = [0.5, 0.0, 1.0, 0.0, 0.5]
    every = [max(draw) for draw in itertools.combinations(shares, 3)]
    made = expected_maximum(hits, prompts, draws=3)
    assert made.value == pytest.approx(np.mean(every))
    assert made.interval[0] <= made.value <= made.interval[1] and made.n == 5
    assert expected_maximum(hits, prompts, draws=1).value == pytest.approx(np.mean(shares))
    # With all prompts drawn it is the largest share, in a resample the largest that is in it.
    whole = expected_maximum(hits, prompts, draws=5)
    assert whole.value == 1 and whole.interval[1] == 1 and whole.interval[0] >= 0.5
    with pytest.raises(InputError, match="25"):
        expected_maximum(hits, prompts)


def test_i2p_counts_a_picture_if_either_judge_fires() -> None:
    probability, maximum = inappropriate([1, 0, 0, 0], [1, 1, 0, 0], ["a", "a", "b", "b"])
    assert probability.value == 0.5
    assert maximum.value is None and maximum.protocol.startswith("i2p/expected-maximum/draws=25")
    many = [str(i // 2) for i in range(60)]
    probability, maximum = inappropriate([True] + [False] * 59, [False] * 60, many)
    assert probability.value == pytest.approx(1 / 60)
    assert maximum.value == pytest.approx(0.5 * 25 / 30)  # the one prompt of 30 is among the 25


def share(value: float | None, id: str = "celebrity/faces-only/detector=giphy") -> Measurement:
    return Measurement(value, id, 25)


def test_maces_composites_have_the_golden_values_and_one_protocol() -> None:
    h_o = mace_composite(share(0.1), share(0.9), share(0.5))
    h_c = mace_composite(share(0.1), share(0.9))
    assert h_o.value == pytest.approx(0.7105, abs=5e-5)
    assert h_c.value == pytest.approx(0.9)
    assert h_c.protocol == "mace/h-c/accuracy=celebrity/faces-only/detector=giphy"
    # The paper's own row: 100 celebrities, Acc_e 0.0430, Acc_s 0.8456 -> 0.8979.
    assert mace_composite(share(0.0430), share(0.8456)).value == pytest.approx(0.8979, abs=5e-5)
    with pytest.raises(ProtocolError):
        h_o.minus(h_c)
    with pytest.raises(ProtocolError):
        mace_composite(share(0.1), share(0.9, "celebrity/all-pictures/detector=giphy"))
    with pytest.raises(ProtocolError, match="no value"):
        mace_composite(share(None), share(0.9))


def test_lpips_overall_is_of_one_size_only() -> None:
    erased, others = share(0.4, "lpips/alex-rece"), share(0.1, "lpips/alex-rece")
    made = lpips_overall(erased, others)
    assert (
        made.value == pytest.approx(0.3)
        and made.protocol == "lpips/overall/distance=lpips/alex-rece"
    )
    with pytest.raises(ProtocolError):
        lpips_overall(erased, share(0.1, "lpips/alex-esd"))


def test_a_ranking_of_measurements_refuses_to_mix_judges() -> None:
    def row(target: float, kept: float, judge: str = "oracle") -> dict[str, Measurement]:
        return {"target_hit": share(target, judge), "kept_hit": share(kept, judge)}

    assert [name for name, _ in rank({"a": row(0.5, 0.9), "b": row(0.1, 0.9)})] == ["b", "a"]
    with pytest.raises(ProtocolError):
        rank({"a": row(0.5, 0.9), "b": row(0.1, 0.9, "clip")})
    with pytest.raises(ProtocolError, match="no value"):
        rank({"a": {"target_hit": share(None), "kept_hit": 0.9}})
