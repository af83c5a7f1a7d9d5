"""SPM: the loss by hand, where adapters stand, who walks, the time told, the schedule, resuming, layouts, refusals."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from expunge.concept import Concept
from expunge.core import scores, trajectories
from expunge.core.layer_choice import block_weights
from expunge.core.low_rank import LowRank
from expunge.core.tasks import Optimiser, Step
from expunge.edit import Edit
from expunge.erase.diffusion.spm import SIDES, SPM, _Membrane
from expunge.errors import MissingPart, SettingError, UnsupportedModel
from expunge.models.types import Condition
from expunge.testing import bench, tiny_diffusion, tiny_layout

STAR = Concept("star", phrases=("heart",))
QUICK = {"steps": 2, "warmup": 0, "lr": 1e-2, "sampling_steps": 4, "batch": 2, "anchors": 2}


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


def membrane(model, filled=True, **settings):
    """The task, its adapters filled with random numbers as if training had gone on for a while."""
    method = SPM(**{**QUICK, **settings})
    adapters = LowRank(
        model, method._weights(model), rank=method.rank, seed=0, scale=method.alpha / method.rank,
        convolutions=True, start="kaiming",
    )  # fmt: skip
    task = _Membrane(method, model, (STAR,), adapters, 0)
    if filled:
        draw = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for up in adapters.up.values():
                up.copy_(0.3 * torch.randn(up.shape, generator=draw))
    return task


def step_of(task, index=0):
    """A step whose original model is the one without adapters."""
    ups = list(task.adapters.up.values())

    class Without:
        def __enter__(self):
            self.held = [up.data for up in ups]
            for up in ups:
                up.data = torch.zeros_like(up)

        def __exit__(self, *_):
            for up, value in zip(ups, self.held, strict=True):
                up.data = value

    return Step(index, 10, 0, original=Without)


# -- where adapters stand ------------------------------------------------------------------------------


def test_stable_diffusion_has_192_adapters_of_423_936_numbers():
    """The published count, on the denoiser of SD 1.4 without its memory; 0.05 % of it."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)
    model = tiny_diffusion()
    model.pipeline.unet = unet
    names, tensors = block_weights(model), model.tensors()
    sizes = [tensors[n].shape[0] + tensors[n][0].numel() for n in names]
    assert (len(names), sum(sizes)) == (192, 423_936)
    share = sum(sizes) / sum(p.numel() for p in unet.parameters())
    assert 0.0004 < share < 0.0006


def test_blocks_and_all_layers(model):
    blocks = block_weights(model)
    assert len(blocks) == 48 and all(".attentions." in name for name in blocks)
    assert {n.rsplit(".", 2)[1] for n in blocks} >= {
        "proj_in",
        "proj_out",
        "to_q",
        "to_k",
        "to_v",
        "proj",
    }
    everything = SPM(layers="all")._weights(model)
    assert set(blocks) < set(everything) and "unet.conv_in.weight" in everything
    assert not any(n.startswith(("vae", "text_encoder")) or "norm" in n for n in everything)


def test_layers_that_see_the_size_of_a_picture_have_no_adapter():
    sized = tiny_layout("pixart", sample_size=128)
    assert any(".resolution_embedder." in name for name in sized.tensors())
    chosen = SPM(layers="all")._weights(sized)
    assert "transformer.adaln_single.linear.weight" in chosen
    assert not any("resolution" in name or "aspect_ratio" in name for name in chosen)


@pytest.mark.parametrize(("layout", "block"), [
    ("sdxl", ".attentions."), ("pixart", ".transformer_blocks."), ("sana", ".transformer_blocks."),
    ("sd3", ".transformer_blocks."), ("flux", "transformer_blocks."),
])  # fmt: skip
def test_every_layout_learns_draws_and_comes_off(layout, block):
    model = tiny_layout(layout)
    names = block_weights(model)
    assert all(block in name for name in names) and not any("embed" in name for name in names)
    if layout == "flux":
        assert any(".single_transformer_blocks." in name for name in names)
    edit = SPM(**{**QUICK, "steps": 1, "phrases": True, "anchor_empty": True}).erase(model, STAR)
    assert edit.manifest.report["phrases"] == "star, heart"
    with torch.no_grad():
        plain = model.sample(model.encode(["a star"]), [0], steps=2)
        with edit.on(model):
            assert not torch.equal(model.sample(model.encode(["a star"]), [0], steps=2), plain)
        assert torch.equal(model.sample(model.encode(["a star"]), [0], steps=2), plain)


