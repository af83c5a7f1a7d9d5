"""Retain prompts and their points: where they come from, what is left out, turns, depths, who walks."""

from __future__ import annotations

import pytest
import torch

from expunge.concept import Concept
from expunge.core import scores, trajectories
from expunge.core.everyday_objects import EVERYDAY_OBJECTS
from expunge.core.retain import RetainSource, retain_prompts
from expunge.core.tasks import Step
from expunge.errors import InputError
from expunge.models.base import Companions
from expunge.testing import tiny_diffusion

STAR = Concept("star", phrases=("heart",))
PROMPTS = ["a red circle", "a blue square", "a heart", "green plain", "striped"]


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


def source(model, prompts=PROMPTS, **more):
    return RetainSource(
        model, prompts, **{"steps": 5, "guidance": 3.0, "seed": 1, "batch": 2} | more
    )


def test_243_different_objects():
    assert len(EVERYDAY_OBJECTS) == len(set(EVERYDAY_OBJECTS)) == 243
    assert all(name == name.strip() and name for name in EVERYDAY_OBJECTS)


def test_the_users_prompts_then_the_worlds_then_everyday_objects(model):
    given = retain_prompts(
        model, [STAR], ["square"], ["a red circle", "two HEARTS", "a heart"], count=9
    )
    assert given.prompts == ("a red circle", "two HEARTS", "a photo of square")
    assert (given.origin, given.left_out) == ("data", 1)
    plain = retain_prompts(model, [Concept("dog"), STAR], (), count=243)
    assert plain.origin == "objects" and plain.left_out == 2  # "hot dog" names it too
    assert len(plain.prompts) == 241 and not any("dog" in text for text in plain.prompts)
    asked = []

    def captions(n, seed=0, without=()):
        asked.append((n, set(without)))
        return ["a circle", "a bright pentangle"][: 1 + ("star" not in without)]

    other = tiny_diffusion()
    other.companions = Companions(
        "w", captions=captions, unrelated=("red",), neighbours=lambda c: ("circle", "square"),
        concept=lambda name: STAR if name == "star" else None,
    )  # fmt: skip
    world = retain_prompts(other, [STAR], ["circle"], count=7)
    assert world.origin == "world" and world.prompts == ("a circle", "a photo of circle")
    # By label: also words that nobody listed; what an audit measures is not given away.
    assert asked == [(7, {"star", "square", "red"})]
    free = retain_prompts(other, [STAR], ["circle"], count=7, filtered=False)
    assert "a bright pentangle" in free.prompts and asked[1] == (7, {"square", "red"})


def test_all_left_out_is_an_error(model):
    with pytest.raises(InputError, match="all 2 retain prompts name 'star'"):
        retain_prompts(model, [STAR], (), ["a star", "a Heart"], count=5)
    assert retain_prompts(model, [STAR], (), ["a star"], count=5, filtered=False).left_out == 0


@pytest.mark.parametrize("bank", [None, 6])
def test_every_prompt_has_its_turn_before_any_comes_again(model, bank):
    own = source(model, bank=bank)
    total = 5 if bank is None else bank
    taken = [i for number in range(3 * total) for i in own.turn(number)]
    rounds = [taken[k * total : (k + 1) * total] for k in range(6)]
    assert all(sorted(one) == list(range(total)) for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1
    assert source(model, bank=bank).turn(7) == own.turn(7)  # also when resumed there


@pytest.mark.parametrize("binned", [False, True])
def test_fresh_points_stand_as_deep_as_those_they_accompany(model, binned):
    own = source(model, batch=3, binned=binned)
    like = trajectories.draw(model, ["a star"], 2, steps=5, guidance=3.0, seed=4)
    depths = trajectories.depths_of(model, like, steps=5)
    if binned:
        like = trajectories.relabelled(model, like, steps=5, seed=4)
    points, texts, answers = own.at(Step(0, 9, 0), 1, like)
    assert torch.equal(points.timesteps, like.timesteps[[0, 1, 0]])
    assert texts == [PROMPTS[i] for i in own.turn(1)]
    wanted = trajectories.draw(
        model, texts, 3, steps=5, guidance=3.0, seed=own.seed, first=3, depths=depths[[0, 1, 0]]
    )
    assert torch.equal(points.latents, wanted.latents)
    with torch.no_grad():
        torch.testing.assert_close(answers, scores.epsilon(model, points, model.encode(texts)))


def test_a_bank_keeps_points_prompts_and_answers_together(model):
    own = source(model, bank=6)
    points, texts, answers = own.at(Step(0, 9, 0), 0)
    assert texts == [PROMPTS[i % 5] for i in own.turn(0)]
    with torch.no_grad():
        made = scores.epsilon(model, points, model.encode(texts))
    torch.testing.assert_close(answers, made, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("walked", "asked"), [("frozen", 1), ("student", 1)])
def test_answers_come_from_the_original(model, walked, asked):
    inside = []

    class Original:
        def __enter__(self):
            inside.append(True)

        def __exit__(self, *_):
            pass

    own = source(model, walked=walked)
    order = []
    own._fresh = lambda *a, f=own._fresh: (order.append(len(inside)), f(*a))[1]
    own.at(Step(0, 9, 0, original=Original), 0)
    assert len(inside) == asked and order == [0 if walked == "student" else 1]
