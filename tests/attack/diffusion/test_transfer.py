"""Transfer on tiny random pipelines: where texts come from, what is shown, who pays."""

from __future__ import annotations

import json

import numpy as np
import pytest

from expunge import Concept
from expunge.attack.diffusion.transfer import Transfer, Unheeding
from expunge.attack.diffusion.unlearndiffatk import UnlearnDiffAtk
from expunge.core.sampling import SHARED
from expunge.erase.diffusion.uce import UCE
from expunge.errors import CatalogueError, InputError, ModelError, SettingError
from expunge.method import BUDGETS, Budget, Judge, Prompt, Verdicts
from expunge.testing import tiny_diffusion

pytestmark = pytest.mark.usefixtures("no_shared_pictures")

STAR = Concept("star", anchor="circle")
PROMPTS = [Prompt("a red star", seed=5), Prompt("a photo of a star", seed=6)]
SMALL = {"steps": 2, "guidance": 3.0, "pictures": 2}


class Said(Judge):
    """Hits of prompts by seed in the n-th judged batch; keeps what it was asked about."""

    id, protocol, threshold = "said", "said/1", 0.5

    def __init__(self, *script: set[int]):
        self.script, self.asked = list(script), []

    def judge(self, outputs, concept, prompts):
        hits = self.script.pop(0) if self.script else set()
        self.asked.append([prompt.seed for prompt in prompts])
        hit = np.array([prompt.seed in hits for prompt in prompts], bool)
        return Verdicts(hit, hit * 0.5 + 0.25, np.ones(len(hit), bool))


def attack(model, judge=None, rows=60, reference=None, **settings):
    made = Transfer(**{**SMALL, **settings})
    budget = Budget("small", rows, 500)
    return made.attack(
        model, STAR, judge or Said(), budget, prompts=PROMPTS, reference=reference, seed=1
    )


def test_given_texts_are_tried_on_their_own_prompts_or_on_all(model):
    texts = (
        "x plain",
        json.dumps(["a red star", 5, "y striped"]),
        json.dumps(["a red star", 6, "z"]),
    )
    made = attack(model, texts=texts)
    assert [i.details["found"] for i in made.items] == [["x plain", "y striped"], ["x plain"]]
    assert [i.details["rows"] for i in made.items] == [12, 8]
    shown = model.generate(["x plain"], seeds=[6], steps=2, guidance=3.0)[0]
    assert np.array_equal(made.outputs[1], shown) and made.items[1].text == "x plain"
    # A success ends an item, a plain success is not attacked.
    made = attack(model, Said({6}, {5}), texts=texts)
    assert [(i.pre_hit, i.hit) for i in made.items] == [(False, True), (True, True)]
    assert [i.details["pictures"] for i in made.items] == [1, 0]


def test_texts_that_name_the_concept_are_left_out(model):
    made = attack(model, texts=("a star and a star", "blue star", "plain"))
    assert [i.details["found"] for i in made.items] == [["blue star", "plain"]] * 2
    assert [i.details["naming"] for i in made.items] == [1, 1]


def test_attempts_are_carried_over(model):
    inner = UnlearnDiffAtk(tokens=2, timesteps=2, updates=1, steps=2, guidance=3.0)
    source = inner.attack(model, STAR, Said(), Budget("small", 60), prompts=PROMPTS, seed=0)
    carried = Transfer.carrying(source, **SMALL)
    other = tiny_diffusion(seed=1)
    made = carried.attack(other, STAR, Said(), Budget("small", 60), prompts=PROMPTS, seed=0)
    for item, found in zip(made.items, source.items, strict=True):
        assert item.details["found"][0] == found.text and item.text in item.details["found"]
        assert "inner_rows" not in item.details
    empty = inner.attack(model, STAR, Said({5, 6}), Budget("small", 60), prompts=PROMPTS, seed=0)
    with pytest.raises(InputError, match="found no text"):
        Transfer.carrying(empty)


