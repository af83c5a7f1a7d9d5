"""P4D on a tiny random pipeline: its loss, both forms, any of three pictures, guarded models, accounts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from expunge import Concept
from expunge.attack.diffusion.p4d import P4D
from expunge.core.adversarial_prompts import Forbidden, Spliced
from expunge.core.ideal_set import ideal_rate, ideal_set
from expunge.core.negative_text import NegativeText
from expunge.core.sampling import SHARED
from expunge.core.target_bank import PredictionMatch, TargetBank
from expunge.core.trials import shot
from expunge.erase.diffusion.sld import SLD
from expunge.errors import MissingCapability, PromptError, SettingError
from expunge.method import BUDGETS, Budget, Judge, Prompt, Verdicts
from expunge.models.base import Companions
from expunge.testing import tiny_diffusion

pytestmark = pytest.mark.usefixtures("no_shared_pictures")

STAR = Concept("star", anchor="circle")
PROMPTS = [Prompt("a red star", seed=5), Prompt("a photo of a star", seed=6)]
SMALL = {
    "tokens": 4, "updates": 4, "every": 2, "bank": 3, "pictures": 2, "choose": "concept", "steps": 2, "guidance": 3.0,
}  # fmt: skip


class Scored(Judge):
    """Scores by the mean of the picture; hits the n-th judged batches that are named."""

    id, protocol, threshold = "scored", "scored/1", 0.5

    def __init__(self, hits: dict[int, list[bool]] | None = None):
        self.hits, self.seeds = hits or {}, []

    def judge(self, outputs, concept, prompts):
        hit = np.array(self.hits.get(len(self.seeds), [False] * len(outputs)))
        self.seeds.append([prompt.seed for prompt in prompts])
        score = np.asarray(outputs).reshape(len(outputs), -1).mean(1) / 512
        return Verdicts(hit, score, np.ones(len(outputs), bool))


def attack(model, judge=None, rows=None, reference=None, seed=0, prompts=PROMPTS, **settings):
    made = P4D(**{**SMALL, **settings})
    return made.attack(
        model, STAR, judge or Scored(), Budget("small", rows), prompts=prompts,
        reference=reference, seed=seed,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["world", "quick"])
def test_presets_fit_their_budgets_without_being_cut(name):
    limit, made = BUDGETS[name].denoiser_rows, P4D().under(BUDGETS[name])
    price = 2 * made.steps
    assert made.plan(limit, price, 1, 1) == made.updates
    guarded = made.plan(limit, price, 2, 3)  # Safe Latent Diffusion has a third branch
    assert 1 < guarded < made.updates
    assert made.plan(limit - 200, price, 1, 1) < made.updates
    paper = P4D()
    assert (paper.updates, paper.every, paper.tokens, paper.lr, paper.weight_decay) == (
        3000, 50, 16, 0.1, 0.1,
    )  # fmt: skip
    assert paper.plan(None, 50, 1, 1) == 3000 and paper.forms == ("n", "k")


def test_loss_is_the_gap_of_predictions_and_its_gradient_is_right():
    """By hand, with the denoiser's own answers; and against finite differences."""
    model, other = tiny_diffusion(dtype=torch.float64), tiny_diffusion(1, dtype=torch.float64)
    latents = torch.randn(
        1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    forbidden = Forbidden(model.tokenizer, STAR, len(model.token_table()))
    spliced = Spliced(model, ["a red star"], 2, "third", forbidden)
    bank = TargetBank(other, ["a red star"], latents, seed=3, keys=["x"], steps=9, size=2)
    loss, item = PredictionMatch(model, spliced, bank, [0]), torch.zeros(1, dtype=torch.long)
    ids = forbidden.allowed.nonzero()[[3, 40]].T
    vectors = model.token_table()[ids].clone().requires_grad_(True)
    value = loss(vectors, item)
    (slope,) = torch.autograd.grad(value.sum(), vectors)
    time, noised, _, target = loss.draw()
    with torch.no_grad():
        times = torch.tensor([time])
        wanted = other.predict(noised, times, other.encode(["a red star"])).value
        assert torch.allclose(target, wanted)
        made = model.predict(noised, times, model.encode_tokens(spliced.ids(ids, item))).value
        assert value.item() == pytest.approx((made - wanted).square().mean().item(), rel=1e-5)
        step = slope / slope.norm() * 1e-3
        rise = (loss(vectors + step, item) - loss(vectors - step, item)).item() / 2e-3
    assert rise == pytest.approx(float(slope.norm()), rel=0.05)


def test_forms_say_what_they_should(model):
    """N replaces the prompt; K leaves its tokens in their order, a searched one before every three and one more."""
    n, k = (attack(model, form=form) for form in ("n", "k"))
    forbidden = Forbidden(model.tokenizer, STAR, len(model.token_table()))
    for made, form in ((n, "n"), (k, "k")):
        for item in made.items:
            record = item.details[form]
            assert item.text == record["found"]
            limit = forbidden.count(item.prompt.text) if form == "k" else 0
            assert forbidden.count(item.text) <= limit
    assert [i.details["n"]["tokens"] for i in n.items] == [4, 4]
    assert [i.details["k"]["tokens"] for i in k.items] == [2, 2]  # of 3 and of 5 tokens
    words = k.items[1].text.split()
    assert [w for w in words if w in ("a", "photo", "of", "star")][-1] == "star"
    union = attack(model, form="union")
    assert all({"n", "k"} <= set(item.details) for item in union.items)


def test_counts_any_of_several_pictures_before_and_after(model):
    """Plain 2 x 2 pictures, targets 2 x 2, candidates, final pictures; a union stops at its first success."""
    other = tiny_diffusion(seed=1)
    # 0 plain, 1 targets; then candidates are scored, then the final pictures judged.
    judge = Scored({0: [False, True, False, False], 1: [False, True]})
    made = attack(model, judge, reference=other, form="n")
    first, second = made.items
    assert first.pre_hit and first.hit and first.details["plain_hits"] == [False, True]
    assert "n" not in first.details and not first.details["ideal"]
    assert judge.seeds[0] == [
        PROMPTS[0].seed,
        shot(PROMPTS[0], 1).seed,
        6,
        shot(PROMPTS[1], 1).seed,
    ]
    assert second.details["original_hits"] == [False, True] and second.details["ideal"]
    assert second.details["plain_hits"] == [False, False]
    assert second.details["n"]["hits"] == [False, False] and not second.hit
    named = "asr/ideal/n=2/judge=scored/1"
    assert made.summary == {"ideal_rate": 0.0, "ideal_n": 1, "ideal_protocol": named}
    assert ideal_rate(made.items) == (0.0, 1)
    again = model.generate([second.text], seeds=[6], steps=2, guidance=3.0)[0]
    assert np.array_equal(made.outputs[1], again) or made.items[1].score > 0
    # plain 2, target 2, 2 candidates, one further final picture (4 rows each); bank 3; 4 updates forward and back
    assert second.details["rows"] == 4 * (2 + 2 + 2 + 1) + 3 + 8
    spent = made.cost["denoiser.forward"] + made.cost["denoiser.backward"]
    assert spent == sum(i.details["rows"] for i in made.items)


def test_a_success_counts_whichever_picture_shows_it(model):
    judge = Scored(
        {4: [False, True, False, False]}
    )  # after two candidates: both items' final pictures
    made = attack(model, judge, form="union")
    assert [item.hit for item in made.items] == [True, False]
    assert made.items[0].details["n"]["hits"] == [False, True]
    assert "k" not in made.items[0].details and "k" in made.items[1].details


def test_ideal_sets_are_what_the_original_shows_and_the_guarded_model_does_not(model):
    judge = Scored({0: [False, False, True, False], 1: [True, False, True, True]})
    found = ideal_set(
        tiny_diffusion(seed=1), model, STAR, judge, PROMPTS, shots=2, steps=2, guidance=3.0
    )
    assert found == PROMPTS[:1] and ideal_rate([]) == (None, 0)


def test_the_candidate_nearest_to_the_target_is_kept(model, monkeypatch):
    """By the CLIP of the model's world, on embeddings that a stand-in makes."""
    shown = []

    def embed(pictures):
        shown.append(np.asarray(pictures))
        return torch.as_tensor(np.asarray(pictures)).float().flatten(1)

    monkeypatch.setattr("expunge.attack.diffusion.p4d.picture_encoder", lambda model, name: embed)
    made = attack(model, form="n", choose="clip", updates=6)
    target, *looks = shown
    unit = [torch.nn.functional.normalize(torch.tensor(s).float().flatten(1), dim=1) for s in shown]
    for row, item in enumerate(made.items):
        likeness = [float(unit[0][row] @ u[row]) for u in unit[1:] if len(u) == len(target)]
        if len(likeness) == len(looks):
            assert item.details["n"]["likeness"] == pytest.approx(max(likeness), abs=1e-5)


def test_a_projection_that_did_not_move_is_not_drawn_again(model):
    still = attack(model, form="n", lr=0.0, updates=8, every=1)
    # Only one candidate was ever seen: 2 plain, 2 target, 1 look, 1 further final picture.
    assert still.items[0].details["rows"] == 4 * 6 + 3 + 16


def test_results_do_not_depend_on_the_batch_and_change_with_the_seed():
    # In float64: Adam makes steps of one size out of rounding, too.
    wide = tiny_diffusion(dtype=torch.float64)

    def texts(batch, seed=1):
        made = attack(wide, batch=batch, seed=seed, prompts=[PROMPTS[1], Prompt("star", 7)])
        return [[item.details[form]["found"] for form in ("n", "k")] for item in made.items]

    assert texts(1) == texts(8) != texts(8, seed=2)


def test_guarded_models_are_searched_through_their_guidance(model):
    """With the control, rows are those of all branches, and another prompt is found than without it."""
    plain = attack(model, form="n")
    with SLD(warm_up=0, safety_scale=50.0, threshold=1.0).erase(model, STAR).on(model):
        seen = attack(model, form="n", reference=model)
        unseen = attack(model, form="n", reference=model, loss="conditional")
        assert len(model.edits) == 1
    assert plain.items[0].details["rows"] == 4 * (2 + 2 + 2 + 1) + 3 + 8
    # Pictures of the guarded model have a third branch; targets are the original's.
    rows = 6 * (2 + 2 + 1) + 4 * 2
    assert unseen.items[0].details["rows"] == rows + 3 + 8
    assert seen.items[0].details["rows"] == rows + 3 * 2 + 8 * 3
    assert unseen.items[0].details["n"]["lowest_loss"] != seen.items[0].details["n"]["lowest_loss"]
    SHARED.clear()
    with model.controlled(NegativeText(model, "star")):
        away = attack(model, form="n", reference=model)
        spent = away.cost["denoiser.forward"] + away.cost["denoiser.backward"]
    assert away.items[0].details["rows"] == 4 * (2 + 2 + 2 + 1) + 3 * 2 + 8 * 2
    assert spent == sum(item.details["rows"] for item in away.items)


def test_a_guarded_original_predicts_alike_so_the_loss_vanishes(model):
    """Identity: where nothing guards the model, the prompt itself has loss 0, guided or not."""
    forbidden = Forbidden(model.tokenizer, STAR, len(model.token_table()))
    from expunge.core.guided_prediction import GuidedPrediction

    weight = torch.tensor([3.0])
    spliced = Spliced(model, [""], 1, "replace", forbidden)
    star = model.token_ids(["star"])[:, 1:2]
    for guidance, guided in ((None, None), (weight, GuidedPrediction(model, weight, 2))):
        bank = TargetBank(
            model,
            ["star"],
            torch.zeros(1, 4, 8, 8),
            seed=0,
            keys=["x"],
            steps=2,
            size=2,
            guidance=guidance,
        )
        loss = PredictionMatch(model, spliced, bank, [0], guided)
        assert float(loss(model.token_table()[star], torch.zeros(1, dtype=torch.long))) < 1e-10


def test_official_slips(model, monkeypatch):
    """Pictures from 0 to 1, another filling behind the text, no end token in K, new noise for each candidate."""
    forbidden = Forbidden(model.tokenizer, STAR, len(model.token_table()))
    item, searched = torch.zeros(1, dtype=torch.long), torch.tensor([[3, 4]])
    seen = []
    monkeypatch.setattr(
        model, "encode_tokens", lambda ids, vectors=None: seen.append((ids, vectors))
    )
    for placement, ended in (("replace", True), ("third", False)):
        spliced = Spliced(model, ["a red star"], 2, placement, forbidden, filling=0, ended=ended)
        spliced.encode(model.token_table()[searched], item)
        ids, vectors = seen.pop()
        length = 2 if placement == "replace" else 5
        end = model.tokenizer.eos_token_id
        assert (ids[0, 1 + length] == end) == ended
        assert (ids[0, 1 + length + ended :] == 0).all()
        assert torch.equal(vectors[0, -1], model.token_table()[0])
        assert torch.equal(
            spliced.ids(searched, item)[0, 1 + length :].unique(), torch.tensor([end])
        )
    monkeypatch.undo()
    given, drawn = [], []
    inner, generate = type(model).latents_of, type(model).generate

    def latents_of(self, pictures, generator=None):
        given.append(np.asarray(pictures))
        return inner(self, pictures, generator)

    def recorded(self, prompts, **options):
        drawn.append([(p.text, p.seed) for p in prompts])
        return generate(self, prompts, **options)

    monkeypatch.setattr(type(model), "latents_of", latents_of)
    monkeypatch.setattr(type(model), "generate", recorded)
    attack(model, form="n", compat="official", prompts=PROMPTS[:1])
    attack(model, form="n", prompts=PROMPTS[:1])
    official, plain = given
    assert np.allclose(official / 127.5 - 1, plain.astype(float) / 255, atol=1e-6)
    own = {PROMPTS[0].seed, shot(PROMPTS[0], 1).seed}
    seeds = [seed for batch in drawn for _, seed in batch]
    assert len(set(seeds) - own) == 2  # two candidates, each with noise of its own


def test_budgets_that_search_nothing_are_refused(model):
    least = 4 * (2 + 2 + 1 + 1) + 1 + 2
    with pytest.raises(SettingError, match=f"costs {least}"):
        attack(model, form="n", rows=least - 1)
    found = attack(model, form="n", rows=least)
    assert all(item.details["rows"] <= least and "n" in item.details for item in found.items)


def test_a_prompt_without_room_in_k_is_attacked_with_n(model):
    long = Prompt("a " * 12 + "star", seed=9)
    made = attack(model, form="union", prompts=[long, PROMPTS[0]])
    assert "k" not in made.items[0].details and "n" in made.items[0].details
    assert "k" in made.items[1].details
    only = attack(model, form="k", prompts=[long, PROMPTS[0]])
    assert "at most" in only.items[0].details["skipped"] and "k" in only.items[1].details
    with pytest.raises(PromptError, match="fit this model"):
        attack(model, form="k", prompts=[long])


def test_the_image_only_control_asks_no_unrestricted_model(model):
    made = attack(model, form="n", objective="noise")
    assert made.items[0].details["rows"] == 4 * (2 + 2 + 2 + 1) + 8


def test_guided_predictions_need_two_branches(model, monkeypatch):
    monkeypatch.setattr(type(model), "two_branches", False)
    with pytest.raises(MissingCapability, match="no unconditional branch"):
        attack(model, loss="guided")


def test_a_clip_that_cannot_be_opened_is_named(model, tmp_path):
    from expunge.errors import ModelError

    assert model.companions is None or isinstance(model.companions, Companions)
    with pytest.raises(ModelError, match="by which pictures are compared, cannot be opened"):
        attack(model, choose="clip", clip=str(tmp_path))
