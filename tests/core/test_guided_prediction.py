"""Guided predictions at lone points: against the equations by hand, and as the sampling loop makes them."""

from __future__ import annotations

import pytest
import torch

from expunge import Concept
from expunge.core.guided_prediction import GuidedPrediction, acts_on_guidance
from expunge.core.negative_text import NegativeText
from expunge.erase.diffusion.sld import SLD
from expunge.errors import MissingCapability
from expunge.method import Control
from expunge.testing import tiny_diffusion, tiny_layout

STAR = Concept("star", anchor="circle")
TIME = 400


@pytest.fixture
def wide():
    return tiny_diffusion(dtype=torch.float64)


def points(model, count=2):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, *model.latent_shape, generator=generator, dtype=torch.float64)


def alone(model, noised, texts):
    """Predictions without guidance, by hand."""
    times = torch.full((len(noised),), TIME)
    return model.predict(noised, times, model.encode(texts)).value


def made(model, **options):
    return GuidedPrediction(model, torch.tensor([3.0, 5.0]), 4, **options)


ITEM = torch.arange(2)
PROMPTS = ["a red star", "a blue circle"]


@torch.no_grad()
def test_without_a_control_it_is_plain_guidance_and_the_prompts_own_prediction(wide):
    x = points(wide)
    empty, prompt = alone(wide, x, ["", ""]), alone(wide, x, PROMPTS)
    guided, _ = made(wide).guided(x, TIME, wide.encode(PROMPTS), ITEM)
    weight = torch.tensor([3.0, 5.0]).reshape(2, 1, 1, 1)
    assert torch.allclose(guided.value, empty + weight * (prompt - empty), atol=1e-10)
    effective = made(wide).effective(x, TIME, wide.encode(PROMPTS), ITEM)
    assert torch.allclose(effective.value, prompt, atol=1e-10)
    assert not acts_on_guidance(wide) and made(wide).rows == 2 and made(wide).extra == 0


@torch.no_grad()
def test_a_negative_text_is_seen(wide):
    x, weight = points(wide), torch.tensor([3.0, 5.0]).reshape(2, 1, 1, 1)
    empty, prompt = alone(wide, x, ["", ""]), alone(wide, x, PROMPTS)
    away = alone(wide, x, ["star", "star"])
    with wide.controlled(NegativeText(wide, "star")):
        assert acts_on_guidance(wide) and (made(wide).rows, made(wide).extra) == (2, 1)
        guided, _ = made(wide).guided(x, TIME, wide.encode(PROMPTS), ITEM)
        effective = made(wide).effective(x, TIME, wide.encode(PROMPTS), ITEM)
        # Outside guidance nobody sees it: why a loss on single predictions does not, either.
        assert torch.equal(alone(wide, x, PROMPTS), prompt)
    assert torch.allclose(guided.value, away + weight * (prompt - away), atol=1e-10)
    by_hand = empty + (away + weight * (prompt - away) - empty) / weight
    assert torch.allclose(effective.value, by_hand, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("compat", ["paper", "official"])
def test_safe_latent_diffusion_is_seen(wide, compat):
    """Against its equations; the official form has nothing in the place of the empty text."""
    x, weight = points(wide), torch.tensor([3.0, 5.0]).reshape(2, 1, 1, 1)
    method = SLD(warm_up=1, safety_scale=8.0, threshold=0.5, momentum_scale=0.3, momentum_decay=0.4)
    empty, prompt = alone(wide, x, ["", ""]), alone(wide, x, PROMPTS)
    safety = alone(wide, x, ["star", "star"])
    if compat == "official":
        empty = torch.zeros_like(empty)
    gap = prompt - safety
    gate = torch.where(gap < 0.5, (8.0 * gap.abs()).clamp(max=1.0), 0.0)
    gamma = gate * (safety - empty)
    with method.erase(wide, STAR).on(wide):
        asked = made(wide, compat=compat)
        assert acts_on_guidance(wide) and (asked.rows, asked.extra) == (3, 0)
        before = wide.cost.snapshot()
        first, _ = asked.guided(x, TIME, wide.encode(PROMPTS), ITEM)
        assert wide.cost.since(before)["denoiser.forward"] == 6
        second, _ = asked.guided(x, TIME, wide.encode(PROMPTS), ITEM)
        early, _ = asked.guided(x, 999, wide.encode(PROMPTS), ITEM)
        effective = asked.effective(x, TIME, wide.encode(PROMPTS), ITEM)
    plain = empty + weight * (prompt - empty)
    safe = empty + weight * (prompt - empty - gamma)
    assert (safe - plain).abs().max() > 1e-3
    if compat == "paper":  # the point stands after the warm-up, and has no history
        assert torch.allclose(first.value, safe, atol=1e-8)
        assert torch.allclose(second.value, safe, atol=1e-8)
        assert torch.allclose(effective.value, prompt - gamma, atol=1e-8)
        # Near the beginning of a sampling the warm-up leaves all as it is.
        times = torch.full((2,), 999)
        apart = [wide.predict(x, times, wide.encode(t)).value for t in (["", ""], PROMPTS)]
        assert torch.allclose(early.value, apart[0] + weight * (apart[1] - apart[0]), atol=1e-8)
    else:  # warm-up in evaluations, and momentum from one to the next
        assert torch.allclose(first.value, plain, atol=1e-8)
        pushed = gamma + 0.3 * 0.6 * gamma
        # Safe Latent Diffusion compares in float32.
        assert torch.allclose(second.value, empty + weight * (prompt - pushed), atol=1e-5)


def test_gradients_reach_the_prompt(wide):
    x = points(wide)
    with SLD(warm_up=0, safety_scale=8.0, threshold=0.5).erase(wide, STAR).on(wide):
        with torch.no_grad():
            condition = wide.encode(PROMPTS)
        rows = condition.embeddings.clone().requires_grad_(True)
        value = made(wide).effective(x, TIME, condition.with_embeddings(rows), ITEM).value
        (slope,) = torch.autograd.grad(value.square().sum(), rows)
    assert slope.abs().amax((1, 2)).min() > 0


def test_what_counts_as_acting_on_guidance():
    class Plain(Control):
        def latents(self, context, latents):
            return latents

    class Changes(Control):
        def prediction(self, context, prediction):
            return prediction

    assert not Plain.on_guidance() and Changes.on_guidance() and NegativeText.on_guidance()


def test_a_negative_text_stands_behind_the_users_own_and_needs_a_branch(wide, monkeypatch):
    control = NegativeText(wide, "star")
    assert control.text() == "star" and control.text("blurry") == "blurry, star"
    plain = wide.generate("a red star", seeds=1, steps=2, negative="star")
    with wide.controlled(control):
        assert (wide.generate("a red star", seeds=1, steps=2) == plain).all()
    monkeypatch.setattr(type(wide), "two_branches", False)
    with pytest.raises(MissingCapability, match="no branch for a negative text"):
        NegativeText(wide, "star")


@pytest.mark.parametrize("layout", ["sdxl", "sd3"])
def test_a_negative_text_brings_its_pooled_vector(layout):
    """It must be what the pipeline's own negative prompt is, second vector included."""
    model = tiny_layout(layout)
    wanted = model.generate("a red star", seeds=1, steps=2, negative="heart")
    with model.controlled(NegativeText(model, "heart")):
        found = model.generate("a red star", seeds=1, steps=2)
    assert (found == wanted).all()
    assert (wanted != model.generate("a red star", seeds=1, steps=2)).any()