def test_a_denoiser_without_blocks_is_refused(model, monkeypatch):
    monkeypatch.setattr("expunge.core.layer_choice.class_is", lambda module, name: False)
    with pytest.raises(MissingPart, match="no transformer blocks"):
        SPM(**QUICK).erase(model, STAR)


def test_the_start_is_kaimings_and_changes_nothing(model):
    adapters = membrane(model, filled=False, rank=2).adapters
    for name, down in adapters.down.items():
        bound = model.tensor(name)[0].numel() ** -0.5
        assert float(down.detach().abs().max()) <= bound and not adapters.up[name].any()
    every = torch.cat([d.flatten() * d.shape[1] ** 0.5 for d in adapters.down.values()])
    assert abs(float(every.std()) - 1 / 3**0.5) < 0.02 and abs(float(every.mean())) < 0.03


# -- the loss ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("settings", [
    {}, {"bank": 4}, {"surrogate": "circle", "eta": 3.0, "anchoring": 7.0},
    {"anchor_source": "vocabulary", "vocabulary": 9}, {"anchors": 0},
    {"anchor_empty": True, "phrases": True, "rank": 2, "alpha": 3.0},
])  # fmt: skip
def test_the_loss_is_that_of_the_two_terms(kind, settings):
    model = tiny_diffusion(prediction_type=kind)
    task = membrane(model, **{"eta": 0.7, "anchoring": 11.0, **settings})
    step = step_of(task)
    with torch.no_grad():
        loss = float(task.step(step)["adapters"])
        with task.adapters.attached():
            points, _ = task.points.at(step)
        anchors = task.drawn(points, step.generator("anchors"))
        own = task.concept.select(points.which)
        sur = model.encode([task.method.surrogate])
        concept, away = scores.asked(model, points, [own, sur])
        target = away.double() - task.method.eta * (concept.double() - away.double())
        with task.adapters.attached():
            made, *near = scores.asked(model, points, [own, *anchors])
        still = scores.asked(model, points, anchors) if anchors else []
        moved = [
            (a.double() - b.double()).square().mean() for a, b in zip(near, still, strict=True)
        ]
    wanted = (made.double() - target).square().mean()
    if moved:
        wanted = wanted + task.method.anchoring * torch.stack(moved).mean()
    assert math.isclose(loss, float(wanted), rel_tol=1e-4)
    assert len(anchors) == task.method.anchors + task.method.anchor_empty
    assert not moved or float(torch.stack(moved).mean()) > 1e-8


def test_every_anchor_takes_part(model):
    """The published code cancels two of four anchors; here a change at any one of them moves the loss."""
    task = membrane(model, anchors=4, batch=1)
    step, drawn = step_of(task), task.drawn
    with torch.no_grad():
        whole = float(task.step(step)["adapters"])
        for left in range(4):
            task.drawn = lambda points, g, left=left: [
                a if i != left else task.empty for i, a in enumerate(drawn(points, g))
            ]
            assert not math.isclose(float(task.step(step)["adapters"]), whole, rel_tol=1e-6)


def test_the_student_walks_unless_there_is_a_bank(model):
    task = membrane(model)
    step = step_of(task)
    walk = {"steps": 4, "guidance": 3.0, "seed": 0, "low": 1}
    with torch.no_grad():
        frozen = trajectories.draw(model, ["star"], 2, **walk)
        with task.adapters.attached():
            own = trajectories.draw(model, ["star"], 2, **walk)
            found, _ = task.points.at(step)
    assert torch.equal(found.latents, own.latents) and not torch.equal(own.latents, frozen.latents)
    banked = membrane(model, bank=2)
    assert torch.equal(banked.points.bank[0].latents, frozen.latents)
    pure = membrane(model, walked="frozen")
    with pure.adapters.attached():
        assert torch.equal(pure.points.at(step_of(pure))[0].latents, frozen.latents)


