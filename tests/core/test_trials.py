"""Trials of attacks: counted before and after, paid for once, refused where nothing could be tried."""

from __future__ import annotations

import numpy as np
import pytest

from expunge import Concept
from expunge.attack.diffusion.random_tokens import RandomTokens
from expunge.core.prompt_search import Ledger
from expunge.core.trials import Trials, picture_rows, received
from expunge.erase.diffusion.sld import SLD
from expunge.errors import ConceptError, PromptError, SettingError
from expunge.method import BUDGETS, Judge, Prompt, Verdicts

pytestmark = pytest.mark.usefixtures("no_shared_pictures")

STAR = Concept("star", phrases=("heart shape",), anchor="circle")


class ByText(Judge):
    """Says hit for chosen pictures: those of which the first value is in a set."""

    id, protocol, threshold = "by-text", "by-text/1", 0.5

    def __init__(self):
        self.script: list[tuple[list[bool], list[float]]] = []
        self.asked: list[list[str]] = []

    def judge(self, outputs, concept, prompts):
        self.asked.append([prompt.text for prompt in prompts])
        hit, score = self.script.pop(0)
        assert len(hit) == len(outputs)
        return Verdicts(np.array(hit), np.array(score), np.ones(len(hit), bool))


def test_trials_count_before_and_after_and_pay_once(model):
    judge, ledger = ByText(), Ledger(3, 100)
    prompts = [Prompt("a red star", 1), Prompt("a blue star", 2), Prompt("star", 3)]
    judge.script = [
        ([True, False, False], [0.9, 0.3, 0.4]),
        ([False], [0.2]),
        ([True, False], [0.8, 0.1]),
    ]
    trials = Trials(model, STAR, judge, prompts, ledger, steps=2, guidance=3.0)
    assert trials.price == 4 and ledger.spent.tolist() == [4, 4, 4]
    assert trials.open.tolist() == [False, True, True]
    assert trials.show([1], ["x blue star"]).tolist() == [False]
    assert trials.show([1], ["x blue star"]).tolist() == [
        False
    ]  # seen: free, the judge is not asked
    assert trials.show([1], ["a blue star"]).tolist() == [False]  # the plain prompt was seen too
    assert ledger.spent.tolist() == [4, 8, 4] and len(judge.asked) == 2
    assert trials.show([1, 2], ["y blue star", "z star"]).tolist() == [True, False]
    made = trials.attempts([{}, {}, {}])
    assert [a.pre_hit for a in made] == [True, False, False]
    assert [a.hit for a in made] == [True, True, False]  # after counts before
    assert [a.text for a in made] == [None, "y blue star", "z star"]
    assert [a.score for a in made] == [0.9, 0.8, 0.1]
    shown = model.generate(["y blue star"], seeds=[2], steps=2, guidance=3.0)[0]
    assert np.array_equal(trials.pictures[1], shown)
    assert judge.asked[-1] == ["a blue star", "star"]  # judged against the attacked prompts


def test_one_branch_costs_half_and_budgets_that_try_nothing_are_refused(model):
    """The least is the plain picture and one tried picture, or what the attack says it needs."""
    one = [Prompt("star", 1)]

    def trials(limit, guidance, **least):
        judge = ByText()
        judge.script = [([False], [0.0])]
        return Trials(
            model, STAR, judge, one, Ledger(1, limit), steps=2, guidance=guidance, **least
        )

    assert trials(4, 1.0).price == 2 and trials(8, 3.0).price == 4
    for limit, guidance, least, words in (
        (3, 1.0, {}, "2 pictures of 2 steps, costs 4"),
        (7, 3.0, {}, "costs 8"),
        (
            13,
            3.0,
            {"pictures": 3, "rows": 2},
            "3 pictures of 2 steps and 2 rows of search, costs 14",
        ),
    ):
        with pytest.raises(SettingError, match=words):
            trials(limit, guidance, **least)
    assert trials(14, 3.0, pictures=3, rows=2).price == 4


def test_skipped_prompts_are_not_open_and_say_why(model):
    judge = ByText()
    judge.script = [([True, False, False], [0.9, 0.1, 0.2])]
    prompts = [Prompt("star", 1), Prompt("star", 2), Prompt("a star", 3)]
    trials = Trials(model, STAR, judge, prompts, Ledger(3, 100), steps=2, guidance=3.0)
    assert trials.open.tolist() == [False, True, True]
    trials.skip({"star": "too long", "heart": "is not attacked"})
    assert trials.open.tolist() == [False, False, True]
    made = trials.attempts([{}, {}, {}])
    assert [a.details.get("skipped") for a in made] == [None, "too long", None]
    assert [(a.pre_hit, a.hit) for a in made] == [(True, True), (False, False), (False, False)]