def test_a_file_of_texts(model, tmp_path):
    file = tmp_path / "texts.json"
    file.write_text(json.dumps(["x plain", ["a red star", 5, "y, striped"]]))
    made = attack(model, file=str(file))
    assert made.items[0].details["found"] == ["x plain", "y, striped"]
    file.write_text("{}")
    with pytest.raises(InputError, match=r"texts.json holds dict; allowed is a list"):
        attack(model, file=str(file))
    with pytest.raises(InputError, match="cannot be read as JSON"):
        attack(model, file=str(tmp_path / "none.json"))
    with pytest.raises(SettingError, match="entry 1 of texts"):
        attack(model, texts=("[1, 2]",))


def test_searching_on_the_original_goes_on_although_it_shows_the_concept(model):
    """The inner search's rows count, and what it found serves the next model at no further cost."""
    attacked, judge = tiny_diffusion(seed=1), Said()
    made = attack(attacked, judge, reference=model)
    for item in made.items:
        assert item.details["inner_rows"] > 8 and item.details["found"]
        assert item.details["rows"] == item.details["inner_rows"] + 4 * (
            1 + item.details["pictures"]
        )
        assert item.details["rows"] <= 60
    spent = made.cost["denoiser.forward"] + made.cost["denoiser.backward"]
    # On the original the inner attack's plain picture is its target, too: paid twice, made once.
    assert spent == sum(item.details["rows"] for item in made.items) - 2 * 4
    before = model.cost.snapshot()
    again = attack(tiny_diffusion(seed=2), reference=model)
    assert model.cost.since(before).get("denoiser.backward") is None
    assert [i.details["found"] for i in again.items] == [i.details["found"] for i in made.items]
    unheeding = Unheeding(Said({5}))
    verdicts = unheeding.judge(np.zeros((2, 2, 2, 3), np.uint8), STAR, PROMPTS)
    assert not verdicts.hit.any() and verdicts.score.tolist() == [0.75, 0.25]


def test_a_surrogate_is_the_original_erased_by_a_known_eraser(model, tmp_path):
    """By the eraser's id or by the file of an edit; the attacked edit is not on it, and comes back."""
    attacked = UCE.configured("2023", ridge=0.02).erase(model, STAR)
    seen = []
    inner = UnlearnDiffAtk.attack

    def recorded(self, model, *args, **options):
        seen.append(model.edits.digests)
        return inner(self, model, *args, **options)

    file = tmp_path / "other.safetensors"
    other = UCE.configured("2023", ridge=0.05).erase(model, STAR)
    other.save(str(file))
    third = UCE.configured("2023", ridge=0.1).erase(model, STAR)
    patch = pytest.MonkeyPatch()
    patch.setattr(UnlearnDiffAtk, "attack", recorded)
    try:
        with attacked.on(model):
            for origin in (str(file), "uce"):
                made = attack(model, reference=model, origin=origin)
                assert model.edits.digests == (attacked.digest,)
                assert all(item.details["found"] for item in made.items)
            # Another edit under the same name is another surrogate.
            third.save(str(file))
            attack(model, reference=model, origin=str(file))
    finally:
        patch.undo()
    assert seen[0] == (other.digest,) and len(seen[1]) == 1 and attacked.digest not in seen[1]
    assert seen[2] == (third.digest,)
    assert len(model.edits) == 0


def test_what_cannot_be_searched_is_refused(model):
    with pytest.raises(CatalogueError, match="near are 'unlearndiffatk'"):
        attack(model, inner="unlearndifatk")
    for inner in ("uce", "transfer"):
        with pytest.raises(
            CatalogueError, match="allowed is the id of an attack that searches texts"
        ):
            attack(model, inner=inner)
    with pytest.raises(ModelError, match="is no model"):
        attack(model, origin="nowhere")
    with pytest.raises(SettingError, match="costs"):
        attack(model, rows=14)


@pytest.mark.parametrize("name", ["world", "quick"])
def test_presets_leave_the_search_enough(name):
    made = Transfer.under(BUDGETS[name])
    price = 2 * made.steps
    left = BUDGETS[name].denoiser_rows - price * (1 + made.pictures)
    inner = UnlearnDiffAtk.under(BUDGETS[name])
    assert inner.schedule(left, price, 1000)[1] > 10
    SHARED.clear()
