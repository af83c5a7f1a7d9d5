"""Concept inversion on a tiny random pipeline: its losses, which one is chosen, its accounts, its controls."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from expunge import Concept
from expunge.attack.diffusion.concept_inversion import ConceptInversion, _Inversion
from expunge.core.word_inversion import export_word
from expunge.erase.diffusion.sld import SLD
from expunge.erase.diffusion.uce import UCE
from expunge.errors import MissingCapability, SettingError
from expunge.method import BUDGETS, Budget, Control, Judge, Prompt, Verdicts
from expunge.models.base import Pictures, noise_generator
from expunge.testing import tiny_diffusion
from expunge.testing.layouts import tiny_layout

pytestmark = pytest.mark.usefixtures("no_shared_pictures")

STAR = Concept("star", anchor="circle")
PROMPTS = [Prompt("a red star", seed=5), Prompt("a blue square", seed=6)]
SMALL = {"pictures": 2, "curve": (0, 1, 3), "batch": 2, "accumulate": 2, "steps": 2, "guidance": 3.0}  # fmt: skip
FREE = Budget("free")


class Blind(Judge):
    id, protocol, threshold = "blind", "blind/1", 0.5

    def judge(self, outputs, concept, prompts):
        n = len(outputs)
        return Verdicts(np.zeros(n, bool), np.zeros(n), np.ones(n, bool))


def run(model, seed=0, budget=FREE, reference=None, **changes):
    method = ConceptInversion(**{**SMALL, **changes})
    return method.attack(
        model, STAR, Blind(), budget, prompts=PROMPTS, reference=reference, seed=seed
    )


def inversion(model, guidance=3.0, concept=STAR, **changes):
    made = _Inversion(ConceptInversion(**{**SMALL, **changes}), model, concept, guidance, 7)
    pixels = np.random.default_rng(0).integers(0, 255, (2, 16, 16, 3), dtype=np.uint8)
    made.prepare(Pictures(pixels, None, ("a red star", "a green star")))
    return made


class Negative(Control):
    """Another negative text, as an edit might bring it."""

    def condition(self, context, condition):
        return condition


def test_defaults_are_the_papers():
    method = ConceptInversion()
    assert method.rate == pytest.approx(0.08) and method.curve[-1] == 5000
    assert ConceptInversion(scale_lr=False).rate == 5e-3
    sld = ConceptInversion.configured("paper:sld")
    assert (sld.guided_batch, sld.accumulate, sld.curve[-1], sld.loss) == (1, 4, 1000, "guided")
    assert sld.rate_of("guided") == pytest.approx(0.02)


@pytest.mark.parametrize("kind", [("object", 27), ("style", 19), ("identity", 2), ("mark", 27)])
def test_templates_by_kind(kind, monkeypatch):
    monkeypatch.setattr(
        "expunge.attack.diffusion.concept_inversion.fitting",
        lambda model, texts, tokens: list(texts),
    )
    monkeypatch.setattr(
        "expunge.attack.diffusion.concept_inversion.FreePrompts", lambda model, texts, tokens: None
    )
    name, count = kind
    made = inversion(tiny_diffusion(), concept=Concept("star", kind=name))
    assert len(made.templates) == len(made.texts) == count


def test_unsafe_concepts_learn_in_captions():
    made = inversion(tiny_diffusion(), concept=Concept("star", kind="unsafe"))
    assert made.texts == ["a red {}", "a green {}"]
    assert made._target(torch.tensor([1, 0])) == ["a green star", "a red star"]
    assert inversion(tiny_diffusion())._target(torch.tensor([1])) == ["star"]
    assert inversion(tiny_diffusion(), text="moon")._target(torch.tensor([1])) == ["moon"]


def test_the_plain_loss_is_the_error_of_the_noise():
    model = tiny_diffusion()
    made = inversion(model, posterior="mean", flip=0.0, batch=3)
    word = made.vectors
    found = made(4, 1, word)
    draw = noise_generator(7, "inversion of star", "4.1")
    pick = torch.randint(2, (3,), generator=draw)
    torch.rand(3, generator=draw)
    item = torch.randint(len(made.texts), (3,), generator=draw)
    times = torch.randint(0, 1000, (3,), generator=draw)
    with torch.no_grad():
        clean = model.latents_of(made.pictures)[pick]
        noise = torch.randn(clean.shape, generator=draw)
        texts = [made.texts[int(i)].format("circle") for i in item]  # training begins at the anchor
        seen = model.noised(clean, noise, times)
        error = noise - model.predict(seen, times, model.encode(texts)).value
    assert float(found) == pytest.approx(float(error.square().mean()), rel=1e-5)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction", "sample"])
def test_the_negative_loss_is_the_papers(predicts):
    """g (e_c - e_u) + e_u against e_c + g (e_S* - e_c), with c as the sampler's negative text; e is noise."""
    model = tiny_diffusion(prediction_type=predicts)
    made = inversion(model, negative="star", posterior="mean", flip=0.0, batch=1)
    assert made.loss == "negative"
    found = made(0, 0, made.vectors)
    draw = noise_generator(7, "inversion of star", "0.0")
    pick = torch.randint(2, (1,), generator=draw)
    torch.rand(1, generator=draw)
    item = torch.randint(len(made.texts), (1,), generator=draw)
    time = torch.randint(1000, (1,), generator=draw)
    with torch.no_grad():
        clean = model.latents_of(made.pictures)[pick]
        noise = torch.randn(clean.shape, generator=draw)
        seen = model.noised(clean, noise, time)
        texts = ("", "star", made.texts[int(item)].format("circle"))
        u, c, s = (model.predict(seen, time, model.encode(text)).epsilon(seen) for text in texts)
        error = (u + 3.0 * (c - u)) - (c + 3.0 * (s - c))
    assert float(found) == pytest.approx(float(error.square().mean()), rel=1e-3)


