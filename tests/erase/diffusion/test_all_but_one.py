"""All but One: identities of its losses, what is asked of the model, and the effect on tiny random models."""

import dataclasses

import pytest
import torch

from expunge.concept import Concept
from expunge.core import scores
from expunge.core.finetune import Step
from expunge.core.layer_choice import trainable
from expunge.erase.diffusion.all_but_one import AllButOne, _Surgery
from expunge.errors import SettingError
from expunge.testing import tiny_diffusion, tiny_layout
from expunge.testing.resuming import Killed, writing

# diffusers hands its tables to numpy the old way
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

STAR = Concept("star", phrases=("heart",), anchor="circle")
STEP = Step(0, 2, 5)


@pytest.fixture
def model():
    return tiny_diffusion()


def surgery(model, goals, kept=(), seed=0, **settings):
    method = AllButOne(**{"sampling_steps": 4, "bank": 3, "batch": 3, **settings})
    task = _Surgery(method, model, goals, kept, seed)
    for _, parameter in task.trained:
        parameter.requires_grad_(True)
    return task


def gradient(task, loss):
    parameters = [p for _, p in task.trained]
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return {n: g for (n, _), g in zip(task.trained, found, strict=True) if g is not None}


def size(gradients):
    return float(torch.stack([g.abs().max() for g in gradients.values()]).max())


def moved(task, seed=0):
    """The student away from the start."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in task.trained:
            parameter += 0.05 * torch.randn(parameter.shape, generator=draw)


# -- identities --------------------------------------------------------------------------------------


def test_at_the_start_the_concepts_own_term_costs_nothing_and_moves_nothing(model):
    """c' = c: L = 0 with zero gradient, and L_u = 0 whatever the goal."""
    task = surgery(model, {"star": ("star", 1.0)})
    loss = task.step(STEP)["denoiser"]
    other = surgery(tiny_diffusion(), {"star": ("circle", 1.0)})
    control = other.step(STEP)["denoiser"]
    assert float(loss.detach()) < 1e-9 < 1e-6 < float(control.detach())
    assert task.now[1] < 1e-10 and other.now[1] < 1e-10
    assert size(gradient(task, loss)) < 1e-3 * size(gradient(other, control))


def test_no_gradient_of_the_guidance_term_passes_through_the_unconditional_branch(model):
    """By hand: with and without stop-gradient, at a student that has moved."""
    task = surgery(model, {"star": ("circle", 1.0)}, constraint=0.0)
    moved(task)
    points, answers = task.points.at(STEP)
    own, empty = (
        scores.epsilon(model, points, c)
        for c in (task.concept.select(points.which), task.empty.repeat(3))
    )
    stopped = (own - empty.detach() - answers["goal"]).square().mean()
    through = (own - empty - answers["goal"]).square().mean()
    found = gradient(task, task.step(STEP)["denoiser"])
    expected, wrong = gradient(task, stopped), gradient(task, through)
    for name in found:
        torch.testing.assert_close(found[name], expected[name], atol=1e-5, rtol=1e-3)
    assert size({n: found[n] - wrong[n] for n in found}) > 1e-2 * size(found)


def test_pushing_away_at_a_kept_unconditional_score_is_esd(model):
    """eps_theta(x, 0) = eps_o(x, 0): L_g is ESD's loss, at the paper's eta."""
    from expunge.erase.diffusion.esd import ESD, _Push

    task = surgery(model, {"star": ("star", -1.5)}, constraint=0.0)
    points, answers = task.points.at(STEP)
    # In the paper's form, of which ESD's setting is one more: eps_o(0) - eta (eps_o(c) - eps_o(0)).
    esd = _Push(ESD(eta=2.5, sampling_steps=4, bank=3), model, (Concept("star"),), 0)
    torch.testing.assert_close(
        answers["empty"] + answers["goal"], esd.target(points)["target"], atol=1e-5, rtol=1e-4
    )
    with torch.no_grad():
        own = scores.epsilon(model, points, task.concept.select(points.which))
    expected = (own - esd.target(points)["target"]).square().mean()
    torch.testing.assert_close(task.step(STEP)["denoiser"], expected, atol=1e-7, rtol=1e-4)
    # Not any more once the unconditional score has moved.
    moved(task)
    own = scores.epsilon(model, points, task.concept.select(points.which))
    expected = (own - answers["empty"] - answers["goal"]).square().mean()
    assert abs(float((task.step(STEP)["denoiser"] / expected).detach()) - 1) > 0.01


