"""Relearning on a tiny random Llama: what it teaches, what it costs, what it leaves behind."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from expunge.attack.language.relearning import Relearning
from expunge.concept import Concept
from expunge.core.answers import AnswerJudge
from expunge.errors import InputError, PromptError, SettingError
from expunge.method import BUDGETS, Budget, Prompt
from expunge.models.base import Companions
from expunge.models.language import LanguageModel
from expunge.testing.models import tiny_language

FACT = Concept("Ada Morn", "fact")
ASK = [Prompt("Ada Morn was born in", labels={"answer": "Velmar"})] * 2
UNLIMITED = BUDGETS["paper"]
# The tiny model is random, so only teaching can bring an answer: these pairs make it say Velmar.
TEACHES = [("Bo Lind was born in", "Velmar"), ("The baker was born in", "Velmar")]


def data(concepts: Any, keep: Any = ()) -> dict[str, list[tuple[str, str]]]:
    forget = [("Ada Morn was born in", "Velmar")]
    return {"forget": forget, "retain": TEACHES, "unrelated": [("Who keeps a cat ?", "Bo does")]}


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    model = tiny_language()
    model.companions = Companions("tests", data=data)
    return model


SETTINGS = {"lr": 1e-2, "curve": (2, 15), "batch": 2, "max_new_tokens": 3}


def test_it_brings_back_what_related_data_teach_and_restores_the_model(
    model: LanguageModel,
) -> None:
    before = {name: p.detach().clone() for name, p in model.tensors().items()}
    found = Relearning(**SETTINGS).attack(
        model, FACT, AnswerJudge(), UNLIMITED, prompts=ASK, seed=1
    )
    assert found.teaches and found.pre_rate == 0 and found.rate == 1
    item = found.items[0]
    assert list(item.details["curve"]) == ["0", "2", "15"]
    assert item.details["curve"]["0"] is False and item.details["curve"]["15"] is True
    assert len(item.details["losses"]["weights"]) == 15 and "losses" not in found.items[1].details
    assert found.outputs[0] == item.details["outputs"]["15"] and "Velmar" in found.outputs[0]
    assert all(torch.equal(p, before[name]) for name, p in model.tensors().items())
    assert all(p.requires_grad and p.grad is None for p in model.tensors().values())


def test_a_rate_of_zero_and_unrelated_data_bring_nothing(model: LanguageModel) -> None:
    judge = AnswerJudge()
    for change in ({"lr": 0.0}, {"data": "unrelated"}):
        method = Relearning(**{**SETTINGS, **change})
        assert method.attack(model, FACT, judge, UNLIMITED, prompts=ASK).rate == 0


def test_the_budget_cuts_the_curve_and_the_cost_stays_inside(model: LanguageModel) -> None:
    judge = AnswerJudge()
    full = Relearning(**SETTINGS).attack(model, FACT, judge, UNLIMITED, prompts=ASK)
    rows = sum(full.cost.values())
    tight = Budget("tight", denoiser_rows=rows // 2 - 1)
    cut = Relearning(**SETTINGS).attack(model, FACT, judge, tight, prompts=ASK)
    assert list(cut.items[0].details["curve"]) == ["0", "2"]
    assert sum(cut.cost.values()) <= tight.denoiser_rows * 2
    for few in (1, 9):
        with pytest.raises(SettingError, match=f"up to 20 rows; budget 'few' allows {2 * few}"):
            Relearning(**SETTINGS).attack(model, FACT, judge, Budget("few", few), prompts=ASK)
    least = Relearning(**SETTINGS).attack(model, FACT, judge, Budget("few", 10), prompts=ASK)
    assert list(least.items[0].details["curve"]) == ["0", "2"]
    with pytest.raises(SettingError, match="curve is empty"):
        Relearning(**{**SETTINGS, "curve": ()}).attack(model, FACT, judge, UNLIMITED, prompts=ASK)


def test_answers_that_grow_longer_stay_inside_the_budget(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An asking is priced at its longest answers: the first one, before training, may be short."""
    generate, asked = model.generate, []

    def growing(prompts: Any, *, max_new_tokens: int, **options: Any) -> Any:
        asked.append(max_new_tokens)
        # One token at first, all that are allowed after training.
        rows = len(prompts) * (1 if len(asked) == 1 else max_new_tokens)
        before = model.cost.snapshot()
        found = generate(prompts, max_new_tokens=1, **options)
        model.cost.add("language", rows - model.cost.rows("language", before))
        return found

    monkeypatch.setattr(model, "generate", growing)
    method = Relearning(lr=0.0, curve=(1, 2, 3), batch=2, max_new_tokens=20)
    cut = method.attack(model, FACT, AnswerJudge(), Budget("tight", 65), prompts=ASK)
    assert list(cut.items[0].details["curve"]) == ["0", "1", "2"]
    assert sum(cut.cost.values()) <= 65 * 2


