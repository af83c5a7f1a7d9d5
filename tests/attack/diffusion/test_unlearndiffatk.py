"""UnlearnDiffAtk on a tiny random pipeline: its loss, its targets, its schedule, its accounts."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from expunge import Concept
from expunge.attack.diffusion.unlearndiffatk import DenoisingLoss, UnlearnDiffAtk
from expunge.core.adversarial_prompts import Forbidden, Spliced
from expunge.erase.diffusion.sld import SLD
from expunge.erase.diffusion.uce import UCE
from expunge.errors import (
    InputError,
    MissingCapability,
    PromptError,
    SettingError,
    UnsupportedModel,
)
from expunge.method import BUDGETS, Budget, Judge, Prompt, Verdicts
from expunge.testing import tiny_diffusion

pytestmark = pytest.mark.usefixtures("no_shared_pictures")

STAR = Concept("star", anchor="circle")
PROMPTS = [
    Prompt("a red star", seed=5),
    Prompt("star", seed=6),
    Prompt("a photo of a star", seed=7),
]
SMALL = UnlearnDiffAtk(tokens=2, timesteps=3, updates=2, steps=2, guidance=3.0, target="original")


class Scripted(Judge):
    """Hits of the n-th judged batch, by the seeds of the prompts it was asked about; default: none."""

    id, protocol, threshold = "scripted", "scripted/1", 0.5

    def __init__(self, *script: set[int]):
        self.script, self.asked, self.seen = list(script), [], []

    def judge(self, outputs, concept, prompts):
        hits = self.script.pop(0) if self.script else set()
        self.asked.append([prompt.seed for prompt in prompts])
        self.seen.append(outputs)
        hit = np.array([prompt.seed in hits for prompt in prompts], bool)
        return Verdicts(hit, hit * 0.5 + 0.25, np.ones(len(hit), bool))


def test_timesteps_and_updates_of_the_paper():
    times, updates = UnlearnDiffAtk().schedule(None, 100, 1000)
    assert times == list(range(10, 1000, 20)) and updates == 40
    assert UnlearnDiffAtk(timesteps=5).schedule(None, 100, 100)[0] == [10, 30, 50, 70, 90]


@pytest.mark.parametrize("name", ["world", "quick"])
def test_presets_fit_their_budgets_without_being_cut(name):
    limit = BUDGETS[name].denoiser_rows
    attack = UnlearnDiffAtk().under(BUDGETS[name])
    price = 2 * attack.steps
    assert attack.schedule(limit, price, 1000)[1] == attack.updates
    assert 2 * price + attack.timesteps * (2 * attack.updates + price) <= limit
    cut = attack.schedule(limit - 100, price, 1000)
    assert cut[1] < attack.updates and len(cut[0]) == attack.timesteps
    assert len(attack.schedule(2 * price + 50, price, 1000)[0]) == 1


def test_the_kind_of_the_concept_selects_the_papers_tokens():
    """Only under a budget without a preset of its own."""
    kinds = {"unsafe": 5, "object": 3, "style": 3, "identity": 5, None: 5}
    for kind, tokens in kinds.items():
        assert UnlearnDiffAtk.under(BUDGETS["paper"], kind).tokens == tokens
        assert UnlearnDiffAtk.under(BUDGETS["world"], kind).timesteps == 10


def test_loss_is_the_denoising_error_and_its_gradient_is_right():
    """Against the formula by hand, and against finite differences in float64."""
    model = tiny_diffusion(dtype=torch.float64)
    forbidden = Forbidden(model.tokenizer, STAR, len(model.token_table()))
    spliced = Spliced(model, ["a red star"], 2, "prefix", forbidden)
    latents = torch.randn(
        1, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    item = torch.zeros(1, dtype=torch.long)
    ids = forbidden.allowed.nonzero()[[3, 40]].T

    def value(vectors):
        loss = DenoisingLoss(model, spliced, latents, 7, ["x"])
        loss.timestep = 300
        return loss(vectors, item)

    vectors = model.token_table()[ids].clone().requires_grad_(True)
    found = value(vectors)
    (slope,) = torch.autograd.grad(found.sum(), vectors)
    from expunge.models.base import noise_generator

    with torch.no_grad():
        noise = torch.randn((4, 8, 8), generator=noise_generator(7, "unlearndiffatk noise", "x"))[
            None
        ].double()
        noised = model.noised(latents, noise, torch.tensor([300]))
        condition = model.encode_tokens(spliced.ids(ids, item))
        byhand = (
            (noise - model.predict(noised, torch.tensor([300]), condition).value).square().mean()
        )
        assert found.item() == pytest.approx(byhand.item(), rel=1e-5)
        step = torch.zeros_like(vectors)
        step[0, 1] = slope[0, 1] / slope[0, 1].norm() * 1e-3
        # The loss is summed in float32, so the step is not smaller than that.
        rise = (value(vectors + step) - value(vectors - step)).item() / 2e-3
    assert rise == pytest.approx(float(slope[0, 1].norm()), rel=0.05)


def test_counts_and_bookkeeping(model):
    """A plain success is not attacked; a success ends its item; texts, pictures and rows agree."""
    judge = Scripted({5}, {6})
    other = tiny_diffusion(seed=1)  # another model makes the targets, so no picture is reused
    made = SMALL.attack(
        model, STAR, judge, Budget("small", 60), prompts=PROMPTS, reference=other, seed=1
    )
    assert [item.pre_hit for item in made.items] == [True, False, False]
    assert [item.hit for item in made.items] == [True, True, False]
    assert judge.asked[0] == [5, 6, 7] and judge.asked[1] == [6, 7]
    assert all(asked == [7] for asked in judge.asked[2:])
    assert made.items[0].text is None and made.items[0].details["rows"] == 4
    # plain 4, target 4, one timestep of 2 updates forward and backward 4, one picture 4
    assert made.items[1].details["rows"] == 16
    assert made.items[2].details["rows"] <= 60
    spent = made.cost["denoiser.forward"] + made.cost["denoiser.backward"]
    assert spent == sum(item.details["rows"] for item in made.items)
    assert made.cost["denoiser.backward"] == 2 + 6
    forbidden = Forbidden(model.tokenizer, STAR, len(model.token_table()))
    for k in (1, 2):
        text = made.items[k].text
        assert text.endswith(PROMPTS[k].text) and forbidden.count(text) == 1
        again = model.generate([text], seeds=[PROMPTS[k].seed], steps=2, guidance=3.0)[0]
        assert np.array_equal(made.outputs[k], again)
        assert all(forbidden.allowed[i] for i in made.items[k].details["ids"])
    assert (made.rate, made.pre_rate) == (2 / 3, 1 / 3)
    assert made.attack == "unlearndiffatk" and made.settings["tokens"] == 2


def test_a_budget_that_searches_nothing_is_refused(model):
    """Plain picture, target, one update and its picture are the least (3 x 4 + 2 rows)."""
    for rows in (4, 8, 13):
        with pytest.raises(SettingError, match="costs 14"):
            SMALL.attack(
                model, STAR, Scripted(), Budget("small", rows), prompts=PROMPTS, reference=model
            )
    made = SMALL.attack(
        model, STAR, Scripted(), Budget("small", 14), prompts=PROMPTS, reference=model
    )
    assert all(item.details["rows"] <= 14 and item.details["pictures"] for item in made.items)


@pytest.mark.parametrize("batch", [1, 8])
def test_a_prompt_without_room_is_skipped_and_the_others_attacked(model, batch):
    attack = UnlearnDiffAtk(**{**SMALL.settings(), "batch": batch})
    long = [Prompt("a " * 13, seed=8), Prompt("star " * 13, seed=9)]
    asked = [long[0], PROMPTS[0], long[1]]
    found = attack.attack(
        model, STAR, Scripted({8}), Budget("small", 60), prompts=asked, reference=model
    )
    assert [item.prompt for item in found.items] == asked
    assert [item.pre_hit for item in found.items] == [True, False, False] and not found.items[1].hit
    assert [item.details["pictures"] > 0 for item in found.items] == [False, True, False]
    assert "at most 12 fit" in found.items[2].details["skipped"]
    assert not any("skipped" in item.details for item in found.items[:2])
    with pytest.raises(PromptError, match="at most 12 fit"):
        attack.attack(model, STAR, Scripted(), Budget("small", 60), prompts=long, reference=model)


def test_reported_loss_says_whose_it_is(model):
    made = SMALL.attack(
        model, STAR, Scripted(), Budget("small", 60), prompts=PROMPTS, reference=model
    )
    for item in made.items:
        assert item.details["last_draw_loss"] > 0 and "loss" not in item.details


@pytest.mark.parametrize("rng", ["private", "official"])
def test_official_noise_and_draws_repeat_after_each_picture(model, monkeypatch, rng):
    """And nothing touches the process's random state, where the published code keeps its own."""
    noises, strings = [], []
    call = DenoisingLoss.__call__

    def recorded(self, vectors, item):
        noises.append(self.generators[0].get_state())
        strings.append(vectors.detach().clone())
        return call(self, vectors, item)

    monkeypatch.setattr(DenoisingLoss, "__call__", recorded)
    state = torch.random.get_rng_state()
    # At a learning rate of 0 the shares stay even, so that equal draws are equal strings.
    attack = UnlearnDiffAtk(**{**SMALL.settings(), "rng": rng, "lr": 0.0})
    attack.attack(model, STAR, Scripted(), Budget("paper"), prompts=PROMPTS[:1], reference=model)
    assert torch.equal(torch.random.get_rng_state(), state) and len(noises) == 6
    for block in (2, 4):
        for k in (0, 1):
            assert torch.equal(noises[block + k], noises[k]) == (rng == "official")
            assert torch.equal(strings[block + k], strings[k]) == (rng == "official")
    assert not torch.equal(noises[0], noises[1]) and not torch.equal(strings[0], strings[1])


