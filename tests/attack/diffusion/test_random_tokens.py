"""The control: as many random tokens as the search has, one picture a draw."""

from __future__ import annotations

import numpy as np
import pytest

from expunge import Concept
from expunge.attack.diffusion.random_tokens import RandomTokens
from expunge.core.adversarial_prompts import Forbidden
from expunge.core.sampling import SHARED
from expunge.errors import SettingError
from expunge.method import Budget, Judge, Prompt, Verdicts
from expunge.testing import tiny_diffusion

pytestmark = pytest.mark.usefixtures("no_shared_pictures")

STAR = Concept("star", anchor="circle")
PROMPTS = [Prompt("a red star", seed=5), Prompt("star", seed=6)]
SMALL = {"tokens": 2, "steps": 2, "guidance": 3.0}


class After(Judge):
    """Says hit from the n-th judged batch on."""

    id, protocol, threshold = "after", "after/1", 0.5

    def __init__(self, calls: int):
        self.calls, self.made = calls, []

    def judge(self, outputs, concept, prompts):
        self.made.append(len(outputs))
        hit = np.full(len(outputs), len(self.made) > self.calls)
        return Verdicts(hit, hit * 1.0, np.ones(len(outputs), bool))


def run(model, judge, budget=None, **settings):
    attack = RandomTokens(**{**SMALL, **settings})
    return attack.attack(model, STAR, judge, Budget("small", budget), prompts=PROMPTS, seed=0)


def test_pictures_and_rows_end_the_draws(model):
    by_pictures = run(model, After(99), pictures=3)
    assert [item.details["pictures"] for item in by_pictures.items] == [3, 3]
    assert not any(item.hit for item in by_pictures.items)
    by_rows = run(model, After(99), budget=15)
    assert [item.details["rows"] for item in by_rows.items] == [
        12,
        12,
    ]  # plain 4 and two draws of 4
    SHARED.clear()
    paid = run(model, After(99), budget=15)
    assert paid.cost["denoiser.forward"] == 24 and "denoiser.backward" not in paid.cost


def test_a_budget_without_one_draw_is_refused(model):
    for rows in (4, 7):
        with pytest.raises(SettingError, match="costs 8"):
            run(model, After(99), budget=rows)
    assert [i.details["pictures"] for i in run(model, After(99), budget=8).items] == [1, 1]


def test_a_prompt_without_room_is_skipped_and_the_others_attacked(model):
    asked = [Prompt("star " * 13, seed=7), *PROMPTS]
    attack = RandomTokens(**SMALL, pictures=2)
    found = attack.attack(model, STAR, After(2), Budget("small", None), prompts=asked, seed=0)
    assert [item.hit for item in found.items] == [False, True, True]
    assert "at most 12 fit" in found.items[0].details["skipped"]
    assert [item.text for item in found.items[1:]] == [
        item.text for item in run(model, After(2), pictures=2).items
    ]


def test_success_ends_an_item(model):
    judge = After(2)
    made = run(model, judge, pictures=9)
    assert judge.made == [2, 2, 2] and all(item.hit and not item.pre_hit for item in made.items)
    assert (
        run(model, After(0), pictures=9).items[0].details["pictures"] == 0
    )  # the plain prompt did


def test_draws_are_usable_differ_and_are_the_same_on_every_model(model):
    one = run(model, After(1), pictures=4)
    forbidden = Forbidden(model.tokenizer, STAR, len(model.token_table()))
    for item in one.items:
        assert item.text != item.prompt.text and item.text.endswith(item.prompt.text)
        assert forbidden.count(item.text) == 1
    other = run(tiny_diffusion(seed=1), After(1), pictures=4)
    assert [item.text for item in one.items] == [item.text for item in other.items]
    replaced = run(model, After(1), pictures=4, placement="replace")
    assert all(forbidden.count(item.text) == 0 for item in replaced.items)


def test_one_token_to_every_three_as_p4d_k(model):
    """Prompts of different lengths get different numbers of tokens, in one run, whatever the batch."""
    asked = [Prompt("a photo of a red star", seed=7), *PROMPTS]
    seen = {}
    for batch in (1, 8):
        attack = RandomTokens(
            **{**SMALL, "tokens": 0, "placement": "third", "batch": batch}, pictures=1
        )
        found = attack.attack(model, STAR, After(99), Budget("small", None), prompts=asked, seed=0)
        seen[batch] = [item.text for item in found.items]
    assert seen[1] == seen[8]
    lengths = model.content_length([prompt.text for prompt in asked])
    assert lengths == [6, 3, 1]
    ids = model.tokenizer(seen[8], add_special_tokens=False).input_ids
    assert [len(row) for row in ids] == [6 + 3, 3 + 2, 1 + 1]
    assert all(text.find("star") >= 0 for text in seen[8])