def test_an_alternative_at_a_kept_unconditional_score_is_concept_ablation(model):
    """eps_theta(x, 0) = eps_o(x, 0): the full conditional score of the alternative is the target."""
    task = surgery(model, {"star": ("circle", 1.0)}, constraint=0.0)
    points, answers = task.points.at(STEP)
    circle, star = (model.encode(t).repeat(3) for t in ("circle", "star"))
    target = scores.asked(model, points, [circle])[0]
    torch.testing.assert_close(answers["empty"] + answers["goal"], target, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        expected = (scores.epsilon(model, points, star) - target).square().mean()
    torch.testing.assert_close(task.step(STEP)["denoiser"], expected, atol=1e-7, rtol=1e-4)


def test_zero_and_constraint_by_brute_force(model):
    """L at a moved student, from separate passes in the plain words of the equations."""
    task = surgery(
        model, {"star": ("star", 0.0), "heart": ("heart", 0.0)}, ["square"], constraint=3.0, seed=2
    )
    points, answers = task.points.at(STEP)
    assert not answers["goal"].any()
    other, held = task.others[0].at(dataclasses.replace(STEP, seed=task.seed))
    before = scores.asked(model, points, [task.empty])[0]
    torch.testing.assert_close(before, answers["empty"], atol=1e-5, rtol=1e-4)
    moved(task)
    ask = lambda where, text: scores.asked(model, where, [text])[0]  # noqa: E731
    own = torch.cat(
        [
            ask(points.select(slice(i, i + 1)), model.encode(["star", "heart"][int(w)]))
            for i, w in enumerate(points.which)
        ]
    )
    now, still = ask(points, model.unconditional()), ask(other, model.unconditional())
    drift = torch.cat([now - before, still - held["empty"]]).square().mean()
    expected = (own - now).square().mean() + 3.0 * drift
    torch.testing.assert_close(task.step(STEP)["denoiser"], expected, atol=1e-6, rtol=1e-4)
    assert float(drift) > 1e-4


# -- points ------------------------------------------------------------------------------------------


def test_constraint_points_are_shared_out(model):
    goals = {"star": ("circle", 1.0)}
    task = surgery(model, goals, batch=4, bank=8)
    (still,) = task.others
    assert (still.batch, still.texts, len(still.bank[0].which)) == (4, [""], 8)
    task = surgery(model, goals, ["square", "red"], batch=4, bank=8, constraint_share=0.2)
    assert [s.texts for s in task.others] == [[""], ["square", "red"]]
    assert [(s.batch, len(s.bank[0].which)) for s in task.others] == [(1, 1), (1, 1)]
    assert surgery(model, goals, constraint_share=0.0).others == []
    assert surgery(model, goals, constraint=0.0).others == []
    # Every second step takes those of what is kept.
    first, second = (task.others[i % 2].at(STEP)[0].latents for i in (0, 1))
    assert not torch.equal(first, second)


def test_late_points_only(model):
    task = surgery(model, {"star": ("circle", 1.0)}, highest_time=0.6, bank=16)
    early = surgery(model, {"star": ("circle", 1.0)}, bank=16)
    for source in (task.points, *task.others):
        assert source.bank[0].timesteps.max() <= 600
    assert early.points.bank[0].timesteps.max() > 600
    with pytest.raises(SettingError, match="lies below highest_time"):
        surgery(model, {"star": ("circle", 1.0)}, highest_time=0.0)


def test_the_bank_holds_what_a_fresh_step_would_compute(model):
    """The frozen model alone decides points and targets, so the two ways agree on them."""
    goals = {"star": ("circle", 1.0)}
    banked, fresh = surgery(model, goals, bank=3), surgery(model, goals, bank=None)
    points, answers = fresh.points.at(STEP)
    assert torch.equal(points.latents, banked.points.bank[0].latents)
    for name in ("goal", "empty"):
        assert torch.equal(answers[name], banked.points.bank[1][name])


# -- the edit ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"goal": "away", "bank": 8}, {"goal": "zero"}, {"projected": True, "bank": 8}],
    ids=["alternative", "away", "zero", "projected"],
)
def test_erase_lowers_the_loss_and_leaves_the_model_alone(model, settings):
    before = {n: p.detach().clone() for n, p in model.tensors().items()}
    method = AllButOne(steps=12, lr=3e-3, sampling_steps=4, batch=4, **settings)
    edit = method.erase(model, STAR, keep=["square"], seed=1)
    assert all(torch.equal(p, before[n]) for n, p in model.tensors().items())
    assert not any(p.requires_grad for p in model.tensors().values())
    report = edit.manifest.report
    losses = report["losses"]["denoiser"]
    assert sum(losses[-4:]) < sum(losses[:4])
    text, factor = {"away": ("star", -1.0), "zero": ("star", 0.0)}.get(
        settings.get("goal"), ("circle", 1.0)
    )
    assert report["goals"] == {"star": {"towards": text, "factor": factor}}
    assert report["guidance_term_loss"] > 0 and report["unconditional_drift"] > 0
    assert ("conflicts" in report) == ("projected" in settings)
    assert {t.name for t in edit.manifest.targets} <= {
        n for n, _ in trainable(model, "cross-attention")
    }
    assert method.erase(model, STAR, keep=["square"], seed=1) == edit
    assert method.erase(model, STAR, keep=["square"], seed=2) != edit