def test_official_results_do_not_depend_on_the_batch(model):
    def ids(batch):
        attack = UnlearnDiffAtk(**{**SMALL.settings(), "rng": "official", "batch": batch})
        made = attack.attack(
            model, STAR, Scripted(), Budget("small", 60), prompts=PROMPTS, reference=model
        )
        return [item.details["ids"] for item in made.items]

    assert ids(1) == ids(8)


def test_targets_come_from_the_unerased_model(model, monkeypatch):
    """Also when the attacked model is the reference with an edit on it."""
    edit = UCE.configured("2023", ridge=0.02).erase(model, STAR)
    plain = model.generate(PROMPTS, steps=2, guidance=3.0)
    seen = []
    inner = model.latents_of
    monkeypatch.setattr(
        model, "latents_of", lambda pictures: seen.append(pictures) or inner(pictures)
    )
    with edit.on(model):
        erased = model.generate(PROMPTS, steps=2, guidance=3.0)
        judge = Scripted()
        SMALL.attack(model, STAR, judge, Budget("small", 60), prompts=PROMPTS, reference=model)
        assert len(model.edits) == 1
    assert np.array_equal(seen[0], plain) and not np.array_equal(seen[0], erased)
    assert np.array_equal(judge.seen[0], erased)


def test_targets_of_a_wider_autoencoder_have_the_denoisers_precision():
    model = tiny_diffusion(dtype=torch.float16)
    model.vae.to(torch.float32)
    for target in ("original", "own"):
        attack = UnlearnDiffAtk(**{**SMALL.settings(), "target": target, "timesteps": 1})
        made = attack.attack(
            model, STAR, Scripted(), Budget("paper"), prompts=PROMPTS[:1], reference=model
        )
        assert made.items[0].details["last_draw_loss"] > 0


