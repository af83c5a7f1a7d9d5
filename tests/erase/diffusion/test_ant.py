"""ANT: the four terms by hand, who walks, maps at fixed weights, masks that hold, fusion, resuming, layouts."""

from __future__ import annotations

import contextlib
import functools

import pytest
import rich.progress  # noqa: F401  # see the last test
import torch

from expunge.concept import Concept
from expunge.core import fusion, saliency, scores, trajectories
from expunge.core.layer_choice import trainable
from expunge.core.projections import Projections
from expunge.core.reversal import depths
from expunge.core.tasks import Step
from expunge.erase.diffusion import ant
from expunge.erase.diffusion.ant import ANT, _Steering
from expunge.errors import ConceptError, InputError, SettingError
from expunge.testing import bench, tiny_diffusion, tiny_layout
from expunge.testing.resuming import Killed, writing

STAR, SQUARE = Concept("star", phrases=("heart",)), Concept("square")
CAPTIONS = {"captions": ["a photo of red", "blue", "green plain", "a"]}
QUICK = {
    "sampling_steps": 5, "t_prime": 30, "steps": 3, "batch": 2, "lr": 1e-3, "iterations": 3, "map_seeds": 2,
    "map_templates": ("{}", "a red {}"), "rank": 2, "templates": ("a {}",), "preserve_scale": 1e-3, "domain_scale": 1.0,
    "general_texts": 8, "domain_texts": 3, "ridge": 1e-2,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


def steering(model, guided=1.0, groups=None, **settings):
    method = ANT(**{**QUICK, "walked": "frozen", **settings})
    groups = groups or {"denoiser": trainable(model, "cross-attention")}
    return _Steering(method, model, ["star", "heart"], 1, groups, loss_guidance=guided)


class _Moved:
    """The model with other weights while the frozen answers stay."""

    def __init__(self, model):
        self.pairs = trainable(model, "cross-attention")
        self.before = [p.detach().clone() for _, p in self.pairs]

    def __enter__(self):
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for _, p in self.pairs:
                p.add_(0.1 * torch.randn(p.shape, generator=draw))

    def __exit__(self, *_):
        with torch.no_grad():
            for (_, p), value in zip(self.pairs, self.before, strict=True):
                p.copy_(value)


@pytest.mark.parametrize("guided", [1.0, 7.5])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_the_four_terms(kind, guided):
    model = tiny_diffusion(prediction_type=kind)
    task = steering(model, guided, bank=4, eta=0.7, l1=0.4, l2=0.3, l3=0.2)
    step = Step(0, 1, 1)
    points, answers = task.points.at(step)
    early = depths(5, 30)["preserve"][1]
    times = model.timesteps(5).tolist()
    assert all(times.index(int(t)) >= early for t in points.timesteps[:2])
    assert all(times.index(int(t)) < early for t in points.timesteps[2:])
    assert torch.equal(points.which[:2], points.which[2:])
    with torch.no_grad():
        u, v = answers["empty"].double(), answers["concept"].double()
        with _Moved(model):
            loss = float(task.step(step)["denoiser"])
            made, still = scores.asked(
                model, points, [task.concept.select(points.which), task.empty]
            )
    made, still = made.double(), still.double()
    pushed = made if guided == 1 else still + guided * (made - still)
    terms = [
        (1.0, pushed[:2] - (u[:2] - 0.7 * guided * (v - u)[:2])),
        (0.4, pushed[2:] - (u[2:] + 0.7 * guided * (v - u)[2:])),
        (0.3, still[:2] - u[:2]),
        (0.2, still[2:] - u[2:]),
    ]
    assert loss == pytest.approx(sum(w * float(t.square().mean()) for w, t in terms), rel=1e-4)


def test_at_the_start_only_the_late_conditional_term_counts(model):
    """eta 1: the held prediction is its own target, and so are both unconditional ones."""
    task = steering(model, bank=4)
    _, answers = task.points.at(Step(0, 1, 1))
    with torch.no_grad():
        loss = float(task.step(Step(0, 1, 1))["denoiser"])
    delta = (answers["concept"] - answers["empty"])[:2]
    assert loss == pytest.approx(float((2 * delta).square().mean()), rel=1e-3)


def test_every_term_has_a_gradient(model):
    """Away from the start, the derivative of the loss along a direction is that of finite differences."""
    task = steering(model, bank=4, l2=0.7, l3=0.9, eta=0.5)
    pairs = trainable(model, "cross-attention")
    with _Moved(model):
        for parameter in (p for _, p in pairs):
            parameter.requires_grad_(True)
        gradients = torch.autograd.grad(task.step(Step(0, 1, 1))["denoiser"], [p for _, p in pairs])
        slope = sum(float(g.double().square().sum()) for g in gradients)
        values = []
        with torch.no_grad():
            for sign in (1, -2):
                for (_, p), g in zip(pairs, gradients, strict=True):
                    p.add_(sign * 1e-2 * g)
                values.append(float(task.step(Step(0, 1, 1))["denoiser"]))
    for parameter in (p for _, p in pairs):
        parameter.requires_grad_(False)
    assert (values[0] - values[1]) / 2e-2 == pytest.approx(slope, rel=2e-2)
    # Unconditional predictions take part: without them the same step has another gradient.
    other = steering(model, bank=4, l2=0.0, l3=0.0, eta=0.5)
    assert float(other.step(Step(0, 1, 1))["denoiser"]) < values[0]


def test_cost_is_one_walk_four_answers_and_four_student_rows(model):
    before = model.cost.snapshot()
    method = ANT(**{**QUICK, "walked": "frozen", "mask": "none", "steps": 2})
    edit = method.erase(model, "star")
    assert edit.manifest.cost["denoiser.backward"] == 2 * 2 * 4
    walked = 0
    for first in (0, 2):
        late = trajectories.draw(
            model, ["star"], 2, steps=5, guidance=3.0, seed=0, first=first, low=2
        )
        times = model.timesteps(5).tolist()
        walked += sum(2 * times.index(int(t)) for t in late.timesteps)
    assert edit.manifest.cost["denoiser.forward"] == walked + 2 * 2 * 4 + 2 * 2 * 4
    assert model.cost.rows("denoiser", before) > 0


def test_who_walks(model):
    """The student's walks change what is learnt after the first step; frozen ones and a bank are stated."""
    edits = {
        walked: ANT(**{**QUICK, "mask": "none", "walked": walked, "lr": 1e-2, "steps": 2}).erase(model, "star")
        for walked in ("student", "frozen")
    }  # fmt: skip
    student, frozen = (edits[w].manifest.report for w in ("student", "frozen"))
    assert student["losses"]["denoiser"][0] == frozen["losses"]["denoiser"][0]
    assert student["losses"]["denoiser"][1] != frozen["losses"]["denoiser"][1]
    assert (student["walked"], frozen["walked"]) == ("student", "frozen")
    assert ANT(**QUICK, bank=4).erase(model, "star").manifest.report["walked"] == "frozen"
    with pytest.raises(SettingError, match="bank"):
        ANT(**QUICK, bank=4, walked="student").erase(model, "star")


def test_all_steps_turned_and_swapped_ranges(model):
    whole = steering(model, t_prime=50, bank=4)
    assert list(whole.ranges) == ["erase"] and len(whole.points.at(Step(0, 1, 1))[0].which) == 2
    assert steering(model, swapped=True, bank=2).ranges == {"erase": (0, 3), "preserve": (3, 5)}


# -- maps ------------------------------------------------------------------------------------------


def maps(model, **settings):
    method = ANT(**{**QUICK, **settings})
    pairs = trainable(model, "cross-attention")
    return pairs, method._maps(model, [STAR], pairs, 0)


def test_a_map_is_half_of_each_tensor_by_the_gradient_of_the_loss(model):
    """One map against the gradient of the late term written out, at the weights as they are."""
    before = bench.trace(model)
    pairs, makers = maps(model)
    assert len(makers) == 4  # two texts, two seeds
    made = [maker() for maker in makers]
    assert bench.trace(model) == before
    assert all(int(m.sum()) == m.numel() // 2 for found in made for m in found.values())
    text, seed = makers[1].args[2:]
    assert text == "star" and "heart" in makers[2].args[2]
    points = trajectories.draw(model, [text], 3, steps=5, guidance=3.0, seed=seed, low=2)
    condition, empty = model.encode([text]).detach(), model.unconditional().detach()
    v, u = scores.asked(model, points, [condition, empty])
    chosen = [p for _, p in pairs]
    for parameter in chosen:
        parameter.requires_grad_(True)
    loss = (scores.epsilon(model, points, condition.repeat(3)) - (2 * u - v)).square().mean()
    gradients = dict(zip([n for n, _ in pairs], torch.autograd.grad(loss, chosen), strict=True))
    for parameter in chosen:
        parameter.requires_grad_(False)
    wanted = saliency.salient(gradients, 0.5, scope="tensor")
    agreed = sum(float((wanted[n] == made[1][n]).float().sum()) for n in wanted)
    assert agreed / sum(m.numel() for m in wanted.values()) > 0.999
    assert any(not torch.equal(made[0][n], made[1][n]) for n in wanted)


def test_masked_weights_stay_and_the_least_half_is_another(model):
    reports = {}
    for mask in ("salient", "least"):
        edit = ANT(**QUICK, mask=mask).erase(model, STAR, seed=3)
        report = reports[mask] = edit.manifest.report
        shares = report["density_after_each_map"]
        assert len(shares) == 4 and 0.4 < shares[0] <= 0.5 and shares == sorted(shares)[::-1]
        moved = sum(
            int((edit.change(t.name, model.tensor(t.name)) != 0).sum())
            for t in edit.manifest.targets
        )
        total = sum(p.numel() for _, p in trainable(model, "full"))
        assert 0 < moved <= shares[-1] * total + 1
        assert report["mask"]["density"] == shares[-1]
    free = ANT(**QUICK, mask="none").erase(model, STAR, seed=3)
    assert "mask" not in free.manifest.report
    assert reports["salient"]["losses"] != reports["least"]["losses"]


def test_a_map_of_another_eta_sees_both_ranges(model):
    _, makers = maps(model, eta=0.5)
    before = model.cost.snapshot()
    makers[0]()
    assert model.cost.since(before)["denoiser.backward"] == 2 * 3
    before = model.cost.snapshot()
    maps(model)[1][0]()
    assert model.cost.since(before)["denoiser.backward"] == 3


# -- many concepts ---------------------------------------------------------------------------------


def test_many_concepts_are_fused_from_what_was_trained(model, monkeypatch):
    changes = {}
    own = ANT._change

    def kept(self, model, groups, concept, *rest):
        changes[concept.name] = own(self, model, groups, concept, *rest)
        return changes[concept.name]

    monkeypatch.setattr(ANT, "_change", kept)
    method = ANT(**QUICK)
    before = bench.trace(model)
    edit = method.erase(model, [STAR, SQUARE], keep=["blue"], data=CAPTIONS)
    assert bench.trace(model) == before
    assert edit.manifest.report["form"] == "multi" and set(changes) == {"star", "square"}
    assert {t.name for t in edit.manifest.targets} == set(model.text_projections())
    (group,) = Projections.groups(model)
    general, domain = fusion.preserved(
        method, model, [STAR, SQUARE], ["blue"], CAPTIONS["captions"]
    )
    texts = [[p.erased for p in fusion.pairs(method, model, c)] for c in (STAR, SQUARE)]
    prior = fusion.prior(method, group, general, domain)
    moments = fusion.fused(group, texts, [c for c, _ in changes.values()], prior)
    for name, change in moments.solve(method.ridge)[0]:
        torch.testing.assert_close(
            edit.change(name, model.tensor(name)), change, atol=1e-6, rtol=1e-3
        )
        up = changes["star"][0][name][0]
        assert up.shape[1] == 2 and float(up.abs().max()) > 0


def test_a_change_counts_alpha_over_rank_and_is_merged_at_its_scale(model):
    one, two = (
        ANT(**{**QUICK, "lr": 0.0, "merge_scale": 2.0 * scale, "alpha": 3.0 * scale})
        for scale in (1, 2)
    )
    groups = Projections.groups(model)
    for method, factor in ((one, 1), (two, 4)):
        found = []

        class Task(_Steering):
            def step(self, step, found=found):
                found.append({n: tuple(p.shape) for n, p in self.groups["changes"]})
                with torch.no_grad():
                    for name, parameter in self.groups["changes"]:
                        if name.endswith("_up"):
                            parameter.fill_(1.0)
                return super().step(step)

        original = ant._Steering
        ant._Steering = Task
        try:
            change, _ = method._change(model, groups, STAR, 0, {}, None)
        finally:
            ant._Steering = original
        up, _ = change[groups[0].names[0]]
        torch.testing.assert_close(up, torch.full_like(up, factor * 2.0 * 3.0 / 2))
        names = {n.rsplit(".low_rank", 1)[0] for n in found[0]}
        kinds = {tuple(model.tensor(n).shape[2:]) for n in names}
        assert kinds >= {(), (3, 3)}
        assert not any("conv_in" in n or "time_embedding" in n for n in names)


def test_what_would_be_ignored_or_contradicts_itself_is_refused(model):
    with pytest.raises(ConceptError, match="to be kept, but also erased"):
        ANT(**QUICK, form="multi").erase(model, STAR, keep=["blue", "heart"], data=CAPTIONS)
    with pytest.raises(SettingError, match="guide has no part"):
        ANT(**QUICK, guide="blue").erase(model, STAR)
    with pytest.raises(SettingError, match="no mask='least'"):
        ANT(**QUICK, form="multi", mask="least").erase(model, STAR, data=CAPTIONS)
    with pytest.raises(SettingError, match="no entry is in all"):
        ANT(**QUICK | {"ratio": 0.0}).erase(model, STAR)
    with pytest.raises(InputError, match="reads no 'pictures'"):
        ANT(**QUICK, form="multi").erase(model, STAR, data={"pictures": {}, **CAPTIONS})


def test_the_form_follows_the_number_of_concepts_or_the_setting(model):
    assert ANT(**QUICK).erase(model, "star").manifest.report["form"] == "single"
    single = ANT(**QUICK, form="single").erase(model, [STAR, SQUARE]).manifest.report
    assert single["form"] == "single" and len(single["density_after_each_map"]) == 8
    multi = ANT(**QUICK, form="multi").erase(model, "star", data=CAPTIONS)
    assert multi.manifest.report["form"] == "multi"
    with pytest.raises(SettingError, match="walks with the frozen model"):
        ANT(**QUICK, form="multi", walked="student").erase(model, "star", data=CAPTIONS)
    with pytest.raises(SettingError, match="map_templates holds 'a star'"):
        ANT(**{**QUICK, "map_templates": ("{}", "a star")}).erase(model, "star")
    with pytest.raises(SettingError, match="nothing to preserve"):
        ANT(**{**QUICK, "domain_scale": 0.0}, form="multi").erase(tiny_diffusion(), "star")


@functools.cache
def of_two_concepts(form, steps=QUICK["steps"], kill=None, run=None):
    """An edit of a form that was not interrupted, or one that is killed at a checkpoint."""
    data = CAPTIONS if form == "multi" else None
    with writing(kill_at=kill) if kill else contextlib.nullcontext():
        return ANT(**{**QUICK, "steps": steps}, form=form).erase(
            tiny_diffusion(), [STAR, SQUARE], data=data, seed=2, run=run
        )


@pytest.mark.parametrize("form", ["single", "multi"])
@pytest.mark.parametrize("kill", [1, 3, 6])
def test_a_killed_run_of_either_form_resumes_bit_for_bit(tmp_path, kill, form):
    """Killed between maps, in the first concept's training and in the second's."""
    whole = of_two_concepts(form)
    with pytest.raises(Killed):
        of_two_concepts(form, kill=kill, run=tmp_path)
    assert of_two_concepts(form, run=tmp_path).digest == whole.digest
    assert of_two_concepts(form, steps=2).manifest.tensors_digest != whole.manifest.tensors_digest


@pytest.mark.parametrize("layout", ["sana", "sd3", "flux"])
@pytest.mark.parametrize("form", ["single", "multi"])
def test_transformers_and_flow_matching(layout, form):
    model = tiny_layout(layout)
    # At first use transformers hangs hooks of its own into text encoders.
    model.encode(["a star"])
    before = bench.trace(model)
    edit = ANT(**QUICK, form=form).erase(model, "star", data=CAPTIONS if form == "multi" else None)
    assert bench.trace(model) == before
    assert edit.manifest.report["form"] == form