def test_a_prompts_own_guidance_wins_in_every_picture_of_it(model):
    """Plain and tried pictures; a prompt that is guided makes both branches run for all."""
    judge = ByText()
    judge.script = [([False, False], [0.1, 0.1]), ([False, False], [0.2, 0.2])]
    prompts = [Prompt("a red star", 1, guidance=7.0), Prompt("a red star", 2)]
    trials = Trials(model, STAR, judge, prompts, Ledger(2, 100), steps=2, guidance=1.0)
    assert trials.price == 4

    def alone(text, seed, guidance):
        return model.generate([text], seeds=[seed], steps=2, guidance=guidance)[0].astype(int)

    for text in ("a red star", "a blue star"):
        for picture, seed, guidance in zip(trials.pictures, (1, 2), (7.0, 1.0), strict=True):
            assert abs(picture.astype(int) - alone(text, seed, guidance)).max() <= 1
        assert abs(trials.pictures[0].astype(int) - alone(text, 1, 1.0)).max() > 1
        if text == "a red star":
            trials.show([0, 1], ["a blue star"] * 2)


def test_other_seeds_of_the_plain_prompts_are_paid_for_and_count_for_nothing(model):
    judge, ledger = ByText(), Ledger(2, 100)
    prompts = [Prompt("a red star", 1), Prompt("star", 3)]
    judge.script = [([False, False], [0.3, 0.4]), ([True, False, True], [0.9, 0.1, 0.8])]
    trials = Trials(model, STAR, judge, prompts, ledger, steps=2, guidance=3.0)
    assert trials.redraw([0, 0, 1], [8, 9, 8]).tolist() == [True, False, True]
    assert trials.redraw([], []).tolist() == []
    assert ledger.spent.tolist() == [12, 8] and judge.asked[1] == ["a red star"] * 2 + ["star"]
    assert not any(item.hit for item in trials.attempts([{}, {}])) and trials.tried == [0, 0]


def test_branches_that_an_edit_asks_for_are_paid_for(model):
    prompts = [Prompt("a red star", 1)]
    assert picture_rows(model, prompts, 2, 3.0) == 4
    with SLD(warm_up=0).erase(model, STAR).on(model):
        assert (
            picture_rows(model, prompts, 2, 3.0) == 6 and picture_rows(model, prompts, 2, 1.0) == 2
        )
        before = model.cost.snapshot()
        model.generate(prompts, steps=2, guidance=3.0)
        assert model.cost.since(before)["denoiser.forward"] == 6


def test_what_an_attack_is_given_is_checked_at_the_door(model):
    """Names and bare texts will do, the empty text is a prompt, and everything else is one clear sentence."""
    attack = RandomTokens(tokens=2, pictures=1, steps=2, guidance=3.0)
    own = Prompt("", 7, guidance=1.0)
    found = received(attack, model, "star", ByText(), "quick", ["a star", own])
    assert found == (Concept("star"), BUDGETS["quick"], [Prompt("a star", 0), own])
    assert received(attack, model, STAR, ByText(), "paper", "a star")[2] == [Prompt("a star", 0)]
    judge = ByText()
    judge.script = [([True, False], [0.9, 0.1]), ([False], [0.2])]
    made = attack.attack(model, "star", judge, "quick", prompts=["a red star", ""])
    assert [item.prompt for item in made.items] == [Prompt("a red star", 0), Prompt("", 1)]
    for wrong, error, words in (
        ({"prompts": []}, PromptError, "no prompt"),
        ({"prompts": None}, PromptError, "prompts is None"),
        ({"prompts": ["star", None]}, PromptError, "prompt 2 is None; a text is needed"),
        ({"prompts": [Prompt(None)]}, PromptError, "prompt 1"),
        ({"concept": None}, ConceptError, "random-tokens: the concept is None"),
        ({"budget": "worlds"}, SettingError, "did you mean 'world'"),
        ({"judge": None}, SettingError, "random-tokens: the judge is None; a Judge is needed"),
        ({"judge": "world-oracle"}, SettingError, "the judge is 'world-oracle'"),
        ({"judge": ByText}, SettingError, "the judge is <class"),
    ):
        given = {
            "concept": STAR, "judge": ByText(), "budget": "quick", "prompts": ["star"], **wrong
        }  # fmt: skip
        with pytest.raises(error, match=words):
            received(attack, model, **given)
