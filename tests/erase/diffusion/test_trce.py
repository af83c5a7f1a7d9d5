"""TRCE on a tiny random pipeline: the closed form, the hinge, what trains against what, and what stays."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch

from expunge import Concept
from expunge.core.projections import Projections
from expunge.core.token_policy import Pair, stream_pairs
from expunge.erase.diffusion import trce
from expunge.erase.diffusion.trce import TRCE, _Contrast, hinge, moments, trainable
from expunge.errors import InputError, NumericalError, SettingError, UnsupportedModel
from expunge.testing import tiny_diffusion
from expunge.testing.bench import trace
from expunge.testing.layouts import tiny_layout

STAR = Concept("star", "unsafe", phrases=("red star",), anchor="circle")
HEART = Concept("heart", anchor="square")
CAPTIONS = [
    f"{a} {b} {c}"
    for a in ("a red", "blue", "photo of a", "green")
    for b in ("striped", "plain", "zigzag")
    for c in ("circle", "square", "q")
]
QUICK = {"steps": 4, "sampling_steps": 4, "keep_batch": 2, "bank": 3, "lr": 1e-3}


@pytest.fixture(scope="module")
def model():
    made = tiny_diffusion()
    # Rows of a fresh layer norm have mean zero, so that their moments would be singular.
    norm = next(p for n, p in made.tensors().items() if n.endswith("final_layer_norm.bias"))
    with torch.no_grad():
        norm.copy_(torch.linspace(-1, 1, len(norm)).square())
    return made


def edit_of(method, model, concepts=STAR, data=CAPTIONS, **more):
    return method.erase(model, concepts, data=data, **more)


# -- stage 1 ---------------------------------------------------------------------------------------


def places(model, pair):
    """(weight group, row of the unsafe prompt, row of its replacement), found by hand in the token ids."""
    tokenizer = model.tokenizer
    old, new = model.token_ids(list(pair[:2])).tolist()
    ends = [ids.index(tokenizer.eos_token_id) for ids in (old, new)]
    word = tokenizer(pair.keyword, add_special_tokens=False).input_ids
    last = len(old) - 1
    found = [(0, 0, 0), (1, ends[0], ends[1]), *[(2, last, last)] * (last - ends[0])]
    for start in range(len(old) - len(word) + 1):
        if old[start : start + len(word)] == word:
            found += [(3, start + i, last) for i in range(len(word))]
    return found


def brute_force(model, pairs, general, own, weights, eta, ridge):
    """The minimiser of the whole objective for all matrices stacked, by least squares over single rows."""
    old = torch.cat([model.tensors()[n].detach().double() for n in model.text_projections()])
    rows, values = [], []
    for pair in pairs:
        unsafe, safe = model.encode(list(pair[:2])).embeddings.double()
        for group, i, k in places(model, pair):
            scale = (weights[group] / len(pairs)) ** 0.5
            rows.append(scale * unsafe[i])
            values.append(scale * old @ safe[k])
    for texts in (general, own):
        for text in texts:
            for row in model.encode([text]).embeddings[0].double():
                rows.append((eta / len(texts)) ** 0.5 * row)
                values.append(old @ rows[-1])
    width = old.shape[1]
    rows += list(ridge**0.5 * torch.eye(width, dtype=torch.float64))
    values += list(ridge**0.5 * old.T)
    return old, torch.linalg.lstsq(torch.stack(rows), torch.stack(values), driver="gelsd")[0].T


@pytest.mark.parametrize(
    "weights",
    [(0, 1, 0, 0), (1, 0, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 1, 1, 0), (0.5, 2, 0.1, 0.3)],
)
@pytest.mark.parametrize("ridge", [0.0, 0.05])
def test_stage_one_is_the_minimiser_for_every_choice_of_rows(model, weights, ridge):
    # "hazard" is several tokens: the end of text is not where words are counted.
    pairs = [
        Pair("a photo of star", "a photo of circle", "star"),
        Pair("a hazard", "a plain yellow square", "hazard"),
        Pair("red star", "circle", "red star"),
    ]
    own = [pair.replacing for pair in pairs]
    old, wanted = brute_force(model, pairs, CAPTIONS, own, weights, 0.3, ridge)
    (group,) = Projections.groups(model)
    found = moments(group.text, pairs, CAPTIONS, own, token_weights=weights, eta=0.3)
    change = found.solve(ridge).change
    assert float((old + old @ change - wanted).norm() / wanted.norm()) < 1e-6
    if weights != (
        1,
        0,
        0,
        0,
    ):  # the start row is the same in both prompts, so that group moves nothing
        assert float((wanted - old).norm() / old.norm()) > 1e-3
        assert float((old @ change - (wanted - old)).norm() / (wanted - old).norm()) < 1e-6


def test_the_first_end_of_text_goes_where_that_of_the_safe_prompt_was(model):
    old = {n: model.tensors()[n].detach().double().clone() for n in model.text_projections()}
    pairs = [("a photo of star", "a photo of circle"), ("heart", "square")]
    (block,) = stream_pairs(model.text_inputs()[0], pairs, "eot_only")
    c, g = block.sources.double(), block.targets.double()
    method = TRCE(stage2=False, eta=1e-6, templates=("a photo of {}",), erase_phrases=False)
    with edit_of(method, model, [STAR, HEART]).on(model):
        for name, before in old.items():
            wanted = g @ before.T
            found = c @ model.tensors()[name].detach().double().T
            assert float((found - wanted).norm() / wanted.norm()) < 1e-2
            assert float((c @ before.T - wanted).norm() / wanted.norm()) > 5e-2


def test_safe_prompts_and_what_is_kept_join_the_preserved_texts(model):
    report = edit_of(TRCE(stage2=False), model, keep=[HEART, "blue"]).manifest.report
    # Two names, in themselves and in every template; one safe word and two kept ones the same way.
    forms = 1 + len(trce.TEMPLATES)
    assert forms == 15
    assert (report["pairs"], report["own_texts"]) == (2 * forms, 3 * forms)
    assert report["general_texts"] == len(CAPTIONS)
    assert report["keep_rows"] == 16 * (len(CAPTIONS) + 3 * forms)
    assert report["erase_rows"] == 2 * forms


def test_a_safe_prompt_that_names_another_erased_concept_is_not_preserved(model):
    method, circle = TRCE(stage2=False), Concept("circle", anchor="square")
    forms = 1 + len(trce.TEMPLATES)
    # The star's safe word is the circle, which is erased as well: only what replaces the circle stays.
    report = edit_of(method, model, [STAR, circle]).manifest.report
    assert (report["pairs"], report["own_texts"]) == (3 * forms, forms)


def test_captions_come_as_texts_or_in_a_mapping_and_are_part_of_the_edit(model):
    one, two = (
        edit_of(TRCE(stage2=False), model, data=data) for data in (CAPTIONS, {"captions": CAPTIONS})
    )
    assert one == two and one.manifest.data_digest is not None
    assert edit_of(TRCE(stage2=False), model, data=CAPTIONS[:9]) != one
    with pytest.raises(InputError, match="captions"):
        edit_of(TRCE(stage2=False), model, data={"caption": CAPTIONS})
    with pytest.raises(InputError, match="reads no 'pictures'"):
        edit_of(TRCE(stage2=False), model, data={"captions": CAPTIONS, "pictures": {}})


def test_without_captions_a_ridge_takes_their_place_and_says_so(model):
    with pytest.warns(UserWarning, match="general captions"):
        edit = edit_of(TRCE(stage2=False), model, data=None)
    assert edit.manifest.report["general_texts"] == 0
    assert 0 < edit.manifest.report["ridge_share"] < 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        edit_of(TRCE(stage2=False, ridge=0.1), model, data=None)
        edit_of(TRCE(stage2=False), model)
    for method, singular in (
        (TRCE(stage2=False, eta=0.0), model),
        (TRCE(stage2=False), tiny_diffusion()),
    ):
        with pytest.raises(NumericalError, match="ridge"):
            edit_of(method, singular)


# -- stage 2 ---------------------------------------------------------------------------------------


def test_the_hinge_by_hand():
    made = torch.tensor([[1.0, 1.0], [0.0, 3.0], [2.0, 2.0]]).reshape(3, 1, 1, 2)
    safe, unsafe = torch.zeros(3, 1, 1, 2), torch.full((3, 1, 1, 2), 2.0)
    # mse to safe: 1, 4.5, 4; to unsafe: 1, 2.5, 0.
    assert hinge(made, safe, unsafe, 1.0, 0.01).tolist() == pytest.approx([0.01, 2.01, 4.01])
    assert hinge(made, safe, unsafe, 0.5, -0.5).tolist() == pytest.approx([0.0, 0.75, 1.75])
    assert hinge(unsafe - 2, unsafe - 2, unsafe, 1.0, 0.01).tolist() == [0.0, 0.0, 0.0]


def test_gradients_of_the_hinge_agree_with_finite_differences():
    draw = torch.Generator().manual_seed(1)
    made, safe, unsafe = torch.randn(3, 4, 2, 3, 3, generator=draw, dtype=torch.float64)
    made[0] = safe[0] + 0.1  # rests
    loss = lambda p: hinge(p, safe, unsafe, 2.0, 0.3)  # noqa: E731
    assert 0 < int((loss(made) > 0).sum()) < 4
    assert torch.autograd.gradcheck(loss, made.clone().requires_grad_())


def test_only_visual_attention_trains(model):
    names = [name for name, _ in trainable(model)]
    inside = [n for n in model.tensors() if ".attn1." in n or ".attn2." in n]
    rest = {n for n in inside if n not in names}
    assert {n.split(".attn2.")[1].split(".")[0] for n in rest} == {"to_k", "to_v", "to_out"}
    assert sum(".attn1.to_out" in n for n in names) and sum("attn2.to_q" in n for n in names)
    edit = edit_of(TRCE(stage1=False, **QUICK), model)
    assert {t.name for t in edit.manifest.targets} <= set(names)
    both = edit_of(TRCE(**QUICK), model)
    assert {t.name for t in both.manifest.targets} == {*names, *model.text_projections()}


def test_both_stages_hold_the_matrices_of_the_first(model):
    first, both = edit_of(TRCE(stage2=False), model), edit_of(TRCE(**QUICK), model)
    for name in model.text_projections():
        weight = model.tensors()[name]
        torch.testing.assert_close(
            both.change(name, weight), first.change(name, weight), atol=1e-6, rtol=1e-5
        )
    assert both.manifest.fitted_on == [] and both.kind in ("dense", "low-rank")
    assert both.manifest.report["pairs"] == first.manifest.report["pairs"]
    assert len(both.manifest.report["losses"]["attention"]) == 4


def contrast(model, **settings):
    return _Contrast(TRCE(**{**QUICK, **settings}), model, [Pair("a star", "a circle", "star")], 0)


def said(model, points, text):
    with torch.no_grad():
        condition = model.encode([text]).repeat(len(points.which))
        return model.predict(points.latents, points.timesteps, condition).epsilon(points.latents)


def test_the_teacher_is_the_model_before_stage_one(model):
    stage = edit_of(TRCE(stage2=False), model)
    task = contrast(model)
    none = said(model, task.points, "")
    for target, text in ((task.safe, "a circle"), (task.unsafe, "a star")):
        own = said(model, task.points, text)
        torch.testing.assert_close(target, own + 15 * (own - none), atol=1e-4, rtol=1e-4)
    with stage.on(model):
        task.prepare()
        torch.testing.assert_close(task.held, said(model, task.still, ""), atol=1e-5, rtol=1e-4)
        other = said(model, task.points, "a star")
    assert not torch.allclose(other, said(model, task.points, "a star"), atol=1e-3)
    assert not torch.allclose(task.held, said(model, task.still, ""), atol=1e-5)


def test_erase_asks_the_teacher_before_and_trains_after_the_edit_is_on(model, monkeypatch):
    seen = []
    for name in ("__init__", "prepare", "step"):
        real = getattr(_Contrast, name)

        def watched(self, *args, _name=name, _real=real):
            seen.append((_name, len(model.edits)))
            return _real(self, *args)

        monkeypatch.setattr(_Contrast, name, watched)
    edit_of(TRCE(**QUICK), model)
    assert seen == [("__init__", 0), ("prepare", 1), *[("step", 1)] * 4]
    assert len(model.edits) == 0


def test_unsafe_points_are_early_and_kept_points_anywhere(model):
    times = model.timesteps(4)
    task = contrast(model, bank=40)
    assert set(task.points.timesteps.tolist()) == set(times[:3].tolist())
    assert set(task.still.timesteps.tolist()) == set(times.tolist())
    assert len(task.still.which) == 80
    late = contrast(model, bank=10, early=0.0)
    assert set(late.points.timesteps.tolist()) == {int(times[0])}


def test_the_first_loss_is_that_of_the_hinges_and_rows_are_counted(model):
    task = contrast(model, steps=1, bank=2, batch=2)
    torch.testing.assert_close(task.points.which, torch.zeros(2, dtype=torch.long))
    parts = [
        hinge(said(model, task.points, text), task.safe, task.unsafe, 1.0, 0.01).mean()
        for text in ("a star", "")
    ]
    concept = Concept("star", anchor="circle")
    method = TRCE(**{**QUICK, "steps": 1, "bank": 2, "batch": 2, "subject": "a {}"}, stage1=False)
    edit = edit_of(method, model, concept)
    # The student starts where eps1 is, so that the other half of the loss is zero.
    assert edit.manifest.report["losses"]["attention"][0] == pytest.approx(
        float(sum(parts)) / 2, rel=1e-4
    )
    assert edit.manifest.cost["denoiser.backward"] == 2 * 2 + 2 * 2


def test_training_pushes_to_the_safe_side(model):
    method = TRCE(**{**QUICK, "steps": 60, "lr": 5e-3, "keep_scale": 1.0}, stage1=False)
    losses = edit_of(method, model).manifest.report["losses"]["attention"]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_a_killed_run_resumes_bit_for_bit(model, monkeypatch, tmp_path):
    method, before = TRCE(**QUICK), trace(model)
    whole = edit_of(method, model, [STAR, HEART], seed=5)
    real = _Contrast.step

    def killed(self, step):
        if step.index == 2:
            raise KeyboardInterrupt
        return real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(_Contrast, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            edit_of(method, model, [STAR, HEART], seed=5, run=tmp_path)
    assert trace(model) == before
    resumed = edit_of(method, model, [STAR, HEART], seed=5, run=tmp_path)
    assert resumed.manifest.report["resumed_at"] == 2
    assert resumed == whole and trace(model) == before
    assert edit_of(method, model, [STAR, HEART], seed=6) != whole


def test_stacked_on_another_edit_the_teacher_is_what_stands_there(model):
    earlier = edit_of(TRCE(stage2=False), model, HEART)
    with earlier.on(model):
        inside = edit_of(TRCE(**QUICK), model)
        assert inside.manifest.fitted_on == [earlier.digest]
        with inside.on(model):
            pass
        assert model.edits.digests == (earlier.digest,)
    assert inside != edit_of(TRCE(**QUICK), model)


# -- settings --------------------------------------------------------------------------------------


def test_a_bank_that_leaves_a_name_out_is_refused(model):
    many = [Concept(name, anchor="circle") for name in ("star", "heart", "square", "blue")]
    before = model.cost.snapshot()
    with pytest.raises(SettingError, match="bank=3 has no point for 1 of 4 names"):
        TRCE(**QUICK).erase(model, many, data=CAPTIONS)
    assert "denoiser.forward" not in model.cost.since(before)


def test_presets_and_settings(model):
    assert TRCE() == TRCE.configured("paper:unsafe") and TRCE().eta == 1e-4
    assert TRCE.configured("paper:themes").eta == pytest.approx(0.02**2)
    for wrong in (
        {"stage1": False, "stage2": False},
        {"token_weights": (0.0, 0.0, 0.0, 0.0)},
        {"token_weights": (1.0,)},
        {"eta": -1.0},
        {"early": 1.5},
    ):
        with pytest.raises(SettingError):
            TRCE(**wrong)


@pytest.mark.parametrize("layout", ["sd3", "flux"])
def test_stage_two_is_refused_where_text_and_pixels_attend_to_each_other(layout):
    other = tiny_layout(layout)
    with pytest.raises(UnsupportedModel, match="stage2=False"):
        edit_of(TRCE(**QUICK), other)
    edit = edit_of(TRCE(stage2=False, ridge=0.1), other)
    with edit.on(other), contextlib.suppress(ValueError):
        raise ValueError
    assert len(edit.manifest.targets) == len(other.text_projections())