def test_the_chain_descends_inside_its_span():
    made = inversion(tiny_diffusion(), loss="guided", span=40, chosen=5)
    for seed in range(20):
        times = made.times(torch.Generator().manual_seed(seed))
        assert len(times) == 5 and bool((times.diff() < 0).all())
        assert 0 <= times[-1] and times[0] < 1000 and times[0] - times[-1] < 40
    assert len(inversion(tiny_diffusion(), negative="x").times(torch.Generator())) == 1


def test_the_loss_goes_by_what_acts_on_the_model():
    model = tiny_diffusion()
    assert inversion(model).loss == "plain"
    assert inversion(model, negative="star").loss == "negative"
    with SLD().erase(model, STAR).on(model):
        assert inversion(model).loss == "guided"
        assert inversion(model, loss="plain").loss == "plain"
    with UCE().erase(model, STAR).on(model):
        assert inversion(model).loss == "plain"
    with model.controlled(Negative()):
        assert inversion(model).loss == "negative"
    with pytest.raises(SettingError, match="at guidance 1"):
        inversion(model, guidance=1.0, loss="guided")
    with pytest.raises(SettingError, match="chosen is 60, but the span has 50"):
        inversion(model, loss="guided", chosen=60)
    with pytest.raises(MissingCapability):
        run(tiny_layout("sd3"))


@pytest.mark.parametrize(
    ("changes", "each"),
    [
        ({}, 2 * 4),
        ({"negative": "star"}, 4 * (2 * 2 + 2)),
        ({"loss": "guided", "chosen": 3, "span": 5}, 2 * (3 * 6 + 2)),
        ({"loss": "guided", "chosen": 3, "span": 5, "graph": "last"}, 2 * (3 * 4 + 2)),
    ],
)
def test_an_update_costs_what_was_planned(changes, each):
    """And each item is charged for the whole training, its pictures of the concept included."""
    model = tiny_diffusion()
    acting = SLD(warm_up=0).erase(model, STAR) if changes.get("loss") == "guided" else None
    other = tiny_diffusion(seed=1)
    if acting is None:
        made = run(model, reference=other, **changes)
    else:
        with acting.on(model):
            made = run(model, reference=other, **changes)
    # SLD asks for its branch in every pass: three rows a picture in sampling, too.
    shown = 4 if acting is None else 6
    details = made.items[0].details
    assert details["shared_rows"] == 2 * 4 + 3 * each
    assert details["rows"] == details["shared_rows"] + 4 * shown
    spent = made.cost["denoiser.forward"] + made.cost["denoiser.backward"]
    assert spent == details["shared_rows"] + len(PROMPTS) * 4 * shown
    assert list(details["curve"]) == ["0", "1", "3"] and len(details["losses"]) == 3


