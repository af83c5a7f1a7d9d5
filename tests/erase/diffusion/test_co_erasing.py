"""Co-Erasing: targets of both stages, the blur, resume, and nothing left behind."""

import dataclasses

import numpy as np
import pytest
import torch

from expunge.concept import Concept
from expunge.core import finetune, scores
from expunge.core.image_prompts import refined, with_image
from expunge.core.layer_choice import trainable
from expunge.erase.diffusion import co_erasing
from expunge.erase.diffusion.co_erasing import CoErasing, _Negative, blurred
from expunge.errors import InputError, MissingPart, ModelError, SettingError, UnsupportedModel
from expunge.testing import tiny_diffusion, tiny_layout
from expunge.testing.diffusion import tiny_image_prompts

STAR = Concept("star", phrases=("heart",))
QUICK = {"text_steps": 3, "steps": 4, "count": 3, "batch": 2, "sampling_steps": 4, "lr": 3e-3}


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


@pytest.fixture(scope="module")
def branch(model):
    return tiny_image_prompts(model)


def test_target_of_the_second_stage(model, branch):
    method = CoErasing(eta=1.5, sampling_steps=4, bank=3, walked="frozen", count=2, blur=3)
    tokens = [method._tokens(model, branch, STAR, 0)]
    assert tokens[0].shape[:2] == (2, 4)
    with branch.attached(model):
        task = _Negative(method, model, (STAR,), trainable(model, "other"), 0, branch, tokens)
        points, answers = task.points.bank
        seen = dataclasses.replace(points, latents=blurred(points.latents, 3))
        with torch.no_grad():
            concept = scores.epsilon(
                model, seen, with_image(task.concept.select(points.which), answers["tokens"])
            )
    with torch.no_grad():
        empty = scores.epsilon(model, seen, task.empty.repeat(3))
    torch.testing.assert_close(
        answers["target"], empty - 1.5 * (concept - empty), atol=1e-5, rtol=1e-4
    )
    rows = task.concept.embeddings[0]
    options = [refined(q[None], rows)[0] for q in tokens[0]]
    assert all(any(torch.allclose(t, o) for o in options) for t in answers["tokens"])


@pytest.mark.parametrize("kernel, sigma", [(3, 0.8), (5, 1.1)])
def test_blur_is_a_gaussian(kernel, sigma):
    latents = torch.zeros(1, 2, 9, 9, dtype=torch.float64)
    latents[0, 1, 4, 4] = 1.0
    made = blurred(latents, kernel)
    place = np.arange(kernel) - kernel // 2
    line = np.exp(-0.5 * (place / sigma) ** 2)
    wanted = np.outer(line, line) / line.sum() ** 2
    half = kernel // 2
    square = made[0, 1, 4 - half : 5 + half, 4 - half : 5 + half].numpy()
    assert np.allclose(square, wanted, atol=1e-6)
    assert not made[0, 0].any()
    flat = torch.full((1, 1, 6, 6), 2.5)
    torch.testing.assert_close(blurred(flat, kernel), flat)


@pytest.mark.parametrize(
    "more",
    [{}, {"evidence": "image"}, {"evidence": "text"}, {"refine": False, "text_uncond": False},
     {"pictures": "random", "token_noise": 0.1}, {"text_steps": 0, "layers": "full"},
     {"walked": "frozen", "bank": 4, "phrases": True, "blur": 0}],
)  # fmt: skip
def test_erase_is_repeatable_and_leaves_the_model_alone(model, branch, more):
    before = {n: p.detach().clone() for n, p in model.tensors().items()}
    method = CoErasing(**{**QUICK, **more})
    branch = None if method.evidence == "text" else branch
    edit = method.erase(model, (STAR, Concept("circle")), seed=1, data=branch)
    assert all(torch.equal(p, before[n]) for n, p in model.tensors().items())
    assert not model.denoiser.conv_in.weight.requires_grad
    assert model.controls == ()
    assert method.erase(model, (STAR, Concept("circle")), seed=1, data=branch) == edit
    assert {t.name for t in edit.manifest.targets} <= set(before)
    losses = edit.manifest.report["losses"]
    assert len(losses["image"]) == 4 and ("text" in losses) == bool(method.text_steps)


