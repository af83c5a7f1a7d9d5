"""Edits go on and come off bit for bit, in every order and precision; what does not fit is refused."""

from __future__ import annotations

import itertools

import pytest
import torch

from expunge.edit import Edit
from expunge.errors import (
    MissingPart,
    NonFiniteError,
    NotOnModel,
    WrongBase,
    WrongShape,
    WrongState,
)
from expunge.testing import tiny_diffusion

from .edits import make, same, values

KINDS = ("dense", "low-rank", "shared-low-rank")


@pytest.fixture(scope="module", params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def model(request):
    return tiny_diffusion(dtype=request.param)


@pytest.fixture(autouse=True)
def bare(request):
    yield
    if "model" in request.fixturenames:
        request.getfixturevalue("model").edits.clear()


@pytest.fixture
def plain():
    return tiny_diffusion()


def test_three_deep_removed_in_every_order(model):
    before, edits = values(model), [make(model, kind, i) for i, kind in enumerate(KINDS)]
    for order in itertools.permutations(range(3)):
        for edit in edits:
            edit.apply(model, rebase=True)
        assert not same(model, before) and len(model.edits) == 3
        for i in order:
            edits[i].revert(model)
        assert same(model, before) and not model.edits.originals, order


@pytest.mark.parametrize("kind", KINDS)
def test_after_an_exception(model, kind):
    before, edit = values(model), make(model, kind)
    with pytest.raises(ZeroDivisionError), edit.on(model):
        assert not same(model, before)
        raise ZeroDivisionError
    assert same(model, before) and not model.edits.digests


def test_removing_one_recomputes_the_rest_from_the_base(model):
    one, two = make(model, "dense", 1), make(model, "shared-low-rank", 2)
    with two.on(model):
        alone = values(model)
    one.apply(model)
    two.apply(model, rebase=True)
    assert not same(model, alone)  # control: with both, the values are others
    one.revert(model)
    assert same(model, alone) and model.edits.digests == (two.digest,)


def test_lifted_restores_bit_for_bit_also_after_exceptions_and_inner_edits(model):
    before, edit, inner = values(model), make(model), make(model, "dense", 5)
    edit.apply(model)
    edited = values(model)
    with pytest.raises(ZeroDivisionError), model.lifted():
        assert same(model, before) and not model.edits.digests
        inner.apply(model)
        raise ZeroDivisionError
    assert same(model, edited) and model.edits.digests == (edit.digest,)
    edit.revert(model)
    assert same(model, before)


def test_a_dependant_is_refused_unless_named(plain):
    before, first = values(plain), make(plain, seed=1)
    first.apply(plain)
    second = make(plain, "dense", 2)
    assert second.manifest.fitted_on == [first.digest]
    second.apply(plain)
    both = values(plain)
    with pytest.raises(WrongState, match=f"fitted on {first.digest[:12]}"):
        first.revert(plain)
    assert same(plain, both) and len(plain.edits) == 2
    first.revert(plain, although=(second.digest,))
    assert plain.edits.digests == (second.digest,)
    second.revert(plain)
    assert same(plain, before)


def test_the_wrong_state_is_refused_and_rebase_allows_it(plain):
    first, second = make(plain, seed=1), make(plain, seed=2)
    first.apply(plain)
    held = values(plain)
    with pytest.raises(WrongState, match="bare base"):
        second.apply(plain)
    with pytest.raises(WrongState, match="already"):
        first.apply(plain, rebase=True)
    assert same(plain, held) and plain.edits.digests == (first.digest,)
    second.apply(plain, rebase=True)
    assert len(plain.edits) == 2
    with pytest.raises(NotOnModel):
        make(plain, seed=3).revert(plain)


def _changed(edit: Edit, **fields) -> Edit:
    return Edit(edit.manifest.model_copy(update=fields), edit.tensors)


def test_wrong_base_shape_and_names_are_refused_and_nothing_is_touched(plain):
    sibling = tiny_diffusion()
    with torch.no_grad():
        sibling.tensor(sibling.text_projections()[0]).add_(1e-4)
    edit, before = make(plain), values(sibling)
    target = edit.manifest.targets[0]
    with pytest.raises(WrongBase, match="different: unet"):
        edit.apply(sibling)
    with pytest.raises(WrongBase):
        edit.apply(tiny_diffusion(seed=9))
    wide = target.model_copy(update={"shape": (target.shape[0], target.shape[1] + 1)})
    with pytest.raises(WrongShape, match=r"33.*32"):
        _changed(edit, targets=[wide, *edit.manifest.targets[1:]]).apply(plain)
    gone = target.model_copy(update={"name": target.name.replace("to_k", "to_kk")})
    with pytest.raises(MissingPart, match=f"did you mean '{target.name}'"):
        _changed(edit, targets=[gone]).apply(plain)
    with pytest.raises(MissingPart, match="names no tensor"):
        _changed(edit, targets=[]).apply(plain)
    assert same(sibling, before) and same(plain, values(tiny_diffusion()))
    edit.apply(sibling, sibling=True)  # allowed by name only
    assert sibling.edits.digests == (edit.digest,)


@pytest.mark.parametrize("pair", [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_an_edit_of_one_half_format_goes_on_the_other(pair):
    edit = make(tiny_diffusion(dtype=pair[0]))
    model = tiny_diffusion(dtype=pair[1])
    with edit.on(model):
        assert model.edits.digests == (edit.digest,)
    with pytest.raises(WrongBase, match="different"):
        edit.apply(tiny_diffusion(seed=1, dtype=pair[1]))


def test_nothing_non_finite_reaches_a_model(plain):
    before, edit = values(plain), make(plain, "dense")
    name = edit.manifest.targets[0].name
    bad = {
        **edit.tensors,
        f"delta.{name}": torch.full_like(edit.tensors[f"delta.{name}"], torch.nan),
    }
    with pytest.raises(NonFiniteError, match="NaN"):
        Edit(edit.manifest, bad)
    half = tiny_diffusion(dtype=torch.float16)
    kept = values(half)
    huge = make(half, "dense", strength=1e6)  # finite in the edit, not in the model's float16
    with pytest.raises(NonFiniteError, match="float16"):
        huge.apply(half)
    assert same(half, kept) and not half.edits.originals and same(plain, before)


def test_a_failed_removal_puts_everything_back(plain, monkeypatch):
    edits = [make(plain, seed=i) for i in range(3)]
    for edit in edits:
        edit.apply(plain, rebase=True)
    held, push, calls = values(plain), type(plain.edits).push, []

    def failing(self, edit, **options):
        calls.append(edit)
        if len(calls) == 2:
            raise ZeroDivisionError
        push(self, edit, **options)

    monkeypatch.setattr(type(plain.edits), "push", failing)
    with pytest.raises(ZeroDivisionError):
        edits[0].revert(plain)
    assert same(plain, held) and plain.edits.digests == tuple(e.digest for e in edits)
