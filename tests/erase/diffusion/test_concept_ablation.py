"""Concept ablation: the loss by hand, its parameter groups, and the effect on tiny random models."""

import dataclasses

import pytest
import torch

from expunge.concept import Concept
from expunge.core import finetune, scores
from expunge.core.anchor_pictures import Material
from expunge.core.layer_choice import trainable
from expunge.core.tasks import Step
from expunge.erase.diffusion.concept_ablation import LAYERS, ConceptAblation, _Overwriting
from expunge.errors import MissingCapability, SettingError
from expunge.testing import tiny_diffusion, tiny_layout

from .watching import held_layers

STAR = Concept("star", phrases=("heart",), anchor="circle")
SMALL = {"pictures": 4, "sampling_steps": 2, "batch": 3, "steps": 3}


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


def task(model, **more):
    method = ConceptAblation(**SMALL | more)
    return _Overwriting(method, model, Material(model, [STAR], method, None, 0))


def epsilons(model, batch, texts):
    with torch.no_grad():
        return scores.epsilon(model, batch.points, model.encode(texts))


def test_the_loss_sums_over_channels_and_means_over_places(model):
    own = task(model)
    step = Step(0, 3, 7)
    batch = own.material.batch(3, step.generator())
    gap = epsilons(model, batch, batch.targets) - epsilons(model, batch, batch.anchors)
    by_hand = gap.square().sum(1).mean((1, 2)).mean()
    torch.testing.assert_close(own.step(step)["weights"].detach(), by_hand)
    assert abs(float(by_hand) / float(gap.square().mean()) - 4) < 1e-4  # four times a plain mean


def test_masked_places_do_not_count(model):
    own = task(model)
    own.material.valid[:, :, 2:] = 0
    step = Step(0, 3, 7)
    batch = own.material.batch(3, step.generator())
    gap = epsilons(model, batch, batch.targets) - epsilons(model, batch, batch.anchors)
    by_hand = gap[:, :, :2].square().sum(1).mean((1, 2)).mean()
    torch.testing.assert_close(own.step(step)["weights"].detach(), by_hand)


def test_noise_is_the_other_target_and_the_prior_a_plain_mean(model):
    step = Step(0, 3, 7)
    own = task(model, loss="noise", prior_weight=2.0)
    draw = step.generator()
    batch, (points, noise, texts) = own.material.batch(3, draw), own.material.anchors_alone(3, draw)
    first = (epsilons(model, batch, batch.targets) - batch.noise).square().sum(1).mean()
    other = batch._replace(points=points)
    prior = (epsilons(model, other, texts) - noise).square().mean()
    torch.testing.assert_close(own.step(step)["weights"].detach(), first + 2.0 * prior)


def test_the_target_is_the_model_as_it_is_by_then_without_gradient(model):
    """If prompts agree, the model-based loss and its gradient vanish whatever the weights are."""
    same = dataclasses.replace(STAR, name="star", anchor="circle")
    method = ConceptAblation(**SMALL)
    own = _Overwriting(method, model, Material(model, [same], method, None, 0))
    batch = own.material.batch(3, Step(0, 3, 7).generator())
    own.material.batch = lambda *_: batch._replace(targets=batch.anchors)
    pairs = own.trained
    for _, parameter in pairs:
        parameter.requires_grad_(True)
    loss = own.step(Step(0, 3, 7))["weights"]
    found = torch.autograd.grad(loss, [p for _, p in pairs])
    for _, parameter in pairs:
        parameter.requires_grad_(False)
    assert float(loss.detach()) < 1e-10 and all(float(g.abs().max()) < 1e-6 for g in found)


@pytest.mark.parametrize(("parameters", "layers"), LAYERS.items())
def test_parameter_groups(model, parameters, layers):
    own = [name for name, _ in task(model, parameters=parameters).trained]
    assert own == [name for name, _ in trainable(model, layers)]


def test_embedding_moves_the_rows_of_the_concepts_own_tokens_only(model):
    edit = ConceptAblation(**SMALL | {"parameters": "embedding", "lr": 1e-2}).erase(model, STAR)
    [target] = edit.manifest.targets
    change = edit.change(target.name, model.tensor(target.name))
    moved = set(change.abs().sum(1).nonzero().flatten().tolist())
    own = set(model.token_ids(["star"])[0].tolist()) - set(model.tokenizer.all_special_ids)
    assert target.name.startswith("text_encoder.") and moved == own
    assert edit.kind == "low-rank"  # a row each of its tokens, not a whole table
    with pytest.raises(MissingCapability):
        ConceptAblation(**SMALL | {"parameters": "embedding"}).erase(tiny_layout("sdxl"), STAR)


