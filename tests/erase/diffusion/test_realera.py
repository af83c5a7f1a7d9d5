"""RealEra: the closed form against least squares, the loss by hand, the teacher, resuming, what is left behind."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from expunge import Concept, Edit
from expunge.core import finetune, trajectories
from expunge.core.neighbour_mining import free_rows, mine
from expunge.core.noise_alignment import Alignment, adapted
from expunge.core.projections import Projections
from expunge.core.token_policy import paired_rows, span
from expunge.erase.diffusion import realera
from expunge.erase.diffusion.realera import RealEra
from expunge.errors import MissingPart, SettingError, UnsupportedModel
from expunge.method import Prompt
from expunge.models.base import Companions, noise_generator
from expunge.testing import tiny_diffusion
from expunge.testing.layouts import tiny_layout

STAR = Concept("star", phrases=("heart",), anchor="plain circle")
SQUARE = Concept("blue square", anchor="plain")
FORM = {
    "neighbours": 6,
    "beyond": 4,
    "vocabulary": 0,
    "ridge": 0.8,
    "preserve_scale": 0.7,
    "beyond_scale": 0.4,
}
QUICK = {
    **FORM,
    "steps": 3,
    "sampling_steps": 4,
    "lr": 1e-2,
    "lora_rank": 2,
    "step_neighbours": 2,
    "step_beyond": 2,
}


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


def embedded(model, text):
    own = span(model.tokenizer, model.token_ids([text])[0].tolist())
    return own, model.encode([text]).embeddings[0]


def rows_by_hand(model, method, seed, concepts=(STAR, SQUARE)):
    """Sources, targets and kept rows with their weights, written out from the equations."""
    pairs = [(n, c.anchor) for c in concepts for n in c.names]
    sources, targets, kept, scales = [], [], [], []
    own, e = embedded(model, "red")
    kept.append(e[own.first : own.end + 1])
    scales += [method.preserve_scale] * len(kept[0])
    for index, (old, new) in enumerate(pairs):
        around = method.mine_from or old
        (a, e), (b, g) = embedded(model, old), embedded(model, new)
        i, k = paired_rows("content_to_end", a, b)
        sources.append(e[i])
        targets.append(g[k])
        (a, e) = embedded(model, around)
        i, k = paired_rows("content_to_end", a, b)
        every = free_rows(a, None, first_row=method.first_row)
        for beyond, count in ((False, method.neighbours), (True, method.beyond)):
            draw = noise_generator(seed, "beyond" if beyond else "neighbours", f"0.0.{index}")
            points = mine(
                e, every, count, beyond=beyond, mining=method.mining, generator=draw
            ).points
            for point in points:
                if beyond:
                    kept.append(point[i])
                    scales += [method.beyond_scale] * len(i)
                else:
                    sources.append(point[i])
                    targets.append(g[k])
    return (
        *(torch.cat(part).double() for part in (sources, targets, kept)),
        torch.tensor(scales).double(),
    )


@pytest.mark.parametrize("more", [{}, {"mine_from": "green heart"}, {"first_row": True}])
def test_the_closed_form_minimises_its_objective(model, more, monkeypatch):
    method, solved = RealEra(align=False, **FORM, **more), []
    shared = realera.shared_edit

    def seen(method, model, concepts, groups, **rest):
        solved.extend(groups)
        return shared(method, model, concepts, groups, **rest)

    monkeypatch.setattr(realera, "shared_edit", seen)
    edit = method.erase(model, [STAR, SQUARE], keep=("red",), seed=4)
    x, g, p, scales = rows_by_hand(model, method, 4)
    ((group, solution),) = solved
    root = torch.cat([torch.ones(len(x)).double(), scales]).sqrt()[:, None]
    eye = 0.8**0.5 * torch.eye(x.shape[1]).double()
    for name, weight in group.weights.items():
        w = weight.double()
        left = torch.cat([root * torch.cat([x, p]), eye])
        right = torch.cat([root * (torch.cat([g, p]) @ w.T), 0.8**0.5 * w.T])
        wanted = torch.linalg.lstsq(left, right, driver="gelsd").solution.T
        found = w + w @ solution.change
        assert float((found - wanted).norm() / wanted.norm()) < 1e-6
        stored = w + edit.change(name, weight)
        assert float((stored - wanted).norm() / wanted.norm()) < 1e-5
    report = edit.manifest.report
    assert report["mining"]["neighbours"] == 3 * 6 and report["mining"]["beyond"] == 3 * 4
    assert report["erase_rows"] == len(x) and report["keep_rows"] == len(p)
    low, high = report["mining"]["cosines"]
    assert 0.5 <= low < high <= 0.9
    assert edit.kind == "shared-low-rank"


def task(model, **settings):
    method = RealEra(**{**QUICK, **settings})
    pairs, *_ = method._texts(model, (STAR,), (), None)
    stage = dataclasses.replace(method, align=False).erase(model, STAR, seed=1)
    return Alignment(method, model, stage, pairs, 1)


def predicted(model, points, embeddings):
    rows = model.encode([""] * len(embeddings)).with_embeddings(embeddings)
    latents = points.latents.repeat_interleave(len(embeddings) // len(points.which), 0)
    times = points.timesteps.repeat_interleave(len(embeddings) // len(points.which), 0)
    with torch.no_grad():
        return model.predict(latents, times, rows).epsilon(latents)


@pytest.mark.parametrize("alternate", [False, True])
@pytest.mark.parametrize("target", ["negative", "anchor"])
def test_the_loss_is_the_published_one(model, alternate, target):
    made = task(model, alternate=alternate, target=target, eta_g=0.7, batch=2)
    with torch.no_grad():
        for up in made.changes.up.values():
            up.normal_(0, 0.1, generator=torch.Generator().manual_seed(2))
    for index in (0, 1):
        step = finetune.Step(index, 3, 1)
        with torch.no_grad():
            found = float(made.step(step)["changes"])
        with made.student():
            points = trajectories.draw(
                model, ["star", "heart"], 2, steps=4, guidance=3.0, seed=1, first=2 * index
            )
        e, a, empty = (
            model.encode(texts).embeddings
            for texts in (["star", "heart"], ["plain circle"] * 2, ["", ""])
        )
        e, a = e[points.which], a[points.which]
        perturbed = []
        for purpose, count in (("neighbours", 2), ("beyond", 2)):
            draw = step.generator(purpose)
            perturbed.append(torch.cat([
                mine(own, torch.arange(16) > 0, count, beyond=purpose == "beyond",
                     mining=made.method.mining, generator=draw).points
                for own in e
            ]))  # fmt: skip
        near, far = perturbed
        y = predicted(model, points, a)
        if target == "negative":
            zero = predicted(model, points, empty)
            y = zero - 0.7 * (predicted(model, points, e) - zero)
        pinned = predicted(model, points, far)
        with made.student():
            own = (predicted(model, points, e) - y).square().mean()
            close = (predicted(model, points, near) - y.repeat_interleave(2, 0)).square().mean()
            beyond = (predicted(model, points, far) - pinned).square().mean()
        wanted = own + close + beyond
        if alternate:  # two points each, summed
            wanted = own if index == 0 else 2 * close + 2 * beyond
        assert found == pytest.approx(float(wanted), rel=1e-4)


def test_the_teacher_is_the_model_before_both_stages(model):
    made = task(model, bank=3)
    points, y = made.bank
    e, a = (model.encode([t] * 3) for t in ("star", "plain circle"))
    plain = model.predict(points.latents, points.timesteps, e).epsilon(points.latents)
    torch.testing.assert_close(made.teacher(points, e), plain.detach())
    with made.student():
        edited = model.predict(points.latents, points.timesteps, e).epsilon(points.latents)
    assert (
        float((edited - plain).detach().abs().max()) > 1e-4
    )  # the closed form is on the student alone
    assert y.shape == points.latents.shape and a.rows == 3
    torch.testing.assert_close(
        model.predict(points.latents, points.timesteps, e).epsilon(points.latents), plain
    )


def test_the_edit_is_both_changes_merged(model):
    method = RealEra(**QUICK)
    edit = method.erase(model, STAR, seed=1)
    stage = dataclasses.replace(method, align=False).erase(model, STAR, seed=1)
    text = set(model.text_projections())
    assert {t.name for t in edit.manifest.targets} == set(adapted(model, "cross-attention"))
    for target in edit.manifest.targets:
        weight = model.tensor(target.name)
        change = edit.change(target.name, weight)
        if target.name in text:
            change = change - stage.change(target.name, weight)
        assert (
            0 < float(change.abs().max()) and int(torch.linalg.matrix_rank(change, rtol=1e-4)) <= 2
        )
    few = RealEra(**{**QUICK, "neighbours": 0, "beyond": 0, "lora_rank": 1}).erase(model, STAR)
    assert (edit.kind, few.kind) == ("dense", "low-rank")
    assert edit.manifest.report["lora_layers"] == len(edit.manifest.targets)
    assert (
        edit.manifest.report["condition"] > 0
        and len(edit.manifest.report["losses"]["changes"]) == 3
    )


def test_training_lowers_the_loss_and_leaves_the_model_alone(model):
    before = {n: p.detach().clone() for n, p in model.tensors().items()}
    method = RealEra(**{**QUICK, "steps": 20, "bank": 6, "batch": 4, "step_beyond": 0})
    edit = method.erase(model, STAR, seed=1)
    losses = edit.manifest.report["losses"]["changes"]
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(torch.equal(p, before[n]) for n, p in model.tensors().items())
    assert not any(p.requires_grad for p in model.tensors().values())
    assert not any(m._forward_hooks for part in model.parts().values() for m in part.modules())
    assert edit.manifest.cost["denoiser.backward"] == 20 * 4 * 3
    assert method.erase(model, STAR, seed=2) != edit


def test_cost_counts_walk_teacher_and_student(model):
    edit = RealEra(**{**QUICK, "steps": 1, "batch": 2}).erase(model, STAR)
    depths = trajectories.draw(model, ["star"], 2, steps=4, guidance=3.0, seed=0).timesteps
    index = {int(t): i for i, t in enumerate(model.timesteps(4))}
    walked = sum(2 * index[int(t)] for t in depths)
    # Empty, concept and points beyond by the teacher; concept, neighbours and points beyond by the student.
    assert edit.manifest.cost["denoiser.forward"] == walked + 2 * (1 + 1 + 2) + 2 * (1 + 2 + 2)
    assert edit.manifest.cost["denoiser.backward"] == 2 * (1 + 2 + 2)
    assert "denoiser.forward" not in RealEra(align=False, **FORM).erase(model, STAR).manifest.cost


@pytest.mark.parametrize("bank", [None, 4])
def test_a_killed_run_resumes_bit_for_bit(model, tmp_path, monkeypatch, bank):
    method = RealEra(**QUICK, bank=bank)
    whole = method.erase(model, STAR, seed=1)
    step = Alignment.step

    def killed(self, now):
        if now.index == 2:
            raise KeyboardInterrupt
        return step(self, now)

    with monkeypatch.context() as patch:
        patch.setattr(Alignment, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            method.erase(model, STAR, seed=1, run=tmp_path)
    assert not any(m._forward_hooks for part in model.parts().values() for m in part.modules())
    again = method.erase(model, STAR, seed=1, run=tmp_path)
    assert again.manifest.report["resumed_at"] == 2
    assert again == whole
    assert all(torch.equal(again.tensors[n], t) for n, t in whole.tensors.items())


def test_several_concepts_share_one_solve_and_one_lora(model):
    both = RealEra(**QUICK).erase(model, [STAR, SQUARE], seed=1)
    assert both.manifest.report["pairs"] == 3
    assert both.manifest.report["mining"]["neighbours"] == 3 * 6
    one = RealEra(**QUICK).erase(model, STAR, seed=1)
    assert {t.name for t in both.manifest.targets} == {t.name for t in one.manifest.targets}
    assert both != one


def test_vocabulary_neighbours_are_erased_and_those_kept_are_named(model):
    plain = {**FORM, "vocabulary": 600, "align": False}
    found = RealEra(**plain, vocabulary_neighbours=6).erase(model, STAR).manifest.report
    words = found["vocabulary"]["star"]["erased"]
    assert len(words) == 6 and "star" not in words and found["pairs"] == 2 + 6
    edit = RealEra(**plain, vocabulary_neighbours=6).erase(model, STAR, keep=(words[2].upper(),))
    report = edit.manifest.report["vocabulary"]["star"]
    assert report == {
        "erased": [word for word in words if word != words[2]],
        "left out, as they are kept": [words[2]],
    }
    assert edit.manifest.report["pairs"] == 2 + 5
    named = RealEra(**plain, vocabulary_neighbours=6).erase(model, STAR, keep=(f"a {words[2]} of",))
    assert named.manifest.report["vocabulary"]["star"] == report
    near = RealEra(**plain).erase(model, STAR).manifest.report
    assert near["vocabulary"] == {} and set(near["mining"]["nearest_words"]) == {"star", "heart"}
    with pytest.raises(SettingError, match="cannot be larger"):
        RealEra(vocabulary=2, vocabulary_neighbours=3)


def test_without_phrases_no_phrase_is_told():
    own, asked = tiny_diffusion(), []

    def prompts(name, n, seed=0, split="test", route="name"):
        asked.append((route, split))
        return [Prompt(f"a red {name} {i}", concept=name) for i in range(n)]

    own.companions = Companions("toy", concept=lambda n: Concept(n), prompts=prompts)
    method = RealEra(**FORM, align=False, erase_phrases=False, context_prompts=2)
    edit = method.erase(own, STAR)
    assert asked == [("name", "development")] and edit.manifest.report["pairs"] == 3
    assert edit.manifest.concepts[0]["phrases"] == ["heart"]


@pytest.mark.parametrize("layout", ["SD3", "Flux", "PixArt", "SDXL"])
def test_the_closed_form_is_for_all_layouts_and_the_alignment_for_rows_of_one_text(layout):
    other = tiny_layout(layout.lower())
    edit = RealEra(align=False, **FORM).erase(other, STAR)
    assert isinstance(edit, Edit)
    assert {t.name for t in edit.manifest.targets} == set(other.text_projections())
    if layout == "SDXL":
        assert RealEra(**{**QUICK, "steps": 1}).erase(other, STAR).manifest.report["steps"] == 1
        return
    before = copy.copy(other.cost.counts)
    with pytest.raises(UnsupportedModel, match="align=False"):
        RealEra(**QUICK).erase(other, STAR)
    assert other.cost.rows("denoiser") == sum(v for k, v in before.items() if "denoiser" in k)


def test_layer_choices(model):
    names = {layers: set(adapted(model, layers)) for layers in
             ("text-projections", "cross-attention", "attention", "all")}  # fmt: skip
    assert names["text-projections"] < names["cross-attention"] < names["attention"] < names["all"]
    assert names["text-projections"] == set(model.text_projections())
    assert not any("conv" in name or "norm" in name for name in names["all"])
    bare = copy.copy(model)
    bare.tensors = dict
    with pytest.raises(MissingPart, match="selects nothing"):
        adapted(bare, "attention")


def test_a_bank_that_leaves_a_text_out_is_refused(model):
    with pytest.raises(SettingError, match="bank=1 has no point for 1 of 2 texts"):
        RealEra(**{**QUICK, "bank": 1}, erase_phrases=False).erase(model, [STAR, SQUARE])


def test_settings_that_cannot_work_are_refused():
    for wrong, said in (
        ({"ridge": 0.0}, "ridge"),
        ({"low_cosine": 0.9, "high_cosine": 0.5}, "the smaller"),
        ({"sampler": "exact"}, "sampler"),
        ({"lora_layers": "conv"}, "lora_layers"),
    ):
        with pytest.raises(SettingError, match=said):
            RealEra(**wrong)


@pytest.mark.parametrize(
    ("preset", "guide"),
    [("paper:object", None), ("paper:style", "art"), ("paper:identity", "a person"), ("paper:unsafe", None)],
)  # fmt: skip
def test_presets_are_those_of_the_paper(model, preset, guide):
    made = RealEra.configured(preset)
    assert (made.radius, made.low_cosine, made.high_cosine, made.eta_g) == (1.6, 0.5, 0.9, 1.0)
    assert (made.step_neighbours, made.step_beyond, made.steps, made.guidance) == (5, 3, 200, 3.0)
    assert made.guide == guide and not made.vocabulary_neighbours
    (group,) = Projections.groups(model)
    assert group.names == model.text_projections()