def test_no_point_is_pure_noise(model):
    points = membrane(model, bank=60).points.bank[0]
    times = model.timesteps(4).tolist()
    assert {int(t) for t in points.timesteps} == {int(t) for t in times[1:]}


def test_the_official_label_is_that_of_the_list(model):
    """k steps of N = 4 of T = 1000: entry floor(250 k) of 999, 998, ..., 0."""
    task = membrane(model, bank=60, time_label="official")
    points = task.points.bank[0]
    told = task.told(points)
    times = [int(t) for t in model.timesteps(4)]
    for before, after in zip(points.timesteps.tolist(), told.timesteps.tolist(), strict=True):
        assert after == 999 - 250 * times.index(int(before))
    assert torch.equal(told.latents, points.latents) and membrane(model).told(points) is points
    with torch.no_grad():  # targets of a bank were asked for at the label
        concept, empty = scores.asked(model, told, [task.concept.select(told.which), task.empty])
    torch.testing.assert_close(
        task.points.bank[1]["target"], 2 * empty - concept, atol=1e-5, rtol=1e-4
    )


def test_random_sides(model):
    task = membrane(model, sides="random")
    seen = {task.shape(Step(i, 100, 0)) for i in range(60)}
    assert {s[1] for s in seen} == {s[2] for s in seen} == {round(8 * side) for side in SIDES}
    assert len(seen) > 8 and membrane(model).shape(Step(0, 1, 0)) is None
    with torch.no_grad():
        found, _ = task.points.at(step_of(task, 3), shape=(4, 4, 6))
    assert found.latents.shape == (2, 4, 4, 6)
    assert SPM(**{**QUICK, "sides": "random"}).erase(model, STAR).kind == "gated-adapter"


# -- training ------------------------------------------------------------------------------------------


def test_the_schedule_warms_up_and_falls_three_times():
    rate = Optimiser(2.0, "adamw", warmup=4, schedule="cosine", cycles=3)
    assert [rate.rate(i, 100) for i in range(4)] == [0.5, 1.0, 1.5, 2.0]
    top = [i for i in range(4, 100) if math.isclose(rate.rate(i, 100), 2.0)]
    assert top == [4, 36, 68]  # three equal falls of 32 steps
    assert rate.rate(35, 100) < 0.01 < rate.rate(36, 100)
    assert math.isclose(rate.rate(20, 100), 1.0)  # the middle of a fall
    once = Optimiser(2.0, warmup=4, schedule="cosine")
    assert math.isclose(once.rate(52, 100), 1.0) and once.rate(36, 100) > 1.0


def test_training_draws_the_prediction_to_the_target(model):
    settings = {"steps": 12, "bank": 4, "anchors": 0, "batch": 4, "lr": 5e-2, "restarts": 1}
    edit = SPM(**{**QUICK, **settings}).erase(model, STAR, seed=1)
    losses = edit.manifest.report["losses"]["adapters"]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])


def test_an_edit_names_what_it_is_and_leaves_nothing_behind(model):
    before = bench.trace(model)
    edit = SPM(**{**QUICK, "rank": 2, "phrases": True}).erase(model, STAR, keep=("square",), seed=3)
    assert bench.trace(model) == before
    manifest = edit.manifest
    assert (manifest.kind, manifest.acts, manifest.keep) == ("gated-adapter", True, ["square"])
    assert manifest.settings["rank"] == 2 and manifest.settings["alpha"] == 1.0
    report = manifest.report
    assert (report["phrases"], report["adapters"]) == ("star, heart", 48)
    assert report["numbers"] == sum(t.numel() for t in edit.tensors.values()) - 1
    edit.apply(model)
    (control,) = model.edits.controls
    assert control.gate.phrases == ("star", "heart")
    edit.revert(model)
    assert bench.trace(model) == before