def test_the_second_stage_starts_from_the_first_and_is_taught_by_it(model, branch, monkeypatch):
    """Student and teacher of stage 2 are the model after stage 1, and the student walks, without guidance."""
    stages, asked, fit = [], [], finetune.fit

    def watched(task, loop, **more):
        assert task.points.walked == "student" and task.points.walk["guidance"] == 1.0
        step = task.step

        def first(now):
            names = [n for n, _ in task.parameters()["denoiser"]]
            with now.original():
                asked.append({n: model.tensor(n).detach().clone() for n in names})
            return step(now)

        task.step = first
        stages.append(fit(task, loop, **more))
        return stages[-1]

    monkeypatch.setattr(co_erasing.finetune, "fit", watched)
    edit = CoErasing(**{**QUICK, "layers": "full"}).erase(model, STAR, seed=1, data=branch)
    one, two = stages
    assert len(two.values) > len(one.values) and len(asked) == 3 + 4
    for name, value in one.values.items():
        assert torch.equal(two.before[name], value) and torch.equal(asked[-1][name], value)
        assert torch.equal(one.before[name], model.tensor(name))
        assert torch.equal(asked[0][name], model.tensor(name))
    name = "unet.conv_in.weight"
    whole = two.values[name] - model.tensor(name)
    torch.testing.assert_close(
        edit.change(name, model.tensor(name)).float(), whole, atol=1e-6, rtol=1e-4
    )


@pytest.mark.parametrize("prediction", ["v_prediction"])
def test_other_predictions(prediction):
    model = tiny_diffusion(prediction_type=prediction)
    edit = CoErasing(**QUICK).erase(model, STAR, data=tiny_image_prompts(model))
    assert all(np.isfinite(edit.manifest.report["losses"]["image"]))


def test_resume(model, branch, tmp_path, monkeypatch):
    method = CoErasing(**QUICK)
    whole = method.erase(model, STAR, seed=1, data=branch)
    calls, step = [], _Negative.step

    def interrupted(self, now):
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(now.index)
        return step(self, now)

    monkeypatch.setattr(_Negative, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        method.erase(model, STAR, seed=1, data=branch, run=tmp_path)
    monkeypatch.setattr(_Negative, "step", step)
    again = method.erase(model, STAR, seed=1, data=branch, run=tmp_path)
    assert again == whole
    short = CoErasing(**{**QUICK, "steps": 3}).erase(model, STAR, seed=1, data=branch)
    assert short != whole


def test_a_missing_branch_is_refused(model):
    with pytest.raises(MissingPart, match="image-prompt"):
        CoErasing(**QUICK).erase(model, STAR)


def test_a_branch_that_the_text_form_would_ignore_is_refused(model, branch):
    with pytest.raises(InputError, match="only with evidence='image' or 'text\\+image'"):
        CoErasing(**QUICK, evidence="text").erase(model, STAR, data=branch)


@pytest.mark.parametrize(
    ("layout", "error"), [("sd3", UnsupportedModel), ("sdxl", ModelError), ("pixart", InputError)]
)
def test_a_branch_that_does_not_fit_is_refused_before_any_work(model, branch, layout, error):
    other = tiny_layout(layout)
    data = tiny_image_prompts(other) if layout == "pixart" else branch
    with pytest.raises(error):
        CoErasing(**QUICK).erase(other, STAR, data=data)
    assert not other.cost.rows("denoiser", {})


def test_a_template_without_a_place_is_refused(model, branch):
    with pytest.raises(SettingError, match="names no concept"):
        CoErasing(**QUICK, template="a photo").erase(model, STAR, data=branch)
    assert len(CoErasing(template="{} {x}", count=2)._tokens(model, branch, STAR, 0)) == 2
