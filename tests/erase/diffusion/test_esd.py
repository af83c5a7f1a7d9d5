"""ESD: layer choices, the target's identities, and the effect on a tiny random model."""

import pytest
import torch

from expunge.concept import Concept
from expunge.core import scores, trajectories
from expunge.core.layer_choice import trainable
from expunge.erase.diffusion.esd import ESD, LAYERS, _Push
from expunge.errors import SettingError
from expunge.testing import tiny_diffusion

STAR = Concept("star", phrases=("heart",))


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


def banked(task):
    points, answers = task.points.bank
    return points, answers["target"]


def test_layer_choices_split_the_denoiser_and_never_train_norms(model):
    inside = {n for n, _ in trainable(model, LAYERS["esd-x"])}
    outside = {n for n, _ in trainable(model, LAYERS["esd-u"])}
    strict = {n for n, _ in trainable(model, LAYERS["esd-x-strict"])}
    assert strict < inside
    assert strict == set(model.text_projections())
    assert inside.isdisjoint(outside)
    assert inside | outside == {n for n, _ in trainable(model, LAYERS["esd-all"])}
    assert not any("norm" in name for name in inside | outside)
    assert any("conv_in" in name for name in outside)
    assert any("time_emb" in name for name in outside)


def test_eta_one_makes_the_target_the_unconditional_prediction(model):
    task = _Push(ESD(eta=1.0, sampling_steps=4, bank=3), model, (STAR,), 0)
    points, targets = banked(task)
    with torch.no_grad():
        empty = scores.epsilon(model, points, task.empty.repeat(3))
    torch.testing.assert_close(targets, empty, atol=1e-5, rtol=1e-4)


def test_eta_zero_leaves_the_prediction_where_it_was(model):
    task = _Push(ESD(eta=0.0, sampling_steps=4, bank=3), model, (STAR,), 0)
    points, targets = banked(task)
    with torch.no_grad():
        own = scores.epsilon(model, points, task.concept.select(points.which))
    torch.testing.assert_close(targets, own)


def test_paper_convention(model):
    """eps(0) - eta' (eps(c) - eps(0)) equals the target at eta = eta' + 1."""
    task = _Push(ESD(eta=3.5, sampling_steps=4, bank=2), model, (STAR,), 0)
    points, targets = banked(task)
    with torch.no_grad():
        empty = scores.epsilon(model, points, task.empty.repeat(2))
        concept = scores.epsilon(model, points, task.concept.select(points.which))
    torch.testing.assert_close(targets, empty - 2.5 * (concept - empty), atol=1e-5, rtol=1e-4)


def test_erasing_from_a_prompt(model):
    """eps(f) - eta (eps(c) - eps(0)), on walks towards f, asked of the student under f."""
    method = ESD(eta=2.5, sampling_steps=4, bank=2, erase_from="a red star")
    task = _Push(method, model, (STAR,), 0)
    points, targets = banked(task)
    with torch.no_grad():
        source = model.encode(["a red star"] * 2)
        f, c, e = (
            scores.epsilon(model, points, x) for x in (source, model.encode(["star"] * 2), task.empty.repeat(2))
        )  # fmt: skip
    torch.testing.assert_close(targets, f - 2.5 * (c - e), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(task.student(points).embeddings, source.embeddings)
    walked = trajectories.draw(model, ["a red star"], 2, steps=4, guidance=3.0, seed=0)
    torch.testing.assert_close(points.latents, walked.latents)


def test_points_do_not_depend_on_batching(model):
    whole = trajectories.draw(model, ["a star", "a circle"], 6, steps=4, guidance=3.0, seed=5)
    parts = trajectories.draw(
        model, ["a star", "a circle"], 6, steps=4, guidance=3.0, seed=5, batch=2
    )
    later = trajectories.draw(
        model, ["a star", "a circle"], 2, steps=4, guidance=3.0, seed=5, first=4
    )
    torch.testing.assert_close(whole.latents, parts.latents, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(whole.latents[4:], later.latents, atol=1e-4, rtol=1e-4)
    assert torch.equal(whole.timesteps, parts.timesteps)
    other = trajectories.draw(model, ["a star", "a circle"], 6, steps=4, guidance=3.0, seed=6)
    assert not torch.allclose(whole.latents, other.latents)


def test_a_walk_stands_where_the_sampler_stands(model):
    points = trajectories.draw(model, ["a star"], 1, steps=4, guidance=3.0, seed=1, low=2, high=3)
    assert points.timesteps[0] == model.timesteps(4)[2]
    with pytest.raises(SettingError):
        trajectories.draw(model, ["a star"], 1, steps=4, guidance=3.0, seed=1, high=9)


@pytest.mark.parametrize("settings", [{}, {"bank": 8}, {"erase_from": "a red star"}])
def test_erase_moves_the_prediction_to_the_target_and_leaves_the_model_alone(model, settings):
    before = {n: p.detach().clone() for n, p in model.tensors().items()}
    method = ESD(steps=12, lr=3e-3, sampling_steps=4, batch=4, **settings)
    edit = method.erase(model, STAR, seed=1)
    assert all(torch.equal(p, before[n]) for n, p in model.tensors().items())
    assert not any(p.requires_grad for p in model.tensors().values())
    losses = edit.manifest.report["losses"]["denoiser"]
    assert sum(losses[-4:]) < sum(losses[:4])
    assert {t.name for t in edit.manifest.targets} <= {
        n for n, _ in trainable(model, LAYERS["esd-x"])
    }
    again = method.erase(model, STAR, seed=1)
    assert again == edit
    assert method.erase(model, STAR, seed=2) != edit


def test_cost_counts_walk_teacher_and_student(model):
    edit = ESD(steps=2, sampling_steps=4, batch=2, bank=4).erase(model, STAR)
    assert edit.manifest.cost["denoiser.backward"] == 4
    depths = [trajectories.draw(model, ["star"], 4, steps=4, guidance=3.0, seed=0).timesteps]
    index = {int(t): i for i, t in enumerate(model.timesteps(4))}
    walked = sum(2 * index[int(t)] for t in depths[0])
    assert edit.manifest.cost["denoiser.forward"] == walked + 4 * 2 + 4
