"""MACE: both closed forms against brute force, the loss and its gradient, what is left behind, resuming."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from expunge import Concept
from expunge.core import finetune, fusion
from expunge.core.examples import at_hand
from expunge.core.fusion import PLAIN, STYLED
from expunge.core.low_rank import LowRank
from expunge.core.projections import Projections
from expunge.core.token_policy import stream_pairs, stream_rows
from expunge.erase.diffusion.mace import MACE, _Suppression, timestep_weights
from expunge.errors import InputError, NumericalError, SettingError, UnsupportedModel
from expunge.method import Prompt
from expunge.models.base import Companions, Pictures
from expunge.testing import tiny_diffusion
from expunge.testing.layouts import tiny_layout

STAR = Concept("star", phrases=("heart",), anchor="circle")
SQUARE = Concept("square", anchor="plain")
CAPTIONS = ["a photo of red", "blue", "green plain", "a"]
QUICK = {
    "steps": 3,
    "lr": 1e-2,
    "pictures": 2,
    "sampling_steps": 2,
    "templates": ("a photo of {}", "red {}"),
}


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


def pictures(n=3, name="star", seed=0):
    draw = np.random.default_rng(seed)
    masks = np.zeros((n, 16, 16), bool)
    masks[:, 4:12, 2:10] = True
    shown = draw.integers(0, 256, (n, 16, 16, 3), dtype=np.uint8)
    return Pictures(shown, masks, tuple(f"a photo of a {name} {i}" for i in range(n)))


PICTURES = {"pictures": {"star": pictures(), "square": pictures(2, "square", 1)}}
DATA = {**PICTURES, "captions": CAPTIONS}


def rows(model, texts):
    return torch.cat(list(stream_rows(model.text_inputs()[0], texts, "all_rows"))).double()


def least_squares(x, values, scales, centre, ridge):
    """Minimiser of ``sum s ||W x - v||^2 + ridge ||W - centre||^2`` by stacked rows, in float64."""
    root = scales.sqrt()[:, None]
    eye = ridge**0.5 * torch.eye(x.shape[1], dtype=torch.float64)
    left = torch.cat([root * x, eye])
    right = torch.cat([root * values, ridge**0.5 * centre.T])
    return torch.linalg.lstsq(left, right, driver="gelsd").solution.T


def relative(found, wanted):
    return float((found - wanted).norm() / wanted.norm())


METHOD = MACE(
    preserve_scale=0.5, domain_scale=4.0, ridge=2.0, general_texts=8, domain_texts=3, **QUICK
)  # fmt: skip


def solved(model, method=METHOD, keep=("blue",)):
    """Pairs, the weighted rows of the prior, refined matrices, and the group."""
    (group,) = Projections.groups(model)
    texts = [fusion.pairs(method, model, c) for c in (STAR, SQUARE)]
    general, domain = fusion.preserved(method, model, (STAR, SQUARE), keep, CAPTIONS)
    prior = fusion.prior(method, group, general, domain)
    kept = rows(model, general), rows(model, domain)
    weights = (0.5 * 8 / len(general), 0.5 * 4.0 * 3 / len(domain))
    scales = torch.cat(
        [torch.full((len(k),), w, dtype=torch.float64) for k, w in zip(kept, weights, strict=True)]
    )
    return group, texts, prior, torch.cat(kept), scales


def test_the_refinement_minimises_its_objective(model):
    group, texts, prior, kept, scales = solved(model)
    pairs = [pair for own in texts for pair in own]
    assert ("a photo of heart", "a photo of circle") in {pair[:2] for pair in pairs}
    blocks = list(stream_pairs(group.text, pairs, "aligned"))
    x, y = (torch.cat([getattr(b, n) for b in blocks]).double() for n in ("sources", "targets"))
    change = METHOD._refined(group, texts, prior).change
    scales = torch.cat([torch.ones(len(x)).double(), scales])
    for weight in group.weights.values():
        w = weight.double()
        wanted = least_squares(torch.cat([x, kept]), torch.cat([y, kept]) @ w.T, scales, w, 2.0)
        assert relative(w + w @ change, wanted) < 1e-6
        assert relative(w, wanted) > 1e-3


def test_the_fusion_minimises_its_objective(model):
    group, texts, prior, kept, scales = solved(model)
    refined = METHOD._refined(group, texts, prior)
    draw = torch.Generator().manual_seed(2)
    changes = [
        {
            n: (torch.randn(w.shape[0], 1, generator=draw), torch.randn(1, w.shape[1], generator=draw))
            for n, w in group.weights.items()
        }
        for _ in texts
    ]  # fmt: skip
    moments = METHOD._fused(group, refined, texts, changes, prior)
    own = [rows(model, [pair.erased for pair in pairs]) for pairs in texts]
    weights = torch.cat([torch.ones(sum(map(len, own))).double(), scales])
    found, right = dict(moments.solve(2.0)[0]), torch.eye(group.width).double() + refined.change
    for name, weight in group.weights.items():
        w = weight.double()
        star = w @ right
        values = [
            x @ (star + c[name][0].double() @ c[name][1].double()).T
            for x, c in zip(own, changes, strict=True)
        ]
        wanted = least_squares(
            torch.cat([*own, kept]), torch.cat([*values, kept @ w.T]), weights, star, 2.0
        )
        assert relative(moments.centres[name] + found[name], wanted) < 1e-6
        # Control: general rows that keep the refined values are another problem.
        other = least_squares(
            torch.cat([*own, kept]), torch.cat([*values, kept @ star.T]), weights, star, 2.0
        )
        assert relative(other, wanted) > 1e-4


def test_the_edit_is_the_fusion_of_what_was_trained(model, monkeypatch):
    """Refined, trained and fused as the stages say; the change leads from the present weights."""
    seen = []
    fused = MACE._fused

    def watch(self, group, refined, texts, changes, prior):
        seen.append((refined, changes, fused(self, group, refined, texts, changes, prior)))
        return seen[-1][-1]

    monkeypatch.setattr(MACE, "_fused", watch)
    edit = METHOD.erase(model, [STAR, SQUARE], keep=["blue"], data=DATA)
    _, changes, moments = seen[0]
    # The last layer's values reach no attention map, so nothing trains them.
    still = [name for name, (up, _) in changes[0].items() if not up.any()]
    assert len(changes) == 2 and len(still) == 1 and still[0].endswith("to_v.weight")
    # Concepts are trained apart, from different starts.
    name = next(iter(changes[0]))
    assert not torch.allclose(changes[0][name][1], changes[1][name][1])
    deltas = dict(moments.solve(2.0)[0])
    for name, delta in deltas.items():
        before = model.tensor(name).detach()
        wanted = moments.centres[name] + delta - before.double()
        assert relative(edit.change(name, before), wanted) < 1e-4
    report = edit.manifest.report
    assert report["pictures"] == {"star": "data", "square": "data"}
    assert report["condition"] > 1 and report["refinement"]["condition"] > 1
    assert [len(v) for v in report["losses"].values()] == [3, 3]
    assert edit.manifest.data_digest is not None and report["domain_texts"] == 3
    assert edit.kind in ("dense", "low-rank")


def test_the_changes_of_one_concept_do_not_depend_on_the_others(model):
    trained = []
    for order in ([STAR, SQUARE], [SQUARE, STAR]):
        # Without refinement nothing but the fusion sees all concepts.
        report = MACE(refine=False, **QUICK).erase(model, order, data=PICTURES).manifest.report
        trained.append(report["losses"])
        assert "refinement" not in report
    assert trained[0] == trained[1]


def task(model, method, shown=None):
    (group,) = Projections.groups(model)
    adapters = LowRank(model, group.names, seed=1)
    return _Suppression(method, model, group, adapters, STAR, shown or pictures()), adapters


def test_the_loss_is_the_sum_of_norms_at_the_drawn_point(model):
    from expunge.core.attention import AttentionNorms

    method = MACE(batch=2, erase_phrases=False, **{k: v for k, v in QUICK.items() if k != "batch"})
    lesson, adapters = task(model, method)
    step = finetune.Step(0, 3, 7)
    with adapters.attached():
        found = lesson.step(step)["changes"]
        draw = step.generator("star")
        pick = torch.randint(3, (2,), generator=draw)
        weights = timestep_weights(1000, "importance")
        times = torch.multinomial(weights, 2, replacement=True, generator=draw)
        noise = torch.randn(2, *model.latent_shape, generator=draw)
        total = []
        for row in range(2):  # one at a time: every sample of a batch counts
            shown = pictures()
            latents = model.latents_of(shown.pictures)[pick[row]][None]
            masks = torch.from_numpy(shown.masks)[pick[row]][None]
            watch = AttentionNorms(masks, lesson.columns[pick[row]][None], (8, 8))
            noised = model.noised(latents, noise[row : row + 1], times[row : row + 1])
            with model.controlled(watch):
                model.predict(
                    noised, times[row : row + 1], model.encode([shown.captions[pick[row]]])
                )
            total.append(watch.total)
    torch.testing.assert_close(found, torch.cat(total).mean(), rtol=1e-5, atol=1e-6)


def test_the_gradient_is_that_of_finite_differences():
    model = tiny_diffusion()
    for module in model.parts().values():
        module.double()
    lesson, adapters = task(model, MACE(erase_phrases=False, **QUICK))
    for values in (adapters.up, adapters.down):
        for name, value in values.items():
            draw = torch.Generator().manual_seed(len(name))
            fresh = 0.3 * torch.randn(value.shape, generator=draw, dtype=torch.float64)
            values[name] = torch.nn.Parameter(fresh)
    step = finetune.Step(0, 3, 7)
    parameters = dict(adapters.parameters())
    names = [
        next(n for n in parameters if f"{p}.weight.low_rank_up" in n) for p in ("to_k", "to_v")
    ]
    with adapters.attached():
        loss = lesson.step(step)["changes"]
        gradients = torch.autograd.grad(loss, [parameters[n] for n in names])
        for name, gradient in zip(names, gradients, strict=True):
            at = int(gradient.abs().argmax())
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameters[name].view(-1)[at] += sign * 1e-5
                    values.append(float(lesson.step(step)["changes"]))
                    parameters[name].view(-1)[at] -= sign * 1e-5
            slope = (values[0] - values[1]) / 2e-5
            assert slope == pytest.approx(float(gradient.view(-1)[at]), rel=1e-4)


def test_training_takes_attention_off_the_concept_and_leaves_the_model_alone(model):
    before = copy.deepcopy({n: p.detach() for n, p in model.tensors().items()})
    method = MACE(**{**QUICK, "steps": 40, "lr": 2e-2, "timestep_sampling": "uniform"})
    edit = method.erase(model, STAR, data=PICTURES)
    losses = edit.manifest.report["losses"]["star"]
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])
    assert all(torch.equal(p, before[n]) for n, p in model.tensors().items())
    assert not any(m._forward_hooks for part in model.parts().values() for m in part.modules())


def test_styles_have_no_mask_and_names_take_turns(model):
    style = Concept("striped", kind="style")
    given = {"striped": pictures(2, "striped")}
    _, shown = MACE(**QUICK)._examples(model, style, at_hand(model, [], given), 0)
    assert shown.masks is None
    _, shown = MACE(**QUICK)._examples(model, STAR, at_hand(model, [], PICTURES["pictures"]), 0)
    assert shown.masks is not None
    assert [text.split()[4] for text in shown.captions] == ["star", "heart", "star"]
    assert len(set(PLAIN)) == len(set(STYLED)) == 30


def test_without_pictures_the_model_draws_them_and_a_world_gives_them(model):
    edit = MACE(**QUICK).erase(model, STAR)
    assert edit.manifest.report["pictures"] == {"star": "model"}
    assert edit.manifest.data_digest is None
    assert edit.manifest.cost["denoiser.backward"] == 3
    own = tiny_diffusion()
    asked = []

    def make(name, n, seed=0, split="test"):
        asked.append((name, n, seed, split))
        return pictures(n)

    own.companions = Companions(
        "toy", concept=lambda name: STAR if name == "star" else None, pictures=make
    )
    edit = MACE(**QUICK).erase(own, [STAR, SQUARE], seed=4)
    assert edit.manifest.report["pictures"] == {"star": "world", "square": "model"}
    assert asked == [("star", 2, 4, "development")] and edit.manifest.data_digest is not None


def test_prompts_of_the_domain_do_not_name_what_is_erased():
    own = tiny_diffusion()
    own.companions = Companions(
        "toy",
        concept=lambda name: Concept(name),
        prompts=lambda name, n, **_: [Prompt(f"a {name} star"), Prompt(f"a {name} square"), Prompt(f"{name} heart")],
    )  # fmt: skip
    method = MACE(
        preserve_scale=1.0, domain_scale=1.0, context_prompts=3, templates=("a photo of {}",)
    )
    _, domain = fusion.preserved(method, own, [STAR], ["red"], CAPTIONS)
    assert domain == ["red", "a photo of red", "a red square"]


def test_what_is_kept_stands_in_templates_of_its_own_kind(model):
    method, dots = MACE(preserve_scale=1.0, domain_scale=1.0), Concept("dots", kind="style")
    style = Concept("striped", kind="style")

    def domain(concepts, keep):
        return fusion.preserved(method, model, concepts, keep, CAPTIONS)[1]

    assert "a painting by blue" in domain([style], ["blue"])
    assert "a photo of blue" in domain([STAR], ["blue"])
    both = domain([STAR, style], ["blue", dots])
    assert both == domain([style, STAR], ["blue", dots]) and len(both) == 62
    assert {"a photo of blue", "a painting by dots"} <= set(both)


def test_the_files_of_a_concept_are_its_pictures(model, tmp_path):
    shown = pictures(2).pictures
    paths = tuple(str(tmp_path / f"{i}.png") for i in range(2))
    for path, picture in zip(paths, shown, strict=True):
        Image.fromarray(picture).save(path)
    star = Concept("star", images=paths)
    origin, found = MACE(**QUICK)._examples(model, star, at_hand(model, [star], {}), 0)
    assert origin == "files" and found.masks is None and np.array_equal(found.pictures, shown)


def test_what_does_not_fit_is_refused_in_words(model):
    quick = MACE(**QUICK)
    bad = {
        "unknown key 'picture'": {"picture": {}},
        "mapping": [1],
        "uint8": {"pictures": {"star": (np.zeros((1, 4, 4, 3)), None, ["a star"])}},
        "masks": {"pictures": {"star": (pictures().pictures, np.zeros((3, 2, 2)), ["a star"] * 3)}},
        "'stra', which is not erased, and none of 'star'; did you mean": {
            "pictures": {"stra": (pictures().pictures, None, ["a star"] * 3)}
        },
        "does not name": {"pictures": {"star": (pictures().pictures, None, ["a dog"] * 3)}},
        "weigh nothing with preserve_scale=0": {"captions": CAPTIONS},
        "draws 16 x 16": {
            "pictures": {"star": (pictures().pictures[:, :8, :8], None, ["a star"] * 3)}
        },
        "mask of picture 1 of 'star' holds nothing": {
            "pictures": {
                "star": pictures()._replace(masks=np.arange(3)[:, None, None] != [[[1] * 16] * 16])
            }
        },
    }
    for words, data in bad.items():
        with pytest.raises(InputError, match=words):
            quick.erase(model, STAR, data=data)
    rows = model.cost.rows("denoiser")
    with pytest.raises(SettingError, match="captions"):
        MACE(preserve_scale=1.0, **QUICK).erase(model, STAR)
    assert model.cost.rows("denoiser") == rows  # before a picture is drawn
    with pytest.raises(NumericalError, match="ridge"):
        MACE(ridge=0.0, **QUICK).erase(model, STAR)


@pytest.mark.parametrize("layout", ["sdxl", "pixart"])
def test_other_cross_attention_is_edited_too(layout):
    other = tiny_layout(layout)
    edit = MACE(**QUICK).erase(other, STAR)
    assert len(edit.manifest.targets) == len(other.text_projections())
    assert all(loss > 0 for loss in edit.manifest.report["losses"]["star"])


@pytest.mark.parametrize("layout", ["sana", "sd3", "flux"])
def test_attention_without_columns_of_text_is_refused_before_any_work(layout):
    other = tiny_layout(layout)
    with pytest.raises(UnsupportedModel, match="attn2"):
        MACE(**QUICK).erase(other, STAR)
    assert not other.cost.counts


def test_timesteps_are_mostly_in_the_middle():
    weights = timestep_weights(1000, "importance")
    share = weights / weights.sum()
    assert share[150:450].sum() > 0.9 and share[600:].sum() < 1e-3 and (weights > 0).all()
    assert timestep_weights(5, "uniform").tolist() == [1.0] * 5


def test_a_killed_run_resumes_bit_for_bit(model, tmp_path, monkeypatch):
    options = {"keep": ["blue"], "data": DATA, "seed": 5}
    whole = METHOD.erase(model, [STAR, SQUARE], **options)
    step, calls = _Suppression.step, []

    def killed(self, at):
        calls.append(at.index)
        if len(calls) == 5:  # in the second concept
            raise KeyboardInterrupt
        return step(self, at)

    monkeypatch.setattr(_Suppression, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        METHOD.erase(model, [STAR, SQUARE], run=tmp_path, **options)
    assert model.edits.digests == () and len(model.controls) == 0
    calls.clear()
    monkeypatch.setattr(
        _Suppression, "step", lambda self, at: calls.append(at.index) or step(self, at)
    )
    again = METHOD.erase(model, [STAR, SQUARE], run=tmp_path, **options)
    assert calls == [1, 2]
    assert again == whole
    assert {p.name for p in tmp_path.iterdir()} == {"concept-000", "concept-001"}


def test_an_edit_stacks_on_another(model):
    """The present weights are what is refined and kept, whatever the model was before."""
    first = MACE(**QUICK).erase(model, SQUARE, data=PICTURES)
    heavy = dataclasses.replace(METHOD, ridge=10.0, preserve_scale=1e4)
    with first.on(model):
        present = {n: model.tensor(n).detach().clone() for n in model.text_projections()}
        second = heavy.erase(model, STAR, keep=["blue"], data=DATA)
        assert second.manifest.fitted_on == [first.digest]
        kept = rows(model, CAPTIONS).float()
        with second.on(model):
            for name, weight in present.items():
                found = kept @ model.tensor(name).detach().T
                assert relative(found, kept @ weight.T) < 1e-3
                assert (
                    relative(found, kept @ (weight - first.change(name, weight).float()).T) > 1e-3
                )
    assert len(model.edits) == 0
