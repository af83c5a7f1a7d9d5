"""SalUn: mask and loss by hand, pseudo targets of the model as it is, pictures, masks that hold, resuming."""

from __future__ import annotations

import numpy as np
import pytest
import rich.progress  # noqa: F401  # see the last test
import torch
from PIL import Image

from expunge.concept import Concept
from expunge.core import saliency, scores
from expunge.core.examples import at_hand
from expunge.core.layer_choice import trainable
from expunge.core.tasks import Step
from expunge.erase.diffusion.salun import SalUn, _Relabelling
from expunge.errors import ConceptError, InputError, SettingError
from expunge.models.base import Companions, Pictures, noise_generator
from expunge.testing import bench, tiny_diffusion, tiny_layout
from expunge.testing.resuming import Killed, writing

STAR = Concept("star", phrases=("heart",), anchor="circle")
QUICK = {"steps": 3, "batch": 2, "pictures": 4, "sampling_steps": 2, "lr": 1e-3}


def pictures(name="star", n=5, seed=0):
    shown = np.random.default_rng(seed).integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)
    return Pictures(shown, None, tuple(f"a red {name} {i}" for i in range(n)))


DATA = {"pictures": {"star": pictures(), "square": pictures("square", 3, 1)}}


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


def task(model, **settings):
    method = SalUn(**{**QUICK, **settings})
    own = at_hand(model, [STAR], DATA["pictures"])
    named = method._named([STAR], ["circle"], [], DATA["pictures"])
    forget = {"star": method._forgotten(model, STAR, own, 0)}
    retain = method._retained(model, [STAR], named, own, 0) if method.alpha else {}
    return _Relabelling(method, model, [STAR], forget, retain, 0)


def test_the_mask_is_that_of_the_summed_guided_loss(model):
    """By hand: signs kept over batches, absolute value last, one threshold over all tensors."""
    own = task(model, layers="xattn", mask_guidance=3.0, ratio=0.3)
    before = bench.trace(model)
    masks = own.mask()
    assert bench.trace(model) == before
    pairs = trainable(model, "cross-attention")
    draw = noise_generator(0, "salun mask")
    total = {n: torch.zeros_like(p) for n, p in pairs}
    for rows in (torch.tensor([0, 1]), torch.tensor([2, 3]), torch.tensor([4])):
        points, noise = scores.noised(model, own.forget.latents[rows], draw, which=rows)
        for _, parameter in pairs:
            parameter.requires_grad_(True)
        named = scores.epsilon(model, points, own.forget.condition.select(rows))
        empty = scores.epsilon(model, points, model.unconditional().repeat(len(rows)))
        loss = (noise - (4.0 * named - 3.0 * empty)).square().mean()
        for (name, _), g in zip(
            pairs, torch.autograd.grad(loss, [p for _, p in pairs]), strict=True
        ):
            total[name] += g
        for _, parameter in pairs:
            parameter.requires_grad_(False)
    flat = torch.cat([total[n].flatten() for n, _ in pairs]).abs()
    chosen = torch.cat([masks[n].flatten() for n, _ in pairs])
    assert int(chosen.sum()) == int(0.3 * len(flat))
    # Rounding may exchange entries beside the threshold, no others.
    assert float(flat[chosen].min()) >= float(flat[~chosen].max()) * (1 - 1e-3)
    assert len({float(m.float().mean()) for m in masks.values()}) > 5


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_is_that_of_one_latent_and_two_captions(kind):
    model = tiny_diffusion(prediction_type=kind)
    own = task(model, alpha=0.7)
    step = Step(1, 3, 0)
    draw = step.generator()
    rows = own._order(1)
    points, _ = scores.noised(model, own.forget.latents[rows], draw, which=rows)
    pick = torch.randint(len(own.retain), (2,), generator=draw)
    kept, noise = scores.noised(model, own.retain.latents[pick], draw, which=pick)
    said = [own.forget.captions[int(i)] for i in rows]
    instead = [text.replace("star", "circle").replace("heart", "circle") for text in said]
    assert said != instead
    with torch.no_grad():
        loss = float(own.step(step)["denoiser"])
        made, other = (scores.epsilon(model, points, model.encode(t)) for t in (said, instead))
        retained = scores.epsilon(model, kept, own.retain.condition.select(pick))
    wanted = (made - other).square().mean() + 0.7 * (noise - retained).square().mean()
    assert loss == pytest.approx(float(wanted), rel=1e-4)


