"""MMA-Diffusion on a tiny random pipeline: starts, bans, runs, any of N pictures, accounts."""

from __future__ import annotations

import string

import numpy as np
import pytest
import torch

from expunge import Concept
from expunge.attack.diffusion.mma import MMADiffusion, letters
from expunge.core.adversarial_prompts import Forbidden
from expunge.core.sampling import SHARED
from expunge.core.trials import shot
from expunge.erase.diffusion.uce import UCE
from expunge.errors import SettingError
from expunge.method import BUDGETS, Budget, Judge, Prompt, Verdicts
from expunge.testing import tiny_diffusion

pytestmark = pytest.mark.usefixtures("no_shared_pictures")

STAR = Concept("star", phrases=("pentagram",), anchor="circle")
PROMPTS = [Prompt("a red star", seed=5), Prompt("a photo of a star", seed=6)]
SMALL = {
    "length": 6, "updates": 3, "candidates": 12, "top": 20, "runs": 2, "pictures": 2, "steps": 2, "guidance": 3.0,
}  # fmt: skip


class Listed(Judge):
    """Hits of the n-th judged batch; default: none."""

    id, protocol, threshold = "listed", "listed/1", 0.5

    def __init__(self, *script: list[bool]):
        self.script, self.seeds = list(script), []

    def judge(self, outputs, concept, prompts):
        hit = np.array(self.script.pop(0) if self.script else [False] * len(outputs), bool)
        self.seeds.append([prompt.seed for prompt in prompts])
        return Verdicts(hit, hit * 0.5 + 0.25, np.ones(len(hit), bool))


def attack(model, judge=None, rows=None, encoder=None, reference=None, seed=0, **settings):
    made = MMADiffusion(**{**SMALL, **settings})
    return made.attack(
        model, STAR, judge or Listed(), Budget("small", rows, encoder), prompts=PROMPTS,
        reference=reference, seed=seed,
    )  # fmt: skip


def test_settings_of_the_paper():
    made = MMADiffusion()
    assert (made.length, made.updates, made.candidates, made.top, made.runs, made.pictures) == (
        20, 1000, 512, 256, 10, 4,
    )  # fmt: skip
    rule = made._rule()
    assert (rule.places, rule.accept, rule.aligned, rule.distinct) == (
        "spread",
        "always",
        True,
        True,
    )
    assert not MMADiffusion(compat="official")._rule().aligned
    for name in ("world", "quick"):
        own = MMADiffusion.under(BUDGETS[name])
        assert own.pictures * 2 * own.steps * (1 + own.tried) <= BUDGETS[name].denoiser_rows


def test_pieces_and_fragments_are_forbidden_in_any_token(model):
    size = len(model.token_table())
    plain = Forbidden(model.tokenizer, STAR, size)
    strict = Forbidden(model.tokenizer, STAR, size, pieces=True, fragments=("ircl",))
    tokens = model.tokenizer.convert_ids_to_tokens(list(range(len(model.tokenizer))))
    for index, token in enumerate(tokens):
        letters_ = token.replace("</w>", "").lower()
        pieces = [w[i : i + 3] for w in ("star", "pentagram") for i in range(len(w) - 2)]
        held = any(piece in letters_ for piece in [*pieces, "ircl"])
        assert bool(strict.allowed[index]) == (bool(plain.allowed[index]) and not held), token
    assert bool(plain.allowed[tokens.index("circle</w>")])


def test_starts_are_random_letters_of_one_token(model):
    forbidden = Forbidden(model.tokenizer, STAR, len(model.token_table()), pieces=True)
    ids = letters(model, forbidden, 8, "0", ["x", "y"])
    assert ids.shape == (2, 8) and not torch.equal(ids[0], ids[1])
    assert torch.equal(ids[1], letters(model, forbidden, 8, "0", ["y"])[0])
    assert not torch.equal(ids, letters(model, forbidden, 8, "1", ["x", "y"]))
    texts = model.tokenizer.batch_decode(ids)
    assert all(set(text.replace(" ", "")) <= set(string.ascii_letters) for text in texts)
    again = model.tokenizer(texts, add_special_tokens=False).input_ids
    assert torch.equal(torch.tensor(again), ids)
    forbidden.allowed[:] = False
    with pytest.raises(SettingError, match="no letter is one allowed token"):
        letters(model, forbidden, 8, "0", ["x"])


def test_strings_are_tried_nearest_first_with_several_pictures(model):
    judge = Listed([False, False, False, True])  # the second prompt's second plain picture
    made = attack(model, judge, tried=2)
    first, second = made.items
    assert second.pre_hit and "runs" not in second.details
    assert judge.seeds[0] == [5, shot(PROMPTS[0], 1).seed, 6, shot(PROMPTS[1], 1).seed]
    runs = first.details["runs"]
    assert len(runs) == 2 and all(run["realisable"] and run["admissible"] for run in runs)
    tried = [entry["text"] for entry in first.details["tried"]]
    assert tried == [r["found"] for r in sorted(runs, key=lambda r: r["loss"])]
    assert all(entry["hits"] == [False, False] for entry in first.details["tried"])
    assert first.details["rows"] == 4 * 2 * 3 and first.text in tried
    assert made.cost["denoiser.forward"] == 4 * 2 * (2 + 2)
    for run in runs:
        assert run["realised_loss"] == pytest.approx(run["loss"], abs=1e-5) and 0 < run["loss"] < 2
    forbidden = Forbidden(model.tokenizer, STAR, len(model.token_table()))
    assert all(forbidden.count(text) == 0 for text in tried)


def test_one_of_n_pictures_is_a_success_and_ends_the_item(model):
    made = attack(model, Listed([False] * 4, [False, True, False, False]), tried=2)
    assert [item.hit for item in made.items] == [True, False]
    assert made.items[0].details["tried"][0]["hits"] == [False, True]
    assert [len(item.details["tried"]) for item in made.items] == [1, 2]


def test_encoder_rows_are_shared_by_the_runs_and_bound(model):
    made = attack(model, encoder=60)
    for item in made.items:
        # One more row scores the answer as it was tokenised again.
        assert all(run["encoder_rows"] <= 31 for run in item.details["runs"])
    with pytest.raises(SettingError, match="takes up to 3 rows an item, but the budget leaves 2"):
        attack(model, encoder=5)
    with pytest.raises(SettingError, match="4 pictures of 2 steps, costs 16"):
        attack(model, rows=15)


def test_only_the_originals_encoder_is_used_and_its_strings_serve_every_model(model):
    edit = UCE.configured("2023", ridge=0.02).erase(model, STAR)
    plain = attack(model)
    before = model.cost.snapshot()
    with edit.on(model):
        erased = attack(model, reference=model)
    assert [i.details["runs"] for i in plain.items] == [i.details["runs"] for i in erased.items]
    assert "encoder.backward" not in model.cost.since(before)  # found strings are kept
    SHARED.clear()
    with edit.on(model):
        again = attack(model, reference=model)
    assert [i.details["runs"] for i in plain.items] == [i.details["runs"] for i in again.items]


def test_same_seed_in_any_batch_and_official_rows_differ():
    wide = tiny_diffusion(dtype=torch.float64)

    def found(**changes):
        SHARED.clear()
        made = attack(wide, **changes)
        return [[run["found"] for run in item.details["runs"]] for item in made.items]

    assert found(batch=1) == found(batch=8)
    assert found() != found(seed=1)
    assert found() != found(compat="official")
