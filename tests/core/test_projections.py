"""What closed-form edits erase, with which keyword, and what their reports say of what moved."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from expunge import Concept
from expunge.core import fusion
from expunge.core.closed_form import Moments, ValueMoments
from expunge.core.concept_prompts import concept_prompts
from expunge.core.projections import (
    Projections,
    erased_pairs,
    per_layer_edit,
    registered_texts,
)
from expunge.core.token_policy import stream_pairs, stream_rows
from expunge.erase.diffusion.all_but_one import AllButOne
from expunge.erase.diffusion.co_erasing import CoErasing
from expunge.erase.diffusion.itd import ItD
from expunge.erase.diffusion.mace import MACE
from expunge.erase.diffusion.realera import RealEra
from expunge.erase.diffusion.rece import RECE
from expunge.erase.diffusion.sld import SLD
from expunge.erase.diffusion.trce import TRCE
from expunge.erase.diffusion.uce import UCE
from expunge.errors import ConceptError, SettingError
from expunge.method import Prompt
from expunge.models.base import Companions
from expunge.testing import tiny_diffusion

STAR = Concept("star", anchor="circle")


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


def test_every_pair_knows_its_name(model):
    concept = Concept("star", phrases=("red heart",), anchor="circle")
    pairs = erased_pairs([concept], None, phrases=True, expand=True, templates=("a plain {}",))
    assert len(pairs) == 14 and {pair.keyword for pair in pairs} == {"star", "red heart"}
    (block,) = stream_pairs(model.text_inputs()[0], pairs, "keyword_tokens")
    assert block.sizes == (1,) * 7 + (2,) * 7


@pytest.mark.parametrize("method", [UCE, RECE])
def test_templates_add_no_rows_of_their_own_words(model, method, monkeypatch):
    """Under keyword_tokens every template around "star" maps the one row of "star"."""
    seen, plain = [], Moments.erase

    def erase(moments, sources, *rest):
        seen.append(sources)
        plain(moments, sources, *rest)

    monkeypatch.setattr(Moments, "erase", erase)
    templates = ("a photo of a {}", "plain red {}")
    edit = method(tokens="keyword_tokens", templates=templates).erase(model, STAR)
    rows = model.encode(["star", "a photo of a star", "plain red star"]).embeddings
    wanted = torch.stack([rows[0, 1], rows[1, 5], rows[2, 3]])
    torch.testing.assert_close(seen[0], wanted, atol=1e-5, rtol=1e-5)
    assert edit.manifest.report["pairs"] == 3


NAMES = ["Yahoo!", "C++", "St.", "हिन्दी", "star"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("guide", ["circle", r"a\1b"])
def test_prompts_in_context_are_found_whatever_a_name_ends_in(name, guide):
    model = tiny_diffusion()
    concept = Concept(name, phrases=(f"red {name}",))

    def prompts(of, n, seed=0, split="test", route="name"):
        shown = concept.phrases[0] if route == "phrase" else of
        return [Prompt(f"a photo of {shown} {i}", seed=i) for i in range(n)]

    model.companions = Companions("toy", concept=lambda name: concept, prompts=prompts)
    pairs, _ = registered_texts(model, [concept], guide, 2, 0)
    assert [tuple(pair) for pair in pairs] == [
        (f"a photo of {shown} {i}", f"a photo of {guide} {i}", shown)
        for shown in concept.names
        for i in range(2)
    ]


def test_without_phrases_no_prompt_with_a_phrase_is_erased():
    model = tiny_diffusion()
    concept = Concept("star", phrases=("pentagram",), anchor="circle")
    asked = []

    def prompts(of, n, seed=0, split="test", route="name"):
        asked.append(route)
        shown = "pentagram" if route == "phrase" else of
        return [Prompt(f"a photo of {shown} {i}", seed=i) for i in range(n)]

    model.companions = Companions("toy", concept=lambda name: concept, prompts=prompts)
    options = {"context_prompts": 2, "templates": ("a {}",)}
    few = (
        UCE(erase_phrases=False, **options),
        TRCE(erase_phrases=False, stage2=False, ridge=1.0, **options),
    )
    for method in few:
        edit = method.erase(model, concept, **({"data": ["a dog"]} if method.id == "trce" else {}))
        assert edit.manifest.report["pairs"] == 4 and set(asked) == {"name"}
    own = fusion.pairs(MACE(erase_phrases=False, **options), model, concept)
    assert [pair.erased for pair in own] == [
        "star", "a star", "a photo of star 0", "a photo of star 1",
    ]  # fmt: skip
    read = concept_prompts(ItD(erase_phrases=False, **options), model, [concept], (), ["a dog"])
    assert read.targets == ("star", "a star", "a photo of star 0", "a photo of star 1")
    assert set(asked) == {"name"}
    assert UCE(**options).erase(model, concept).manifest.report["pairs"] == 8  # control


CLOSED = [UCE(), RECE(), MACE(steps=1), TRCE(ridge=1.0), RealEra()]


@pytest.mark.parametrize("method", CLOSED, ids=lambda m: m.id)
def test_requests_that_would_do_nothing_are_refused_before_any_work(model, method):
    before = model.cost.snapshot()
    star = Concept("star", phrases=("pentagram",), anchor="circle")
    for bad, said in (
        ({"templates": ("a photo",)}, "'a photo', which names no concept"),
        ({"guide": "Star"}, "is 'star' itself"),
        ({"guide": "pentagram"}, "is 'star' itself"),
    ):
        with pytest.raises(SettingError, match=said):
            dataclasses.replace(method, **bad).erase(model, star)
    for keep in ("star", [Concept("pentagram")], ["heart", Prompt("Star")]):
        with pytest.raises(ConceptError, match="also erased"):
            method.erase(model, star, keep=keep)
    assert not {name for name in model.cost.since(before) if name.startswith("denoiser")}
    with pytest.raises(SettingError, match="subject holds"):
        TRCE(subject="a photo").erase(model, star)


@pytest.mark.parametrize("method", [AllButOne(), CoErasing(), ItD(), SLD()], ids=lambda m: m.id)
def test_what_is_erased_is_kept_by_no_other_eraser_either(model, method):
    before, star = model.cost.snapshot(), Concept("star", phrases=("pentagram",))
    for keep in ("star", [Concept("pentagram")], ["heart", Prompt("Star")]):
        with pytest.raises(ConceptError, match="also erased"):
            method.erase(model, star, keep=keep)
    assert not model.cost.since(before)


def test_prompts_are_kept_as_their_texts(model):
    told = UCE().erase(model, STAR, keep=[Prompt("a red heart", seed=4)])
    assert told == UCE().erase(model, STAR, keep=["a red heart"])
    assert told.manifest.keep == ["a red heart"]


def test_the_report_of_per_layer_targets_says_what_that_of_shared_ones_says():
    model = tiny_diffusion()
    model.companions = Companions("toy", unrelated=("heart", "blue square"))
    options = {"keep": ["plain"], "seed": 0}
    shared = UCE().erase(model, STAR, **options).manifest.report
    edit = UCE(technique="tensor").erase(model, STAR, **options)
    report = edit.manifest.report
    assert set(shared) - set(report) == {"factor_error"}
    for name in ("erase_rows", "keep_rows", "pairs", "kept"):
        assert report[name] == shared[name]
    assert report["ridge_share"] == pytest.approx(shared["ridge_share"])

    def values(rows):
        tensors = model.tensors()
        stack = torch.cat([tensors[n].detach().double() for n in model.text_projections()])
        return rows.double() @ stack.T

    rows = {
        "empty": torch.cat(list(stream_rows(model.text_inputs()[0], [""], "all_rows"))),
        "unrelated": torch.cat(
            list(stream_rows(model.text_inputs()[0], ["heart", "blue square"], "all_rows"))
        ),
    }
    before = {name: values(r) for name, r in rows.items()}
    with edit.on(model):
        after = {name: values(r) for name, r in rows.items()}
    ratio = {
        name: ((after[name] - b).square().sum(1) / b.square().sum(1)).mean()
        for name, b in before.items()
    }
    assert report["empty_prompt_change"] == pytest.approx(float(ratio["empty"]) ** 0.5, rel=1e-3)
    assert report["drift"] == pytest.approx(float(ratio["unrelated"]), rel=1e-3)
    assert report["drift"] > 1e-6


def test_an_edit_leads_from_the_present_weights_wherever_the_ridge_pulls():
    """Moments around other matrices than the model's: the edited weights are the minimisers themselves."""
    model = tiny_diffusion()
    (group,) = Projections.groups(model)
    draw = torch.Generator().manual_seed(0)
    centres = {
        n: w.double() + 0.1 * torch.randn(w.shape, generator=draw, dtype=torch.float64)
        for n, w in group.weights.items()
    }
    moments = ValueMoments(centres)
    edit = per_layer_edit(UCE(), model, [STAR], [(group, moments)], 1.0, keep=(), seed=0, report={})
    # Nothing but the ridge: the weights become the centres.
    with edit.on(model):
        for name, centre in centres.items():
            torch.testing.assert_close(
                model.tensor(name).detach().double(), centre, atol=1e-5, rtol=1e-5
            )