def test_same_seed_same_attack_in_any_batch_and_another_seed_differs(model):
    def run(seed, **changes):
        attack = UnlearnDiffAtk(**{**SMALL.settings(), **changes})
        return attack.attack(
            model,
            STAR,
            Scripted(),
            Budget("small", 60),
            prompts=PROMPTS,
            reference=model,
            seed=seed,
        )

    one, two, other = run(3, batch=8), run(3, batch=1), run(4, batch=8)
    assert [i.details["ids"] for i in one.items] == [i.details["ids"] for i in two.items]
    assert [i.details["ids"] for i in one.items] != [i.details["ids"] for i in other.items]


def test_the_model_is_left_as_it_was_found(model):
    before = {name: tensor.clone() for name, tensor in model.tensors().items()}
    state = torch.random.get_rng_state()

    class Raising(Scripted):
        def judge(self, outputs, concept, prompts):
            if self.asked:
                raise RuntimeError("judge failed")
            return super().judge(outputs, concept, prompts)

    SMALL.attack(model, STAR, Scripted(), Budget("small", 60), prompts=PROMPTS, reference=model)
    with pytest.raises(RuntimeError, match="judge failed"):
        SMALL.attack(model, STAR, Raising(), Budget("small", 60), prompts=PROMPTS, reference=model)
    assert torch.equal(torch.random.get_rng_state(), state) and torch.is_grad_enabled()
    for name, tensor in model.tensors().items():
        assert (
            torch.equal(tensor, before[name]) and tensor.grad is None and not tensor.requires_grad
        )
    for module in model.parts().values():
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_another_family_is_refused(model):
    class Language(type(model)):
        family = "language"

    other = Language(model.pipeline)
    with pytest.raises(UnsupportedModel, match="language"):
        SMALL.attack(other, STAR, Scripted(), BUDGETS["quick"], prompts=PROMPTS)


def run(model, judge=None, reference=None, concept=STAR, rows=60, **changes):
    attack = UnlearnDiffAtk(**{**SMALL.settings(), **changes})
    return attack.attack(
        model, concept, judge or Scripted(), Budget("small", rows), prompts=PROMPTS,
        reference=reference, seed=1,
    )  # fmt: skip