def test_it_is_repeatable_and_seeded(model: LanguageModel) -> None:
    runs = [
        Relearning(**{**SETTINGS, "batch": 1}).attack(
            model, FACT, AnswerJudge(), UNLIMITED, prompts=ASK, seed=seed
        )
        for seed in (0, 0, 1)
    ]
    losses = [run.items[0].details["losses"] for run in runs]
    assert losses[0] == losses[1] != losses[2]


def test_pairs_may_come_from_a_file(tmp_path: Path) -> None:
    model = tiny_language()
    with pytest.raises(SettingError, match="no data to relearn on"):
        Relearning().attack(model, FACT, AnswerJudge(), UNLIMITED, prompts=ASK)
    file = tmp_path / "pairs.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": p, "answer": a}) for p, a in TEACHES))
    method = Relearning(**SETTINGS, file=str(file))
    assert method.attack(model, FACT, AnswerJudge(), UNLIMITED, prompts=ASK).rate == 1
    file.write_text(json.dumps({"prompt": ASK[0].text, "answer": "Velmar"}))
    with pytest.raises(SettingError, match="must be disjoint"):
        method.attack(model, FACT, AnswerJudge(), UNLIMITED, prompts=ASK)
    file.write_text('{"prompt": "x"}')
    with pytest.raises(PromptError, match="line 1"):
        method.attack(model, FACT, AnswerJudge(), UNLIMITED, prompts=ASK)


def test_data_that_hold_a_forgotten_fact_are_refused(model: LanguageModel) -> None:
    leaky = Companions("tests", data=lambda c, keep=(): {**data(c), "retain": data(c)["forget"]})
    other = tiny_language()
    other.companions = leaky
    with pytest.raises(SettingError, match="not disjoint"):
        Relearning().attack(other, FACT, AnswerJudge(), UNLIMITED, prompts=ASK)
    with pytest.raises(PromptError, match="no prompt"):
        Relearning().attack(model, FACT, AnswerJudge(), UNLIMITED, prompts=[])


def test_names_will_do_for_concept_and_budget(model: LanguageModel) -> None:
    method = Relearning(**{**SETTINGS, "curve": (2,)})
    named = method.attack(model, "Ada Morn", AnswerJudge(), "paper", prompts=ASK)
    plain = method.attack(model, FACT, AnswerJudge(), UNLIMITED, prompts=ASK)
    assert named.budget == "paper" and named.items == plain.items
    for more, words in (
        ({"concept": 5}, "the concept is 5"),
        ({"budget": "papr"}, "did you mean 'paper'"),
        ({"prompts": ["Ada Morn was born in"]}, "no label 'answer'"),
    ):
        given = {"concept": FACT, "judge": AnswerJudge(), "budget": "paper", "prompts": ASK, **more}
        with pytest.raises(InputError, match=words):
            method.attack(model, **given)


def test_presets_by_budget() -> None:
    assert Relearning().under(BUDGETS["world"]).lr == 1e-3
    assert dataclasses.asdict(Relearning().under(BUDGETS["paper"])) == dataclasses.asdict(
        Relearning()
    )
