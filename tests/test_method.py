"""Hyperparameters: texts are converted, ranges are kept, and what is wrong is said in words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from expunge import catalogue
from expunge.concept import Concept
from expunge.errors import ProtocolError, SettingError, candidate, nearest
from expunge.method import Budget, Control, Measurement, Method, budget, setting


@dataclasses.dataclass(frozen=True)
class Sample(Method):
    """A method with a setting of each type."""

    id: ClassVar[str] = "sample"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {"small": {"steps": 2}}

    steps: int = setting(10, "steps", minimum=1, maximum=100)
    lr: float | None = setting(None, "rate", minimum=0)
    on: bool = setting(False, "switch")
    how: str = setting("fast", "way", choices=("fast", "slow"))
    curve: tuple[int, ...] = setting((1, 2), "points", minimum=1)
    words: tuple[str, ...] = setting((), "words")
    scale: float = setting(1.0, "without bounds")
    betas: tuple[float, float] = setting((0.9, 0.99), "two of them")


@dataclasses.dataclass(frozen=True)
class Listing(Method):
    """A method of another package, whose setting is a list."""

    id: ClassVar[str] = "listing"

    names: Any = setting(None, "names")  # noqa: RUF009  # a field, which is frozen


def test_a_setting_of_any_type_is_stored_as_it_is():
    given = ["a"]
    assert Listing(given).names is given


def test_texts_are_converted():
    made = Sample.configured(None, steps="5", lr="1e-3", on="yes", how="slow", curve="3, 4")
    assert made == Sample(5, 1e-3, True, "slow", (3, 4))
    assert Sample.configured("small", lr="none") == Sample(steps=2)
    assert [row["name"] for row in Sample.describe()] == [
        "steps",
        "lr",
        "on",
        "how",
        "curve",
        "words",
        "scale",
        "betas",
    ]
    lists = Sample.configured(None, curve="3", words="woman, old man")
    assert (lists.curve, lists.words) == ((3,), ("woman", "old man"))
    assert Sample.configured(None, words="woman").words == ("woman",)
    assert Sample.configured(None, words="").words == ()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"stepz": 1}, "did you mean 'steps'"), ({"steps": "x"}, "needs int"), ({"steps": 0}, "from 1"),
        ({"steps": 101}, "to 100"), ({"lr": float("nan")}, "allowed"), ({"how": "fas"}, "mean 'fast'"),
        ({"curve": (1, 0)}, "from 1"), ({"on": "maybe"}, "needs bool"), ({"steps": True}, "allowed"),
        ({"curve": "1,x"}, "needs int"),
    ],
)  # fmt: skip
def test_wrong_settings(settings, match):
    with pytest.raises(SettingError, match=match):
        Sample.configured(None, **settings)


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"steps": 2.5}, "a whole number"), ({"steps": "5"}, "a whole number"), ({"steps": None}, "a whole number"),
        ({"lr": "1e-3"}, "a number or None"), ({"lr": math.nan}, "a number or None"),
        ({"lr": True}, "a number or None"),
        ({"on": 1}, "True or False"), ({"how": 3}, "a text"), ({"curve": 3}, "a tuple, a whole number each"),
        ({"curve": (1, 2.5)}, "a tuple, a whole number each"), ({"words": "woman"}, "a tuple, a text each"),
        ({"scale": math.nan}, "a number"), ({"betas": (0.9,)}, "a tuple of 2, a number each"),
    ],
)  # fmt: skip
def test_values_of_another_type_are_refused(settings, allowed):
    with pytest.raises(
        SettingError, match=f"^sample: {next(iter(settings))} is .*; allowed is {allowed}$"
    ):
        Sample(**settings)


def test_lists_of_files_become_tuples_and_whole_numbers_are_numbers():
    made = Sample(curve=[3, 2], scale=-1, lr=2)
    assert made == Sample(curve=(3, 2), scale=-1, lr=2) and hash(made)
    assert made.settings()["curve"] == (3, 2)


def test_a_method_remembers_its_preset_beside_its_settings():
    made = Sample.configured("small")
    assert made.preset == "small" and Sample.configured("paper").preset == "paper"
    assert Sample.configured("small", steps=5).preset == "small"
    assert Sample().preset is None and Sample.configured(None, steps=2).preset is None
    assert made == Sample(steps=2) and hash(made) == hash(Sample(steps=2))
    assert "preset" not in made.settings() and repr(made) == repr(Sample(steps=2))
    assert dataclasses.replace(made, steps=3).preset is None  # another method


def test_budgets_measurements_and_controls():
    assert budget("quick").denoiser_rows and budget(Budget("own")).name == "own"
    with pytest.raises(SettingError, match="mean 'quick'"):
        budget("quik")
    one, two = Measurement(0.5, "a", 3), Measurement(0.25, "a", 3)
    assert one.minus(two) == 0.25
    with pytest.raises(ProtocolError):
        one.minus(Measurement(0.25, "b", 3))

    class Logits(Control):
        def logits(self, context, logits):
            return logits

    assert Logits.hooks() == {"logits"} and Control.hooks() == frozenset()


@pytest.mark.parametrize(
    ("id", "settings", "alone", "with_pictures"),
    [
        ("closed-form", {}, True, True),
        ("p4d", {}, True, True),
        ("transfer", {}, True, True),
        ("transfer", {"origin": "uce"}, True, True),
        ("transfer", {"texts": ("a shape with five points",)}, False, False),
        ("transfer", {"origin": "some/model"}, False, False),
        ("concept-inversion", {}, True, False),
        ("img2img", {}, True, False),
        ("img2img", {"shows": "other"}, True, True),
        ("inpainting", {"target": "world"}, False, False),
        ("relearning-pictures", {}, False, False),
        ("relearning-pictures", {"data": "concept"}, True, False),
        ("random-tokens", {}, False, False),
    ],
)
def test_attacks_that_mean_nothing_without_the_original_say_so(id, settings, alone, with_pictures):
    attack = catalogue.resolve(id)(**settings)
    star = Concept("star")
    assert attack.needs_reference(star) is alone
    assert attack.needs_reference(dataclasses.replace(star, images=("star.png",))) is with_pictures


def test_the_candidate_is_the_name_that_the_sentence_proposes():
    names = ("star", "hazard", "start")
    assert candidate("stra", names) == "star" and nearest("stra", names) == "; did you mean 'star'?"
    # A name that itself reads like the sentence changes nothing.
    assert candidate("; did you mean", names) is None
    assert nearest("zebra", names) == "; allowed: hazard, star, start"
    assert candidate("star", ()) is None and nearest("star", ()) == "; nothing is allowed here"