def test_targets_come_from_the_model_as_it_is_without_a_gradient(model):
    own = task(model, alpha=0.0)
    pairs = trainable(model, "full")
    for _, parameter in pairs:
        parameter.requires_grad_(True)
    seen = []
    predict = model.predict

    def watched(noised, timesteps, condition, context=None):
        found = predict(noised, timesteps, condition, context)
        seen.append((torch.is_grad_enabled(), noised.clone(), found.value.requires_grad))
        return found

    model.predict = watched
    try:
        own.step(Step(0, 3, 0))
        target = seen[0]
        with torch.no_grad():
            pairs[0][1].add_(1.0)
        seen.clear()
        own.step(Step(0, 3, 0))
    finally:
        del model.predict
        with torch.no_grad():
            pairs[0][1].sub_(1.0)
        for _, parameter in pairs:
            parameter.requires_grad_(False)
    assert [s[0] for s in seen] == [False, True] and [s[2] for s in seen] == [False, True]
    assert torch.equal(seen[0][1], seen[1][1]) and torch.equal(target[1], seen[0][1])
    assert own.other.rows == 5


def test_every_picture_comes_once_in_an_epoch(model):
    own = task(model)
    for epoch in range(2):
        rows = torch.cat([own._order(3 * epoch + i) for i in range(3)])
        assert sorted(rows.tolist()) == [0, 1, 2, 3, 4]
    assert own._order(0).tolist() != own._order(3).tolist()
    edit = SalUn(**{**QUICK, "steps": None, "epochs": 2}).erase(model, STAR, data=DATA)
    assert edit.manifest.report["steps"] == 6


@pytest.mark.parametrize("mask", ["salient", "least", "none"])
def test_only_what_the_mask_chooses_moves(model, mask):
    before = {n: p.detach().clone() for n, p in model.tensors().items()}
    edit = SalUn(**QUICK, mask=mask).erase(model, STAR, data=DATA, seed=2)
    assert all(torch.equal(p, before[n]) for n, p in model.tensors().items())
    moved = {t.name: edit.change(t.name, model.tensor(t.name)) != 0 for t in edit.manifest.targets}
    report = edit.manifest.report
    if mask == "none":
        assert "mask" not in report
        return
    assert edit.kind == "dense" and report["mask"]["density"] == pytest.approx(0.5, abs=1e-5)
    own = task(model, mask=mask)
    own.seed = 2
    chosen = own.mask()
    total = sum(int(m.sum()) for m in chosen.values())
    assert 0 < sum(int(m.sum()) for m in moved.values()) <= total
    assert all(not bool((m & ~chosen[n]).any()) for n, m in moved.items())
    with edit.on(model):
        for name, mask_ in chosen.items():
            assert torch.equal(model.tensor(name)[~mask_], before[name][~mask_])


def test_the_two_halves_are_complements(model):
    top, bottom = (task(model, mask=mask).mask() for mask in ("salient", "least"))
    both = sum(int((top[n] & bottom[n]).sum()) for n in top)
    rest = sum(int((~top[n] & ~bottom[n]).sum()) for n in top)
    assert both == 0 and rest <= 1
    assert saliency.density(top) == pytest.approx(0.5, abs=1e-5)


def test_pictures_are_given_drawn_or_refused(model):
    edit = SalUn(**QUICK).erase(model, STAR, keep=["blue"])
    report = edit.manifest.report
    assert report["pictures"] == {"blue": "model", "circle": "model", "star": "model"}
    assert edit.manifest.data_digest is None
    given = SalUn(**QUICK).erase(model, STAR, data=DATA).manifest
    assert given.report["pictures"] == {"square": "data", "circle": "model", "star": "data"}
    assert given.data_digest is not None
    with pytest.raises(SettingError, match="nothing to retain"):
        SalUn(**QUICK).erase(model, "star")
    assert SalUn(**QUICK, alpha=0.0).erase(model, "star").manifest.report["retained"] == []
    wrong = {"pictures": {"star": pictures("square")}}
    with pytest.raises(InputError, match="does not name"):
        SalUn(**QUICK).erase(model, STAR, data=wrong)


def test_what_would_be_ignored_or_contradicts_itself_is_refused(model):
    with pytest.raises(InputError, match="reads no 'captions'"):
        SalUn(**QUICK).erase(model, STAR, data={"captions": ["a blue square"]})
    with pytest.raises(ConceptError, match="to be kept, but also erased"):
        SalUn(**QUICK).erase(model, STAR, keep=["square", "Heart"])
    for name in ("Star", "heart"):
        with pytest.raises(InputError, match=f"{name!r} names what is erased"):
            SalUn(**QUICK).erase(model, STAR, data={"pictures": {name: pictures(name)}})
    named = {"pictures": {"square": pictures("star"), "star": pictures()}}
    with pytest.raises(InputError, match="every caption of 'square' names what is erased"):
        SalUn(**QUICK).erase(model, STAR, data=named)