def test_the_constraint_holds_the_unconditional_score(model):
    """Lambda has an influence, and keys and values alone do move the unconditional score without it."""
    drift = []
    for weight in (0.0, 10.0):
        method = AllButOne(
            steps=20, lr=3e-3, sampling_steps=4, batch=4, bank=8, layers="cross-attention-kv",
            constraint=weight,
        )  # fmt: skip
        edit = method.erase(model, STAR, seed=1)
        drift.append(edit.manifest.report["unconditional_drift"])
    assert 0 < drift[1] < 0.5 * drift[0]


def test_projection_never_opposes_the_constraint(model):
    task = surgery(model, {"star": ("circle", 1.0)}, projected=True, constraint=0.5)
    moved(task)
    gradients = gradient(task, task.step(STEP)["denoiser"])
    protected = task.protected
    plain = surgery(tiny_diffusion(), {"star": ("circle", 1.0)}, constraint=0.0)
    moved(plain)
    term = gradient(plain, plain.step(STEP)["denoiser"])
    for name in gradients:  # alone, the loss moves what L_g moves
        torch.testing.assert_close(gradients[name], term[name], atol=1e-5, rtol=1e-3)
    opposed = {n: -g for n, g in protected.items()}
    task.gradients(STEP, "denoiser", opposed)  # the worst case: nothing but lambda's part remains
    for name, found in opposed.items():
        torch.testing.assert_close(found, 0.5 * protected[name], atol=1e-6, rtol=1e-4)
    assert task.now[2] == 1.0


