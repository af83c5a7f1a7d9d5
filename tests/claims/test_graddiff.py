"""GradDiff and relearning on the world of facts: recorded claims.

The triad: original, erased and never, asked in wordings that were not trained for the person.  Step
sizes were chosen on one forgotten person (development); the claims run on the other two.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from expunge.attack.language.relearning import Relearning
from expunge.core.answers import AnswerJudge
from expunge.edit import Edit
from expunge.erase.language.graddiff import GradDiff
from expunge.method import BUDGETS, Attempts, Prompt
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


def interval(values: dict[tuple[str, int], np.ndarray]) -> list[float]:
    """95 % bootstrap interval of the mean; the unit is a question, averaged over seeds."""
    names = dict.fromkeys(name for name, _ in values)
    units = np.concatenate(
        [np.mean([values[name, seed] for seed in SEEDS], axis=0, dtype=float) for name in names]
    )
    draw = np.random.default_rng(0)
    means = [draw.choice(units, len(units)).mean() for _ in range(2000)]
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
    erased, kept, towns = {}, {}, {}
    for key, edit in edits.items():
        with edit.on(original):
            erased[key] = hits(original, judge, [key[0]])
            kept[key] = hits(original, judge, OTHERS)
            towns[key] = hits(original, judge, world.TOWNS)
    values = {
        "original forgotten": float(hits(original, judge, TEST).mean()),
        "erased forgotten": float(np.mean(list(erased.values()))),
        "original others": float(hits(original, judge, OTHERS).mean()),
        "erased others": float(np.mean(list(kept.values()))),
        "original towns": float(hits(original, judge, world.TOWNS).mean()),
        "erased towns": float(np.mean(list(towns.values()))),
    }
    holds = (
        values["erased forgotten"] <= 0.25
        and values["erased others"] >= values["original others"] - 0.1
    )
    results.record(
        "forgets-a-person-and-keeps-the-others", "graddiff", GradDiff.version, values, holds,
        sum(map(len, erased.values())), list(SEEDS), preset="world",
        interval={"erased forgotten": interval(erased), "erased others": interval(kept)},
    )  # fmt: skip
    assert holds, values


@pytest.mark.parametrize(
    ("claim", "changes", "note"),
    [
        (
            "retain-term-beats-ascent-by-15-points",
            {"stop_nll": None},
            "with the preset's gentle steps a person is forgotten before ascent alone has harmed the "
            "others, so the retain term has little to save; see the claim about going on",
        ),
        (
            "retain-term-beats-ascent-by-15-points-when-training-goes-on",
            {"stop_nll": None, "lr": 1e-3, "epochs": 32},
            "",
        ),
    ],
)
def test_ascent_alone_harms_what_the_retain_term_keeps(
    original: LanguageModel, judge: AnswerJudge, claim: str, changes: dict[str, Any], note: str
) -> None:
    kept: dict[float, dict[tuple[str, int], np.ndarray]] = {0.0: {}, 4.0: {}}
    for alpha, found in kept.items():
        for name in TEST:
            for seed in SEEDS:
                method = GradDiff.configured("world", alpha=alpha, **changes)
                with method.erase(original, world.concept(name), seed=seed).on(original):
                    found[name, seed] = hits(original, judge, OTHERS)
    names = {4.0: "others, gradient difference", 0.0: "others, ascent alone"}
    values = {names[alpha]: float(np.mean(list(kept[alpha].values()))) for alpha in names}
    holds = values[names[4.0]] >= values[names[0.0]] + 0.15
    results.record(
        claim, "graddiff", GradDiff.version, values, holds, 2 * 3 * len(questions(OTHERS)),
        list(SEEDS), preset="world", note="" if holds else note,
        interval={names[alpha]: interval(kept[alpha]) for alpha in names},
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
    arms = ("erased pre", "erased", "never pre", "never", "original")
    shown: dict[str, dict[tuple[str, int], np.ndarray]] = {arm: {} for arm in arms}
    curve: dict[str, list[float]] = {}
    for (name, seed), edit in edits.items():
        asked, concept = questions([name]), world.concept(name)

        def attacked(
            model: LanguageModel, concept: Any = concept, asked: Any = asked, seed: int = seed
        ) -> Attempts:
            return attack.attack(model, concept, judge, BUDGETS["world"], prompts=asked, seed=seed)

        with edit.on(original):
            erased = attacked(original)
        for steps in erased.items[0].details["curve"]:
            rate = float(np.mean([item.details["curve"][steps] for item in erased.items]))
            curve.setdefault(f"erased after {steps} steps", []).append(rate)
        for arm_name, found in (("erased", erased), ("never", attacked(never))):
            shown[f"{arm_name} pre"][name, seed] = np.array([i.pre_hit for i in found.items])
            shown[arm_name][name, seed] = np.array([i.hit for i in found.items])
        shown["original"][name, seed] = np.array([i.hit for i in attacked(original).items])
    values = {key: float(np.mean(list(v.values()))) for key, v in shown.items()}
    values |= {key: float(np.mean(v)) for key, v in curve.items()}
    values["recovered"] = (values["erased"] - values["never"]) / (
        values["original"] - values["never"]
    )
    advantage = {
        key: 1.0 * shown["erased"][key] - shown["erased pre"][key]
        - 1.0 * shown["never"][key] + shown["never pre"][key]
        for key in edits
    }  # fmt: skip
    bounds = interval(advantage)
    values["gained beyond what it taught"] = float(np.mean(list(advantage.values())))
    holds = bounds[0] > 0
    results.record(
        f"relearning-{arm}-brings-back-more-than-it-teaches", "relearning", Relearning.version,
        values, holds, 18 * len(edits), list(SEEDS), preset="world",
        interval={"gained beyond what it taught": bounds},
        note="" if holds else "the gain beyond the model that never knew is not told from zero",
    )  # fmt: skip
    assert holds, values
