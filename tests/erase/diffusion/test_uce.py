"""UCE on a tiny random pipeline: what it promises of keys and values, options, and what stays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from expunge import Concept, Edit
from expunge.core.projections import registered_texts
from expunge.core.token_policy import POLICIES, stream_pairs, stream_rows
from expunge.erase.diffusion.uce import UCE
from expunge.errors import SettingError, UnsupportedModel
from expunge.method import Prompt
from expunge.models.base import Companions
from expunge.testing import tiny_diffusion

STAR = Concept("star", phrases=("red star",), anchor="circle")
STYLE = Concept("striped", kind="style")


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


def stacked(model) -> torch.Tensor:
    tensors = model.tensors()
    return torch.cat([tensors[name].detach().double() for name in model.text_projections()])


def rows(model, text, policy="last_token"):
    return torch.cat(list(stream_rows(model.text_inputs()[0], [text], policy))).double()


def off(new, old, source, target) -> float:
    """Distance of the edited values of ``source`` from the old values of ``target``."""
    wanted = target @ old.T
    return float((source @ new.T - wanted).norm() / wanted.norm())


def official(model, pairs, kept, a, b, ridge):
    """The published solution written out for each matrix, phrase by phrase, in float32."""
    edited = []
    for name in model.text_projections():
        w = model.tensors()[name].detach()
        left, right = ridge * w.clone(), ridge * torch.eye(w.shape[1])
        for block in stream_pairs(model.text_inputs()[0], pairs, "last_token"):
            for c, g in zip(block.sources, block.targets, strict=True):
                left += a * torch.outer(w @ g, c)
                right += a * torch.outer(c, c)
        for p in (
            torch.cat(list(stream_rows(model.text_inputs()[0], kept, "last_token"))) if kept else ()
        ):
            left += b * torch.outer(w @ p, p)
            right += b * torch.outer(p, p)
        edited.append(left @ torch.inverse(right))
    return torch.cat(edited).double()


def test_the_edit_is_that_of_the_published_procedure(model):
    old = stacked(model)
    edit = UCE(preserve_scale=0.7).erase(model, [STAR, STYLE], keep=["heart", Concept("square")])
    pairs = [("star", "circle"), ("red star", "circle"), ("striped", "art")]
    wanted = official(model, pairs, ["heart", "square"], 1.0, 0.7, 0.5)
    with edit.on(model):
        found = stacked(model)
    assert float((found - wanted).norm() / (wanted - old).norm()) < 1e-3
    assert torch.equal(stacked(model), old)
    other = official(model, pairs[:1], ["heart", "square"], 1.0, 0.7, 0.5)
    assert float((found - other).norm() / (wanted - old).norm()) > 0.1  # control: one concept less


def test_a_small_ridge_gives_the_guide_its_place_and_hardly_moves_the_rest(model):
    old = stacked(model)
    c, g, kept = rows(model, "star"), rows(model, "circle"), rows(model, "heart")
    assert off(old, old, c, g) > 0.05
    star = Concept("star", anchor="circle")
    with UCE(ridge=1e-4).erase(model, star, keep=["heart"]).on(model):
        new = stacked(model)
        assert off(new, old, c, g) < 1e-3
        assert off(new, old, kept, kept) < 1e-3
    with UCE(ridge=1e4).erase(model, star, keep=["heart"]).on(model):
        assert off(stacked(model), old, c, g) > 0.9 * off(old, old, c, g)


def test_the_guide_is_the_setting_then_the_anchor_then_by_kind(model):
    digest = lambda edit: edit.manifest.tensors_digest  # noqa: E731
    plain = Concept("star")
    assert digest(UCE(guide="circle").erase(model, plain)) == digest(
        UCE().erase(model, Concept("star", anchor="circle"))
    )
    assert digest(UCE(guide="").erase(model, Concept("star", anchor="circle"))) == digest(
        UCE().erase(model, plain)
    )
    style = Concept("star", kind="style")
    assert digest(UCE().erase(model, style)) == digest(UCE(guide="art").erase(model, style))
    assert digest(UCE().erase(model, style)) != digest(UCE(guide="").erase(model, style))
    with pytest.raises(SettingError, match="'art' is 'Art' itself"):
        UCE().erase(model, Concept("Art", kind="style"))


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_makes_an_exact_edit_that_survives_saving(model, policy, tmp_path):
    edit = UCE(tokens=policy).erase(model, STAR, keep=["heart"])
    report = edit.manifest.report
    assert edit.kind == "shared-low-rank" and report["token_policy"] == policy
    assert report["rank"] <= report["erase_rows"] and report["factor_error"] < 1e-6
    assert 0 < report["relative_change"] < 10 and report["condition"] > 1
    assert set(report["layers"]) == set(model.text_projections())
    edit.save(tmp_path / "e.safetensors")
    again = Edit.load(tmp_path / "e.safetensors")
    with edit.on(model):
        one = stacked(model)
    with again.on(model):
        assert torch.equal(stacked(model), one)


def test_the_2023_form_keeps_the_empty_prompt_and_weighs_what_is_kept(model):
    edit = UCE.configured("2023").erase(model, STAR)
    assert edit.manifest.report["preserve_scale"] == 1.0 and edit.manifest.report["kept"] == 1
    many = UCE.configured("2023").erase(model, STAR, keep=["heart", "square"])
    assert many.manifest.report["preserve_scale"] == 0.333
    assert UCE().erase(model, STAR, keep=["heart"]).manifest.report["preserve_scale"] == 1.0
    empty = rows(model, "", "all_rows")
    old = stacked(model)
    with edit.on(model):
        held = off(stacked(model), old, empty, empty)
    with UCE.configured("2023", preserve_scale=0.0).erase(model, STAR).on(model):
        loose = off(stacked(model), old, empty, empty)
    assert held < 0.7 * loose
    assert edit.manifest.report["empty_prompt_change"] == pytest.approx(held, rel=0.05)


@pytest.mark.parametrize(
    ("kind", "guide"), [("object", ""), ("style", "art"), ("unsafe", "")]
)  # fmt: skip
def test_presets_are_those_of_the_paper(model, kind, guide):
    made = UCE.configured(f"paper:{kind}")
    assert UCE.preset_for(kind) == f"paper:{kind}"
    assert (made.erase_scale, made.preserve_scale, made.ridge) == (1.0, None, 0.5)
    assert (made.tokens, made.technique, made.expand_prompts) == ("last_token", "replace", False)
    concept = Concept("star", kind=kind)
    one, two = made.erase(model, concept), UCE(guide=guide).erase(model, concept)
    assert one.manifest.tensors_digest == two.manifest.tensors_digest
    assert one.manifest.report["preserve_scale"] == 1.0
    debias = (made.pictures, made.sampling_steps, made.rounds, made.tolerance)
    assert debias == (10, 20, 30, 0.05)


def test_phrases_and_templates_are_erased_too(model):
    count = lambda method, c=STAR: method.erase(model, c).manifest.report["pairs"]  # noqa: E731
    assert count(UCE()) == 2 and count(UCE(erase_phrases=False)) == 1
    assert count(UCE(expand_prompts=True)) == 12
    assert count(UCE(templates=("a photo of {}",))) == 4


def test_prompts_of_a_world_are_erased_in_context_and_general_ones_kept():
    def prompts(name, n, seed=0, split="test", route="name"):
        assert split == "development"  # an eraser never sees test prompts
        word = "red star" if route == "phrase" else name
        return [Prompt(f"a photo of a {word} {i}", seed=i) for i in range(n)]

    own = tiny_diffusion()

    def captions(n, seed=0, without=()):
        asked.append(without)
        return [f"a photo of a ring {i}" for i in range(n)]

    asked: list[tuple[str, ...]] = []
    own.companions = Companions(
        "toy",
        concept=lambda name: STAR,
        neighbours=lambda concept: ("moon", "cross"),
        unrelated=("heart",),
        prompts=prompts,
        captions=captions,
    )
    pairs, general = registered_texts(own, [STAR], None, 2, 3, told=["Moon"])
    # What an audit measures as kept is not given away, except what the eraser was told to keep.
    assert asked == [("star", "cross", "heart")]
    assert pairs[:2] == [
        (f"a photo of a star {i}", f"a photo of a circle {i}", "star") for i in range(2)
    ]
    assert len(pairs) == 4 and all("star" not in pair.replacing for pair in pairs)
    assert general == [f"a photo of a ring {i}" for i in range(3)]
    report = UCE(context_prompts=2, general_prompts=3).erase(own, STAR).manifest.report
    assert report["pairs"] == 6 and report["kept"] == 3 and report["drift"] > 0
    assert registered_texts(tiny_diffusion(), [STAR], None, 2, 3) == ([], [])


def test_tensor_removes_the_direction_of_the_concept(model):
    old = stacked(model)
    c, g = rows(model, "star"), rows(model, "circle")
    edit = UCE(technique="tensor", ridge=1e-4).erase(model, Concept("star", anchor="circle"))
    with edit.on(model):
        tensors = {n: model.tensors()[n].detach().double() for n in model.text_projections()}
        new = {name: c @ w.T for name, w in tensors.items()}
    assert torch.equal(stacked(model), old)
    for name, found in new.items():
        w = model.tensors()[name].detach().double()
        unit = c @ w.T / (c @ w.T).norm()
        wanted = g @ w.T - (unit * (g @ w.T)).sum() * unit
        assert float((found - wanted).norm() / wanted.norm()) < 0.01
        assert abs(float((unit * found).sum())) < 1e-2 * float((g @ w.T).norm())
    assert edit.kind in ("low-rank", "dense") and edit.manifest.report["rank"] == 1


def test_many_concepts_are_one_solve_and_a_stacked_edit_starts_from_the_present_weights(model):
    several = UCE(ridge=1e-4).erase(
        model, [Concept("star", anchor="circle"), Concept("heart", anchor="square")]
    )
    old = stacked(model)
    with several.on(model):
        new = stacked(model)
        for name, guide in (("star", "circle"), ("heart", "square")):
            assert off(new, old, rows(model, name), rows(model, guide)) < 1e-2
        second = UCE(ridge=1e-4).erase(model, Concept("blue", anchor="red"))
        assert second.manifest.fitted_on == [several.digest]
        with second.on(model):
            assert off(stacked(model), new, rows(model, "blue"), rows(model, "red")) < 1e-2
    assert torch.equal(stacked(model), old)


def test_half_precision_models_are_edited(model):
    half = tiny_diffusion(dtype=torch.float16)
    with UCE(ridge=0.01).erase(half, Concept("star", anchor="circle")).on(half):
        new = stacked(half)
    with UCE(ridge=0.01).erase(model, Concept("star", anchor="circle")).on(model):
        full = stacked(model)
    old = stacked(model)
    assert float((new - full).norm() / (full - old).norm()) < 0.05


def test_pictures_change_with_the_edit_and_come_back_without_it(model):
    before = model.generate(["a star"], seeds=[3])
    edit = UCE.configured("2023", ridge=0.01).erase(model, STAR)
    with edit.on(model):
        assert not np.array_equal(model.generate(["a star"], seeds=[3]), before)
    assert np.array_equal(model.generate(["a star"], seeds=[3]), before)


def test_bad_settings_and_families_are_refused(model):
    with pytest.raises(SettingError, match="last_token"):
        UCE(tokens="last")
    with pytest.raises(SettingError):
        UCE(ridge=-1)

    class Other:
        family, name = "language", "tiny"
        check_family = type(model).check_family

    with pytest.raises(UnsupportedModel, match="diffusion"):
        UCE().erase(Other(), STAR)
