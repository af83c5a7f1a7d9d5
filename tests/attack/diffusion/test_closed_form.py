"""The closed-form attack on a tiny random pipeline: what it feeds, what it costs, what it records."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from expunge import Concept
from expunge.attack.diffusion.closed_form import ClosedFormAttack
from expunge.erase.diffusion.uce import UCE
from expunge.errors import SettingError, UnsupportedModel
from expunge.method import Budget, Judge, Prompt, Verdicts, budget
from expunge.testing import tiny_diffusion

STAR = Concept("star", anchor="circle")
PROMPTS = [
    Prompt("a red star", seed=5),
    Prompt("star", seed=6),
    Prompt("a photo of a star", seed=7),
]


class Like(Judge):
    """Hit: the picture is closer to the original model's picture than half of the given distance."""

    id, protocol, threshold = "like", "like/1", 0.5

    def __init__(self, wanted, far):
        self.wanted, self.far = wanted.astype(float), far

    def judge(self, outputs, concept, prompts):
        distance = np.abs(outputs - self.wanted).mean((1, 2, 3))
        score = np.clip(1 - distance / self.far, 0, 1)
        return Verdicts(score >= 0.5, score, np.ones(len(outputs), bool))


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


@pytest.fixture(scope="module")
def edit(model):
    return UCE.configured("2023", ridge=0.02).erase(model, STAR)


@pytest.fixture(scope="module")
def judge(model, edit):
    original = model.generate(PROMPTS, steps=4)
    with edit.on(model):
        edited = model.generate(PROMPTS, steps=4)
    return Like(original, np.abs(edited.astype(float) - original).mean((1, 2, 3)))


def run(model, judge, **settings):
    method = ClosedFormAttack(steps=4, **settings)
    return method.attack(model, STAR, judge, budget("quick"), prompts=PROMPTS, reference=model)


def test_a_large_budget_undoes_the_edit_and_a_small_one_does_not(model, edit, judge):
    with edit.on(model):
        free = run(model, judge, norm_budget=1e6)
        tight = run(model, judge, norm_budget=0.05)
        left = [
            [item.details["residual"] for item in run(model, judge, norm_budget=b).items]
            for b in (0.5, 1, 4)
        ]
    assert free.pre_rate == 0 and free.rate == 1.0
    assert all(item.score > 0.9 and item.details["residual"] < 1e-3 for item in free.items)
    assert tight.rate < 1.0
    assert (np.diff(np.array(left), axis=0) <= 1e-9).all()


def test_on_the_original_it_feeds_the_prompt_back(model, judge):
    found = run(model, judge)
    assert found.pre_rate == 1.0 and found.rate == 1.0
    assert all(item.details["attack_hit"] for item in found.items)


def test_the_record_is_complete_and_the_model_as_it_was(model, edit, judge):
    with edit.on(model):
        before = [model.tensors()[n].detach().clone() for n in model.text_projections()]
        state = model.edits.digests
        found = run(model, judge)
        assert model.edits.digests == state
        for name, value in zip(model.text_projections(), before, strict=True):
            assert torch.equal(model.tensors()[name], value)
    assert [item.prompt for item in found.items] == PROMPTS and found.outputs.shape[0] == 3
    assert found.attack == "closed-form" and not found.teaches and found.judge == "like"
    assert all(item.text is None for item in found.items)
    # Two pictures of four steps with guidance for each of three prompts.
    assert found.cost["denoiser.forward"] == 3 * 2 * 2 * 4
    assert found == dataclasses.replace(found) and found.settings["norm_budget"] == 2.0


def test_a_separate_original_gives_the_same_as_lifting(model, edit, judge):
    other = tiny_diffusion()
    with edit.on(model):
        own = run(model, judge)
        apart = ClosedFormAttack(steps=4).attack(
            model, STAR, judge, budget("quick"), prompts=PROMPTS, reference=other
        )
        none = ClosedFormAttack(steps=4).attack(
            model, STAR, judge, budget("quick"), prompts=PROMPTS
        )
    assert np.abs(own.outputs.astype(int) - apart.outputs).max() <= 1
    assert np.array_equal(own.outputs, none.outputs)
    with pytest.raises(UnsupportedModel, match="reference is 'world'; allowed is an opened model"):
        ClosedFormAttack().attack(
            model, STAR, judge, budget("quick"), prompts=PROMPTS, reference="world"
        )


def test_an_allowance_that_is_too_small_is_refused_in_words(model, judge):
    with pytest.raises(SettingError, match="at most 2 steps"):
        ClosedFormAttack(steps=20).attack(
            model, STAR, judge, Budget("tiny", denoiser_rows=8), prompts=PROMPTS
        )
    with pytest.raises(SettingError):
        ClosedFormAttack(norm_budget=0)