def test_a_budget_cuts_the_curve_or_is_refused():
    model = tiny_diffusion()
    # plain and three pictures 16, pictures of the concept 8, three updates 24
    assert list(run(model, budget=Budget("b", 48)).items[0].details["curve"]) == ["0", "1", "3"]
    assert list(run(model, budget=Budget("b", 47)).items[0].details["curve"]) == ["0", "1"]
    # A word that learnt nothing would look like an attack that failed: 12 + 8 + 8 for one update.
    with pytest.raises(SettingError, match="1 updates, costs 28"):
        run(model, budget=Budget("b", 27))
    assert run(model, budget=Budget("b", 16), word="initial").rate == 0
    with pytest.raises(SettingError, match="0 updates, costs 16"):
        run(model, budget=Budget("b", 15), word="initial")


@pytest.mark.parametrize("name", ["world", "quick"])
def test_presets_fit_their_budgets(name):
    method = ConceptInversion.under(BUDGETS[name])
    price, updates = 2 * method.steps, method.curve[-1]
    rows = price * (method.pictures + 1 + len(method.curve))
    rows += 2 * method.batch * method.accumulate * updates
    assert rows <= BUDGETS[name].denoiser_rows


def test_what_is_drawn_is_the_prompt_with_the_word_and_the_word_can_be_exported(tmp_path):
    model = tiny_diffusion()
    made = run(model, seed=2)
    token = export_word(made, tmp_path / "word.safetensors")
    assert token == "<star>" and "word" not in made.items[1].details
    (row,) = load_file(tmp_path / "word.safetensors").values()
    other = tiny_diffusion()
    other.pipeline.load_textual_inversion(tmp_path, weight_name="word.safetensors")
    again = other.generate(
        ["a red <star>", "<star> a blue square"], seeds=[5, 6], steps=2, guidance=3.0
    )
    assert np.abs(again.astype(int) - made.outputs).max() <= 1 and row.shape == (32,)


def test_a_word_that_learns_nothing():
    model = tiny_diffusion()
    wanted = model.generate(["a red circle"], seeds=[5], steps=2, guidance=3.0)[0]
    made = run(model, word="initial")
    assert np.array_equal(made.outputs[0], wanted) and made.items[0].details["losses"] == []
    assert made.items[0].details["shared_rows"] == 8 and len(made.items[0].details["curve"]) == 3
    one, two = run(model, word="random", seed=1), run(model, word="random", seed=2)
    vectors = [torch.tensor(m.items[0].details["word"]["vectors"]) for m in (one, two)]
    assert not torch.equal(*vectors)
    length = float(model.token_table().norm(dim=1).mean())
    assert float(vectors[0].norm()) == pytest.approx(length, rel=1e-5)


def test_the_pictures_are_the_unerased_models_or_the_concepts_files(tmp_path, monkeypatch):
    model, seen = tiny_diffusion(), []
    plain = model.generate(
        ["a photo of a star", "a rendering of a star"], seeds=[0, 1], steps=2, guidance=3.0
    )
    prepare = _Inversion.prepare

    def watched(self, found):
        seen.append(found.pictures)
        prepare(self, found)

    monkeypatch.setattr(_Inversion, "prepare", watched)
    with UCE.configured("2023", ridge=0.02).erase(model, STAR).on(model):
        run(model)
    assert np.array_equal(seen[0], plain)
    path = tmp_path / "star.png"
    Image.fromarray(np.full((20, 16, 3), 99, np.uint8)).save(path)
    method = ConceptInversion(**SMALL)
    own = Concept("star", anchor="circle", images=(str(path),))
    made = method.attack(model, own, Blind(), FREE, prompts=PROMPTS)
    assert (seen[1] == 99).all() and made.items[0].details["trained_on"] == "1 from files"
    assert made.items[0].details["shared_rows"] == 3 * 8


def test_seeds_and_prompts():
    """The word depends on the seed, not on how many prompts there are."""
    model = tiny_diffusion()
    word = run(model, seed=1).items[0].details["word"]
    alone = ConceptInversion(**SMALL).attack(
        model, STAR, Blind(), FREE, prompts=PROMPTS[:1], seed=1
    )
    assert alone.items[0].details["word"] == word
    assert run(model, seed=2).items[0].details["word"] != word