def test_refusals_come_before_pictures():
    model = tiny_diffusion()
    for bad, said in (({}, "nothing to retain"), ({"other": "star"}, "is 'star' itself")):
        with pytest.raises(SettingError, match=said):
            SalUn(**QUICK, **bad).erase(model, "star")
    assert not model.cost.rows("denoiser", {})
    with pytest.raises(SettingError, match="no entry is in all 1 masks"):
        SalUn(**QUICK, ratio=0.0).erase(model, STAR, data=DATA)


def test_whole_prompts_are_retained_and_what_holds_the_name_is_told(model):
    prompt = "a photo of a red square " * 10
    report = SalUn(**QUICK).erase(model, STAR, keep=[prompt, "star fruit"]).manifest.report
    assert report["retained"] == [prompt, "circle"]
    assert report["named_like_the_erased"] == ["star fruit"]


def test_the_files_of_a_concept_are_its_pictures(model, tmp_path):
    shown = pictures(n=3).pictures
    paths = tuple(str(tmp_path / f"{i}.png") for i in range(3))
    for path, picture in zip(paths, shown, strict=True):
        Image.fromarray(picture).save(path)
    concept, method = Concept("star", phrases=("heart",), images=paths), SalUn(**QUICK)
    read = at_hand(model, [concept], {})
    origin, found = method._forgotten(model, concept, read, 0)
    assert origin == "files" and np.array_equal(found.pictures, shown)
    assert found.captions == ("star", "heart", "star")
    # So are those of what is kept; what is given as data comes first.
    square = Concept("square", images=paths[:1])
    kept = SalUn(**QUICK).erase(model, STAR, keep=[square], data={"pictures": {"star": pictures()}})
    assert kept.manifest.report["pictures"]["square"] == "files"
    both = at_hand(model, [concept], DATA["pictures"])
    assert method._forgotten(model, concept, both, 0)[0] == "data"


def test_nothing_an_audit_measures_is_retained_unless_it_was_named():
    model = tiny_diffusion()
    captions = ("a circle", "a square beside a circle", "a circle and a heart", "a blue circle")

    def shown(name, n, seed=0, split="development"):
        return Pictures(pictures(n=4).pictures, None, captions)

    model.companions = Companions(
        "w", concept=lambda name: STAR if name == "star" else Concept(name), pictures=shown,
        neighbours=lambda concept: ("circle", "square"), unrelated=("blue",),
    )  # fmt: skip
    method = SalUn(**QUICK)
    found = method._retained(model, [STAR], ["circle"], {}, 0)
    assert found["circle"][1].captions == ("a circle",)
    told = method._retained(model, [STAR], ["circle", "square"], {}, 0)
    assert told["circle"][1].captions == ("a circle", "a square beside a circle")


@pytest.mark.parametrize("kill", [1, 3])
def test_a_killed_run_resumes_bit_for_bit(tmp_path, kill):
    """Killed after the mask and in training."""
    several = [STAR, Concept("square", anchor="circle")]
    whole = SalUn(**QUICK).erase(tiny_diffusion(), several, data=DATA, seed=4)
    with pytest.raises(Killed), writing(kill_at=kill):
        SalUn(**QUICK).erase(tiny_diffusion(), several, data=DATA, seed=4, run=tmp_path)
    again = SalUn(**QUICK).erase(tiny_diffusion(), several, data=DATA, seed=4, run=tmp_path)
    assert again.digest == whole.digest
    short = SalUn(**{**QUICK, "steps": 2}).erase(tiny_diffusion(), several, data=DATA, seed=4)
    assert short.manifest.tensors_digest != whole.manifest.tensors_digest


@pytest.mark.parametrize("layout", ["pixart", "sd3"])
def test_transformers_and_flow_matching(layout):
    model = tiny_layout(layout)
    # At first use transformers hangs hooks of its own into text encoders.
    model.encode(["a star"])
    before = bench.trace(model)
    edit = SalUn(**QUICK, layers="xattn").erase(model, STAR)
    assert bench.trace(model) == before
    names = {n for n, _ in trainable(model, "cross-attention")}
    assert {t.name for t in edit.manifest.targets} <= names