def test_the_concept_is_a_negative_text_of_its_anchors_pictures_or_refused(monkeypatch):
    model, seen = tiny_diffusion(), []
    draw = model.generate
    monkeypatch.setattr(
        model, "generate", lambda *a, **k: seen.append(k["negative"]) or draw(*a, **k)
    )
    for avoid in (False, True):
        Material(model, [STAR], ConceptAblation(**SMALL | {"avoid": avoid}), None, 0)
    assert seen == ["", "star"]
    with pytest.raises(
        MissingCapability, match="avoid=True gives a concept's name as negative text"
    ):
        ConceptAblation(**SMALL | {"avoid": True}).erase(tiny_layout("flux"), STAR)


@pytest.mark.parametrize("name", ["epsilon", "v_prediction", "sdxl", "pixart", "sana"])
def test_the_concept_comes_to_look_like_the_anchor(name):
    kinds = ("epsilon", "v_prediction")
    model = tiny_diffusion(prediction_type=name) if name in kinds else tiny_layout(name)
    method = ConceptAblation(pictures=4, sampling_steps=2, batch=4, steps=40, lr=3e-3, guidance=2.0)
    own = _Overwriting(method, model, Material(model, [STAR], method, None, 0))
    batch = own.material.batch(16, torch.Generator().manual_seed(1))

    def gap():
        both = [epsilons(model, batch, texts) for texts in (batch.targets, batch.anchors)]
        return float((both[0] - both[1]).square().mean())

    before, weights = gap(), {n: p.detach().clone() for n, p in model.tensors().items()}
    edit = method.erase(model, STAR, seed=0)
    assert all(torch.equal(p, weights[n]) for n, p in model.tensors().items())
    with edit.on(model):
        assert gap() < 0.6 * before
    assert edit.manifest.report["anchor_change"] > 0


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_small_step_down_the_gradient_lowers_the_loss_under_flow_matching(name):
    """Tiny jointly attending models read most of a text through its pooled vector: no more than a step is asked."""
    model = tiny_layout(name)
    own = task(model, parameters="full-weight")
    step, parameters = Step(0, 3, 7), [p for _, p in own.trained]
    batch = own.material.batch(3, step.generator())
    goal = epsilons(model, batch, batch.anchors)

    def error():
        made = scores.epsilon(model, batch.points, model.encode(batch.targets))
        return (made - goal).square().sum(1).mean()

    for parameter in parameters:
        parameter.requires_grad_(True)
    before = own.step(step)["weights"]
    torch.testing.assert_close(before.detach(), error().detach())
    found = torch.autograd.grad(before, parameters, allow_unused=True)
    with torch.no_grad():
        size = sum(float(g.square().sum()) for g in found if g is not None)
        for parameter, gradient in zip(parameters, found, strict=True):
            if gradient is not None:
                parameter.sub_(gradient * (0.05 * float(before) / size))
        assert float(error()) < float(before)


def test_a_teacher_that_is_exchanged_is_not_remembered_as_the_student(model):
    """Texts encoded while the loop shows the original weights must not be served for the trained ones."""
    name = next(n for n, p in model.tensors().items() if p.shape == model.token_table().shape)
    seen = []

    class Encodes(finetune.Task):
        def parameters(self):
            return {"table": [(name, model.tensor(name))]}

        def step(self, step):
            with torch.no_grad():
                with step.original():
                    before = model.encode(["a star"]).embeddings
                seen.append((before, model.encode(["a star"]).embeddings))
            return {"table": model.encode(["a star"]).embeddings.square().mean()}

    finetune.fit(
        Encodes(), finetune.Loop(3, finetune.Optimiser(0.1)), seed=0,
        modules=tuple(model.parts().values()),
    )  # fmt: skip
    assert torch.equal(*seen[0]) and not torch.equal(*seen[2])
    assert torch.equal(seen[0][0], seen[2][0])


def test_several_concepts_and_wrong_ones(model):
    moon = Concept("square", anchor="circle")
    edit = ConceptAblation(**SMALL).erase(model, [STAR, moon])
    assert edit.manifest.report["anchors"] == {"star": "circle", "square": "circle"}
    with pytest.raises(SettingError, match="has no anchor"):
        ConceptAblation(**SMALL).erase(model, Concept("star"))


def test_what_cannot_be_trained_is_refused_before_pictures_are_made():
    wide = tiny_layout("sdxl")
    with pytest.raises(MissingCapability):
        ConceptAblation(**SMALL, parameters="embedding").erase(wide, STAR)
    assert not wide.cost.counts


def test_a_run_that_was_at_its_end_reports_the_same(model, tmp_path):
    first = ConceptAblation(**SMALL).erase(model, STAR, run=tmp_path).manifest.report
    again = ConceptAblation(**SMALL).erase(model, STAR, run=tmp_path).manifest.report
    assert again["resumed_at"] == 3 and again["anchor_change"] == first["anchor_change"] > 0


def test_the_start_tokens_row_is_held_while_it_trains(model, monkeypatch):
    held = held_layers(model, _Overwriting, monkeypatch)
    ConceptAblation(**SMALL).erase(model, STAR)
    assert held and all(held)
