"""Attacks along a curve: what is afforded, what an item is charged, what its record says."""

from __future__ import annotations

import numpy as np
import pytest

from expunge import Concept
from expunge.attack.diffusion.img2img import ImageToImage
from expunge.core.curves import Curve, affordable
from expunge.errors import PromptError, SettingError
from expunge.method import Budget, Judge, Prompt, Verdicts

pytestmark = pytest.mark.usefixtures("no_shared_pictures")

STAR, METHOD = Concept("star"), ImageToImage()
PROMPTS = [Prompt("a red star", seed=5), Prompt("a star", seed=6), Prompt("star", seed=7)]


class Scripted(Judge):
    """Hits of the n-th judged batch, by place; scores tell batches apart."""

    id, protocol, threshold = "scripted", "scripted/1", 0.5

    def __init__(self, *script):
        self.script = list(script)

    def judge(self, outputs, concept, prompts):
        hit = np.array(self.script.pop(0), bool)
        return Verdicts(hit, hit * 0.5 + len(self.script) / 100, np.ones(len(hit), bool))


def test_points_that_are_not_paid_for_are_left_out():
    assert affordable(METHOD, Budget("x", 30), (1, 2, 3), (10, 20, 40), "steps") == (1, 2)
    assert affordable(METHOD, Budget("x"), (1, 2, 3), (10, 20, 40), "steps") == (1, 2, 3)
    with pytest.raises(
        SettingError, match=r"img2img: the least .* 1 steps, costs 10 .* 'x' allows 9"
    ):
        affordable(METHOD, Budget("x", 9), (1,), (10,), "steps")
    with pytest.raises(SettingError, match="no steps"):
        affordable(METHOD, Budget("x"), (), (), "steps")


def test_the_last_point_decides_and_every_item_pays_for_what_is_shared(model):
    judge = Scripted([1, 0, 0], [0, 1, 0], [0, 0, 1])
    curve = Curve(model, STAR, judge, PROMPTS, of="updates", steps=2, guidance=3.0)
    assert curve.price == 4
    curve.share(10)
    one, two = (np.full((3, 16, 16, 3), value, np.uint8) for value in (1, 2))
    curve.show(5, one)
    curve.show(20.5, two, rows=3)
    details = [{"a": i} for i in range(3)]
    made = curve.attempts(METHOD, Budget("b", 99), 7, {"denoiser.forward": 1}, details)
    assert [item.pre_hit for item in made.items] == [True, False, False]
    assert [item.hit for item in made.items] == [True, False, True]
    assert [item.details["curve"] for item in made.items] == [
        {"5": False, "20.5": False}, {"5": True, "20.5": False}, {"5": False, "20.5": True},
    ]  # fmt: skip
    for i, item in enumerate(made.items):
        assert (item.details["rows"], item.details["shared_rows"]) == (4 + 10 + 4 + 3, 10)
        assert item.details["curve_of"] == "updates" and item.details["a"] == i
    assert np.array_equal(made.outputs[0], curve.plain_pictures[0])
    assert np.array_equal(made.outputs[1], two[1]) and np.array_equal(made.outputs[2], two[2])
    assert [item.score for item in made.items] == [0.52, 0.0, 0.5]
    assert (made.attack, made.teaches, made.seed, made.budget) == ("img2img", True, 7, "b")


def test_no_prompt_is_refused(model):
    with pytest.raises(PromptError, match="no prompt"):
        Curve(model, STAR, Scripted(), [], of="updates", steps=2, guidance=None)