def test_cost_has_no_doubled_batches(model):
    """Walks of k guided steps, one frozen row for c_tar, c_sur and each anchor, one trained row but for c_sur."""
    edit = SPM(**{**QUICK, "steps": 3, "anchors": 2, "guidance": 3.0}).erase(model, STAR)
    times = [int(t) for t in model.timesteps(4)]
    depths = trajectories.draw(model, ["star"], 6, steps=4, guidance=3.0, seed=0, low=1).timesteps
    walked = sum(2 * times.index(int(t)) for t in depths)
    assert edit.manifest.cost["denoiser.backward"] == 3 * 2 * 3
    assert edit.manifest.cost["denoiser.forward"] == walked + 3 * 2 * (4 + 3)
    banked = SPM(**{**QUICK, "steps": 3, "bank": 2}).erase(model, STAR)
    less = banked.manifest.cost["denoiser.forward"]
    walked = sum(2 * times.index(int(t)) for t in depths[:2])
    assert less == walked + 2 * 2 + 3 * 2 * (2 + 3)


def test_presets_and_official_compat(model):
    style, unsafe = SPM.configured("paper:style"), SPM.configured("paper:unsafe")
    assert style.factor == 2.0 and SPM().factor == 1.0
    assert (unsafe.steps, unsafe.eta, unsafe.anchoring, unsafe.factor) == (15_000, 3.0, 100.0, 2.0)
    assert (SPM().steps, SPM().lr, SPM().anchoring, SPM().anchors, SPM().sampling_steps) == (
        3000,
        1e-4,
        1000.0,
        4,
        30,
    )
    for compat, doubled in (("paper", False), ("official", True)):
        edit = SPM(**{**QUICK, "steps": 1, "compat": compat}).erase(model, STAR)
        assert SPM.control(edit, model).doubled is doubled
    assert dataclasses.replace(SPM(), compat="official").settings() != SPM().settings()


def test_a_gated_model_teaches_the_next_eraser(model):
    """What stands on the model while another concept is learnt acts, and is named."""
    first = SPM(**QUICK).erase(model, STAR)
    alone = SPM(**QUICK).erase(model, Concept("circle"), seed=1)
    with first.on(model):
        upon = SPM(**QUICK).erase(model, Concept("circle"), seed=1)
    assert upon.manifest.fitted_on == [first.digest] and alone.manifest.fitted_on == []
    assert upon.manifest.tensors_digest != alone.manifest.tensors_digest


def test_a_prompt_opens_the_gate_further_than_its_embedding(model):
    """Embeddings from elsewhere have no tokens: their gate is the cosine's alone."""
    edit: Edit = SPM(**QUICK).erase(model, STAR)
    with edit.on(model):
        (control,) = model.edits.controls
        named = control.gate.of(model, model.encode(["a star"]))
        soft = control.gate.of(model, Condition(model.encode(["a star"]).embeddings))
    assert float(named) == 1.0 and float(soft) < 1.0


@pytest.mark.parametrize(("settings", "error", "match"), [
    ({"sides": "random", "bank": 4}, SettingError, "fresh points"),
    ({"walked": "teacher"}, SettingError, "walked is 'teacher'"),
    ({"gate": "ajar"}, SettingError, "gate is 'ajar'"),
])  # fmt: skip
def test_settings_that_make_no_sense(model, settings, error, match):
    with pytest.raises(error, match=match):
        SPM(**{**QUICK, **settings}).erase(model, STAR)


def test_what_a_layout_does_not_have(monkeypatch):
    model = tiny_layout("sd3")
    with monkeypatch.context() as patch, pytest.raises(UnsupportedModel, match="reads none"):
        patch.setattr(model, "vocabularies", dict)
        SPM(**QUICK).erase(model, STAR)
    with pytest.raises(UnsupportedModel, match="defined for UNets"):
        SPM(**{**QUICK, "sides": "random"}).erase(model, STAR)
    with pytest.raises(UnsupportedModel, match="time_label='true'"):
        SPM(**{**QUICK, "time_label": "official"}).erase(model, STAR)
    assert not model.cost.counts