def test_several_concepts_phrases_and_alternatives(model):
    method = AllButOne(phrases=True)
    other = Concept("square")
    assert method._goals((STAR, other)) == {
        "star": ("circle", 1.0), "heart": ("circle", 1.0), "square": ("square", -1.0),
    }  # fmt: skip
    named = AllButOne(alternative="triangle", goal="alternative")
    assert named._goals((STAR, other)) == {"star": ("triangle", 1.0), "square": ("triangle", 1.0)}
    assert AllButOne(goal="away", eta=2.0)._goals((STAR,)) == {"star": ("star", -2.0)}
    quick = {"steps": 2, "sampling_steps": 4, "batch": 2}
    edit = AllButOne(**quick).erase(model, [STAR, other])
    assert [c["name"] for c in edit.manifest.concepts] == ["star", "square"]
    with pytest.raises(SettingError, match="'square' has no anchor"):
        AllButOne(goal="alternative", **quick).erase(model, [STAR, other])
    with pytest.raises(SettingError, match="shall become 'circle', which is erased as well"):
        AllButOne(**quick).erase(model, [STAR, "circle"])


def test_cost_counts_walks_frozen_and_student_rows(model):
    counted = []
    for settings in ({}, {"goal": "zero"}, {"constraint": 0.0}, {"projected": True}):
        method = AllButOne(steps=2, sampling_steps=4, batch=3, bank=4, highest_time=1.0, **settings)
        before = model.cost.snapshot()
        goals = method._goals((STAR,))
        _Surgery(method, model, goals, (), 0)
        drawn = model.cost.since(before)["denoiser.forward"]
        cost = method.erase(model, STAR).manifest.cost
        counted.append((cost["denoiser.forward"] - drawn, cost["denoiser.backward"]))
    # Two steps: 3 points under the concept and under nothing, 3 more under nothing.
    assert counted == [(18, 18), (18, 18), (12, 12), (18, 36)]


def test_a_resumed_run_is_the_whole_run_in_edit_and_report(tmp_path):
    """Killed after the second of four steps; one step less is another edit."""
    settings = {"sampling_steps": 4, "batch": 2, "projected": True}
    method = AllButOne(steps=4, **settings)
    whole = method.erase(tiny_diffusion(), STAR, keep=["square"], seed=3)
    with writing(kill_at=2), pytest.raises(Killed):
        method.erase(tiny_diffusion(), STAR, keep=["square"], seed=3, run=tmp_path)
    again = method.erase(tiny_diffusion(), STAR, keep=["square"], seed=3, run=tmp_path)
    assert again.manifest.report["resumed_at"] == 2
    assert again.digest == whole.digest
    for name in ("guidance_term_loss", "unconditional_drift", "conflicts"):
        assert again.manifest.report[name] == whole.manifest.report[name]
    once_more = method.erase(tiny_diffusion(), STAR, keep=["square"], seed=3, run=tmp_path)
    assert once_more.manifest.report["conflicts"] == whole.manifest.report["conflicts"]
    short = AllButOne(steps=3, **settings).erase(tiny_diffusion(), STAR, keep=["square"], seed=3)
    assert short.manifest.tensors_digest != whole.manifest.tensors_digest


@pytest.mark.parametrize("kind", ["v_prediction", "sdxl", "pixart", "sana", "sd3", "flux"])
def test_every_kind_of_model(kind):
    model = tiny_diffusion(prediction_type=kind) if "_" in kind else tiny_layout(kind)
    task = surgery(model, {"star": ("star", 1.0)})
    assert float(task.step(STEP)["denoiser"].detach()) < 1e-9
    method = AllButOne(steps=2, sampling_steps=4, batch=2, bank=4)
    edit = method.erase(model, STAR, keep=["square"])
    assert max(float(t.abs().max()) for t in edit.tensors.values()) > 0


def test_half_precision_trains_and_projects():
    model = tiny_diffusion(dtype=torch.float16)
    method = AllButOne(steps=3, sampling_steps=4, batch=2, bank=4, lr=1e-3, projected=True)
    report = method.erase(model, STAR).manifest.report
    assert report["unconditional_drift"] > 0 and 0 <= report["conflicts"] <= 1


@pytest.mark.parametrize("goal", ["away", "zero"])
def test_an_alternative_that_would_have_no_part_is_refused(goal):
    with pytest.raises(SettingError, match="has no part"):
        AllButOne(goal=goal, alternative="circle", steps=1).erase(tiny_diffusion(), "star")