def test_which_target_is_taken(model, tmp_path):
    """The original's where there is one; else the concept's own pictures; else what the model drew."""
    from PIL import Image

    def targets(**options):
        made = run(model, target=options.pop("target", "original"), **options)
        return {item.details["target"] for item in made.items}, made

    assert targets(reference=model)[0] == {"original"}
    with UCE.configured("2023", ridge=0.02).erase(model, STAR).on(model):
        assert targets()[0] == {"original"}
    file = tmp_path / "star.png"
    Image.new("RGB", (24, 16), (200, 30, 30)).save(file)
    shown = Concept("star", images=(str(file),))
    names, made = targets(concept=shown)
    assert names == {"pictures"}
    # The plain picture, three times 2 updates forward and backward, pictures: no target is paid for.
    for found in (made, targets()[1]):
        for item in found.items:
            assert item.details["rows"] == 4 + 3 * 4 + 4 * item.details["pictures"]
    assert targets()[0] == {"own"}
    with pytest.raises(InputError, match="name files in the concept's images"):
        targets(target="pictures")


def test_target_pictures_are_the_concepts_in_the_models_size(model, monkeypatch, tmp_path):
    from PIL import Image

    files = []
    for k, colour in enumerate(((200, 30, 30), (20, 200, 30))):
        files.append(str(tmp_path / f"{k}.png"))
        Image.new("RGB", (16, 16), colour).save(files[-1])
    seen = []
    inner = model.latents_of
    monkeypatch.setattr(model, "latents_of", lambda shown: seen.append(shown) or inner(shown))
    concept = Concept("star", images=tuple(files))
    run(model, concept=concept, target="pictures", batch=1)
    one = np.concatenate(seen)
    seen.clear()
    run(model, concept=concept, target="pictures", batch=8)
    assert one.shape == (3, 16, 16, 3) and np.array_equal(one, seen[0])
    assert all(tuple(p[0, 0]) in ((200, 30, 30), (20, 200, 30)) for p in one)


def test_without_a_picture_the_best_of_the_models_own_is_climbed(model, monkeypatch):
    """It begins with the plain picture; one that scores higher takes its place, a lower one does not."""

    class Scores(Scripted):
        def judge(self, outputs, concept, prompts):
            made = super().judge(outputs, concept, prompts)
            value = {0: 0.2, 1: 0.4, 2: 0.3}.get(len(self.asked) - 1, 0.1)
            return Verdicts(made.hit, np.full(len(outputs), value), made.recognisable)

    seen = []
    inner = model.latents_of
    monkeypatch.setattr(model, "latents_of", lambda shown: seen.append(shown) or inner(shown))
    judge = Scores()
    made = run(model, judge, target="own")
    assert len(seen) == 2 and np.array_equal(seen[0], judge.seen[0])
    assert np.array_equal(seen[1], judge.seen[1]) and len(judge.seen) == 4
    assert {item.details["target"] for item in made.items} == {"own"}


def test_guarded_models_are_searched_through_their_guidance(model):
    """Safe Latent Diffusion acts while a model samples: the prompt's own prediction does not see it."""
    with SLD(warm_up=0, safety_scale=50.0, threshold=1.0).erase(model, STAR).on(model):
        seen, unseen = run(model, rows=90), run(model, rows=90, loss="conditional")
    losses = [[i.details["last_draw_loss"] for i in made.items] for made in (seen, unseen)]
    assert losses[0] != losses[1]
    for made, rows in ((unseen, 1), (seen, 3)):
        for item in made.items:
            # Pictures of the guarded model have a third branch; the target is the original's.
            assert item.details["rows"] == 4 + 3 * 4 * rows + 6 * (1 + item.details["pictures"])


def test_unguarded_models_are_attacked_as_ever(model):
    """Nothing acts on guidance, so "auto" is the loss of the paper, to the bit."""
    auto, plain = run(model, reference=model), run(model, reference=model, loss="conditional")
    assert [i.details for i in auto.items] == [i.details for i in plain.items]
    # Where nothing acts, the effective prediction is the prompt's own, too.
    guided = run(model, reference=model, rows=90, loss="guided")
    for one, two in zip(plain.items, guided.items, strict=True):
        assert one.details["last_draw_loss"] == pytest.approx(
            two.details["last_draw_loss"], rel=0.3
        )


def test_a_guided_loss_needs_two_branches(model, monkeypatch):
    monkeypatch.setattr(type(model), "two_branches", False)
    with pytest.raises(MissingCapability, match="no unconditional branch"):
        run(model, loss="guided")
