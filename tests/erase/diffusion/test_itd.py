"""ItD on tiny random pipelines: which units, which threshold, who is edited, and what stays bit for bit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from expunge import Concept
from expunge.core.concept_features import Deactivated, peaks
from expunge.core.concept_prompts import concept_prompts
from expunge.core.sampling import SHARED
from expunge.core.text_activations import Rows, recorded, sites
from expunge.core.text_autoencoders import unpacked
from expunge.edit import Edit
from expunge.erase.diffusion.itd import ItD, _refuse_unread
from expunge.errors import (
    EditFormatError,
    InputError,
    MissingCapability,
    SettingError,
    WrongState,
)
from expunge.method import Prompt
from expunge.testing import tiny_diffusion
from expunge.testing.bench import trace
from expunge.testing.layouts import TINY_LAYOUTS, tiny_layout

STAR = Concept("star", phrases=("red star",), anchor="circle")
CAPTIONS = [
    f"{first} {look} {thing}"
    for first in ("a", "a red", "photo of a")
    for look in ("plain", "striped")
    for thing in ("circle", "square", "heart", "star", "green")
]
OTHERS = ["a plain circle", "photo of a striped heart", "a red striped square"]
METHOD = ItD(
    layers=(1,), units=512, k=4, steps=3, batch=16, warm_up=1, most=6, templates=("a {}", "photo of a {}"), padding=4
)  # fmt: skip


@pytest.fixture(autouse=True)
def forgotten():
    SHARED.clear()


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


@pytest.fixture(scope="module")
def edit(model):
    return METHOD.erase(model, STAR, data=CAPTIONS)


def change(method=METHOD, model=None, concepts=STAR, **more):
    return method.erase(model or tiny_diffusion(), concepts, **{"data": CAPTIONS, **more})


def rows_at(model, texts, layer=1):
    site = sites(model, (layer,))
    return Rows.joined([part["text_encoder"] for part in recorded(model, site, texts)])


# -- units and threshold -------------------------------------------------------------------------------


def strongest(autoencoder, rows, most):
    """Indices by brute force on the dense code."""
    found = set()
    z = autoencoder.encode(rows.hidden).masked_fill(rows.first[..., None], 0)
    for text in z.max(1).values:
        order = text.argsort(descending=True)[:most]
        found |= {int(unit) for unit in order if text[unit] > 0}
    return found


def test_the_units_are_those_of_targets_without_those_of_retained_prompts(model, edit):
    texts = concept_prompts(METHOD, model, [STAR], (), CAPTIONS)
    own = unpacked(edit.tensors, "text_encoder.")
    targets, retained = rows_at(model, texts.targets), rows_at(model, texts.retained)
    wanted = strongest(own, targets, 6) - strongest(own, retained, 6)
    assert set(edit.tensors["text_encoder.units"].tolist()) == wanted and wanted
    together = change(dataclasses.replace(METHOD, contrast=False), model)
    assert set(together.tensors["text_encoder.units"].tolist()) == strongest(own, targets, 6)
    assert float(peaks(own, targets).max()) > 0


def test_the_threshold_is_the_least_error_of_a_target_prompt(model, edit):
    control = ItD.control(edit, model)
    [one] = control.edited.values()
    texts = concept_prompts(METHOD, model, [STAR], (), CAPTIONS)
    targets = [rows_at(model, texts.targets)]
    errors, named = one.read(targets)
    assert one.threshold == pytest.approx(0.99 * float(errors[named].min()), rel=1e-5)
    told = edit.manifest.report["sites"]["text_encoder"]
    assert told["target_prompts_without_a_unit"] == int((~named).sum())
    edited = float((errors >= one.threshold).double().mean())
    assert told["target_edited"] == edited and told["threshold"] == one.threshold
    assert told["quality"]["held_out"] and told["units_of_the_concept"] == int(one.mask.sum())
    always = change(dataclasses.replace(METHOD, gate="always"), model)
    assert float(always.tensors["text_encoder.threshold"]) == 0.0


def test_several_concepts_are_the_union_and_need_no_training(model, monkeypatch):
    from expunge.core import text_autoencoders

    data = {"captions": CAPTIONS, "retained": ["a plain circle", "photo of a plain square"]}
    method = dataclasses.replace(METHOD, general_prompts=0)
    heart = Concept("heart")
    first = change(method, model, STAR, data=data)
    monkeypatch.setattr(text_autoencoders, "fit", None)  # another training would fail
    second, both = (change(method, model, c, data=data) for c in (heart, (STAR, heart)))
    units = [set(e.tensors["text_encoder.units"].tolist()) for e in (first, second, both)]
    assert units[2] == units[0] | units[1] and units[0] != units[1]
    assert torch.equal(
        first.tensors["text_encoder.autoencoder.atoms"],
        both.tensors["text_encoder.autoencoder.atoms"],
    )


def test_no_unit_of_its_own_is_an_error(model):
    dense = dataclasses.replace(METHOD, most=512, k=512)
    with pytest.raises(InputError, match="every unit of the target prompts"):
        dense.erase(model, Concept("star"), data=CAPTIONS)


def test_a_concept_without_a_unit_in_a_row_that_counts_is_an_error(model, edit):
    own, (site,) = unpacked(edit.tensors, "text_encoder."), sites(model, (1,))
    targets = ["red star", "a heart"]
    said = list(recorded(model, (site,), targets))
    rows = rows_at(model, targets)
    counted = rows.real & ~rows.first
    on = [own.encode(rows.hidden[i][counted[i]]).gt(0).any(0) for i in range(2)]
    heart = Concept("heart")
    for mask, missing in ((on[0] & ~on[1], "heart"), (on[1] & ~on[0], "star")):
        assert mask.any()
        one = Deactivated(site, own, mask, -8.0)
        with pytest.raises(InputError, match=f"no prompt of {missing!r}"):
            _refuse_unread([STAR, heart], targets, [one], said)
        _refuse_unread([heart if missing == "star" else STAR], targets, [one], said)


def test_what_cannot_be_done_is_refused_before_the_autoencoder_learns(model):
    with pytest.raises(MissingCapability, match="rounds=1 hardens"):
        change(dataclasses.replace(METHOD, rounds=1), tiny_layout("sdxl"))
    with pytest.raises(SettingError, match="names no concept"):
        change(dataclasses.replace(METHOD, templates=("a star",)))


# -- what it does ----------------------------------------------------------------------------------------


def test_a_target_prompt_goes_on_as_its_edited_reconstruction(model, edit):
    [one] = ItD.control(edit, model).edited.values()
    before = rows_at(model, ["a star", *OTHERS])
    read = one.of(before)
    spoken = (read.errors >= one.threshold).tolist()
    assert spoken[0]
    with edit.on(model):
        after = rows_at(
            model, ["a star", *OTHERS]
        )  # a control of the user's sees what an edit left
    for index, edited in enumerate(spoken):
        wanted = (read if edited else before).hidden[index]
        assert torch.equal(after.hidden[index], wanted)


def test_prompts_that_name_no_target_are_untouched_bit_for_bit(model, edit):
    """The control: with the gate always open none of these pictures is the same."""
    untouched = [
        t for t in CAPTIONS if "star" not in t and _error(edit, model, t) < _threshold(edit)
    ]
    assert len(untouched) >= 3
    asked = [Prompt(text, seed=i) for i, text in enumerate([*untouched[:3], "a star"])]
    conditions = {text: model.encode([text]).embeddings for text in untouched}
    before = model.generate(asked)
    with edit.on(model):
        after = model.generate(asked)
        for text, own in conditions.items():
            assert torch.equal(model.encode([text]).embeddings, own)
    assert np.array_equal(before[:3], after[:3]) and not np.array_equal(before[3], after[3])
    always = change(dataclasses.replace(METHOD, gate="always"), model)
    with always.on(model):
        opened = model.generate(asked)
    assert all(not np.array_equal(a, b) for a, b in zip(before, opened, strict=True))


def _error(edit, model, text):
    [one] = ItD.control(edit, model).edited.values()
    return float(one.of(rows_at(model, [text])).errors)


def _threshold(edit):
    return float(edit.tensors["text_encoder.threshold"])


def test_a_negative_text_is_never_edited(model, edit):
    plain, asked = model.unconditional("a star").embeddings, model.encode(["a star"]).embeddings
    with edit.on(model):
        assert torch.equal(model.unconditional("a star").embeddings, plain)
        assert not torch.allclose(model.encode(["a star"]).embeddings, asked)


def test_tau_and_the_start_token(model, edit):
    texts = ["a star"]
    flipped, off = (
        ItD.control(change(dataclasses.replace(METHOD, tau=tau), model), model)
        for tau in (-8.0, 0.0)
    )
    size = {}
    for name, control in (("flipped", flipped), ("off", off)):
        [one] = control.edited.values()
        size[name] = float(one.of(rows_at(model, texts)).errors)
    assert size["flipped"] > size["off"] > 0
    kept = change(dataclasses.replace(METHOD, start="kept"), model)
    before = rows_at(model, texts)
    with kept.on(model):
        after = rows_at(model, texts)
    assert torch.equal(after.hidden[:, 0], before.hidden[:, 0])
    assert not torch.equal(after.hidden[:, 1:], before.hidden[:, 1:])
    with edit.on(model):
        assert not torch.equal(rows_at(model, texts).hidden[:, 0], before.hidden[:, 0])


def test_searches_reach_through_the_edit(model, edit):
    ids = model.token_ids(["a star"])
    vectors = model.token_table()[ids].clone().requires_grad_()
    with edit.on(model):
        model.encode_tokens(ids, vectors).embeddings.square().sum().backward()
    assert bool(torch.isfinite(vectors.grad).all()) and bool(vectors.grad.abs().sum() > 0)


def test_edits_stand_on_each_other_and_leave_nothing_behind(edit):
    model = tiny_diffusion()
    left = trace(model)
    heart = change(METHOD, model, Concept("heart"))
    with edit.on(model):
        with pytest.raises(WrongState):
            heart.apply(model)
        with heart.on(model, rebase=True):
            assert len(model.edits.controls) == 2
            assert not torch.allclose(model.encode(["a heart"]).embeddings, tiny_encode("a heart"))
    assert trace(model) == left


def tiny_encode(text):
    return tiny_diffusion().encode([text]).embeddings


def test_seeds_and_settings_name_the_edit(model, edit):
    assert change(METHOD, model).digest == edit.digest
    assert change(METHOD, model, seed=1).digest != edit.digest
    random = change(dataclasses.replace(METHOD, steps=0), model)
    assert random.manifest.report["sites"]["text_encoder"]["quality"]["rows"] > 0
    assert random.digest != edit.digest and edit.manifest.acts and not edit.manifest.targets


def test_hardening_adds_units_and_never_takes_any(model):
    method = dataclasses.replace(
        METHOD,
        general_prompts=0,
        rounds=1,
        attack_steps=3,
        attack_lr=0.5,
        attack_batch=2,
        pictures=2,
    )
    plain, hardened = (change(dataclasses.replace(method, rounds=n), model) for n in (0, 1))
    units = [set(e.tensors["text_encoder.units"].tolist()) for e in (plain, hardened)]
    assert units[0] < units[1]
    assert len(hardened.manifest.report["attack_losses"]) == 1
    assert hardened.manifest.cost["denoiser.backward"] == 3 * 2
    assert _threshold(hardened) > 0 and not model.acting


# -- files -------------------------------------------------------------------------------------------------


def test_an_edit_is_self_contained(model, edit, tmp_path):
    edit.save(tmp_path / "star.safetensors")
    again = Edit.load(tmp_path / "star.safetensors")
    with edit.on(model):
        wanted = model.encode(["a star"]).embeddings
    fresh = tiny_diffusion()
    with again.on(fresh):
        assert torch.equal(fresh.encode(["a star"]).embeddings, wanted)
    stored = sum(t.numel() * t.element_size() for t in edit.tensors.values())
    assert stored < 2 * 2 * 512 * 32 + 20_000  # two matrices in half precision, and little else


def test_an_edit_may_refer_to_an_autoencoder_in_a_folder(model, tmp_path):
    change(METHOD, model, run=tmp_path / "run")
    place = tmp_path / "run" / "text_encoder" / "autoencoder"
    method = dataclasses.replace(METHOD, autoencoder=str(place), carried="reference")
    small = change(method, model, data={"retained": OTHERS})
    assert sum(t.numel() for t in small.tensors.values()) < 1000
    plain = model.encode(["a star"]).embeddings
    with small.on(model):
        assert not torch.allclose(model.encode(["a star"]).embeddings, plain)
    change(METHOD, model, seed=1, run=tmp_path / "other")
    (tmp_path / "run").rename(tmp_path / "gone")
    (tmp_path / "other").rename(tmp_path / "run")
    with pytest.raises(EditFormatError, match="another autoencoder than the edit was made with"):
        small.apply(model)
    assert not model.edits.digests
    with pytest.raises(SettingError, match="needs the folder that is referred to"):
        change(dataclasses.replace(METHOD, carried="reference"), model)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("text_encoder.units", torch.tensor([512]), "from 0 to 511"),
        ("text_encoder.units", torch.tensor([-1]), "from 0 to 511"),
        ("text_encoder.units", None, "lacks the tensor 'text_encoder.units'"),
        ("text_encoder.autoencoder.bias", None, "no autoencoder that fits"),
    ],
)
def test_damaged_edits_are_refused_and_leave_the_model_alone(model, edit, name, value, message):
    tensors = {k: t for k, t in edit.tensors.items() if k != name}
    broken = Edit(edit.manifest, tensors if value is None else {**tensors, name: value})
    with pytest.raises(EditFormatError, match=message):
        broken.apply(model)
    assert not model.edits.digests and not model.acting


# -- layouts -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TINY_LAYOUTS)
def test_every_layout_whose_text_encoders_have_the_layer(name):
    model = tiny_layout(name)
    method = dataclasses.replace(METHOD, layers=(0,), steps=0, units=2048, k=8, most=40)
    made = method.erase(model, Concept("star"), data=CAPTIONS)
    assert set(made.manifest.report["sites"]) == set(model.layout.encoders())
    before, empty = model.encode(["a star"]), model.unconditional()
    with made.on(model):
        after = model.encode(["a star"])
        assert torch.equal(model.unconditional().embeddings, empty.embeddings)
        assert model.generate(["a star"], seeds=[0], steps=1).shape[0] == 1
    assert not torch.allclose(after.embeddings, before.embeddings)
    if before.pooled is not None:
        assert not torch.allclose(after.pooled, before.pooled)
    assert torch.equal(model.encode(["a star"]).embeddings, before.embeddings)


def test_a_missing_layer_is_refused_before_any_work(model):
    before = model.cost.snapshot()
    with pytest.raises(SettingError, match="no layer 8 that is read; allowed is 0 to 1"):
        ItD().erase(model, STAR, data=CAPTIONS)
    assert not model.cost.since(before)
