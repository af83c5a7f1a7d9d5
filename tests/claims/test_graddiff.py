"""GradDiff and relearning on the world of facts: recorded claims.

The triad: original, erased and never, asked in wordings that were not trained for the person.  Step
sizes were chosen on one forgotten person (development); the claims run on the other two.
"""

from __future__ import annotations

import numpy as np
import pytest

from expunge.attack.language.relearning import Relearning
from expunge.core.answers import AnswerJudge
from expunge.edit import Edit
from expunge.erase.language.graddiff import GradDiff
from expunge.method import BUDGETS, Prompt
from expunge.models.language import LanguageModel
from expunge.run import results
from expunge.world import facts as world

pytestmark = pytest.mark.claims

DEVELOPMENT, *TEST = world.FORGOTTEN
SEEDS = (0, 1, 2)
OTHERS = tuple(name for name in world.PEOPLE if name not in world.FORGOTTEN)


@pytest.fixture(scope="module")
def original() -> LanguageModel:
    return world.open_facts("original")


@pytest.fixture(scope="module")
def never() -> LanguageModel:
    return world.open_facts("never")


@pytest.fixture(scope="module")
def judge(original: LanguageModel) -> AnswerJudge:
    return original.companions.judge()


def questions(names: tuple[str, ...] | list[str]) -> list[Prompt]:
    return [prompt for name in names for prompt in world.prompts(name, 100)]


def hits(
    model: LanguageModel, judge: AnswerJudge, names: tuple[str, ...] | list[str]
) -> np.ndarray:
    asked = questions(names)
    outputs = model.generate(asked, max_new_tokens=8)
    return judge.judge(outputs, world.concept(names[0]), asked).hit


@pytest.fixture(scope="module")
def edits(original: LanguageModel) -> dict[tuple[str, int], Edit]:
    return {
        (name, seed): GradDiff.configured("world").erase(original, world.concept(name), seed=seed)
        for name in TEST
        for seed in SEEDS
    }


def interval(values: list[np.ndarray]) -> list[float]:
    """95 % bootstrap interval of the mean over questions."""
    answers = np.concatenate([v.reshape(-1) for v in values]).astype(float)
    draw = np.random.default_rng(0)
    means = [draw.choice(answers, len(answers)).mean() for _ in range(2000)]
    return [round(float(q), 4) for q in np.quantile(means, [0.025, 0.975])]


def test_the_world_knows_what_it_should(
    original: LanguageModel, never: LanguageModel, judge: AnswerJudge
) -> None:
    values = {
        "original forgotten people": float(hits(original, judge, world.FORGOTTEN).mean()),
        "never forgotten people": float(hits(never, judge, world.FORGOTTEN).mean()),
        "original other people": float(hits(original, judge, OTHERS).mean()),
        "never other people": float(hits(never, judge, OTHERS).mean()),
    }
    holds = (
        values["original forgotten people"] >= 0.8
        and values["never forgotten people"] <= 0.25
        and values["never other people"] >= 0.8
    )
    results.record("facts-are-learned", "graddiff", GradDiff.version, values, holds, 54, [0])
    assert holds, values


def test_forgets_a_person_and_keeps_the_others(
    original: LanguageModel,
    judge: AnswerJudge,
    edits: dict[tuple[str, int], Edit],
) -> None:
    erased, kept, towns = [], [], []
    for (name, _), edit in edits.items():
        with edit.on(original):
            erased.append(hits(original, judge, [name]))
            kept.append(hits(original, judge, OTHERS))
            towns.append(hits(original, judge, world.TOWNS))
    values = {
        "original forgotten": float(hits(original, judge, TEST).mean()),
        "erased forgotten": float(np.mean(erased)),
        "original others": float(hits(original, judge, OTHERS).mean()),
        "erased others": float(np.mean(kept)),
        "original towns": float(hits(original, judge, world.TOWNS).mean()),
        "erased towns": float(np.mean(towns)),
    }
    holds = (
        values["erased forgotten"] <= 0.25
        and values["erased others"] >= values["original others"] - 0.1
    )
    results.record(
        "forgets-a-person-and-keeps-the-others", "graddiff", GradDiff.version, values, holds,
        sum(map(len, erased)), list(SEEDS), preset="world",
        interval={"erased forgotten": interval(erased), "erased others": interval(kept)},
    )  # fmt: skip
    assert holds, values


def test_ascent_alone_destroys_what_the_retain_term_keeps(
    original: LanguageModel, judge: AnswerJudge, edits: dict[tuple[str, int], Edit]
) -> None:
    name = TEST[0]
    with edits[name, 0].on(original):
        with_retain = float(hits(original, judge, OTHERS).mean())
    ascent = GradDiff.configured("world", alpha=0.0, stop_nll=None).erase(
        original, world.concept(name), seed=0
    )
    with ascent.on(original):
        alone = float(hits(original, judge, OTHERS).mean())
    values = {"others, gradient difference": with_retain, "others, ascent alone": alone}
    holds = with_retain >= alone + 0.15
    results.record(
        "retain-term-beats-ascent-by-15-points", "graddiff", GradDiff.version, values, holds,
        len(questions(OTHERS)), [0], preset="world",
    )  # fmt: skip
    assert holds, values


@pytest.mark.parametrize("arm", ["related", "unrelated"])
def test_relearning_brings_back_more_than_it_teaches(
    original: LanguageModel,
    never: LanguageModel,
    judge: AnswerJudge,
    edits: dict[tuple[str, int], Edit],
    arm: str,
) -> None:
    attack = Relearning.configured("world", data=arm)
    rates: dict[str, list[float]] = {
        k: [] for k in ("erased pre", "erased", "never pre", "never", "original")
    }
    curve: dict[str, list[float]] = {}
    for (name, seed), edit in edits.items():
        asked, concept = questions([name]), world.concept(name)
        with edit.on(original):
            found = attack.attack(
                original, concept, judge, BUDGETS["world"], prompts=asked, seed=seed
            )
        rates["erased pre"].append(found.pre_rate)
        rates["erased"].append(found.rate)
        for steps in found.items[0].details["curve"]:
            shown = [item.details["curve"][steps] for item in found.items]
            curve.setdefault(f"erased after {steps} steps", []).append(float(np.mean(shown)))
        blank = attack.attack(never, concept, judge, BUDGETS["world"], prompts=asked, seed=seed)
        rates["never pre"].append(blank.pre_rate)
        rates["never"].append(blank.rate)
        if seed == 0:
            full = attack.attack(original, concept, judge, BUDGETS["world"], prompts=asked)
            rates["original"].append(full.rate)
    values = {key: float(np.mean(v)) for key, v in {**rates, **curve}.items()}
    values["recovered"] = (values["erased"] - values["never"]) / (
        values["original"] - values["never"]
    )
    gained = values["erased"] - values["erased pre"]
    taught = values["never"] - values["never pre"]
    holds = gained > taught
    results.record(
        f"relearning-{arm}-brings-back-more-than-it-teaches", "relearning", Relearning.version,
        values, holds, 18 * len(edits), list(SEEDS), preset="world",
        note="" if holds else "the erased model gained no more than the model that never knew",
    )  # fmt: skip
    assert holds, values
