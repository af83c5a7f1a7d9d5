"""Relearning from pictures: what is trained on, what it costs, what it leaves behind."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from expunge import Concept
from expunge.attack.diffusion.relearning_pictures import RelearningPictures
from expunge.erase.diffusion.uce import UCE
from expunge.errors import SettingError
from expunge.method import BUDGETS, Budget, Judge, Prompt, Verdicts
from expunge.models.base import Companions, Pictures
from expunge.testing import tiny_diffusion

pytestmark = pytest.mark.usefixtures("no_shared_pictures")

STAR = Concept("star", anchor="circle")
PROMPTS = [Prompt("a red star", seed=5), Prompt("star", seed=6)]
SMALL = {"curve": (1, 2), "batch": 2, "pictures": 3, "steps": 2, "guidance": 3.0, "lr": 1e-2}
FREE = Budget("free")


class Seeing(Judge):
    id, protocol, threshold = "seeing", "seeing/1", 0.5

    def __init__(self):
        self.seen = []

    def judge(self, outputs, concept, prompts):
        self.seen.append(np.asarray(outputs))
        n = len(outputs)
        return Verdicts(np.zeros(n, bool), np.zeros(n), np.ones(n, bool))


def run(model, judge=None, budget=FREE, concept=STAR, reference=None, seed=0, **changes):
    method = RelearningPictures(**{**SMALL, **changes})
    return method.attack(
        model, concept, judge or Seeing(), budget, prompts=PROMPTS, reference=reference, seed=seed
    )


def worldly(captions):
    def pictures(name, n, seed=0, split=""):
        return Pictures(np.zeros((n, 16, 16, 3), np.uint8), None, (captions.format(name),) * n)

    model = tiny_diffusion()
    model.companions = Companions(
        "tests",
        concept=lambda name: Concept(name),
        neighbours=lambda c: ("moon", "heart"),
        unrelated=("red",),
        pictures=pictures,
    )
    return model


def test_it_trains_the_denoiser_shows_the_curve_and_puts_all_back():
    model, judge = tiny_diffusion(), Seeing()
    edit = UCE().erase(model, STAR)
    whole = {name: tensor.clone() for name, tensor in model.tensors().items()}
    with edit.on(model):
        before = {name: tensor.clone() for name, tensor in model.tensors().items()}
        made = run(model, judge)
        assert all(torch.equal(t, before[n]) for n, t in model.tensors().items())
    assert all(torch.equal(t, whole[n]) for n, t in model.tensors().items())
    assert len(judge.seen) == 3 and made.teaches
    assert not np.array_equal(judge.seen[0], judge.seen[1])
    assert not np.array_equal(judge.seen[1], judge.seen[2])
    details = made.items[0].details
    assert list(details["curve"]) == ["0", "1", "2"] and details["curve_of"] == "steps"
    assert len(details["losses"]["denoiser"]) == 2 and "losses" not in made.items[1].details
    assert np.array_equal(made.outputs, judge.seen[2])


def test_the_loss_is_the_denoisers_own_on_the_layers_that_train():
    model, judge = tiny_diffusion(), Seeing()
    still = run(model, judge, lr=0.0)
    assert all(np.array_equal(seen, judge.seen[0]) for seen in judge.seen)
    assert (
        run(model, layers="cross-attention-kv").items[0].details["losses"]
        != (run(model).items[0].details["losses"])
    )
    first = [m.items[0].details["losses"]["denoiser"][0] for m in (still, run(model, lr=1.0))]
    assert first[0] == first[1]


def test_rows_of_an_item_and_a_cut_curve():
    model, other = tiny_diffusion(), tiny_diffusion(seed=1)
    made = run(model, reference=other)
    # three pictures of the anchor by the original, two steps forward and backward
    assert made.items[0].details["shared_rows"] == 3 * 4 + 2 * 2 * 2
    assert made.items[0].details["rows"] == 3 * 4 + 12 + 8
    spent = made.cost["denoiser.forward"] + made.cost["denoiser.backward"]
    assert spent == 12 + 8 + len(PROMPTS) * 12
    cut = run(model, reference=other, budget=Budget("b", 31))
    assert list(cut.items[0].details["curve"]) == ["0", "1"]
    with pytest.raises(SettingError, match="1 steps, costs 24"):
        run(model, reference=other, budget=Budget("b", 23))


@pytest.mark.parametrize("name", ["world", "quick"])
def test_presets_fit_their_budgets(name):
    method = RelearningPictures.under(BUDGETS[name])
    rows = 2 * method.steps * (1 + len(method.curve)) + 2 * method.batch * method.curve[-1]
    assert rows <= BUDGETS[name].denoiser_rows


def test_what_is_trained_on():
    model = worldly("a photo of a {}")
    for data, names in (("related", ["moon", "heart"]), ("unrelated", ["red"]), ("concept", ["star"])):  # fmt: skip
        details = run(model, data=data).items[0].details
        assert details["trained_on"] == names and details["data"] == data
        assert details["pictures_from"] == ("original" if data == "concept" else "world")
    bare = tiny_diffusion()
    assert run(bare).items[0].details["trained_on"] == ["circle"]
    assert len(run(bare, data="unrelated").items[0].details["trained_on"]) == 3
    assert run(bare, names=("moon", "sun")).items[0].details["trained_on"] == ["moon", "sun"]


def test_the_concept_is_never_trained_on_unless_asked_for():
    with pytest.raises(SettingError, match="names holds 'star' itself"):
        run(tiny_diffusion(), names=("a Star", "moon"))
    with pytest.raises(SettingError, match="every caption names 'star'"):
        run(worldly("a star beside a {}"))
    with pytest.raises(SettingError, match="nothing is known that is related to 'star'"):
        run(tiny_diffusion(), concept=Concept("star"))
