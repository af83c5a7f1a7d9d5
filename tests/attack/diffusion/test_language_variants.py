"""Language variants: what is tried, what is forbidden, the control beside it."""

from __future__ import annotations

import numpy as np
import pytest

from expunge import Concept
from expunge.attack.diffusion.language_variants import KINDS, LanguageVariants, _Words
from expunge.core.sampling import SEED_STEP
from expunge.errors import MissingCapability, SettingError
from expunge.method import BUDGETS, Budget, Judge, Prompt, Verdicts
from expunge.models.base import Companions
from expunge.testing import tiny_diffusion

pytestmark = pytest.mark.usefixtures("no_shared_pictures")

STAR = Concept("star", phrases=("red heart",))
PROMPTS = [Prompt("a red star", seed=5), Prompt("a blue square", seed=6), Prompt("star", seed=7)]
SMALL = {"variants": 4, "steps": 2, "guidance": 3.0}


class Likes(Judge):
    """Hits pictures of prompts with these seeds, or, by script, single places of a batch."""

    id, protocol, threshold = "likes", "likes/1", 0.5

    def __init__(self, *script):
        self.script, self.asked = list(script), []

    def judge(self, outputs, concept, prompts):
        self.asked.append([(p.text, p.seed) for p in prompts])
        hits = self.script.pop(0) if self.script else ()
        hit = np.array([i in hits for i in range(len(prompts))], bool)
        return Verdicts(hit, hit * 0.5 + 0.25, np.ones(len(hit), bool))


def worldly():
    model = tiny_diffusion()
    words = {"unlisted": ("blob", "star fish"), "euphemism": ("the red heart", "the plain one")}
    model.companions = Companions(
        "tests", concept=lambda name: Concept(name), spoken=lambda name, route: words.get(route, ())
    )
    return model


def variants(text, model=None, count=50, **changes):
    words = _Words(LanguageVariants(**changes), model or worldly(), STAR)
    return words.chosen(text, count, 0, "key")


def test_synonyms_and_euphemisms_come_from_the_world_and_listed_words_are_refused():
    found = variants("a red star", kinds=("synonym", "euphemism", "metaphor"))
    # "star fish" and "the red heart" say the name or a listed phrase.
    assert found == {"a red blob": "synonym", "a red the plain one": "euphemism"}
    assert variants("a star", kinds=("euphemism",)) == {"the plain one": "euphemism"}
    assert variants("a star", kinds=("synonym",), synonyms=("dot", "Star")) == {
        "a dot": "synonym", "a blob": "synonym",
    }  # fmt: skip
    assert variants("a star", tiny_diffusion(), kinds=("synonym",)) == {}


def test_typing_errors_do_not_spell_the_name():
    found = list(variants("a star", kinds=("typo",)))
    assert "a sttar" in found and "a sta" in found and "a satr" in found and "a atar" in found
    assert not any("star" in text for text in found) and "a starr" not in found


def test_orders_keep_the_words():
    found = list(variants("a red star", kinds=("order",)))
    assert found[0] == "star red a" and all(
        sorted(t.split()) == ["a", "red", "star"] for t in found
    )


def test_kinds_take_turns_and_none_is_tried_twice():
    found = variants("a red star", count=6, kinds=("typo", "order", "synonym"))
    assert list(found.values())[:3] == ["typo", "order", "synonym"] and len(found) == 6
    assert list(found.values()).count("synonym") == 1
    assert variants("a red star", count=6) == variants("a red star", count=6)
    assert set(variants("a blue square").values()) == {"order"}
    assert variants("a " * 9 + "star", kinds=("order",)) != {}
    assert variants("circle " * 14 + "star") == {}  # no variant fits the context


def test_an_item_is_a_success_if_any_variant_is_and_the_other_seeds_stand_beside_it():
    judge = Likes((), {1, 9}, {0})
    made = LanguageVariants(**SMALL, kinds=("typo", "order")).attack(
        worldly(), STAR, judge, Budget("b"), prompts=PROMPTS[:1] + PROMPTS[2:]
    )
    # "star" alone has no other order.
    (texts, redraws) = judge.asked[1:]
    assert len(texts) == 8 and len(redraws) == 8
    assert [seed for _, seed in texts] == [5] * 4 + [7] * 4
    assert redraws[:4] == [("a red star", 5 + k * SEED_STEP) for k in (1, 2, 3, 4)]
    assert [item.hit for item in made.items] == [True, False] and made.pre_rate == 0
    first, second = (item.details for item in made.items)
    assert first["kinds"] == {
        "typo": {"tried": 2, "hit": False},
        "order": {"tried": 2, "hit": True},
    }
    assert first["texts"] == ["star red a"] and made.items[0].text == "star red a"
    assert (first["variants"], first["redraws"], first["redraw_hit"]) == (4, 4, True)
    assert second["kinds"] == {"typo": {"tried": 4, "hit": False}} and not second["redraw_hit"]
    assert first["rows"] == 4 * 9 and made.cost["denoiser.forward"] == 2 * 4 * 9
    assert not made.teaches


def test_plain_successes_are_not_varied_and_what_has_no_variant_is_skipped():
    judge = Likes({0})
    made = LanguageVariants(**SMALL, kinds=("typo",)).attack(
        worldly(), STAR, judge, Budget("b"), prompts=PROMPTS
    )
    assert [item.pre_hit for item in made.items] == [True, False, False]
    assert "kinds" not in made.items[0].details and made.items[0].details["rows"] == 4
    assert "no variant" in made.items[1].details["skipped"]
    assert "skipped" not in made.items[2].details and made.items[2].details["variants"] == 4


def test_a_smaller_budget_tries_fewer_and_as_many_fewer_seeds():
    made = LanguageVariants(**SMALL).attack(
        worldly(), STAR, Likes(), Budget("b", 4 * 6), prompts=PROMPTS[:1]
    )
    details = made.items[0].details
    assert (details["variants"], details["redraws"], details["rows"]) == (2, 2, 20)
    with pytest.raises(SettingError, match="3 pictures of 2 steps, costs 12"):
        LanguageVariants(**SMALL).attack(worldly(), STAR, Likes(), Budget("b", 11), prompts=PROMPTS)


@pytest.mark.parametrize("name", ["world", "quick"])
def test_presets_fit_their_budgets(name):
    method = LanguageVariants.under(BUDGETS[name])
    assert 2 * method.steps * (1 + 2 * method.variants) <= BUDGETS[name].denoiser_rows


def test_a_model_of_classes_and_empty_words_are_refused():
    model = worldly()
    for name in ("synonyms", "euphemisms", "metaphors", "translated"):
        with pytest.raises(SettingError, match="hold an empty one"):
            LanguageVariants(**SMALL, **{name: ("dot", " ")}).attack(
                model, STAR, Likes(), Budget("b"), prompts=PROMPTS
            )
    model.pipeline.tokenizer = None
    with pytest.raises(MissingCapability, match="allowed are models that read texts"):
        LanguageVariants(**SMALL).attack(model, STAR, Likes(), Budget("b"), prompts=PROMPTS)


def test_kinds_are_checked():
    with pytest.raises(SettingError, match=r"kinds is 'typos'.*typo"):
        LanguageVariants(kinds=("order", "typos"))
    with pytest.raises(SettingError, match="kinds is empty"):
        LanguageVariants(kinds=()).attack(worldly(), STAR, Likes(), Budget("b"), prompts=PROMPTS)
    assert LanguageVariants.configured(None, kinds="order,typo").kinds == ("order", "typo")
    assert set(KINDS) >= {"synonym", "euphemism", "typo", "order", "translation"}
