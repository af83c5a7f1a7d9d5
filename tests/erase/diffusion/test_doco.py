"""DoCo: losses by hand, surgery, warm-up and the controls, on tiny random models."""

import pytest
import torch
from torch.nn import functional

from expunge.concept import Concept
from expunge.core import scores
from expunge.core.anchor_pictures import Material
from expunge.core.tasks import Step
from expunge.erase.diffusion.doco import DoCo, _clipped, _Correction
from expunge.errors import SettingError
from expunge.testing import tiny_diffusion, tiny_layout

from .watching import held_layers

STAR = Concept("star", phrases=("heart",), anchor="circle")
SMALL = {"pictures": 4, "sampling_steps": 2, "batch": 3, "steps": 5, "warm_up": 2, "lr": 1e-3}


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


def task(model, **more):
    method = DoCo(**SMALL | more)
    return _Correction(method, model, Material(model, [STAR], method, None, 0), 0)


def clean(model, points, texts):
    """``x_0 = (x_t - sigma eps) / alpha``."""
    with torch.no_grad():
        alpha, sigma = model.alpha_sigma(points.timesteps)
        noise = scores.epsilon(model, points, model.encode(texts))
        return (points.latents - sigma * noise) / alpha


def answers(own, step):
    batch = own.material.batch(3, step.generator())
    with torch.no_grad():
        real = own.judge(clean(own.model, batch.points, batch.anchors))
        fake = own.judge(clean(own.model, batch.points, batch.targets))
    return real, fake


def bce(logits, label):
    return functional.binary_cross_entropy_with_logits(logits, torch.full_like(logits, label))


def test_only_the_discriminator_learns_while_it_warms_up(model):
    own, step = task(model), Step(1, 5, 3)
    losses = own.step(step)
    real, fake = answers(own, step)
    assert set(losses) == {"discriminator"}
    torch.testing.assert_close(losses["discriminator"].detach(), bce(real, 0.0) + bce(fake, 1.0))


def test_both_losses_after_it(model):
    own, step = task(model), Step(2, 5, 3)
    for _, parameter in own.trained:
        parameter.requires_grad_(True)
    losses = own.step(step)
    moved = torch.autograd.grad(
        losses["discriminator"], [p for _, p in own.trained], allow_unused=True
    )
    for _, parameter in own.trained:
        parameter.requires_grad_(False)
    assert all(g is None for g in moved)  # the student is not moved by the discriminator's loss
    real, fake = answers(own, step)
    torch.testing.assert_close(losses["denoiser"].detach(), bce(fake, 0.0))
    torch.testing.assert_close(losses["discriminator"].detach(), bce(real, 0.0) + bce(fake, 1.0))


def test_without_surgery_the_prior_is_a_tenth_of_its_weight(model):
    own, step = task(model, surgery=False, prior_weight=3.0), Step(2, 5, 3)
    for _, parameter in own.trained:
        parameter.requires_grad_(True)
    loss = own.step(step)["denoiser"].detach()
    for _, parameter in own.trained:
        parameter.requires_grad_(False)
    _, fake = answers(own, step)
    draw = step.generator()
    own.material.batch(3, draw)
    points, noise, texts = own.material.anchors_alone(3, draw)
    with torch.no_grad():
        prior = (scores.epsilon(model, points, model.encode(texts)) - noise).square().mean()
    torch.testing.assert_close(loss, bce(fake, 0.0) + 0.1 * 3.0 * prior)


@pytest.mark.parametrize("projection", ["exact", "official"])
def test_what_is_applied_never_opposes_the_prior(model, monkeypatch, projection):
    cosines, before = [], []
    hook = _Correction.gradients

    def watched(self, step, group, gradients):
        raw = dict(gradients)
        hook(self, step, group, gradients)
        if group == "denoiser":
            for name, protected in self.protected.items():
                product = float((gradients[name].double() * protected.double()).sum())
                size = float(gradients[name].norm() * protected.norm())
                cosines.append(product / max(size, 1e-30))
                before.append(float((raw[name].double() * protected.double()).sum()))

    monkeypatch.setattr(_Correction, "gradients", watched)
    edit = DoCo(**SMALL | {"steps": 8, "projection": projection}).erase(model, STAR)
    assert min(before) < 0  # there were conflicts
    assert min(cosines) > -1e-6
    assert 0 < edit.manifest.report["conflicts"] < 1
    if projection == "exact":
        assert any(abs(c) < 1e-6 for c in cosines)


def test_gradients_are_clipped_to_norm_one_together():
    found = _clipped({"a": torch.full((4,), 3.0), "b": torch.full((4,), 4.0)})
    assert abs(float(torch.cat(list(found.values())).norm()) - 1) < 1e-6
    small = {"a": torch.tensor([0.1])}
    assert torch.equal(_clipped(small)["a"], small["a"])


def test_nothing_but_keys_and_values_changes_and_the_student_rests_in_the_warm_up(model):
    edit = DoCo(**SMALL).erase(model, STAR)
    assert {t.name for t in edit.manifest.targets} <= set(model.text_projections())
    assert not any(name.startswith("delta.discriminator") for name in edit.tensors)
    losses = edit.manifest.report["losses"]
    assert losses["denoiser"][:2] == [None, None] and None not in losses["discriminator"]
    assert len(edit.manifest.report["discriminator_accuracy"]) == 4


def test_a_warm_up_that_takes_all_steps_is_refused_before_any_work():
    fresh = tiny_diffusion()
    with pytest.raises(SettingError, match="warm_up=5 of steps=5"):
        DoCo(**SMALL | {"warm_up": 5}).erase(fresh, STAR)
    with pytest.raises(SettingError, match="too small"):
        flat = tiny_diffusion()
        flat.denoiser.register_to_config(sample_size=4)
        DoCo(**SMALL).erase(flat, STAR)
    assert not fresh.cost.counts and not flat.cost.counts
    DoCo(**SMALL | {"warm_up": 5, "discriminator": "frozen"}).erase(fresh, STAR)


def test_a_frozen_discriminator_never_learns(model):
    own = task(model, discriminator="frozen")
    assert set(own.parameters()) == {"denoiser"}
    edit = DoCo(**SMALL | {"discriminator": "frozen"}).erase(model, STAR)
    assert set(edit.manifest.report["losses"]) == {"denoiser"}
    assert None not in edit.manifest.report["losses"]["denoiser"]  # no warm-up to wait for


@pytest.mark.parametrize("name", ["v_prediction", "sdxl", "pixart", "sana", "sd3", "flux"])
def test_every_layout(name):
    model = tiny_diffusion(prediction_type=name) if name == "v_prediction" else tiny_layout(name)
    weights = {n: p.detach().clone() for n, p in model.tensors().items()}
    if min(model.latent_shape[1:]) < 8:
        with pytest.raises(SettingError, match="too small"):
            DoCo(**SMALL).erase(model, STAR)
        return
    edit = DoCo(**SMALL).erase(model, STAR)
    assert all(torch.equal(p, weights[n]) for n, p in model.tensors().items())
    assert edit.manifest.targets


def test_seeds_and_several_concepts(model):
    square = Concept("square", anchor="circle")
    first, second = (DoCo(**SMALL).erase(model, [STAR, square], seed=s) for s in (1, 1))
    assert first == second
    assert first != DoCo(**SMALL).erase(model, [STAR, square], seed=2)


def test_the_start_tokens_row_is_held_while_it_trains(model, monkeypatch):
    held = held_layers(model, _Correction, monkeypatch)
    DoCo(**SMALL).erase(model, STAR)
    assert held and all(held)
