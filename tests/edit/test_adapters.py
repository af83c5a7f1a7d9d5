"""Gated adapters as edits: their factors at the door, stacking, siblings, the summary, and what other programs get."""

from __future__ import annotations

import dataclasses

import pydantic
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from expunge.cli import app
from expunge.concept import Concept
from expunge.core.layer_choice import block_weights
from expunge.edit import Edit, adapters
from expunge.edit.summary import print_summary, rows
from expunge.erase.diffusion.spm import SPM
from expunge.errors import (
    EditFormatError,
    MissingPart,
    SettingError,
    UnsupportedModel,
    WrongBase,
    WrongShape,
    WrongState,
)
from expunge.testing import tiny_diffusion

from .edits import make, same, values


def erased(model, name="star", seed=0, **settings):
    """Adapters of random factors, as if they had been learnt."""
    method, draw = SPM(**settings), torch.Generator().manual_seed(seed)
    tensors = {"alpha": torch.tensor(method.alpha)}
    for weight in block_weights(model):
        out, *width = model.tensor(weight).shape
        tensors[f"up.{weight}"] = 0.2 * torch.randn(out, method.rank, generator=draw)
        tensors[f"down.{weight}"] = 0.2 * torch.randn(method.rank, *width, generator=draw)
    return Edit.make(
        method, model, (Concept(name),), kind="gated-adapter", tensors=tensors, acts=True,
        report={"phrases": name},
    )  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


@pytest.fixture(scope="module")
def edit(model):
    return erased(model, rank=2, alpha=3.0)


def drawn(model):
    with torch.no_grad():
        return model.sample(model.encode(["a red star", "a circle"]), [0, 1], steps=2)


def near(one, two):
    return bool(torch.allclose(one, two, atol=1e-4, rtol=1e-3))


def test_no_weight_is_touched_and_it_comes_off_bit_for_bit(model, edit, tmp_path):
    before, plain = values(model), drawn(model)
    edit.save(tmp_path / "edit.safetensors")
    again = Edit.load(tmp_path / "edit.safetensors")
    assert again == edit and again.kind == "gated-adapter" and not again.manifest.targets
    with again.on(model):
        assert same(model, before) and not model.edits.originals
        assert not torch.equal(drawn(model), plain)
        with model.lifted():
            assert torch.equal(drawn(model), plain)
    assert torch.equal(drawn(model), plain) and same(model, before)


def test_layers_and_scale(model, edit):
    shapes = adapters.layers(edit)
    assert shapes == {n: tuple(model.tensor(n).shape) for n in shapes} and len(shapes) == 48
    assert adapters.scale(edit, next(iter(shapes))) == 1.5  # alpha / rank
    assert adapters.layers(make(model)) == {}
    covered = edit.manifest.base
    assert set(covered["components"]) == {"unet"} and set(covered["exact"]) == set(shapes)


def test_factors_that_do_not_go_together_are_refused(edit):
    name = next(iter(adapters.layers(edit)))
    up, down = f"up.{name}", f"down.{name}"
    good = dict(edit.tensors)
    for changes, match in (
        ({up: None}, f"lacks the tensor '{up}'"),
        ({down: None}, f"lacks the tensor '{down}'"),
        ({"alpha": None}, "lacks 'alpha'"),
        ({"alpha": torch.ones(2)}, "a single number"),
        ({up: good[up][:, :1]}, "needed are numbers"),
        ({up: good[up].long()}, "needed are numbers"),
        ({down: good[down].flatten()}, "needed are numbers"),
    ):
        tensors = {k: v for k, v in {**good, **changes}.items() if v is not None}
        with pytest.raises(EditFormatError, match=match):
            Edit(edit.manifest, tensors)
    with pytest.raises(EditFormatError, match="no adapter"):
        Edit(edit.manifest, {"alpha": good["alpha"]})
    with pytest.raises(pydantic.ValidationError, match="does nothing unless it acts"):
        type(edit.manifest).model_validate({**edit.manifest.model_dump(), "acts": False})


def test_layers_the_model_does_not_have_are_refused(model, edit):
    name = next(n for n in adapters.layers(edit) if n.endswith("to_q.weight"))
    elsewhere = {k.replace("to_q", "to_qq"): v for k, v in edit.tensors.items()}
    with pytest.raises(MissingPart, match="did you mean"):
        Edit(edit.manifest, elsewhere).apply(model)
    wide = torch.zeros(2, model.tensor(name).shape[1] + 1)
    with pytest.raises(WrongShape, match=name):
        Edit(edit.manifest, {**edit.tensors, f"down.{name}": wide}).apply(model)
    norm = {
        "up.unet.conv_norm_out.weight": torch.zeros(16, 1),
        "down.unet.conv_norm_out.weight": torch.zeros(1, 16),
    }
    with pytest.raises((WrongShape, MissingPart)):
        Edit(edit.manifest, {**norm, "alpha": torch.tensor(1.0)}).apply(model)
    assert not model.edits.digests


def test_they_stack_unasked_on_each_other_and_on_nothing_else(model, edit):
    plain, two, dense = drawn(model), erased(model, "heart", 1), make(model)
    with edit.on(model), two.on(model):
        both = drawn(model)
        assert model.edits.digests == (edit.digest, two.digest)
        with pytest.raises(WrongState, match="bare base"):
            dense.apply(
                model
            )  # control: what merges into weights was solved for the weights it saw
    with two.on(model), edit.on(model):
        assert near(drawn(model), both)  # sums in another order
    with dense.on(model):
        with pytest.raises(WrongState, match=dense.digest[:12]):
            edit.apply(model)
        with edit.on(model, rebase=True):
            assert len(model.edits) == 2
    with edit.on(model):  # one that was fitted on others needs them, adapters or not
        upon = erased(model, "circle")
    assert upon.manifest.fitted_on == [edit.digest]
    with pytest.raises(WrongState, match=edit.digest[:12]):
        upon.apply(model)
    edit.apply(model)
    upon.apply(model)
    with pytest.raises(WrongState, match="was fitted on"):
        edit.revert(model)
    upon.revert(model)
    edit.revert(model)
    assert torch.equal(drawn(model), plain)


def test_removing_the_lower_one_leaves_the_upper_one(model, edit):
    two = erased(model, "heart", 1)
    with two.on(model):
        alone = drawn(model)
    edit.apply(model)
    two.apply(model)
    edit.revert(model)
    assert torch.equal(drawn(model), alone) and model.edits.digests == (two.digest,)
    two.revert(model)


def test_a_sibling_must_be_allowed_by_name(model, edit):
    sibling = tiny_diffusion()
    with torch.no_grad():
        for name in list(adapters.layers(edit))[:3]:
            sibling.tensor(name).add_(0.01)
    plain = drawn(sibling)
    with pytest.raises(WrongBase, match="different: unet"):
        edit.apply(sibling)
    with edit.on(sibling, sibling=True):
        assert not torch.equal(drawn(sibling), plain)
    assert torch.equal(drawn(sibling), plain)


def test_the_summary_lists_adapters(edit, capsys):
    print_summary(edit)
    shown = capsys.readouterr().out
    for text in (
        "gated-adapter, 48 adapters",
        "while the model runs",
        "no weights change",
        "phrases  star",
    ):
        assert text in shown
    listed = rows(edit)
    assert len(listed) == 48 and {row["rank"] for row in listed} == {2}
    assert sum(row["stored"] for row in listed) == sum(t.numel() for t in edit.tensors.values()) - 1


# -- other programs ------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["diffusers", "kohya", "peft", "full"])
def test_no_format_carries_the_gate(model, edit, tmp_path, format):
    out = tmp_path / "out"
    with pytest.raises(SettingError, match="--without-gate"):
        edit.export(out, format=format, model=model)
    assert not out.exists()
    with pytest.warns(UserWarning, match="spm: the gate is left out"):
        report = edit.export(out, format=format, model=model, without_gate=True)
    assert report["left_out"] == ["gate"] and report["tensors"] == 48
    assert "every prompt" in report["warning"]
    # A plain edit takes the option and has nothing to lose.
    assert "warning" not in make(model).export(
        tmp_path / "x", format=format, model=model, without_gate=True
    )


def test_what_is_left_acts_as_the_open_gate_does(model, edit, tmp_path):
    plain = adapters.ungated(edit)
    assert plain.kind == "low-rank" and not plain.manifest.acts
    assert plain.manifest.report["gate"].startswith("lost")
    with SPM.regated(edit, gate="open").on(model):
        wanted = drawn(model)
    with plain.on(model):
        assert near(drawn(model), wanted)
    with edit.on(model):
        assert not near(drawn(model), wanted)  # control: the gate makes a difference
    with pytest.raises(UnsupportedModel, match="no gate"):
        adapters.ungated(plain)
    path = tmp_path / "lora.safetensors"
    with pytest.warns(UserWarning):
        edit.export(path, model=model, without_gate=True)
    loaded = tiny_diffusion()
    loaded.pipeline.load_lora_weights(tmp_path, weight_name=path.name)
    with torch.no_grad():
        latents = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
        ids = model.encode(["a circle"])
        made = loaded.pipeline.unet(latents, 500, encoder_hidden_states=ids.embeddings).sample
        with plain.on(model):
            torch.testing.assert_close(
                model.predict(latents, torch.tensor([500]), ids).value, made, atol=1e-4, rtol=1e-3
            )
    with safe_open(path, "pt") as file:
        assert file.metadata()["gate"].startswith("lost") and file.metadata()["concepts"] == "star"


def test_kohya_factors_multiply_to_the_change(model, edit, tmp_path):
    path = tmp_path / "lora.safetensors"
    with pytest.warns(UserWarning):
        edit.export(
            path, format="kohya", without_gate=True
        )  # no model needed: shapes stand in the factors
    tensors = load_file(path)
    name = next(n for n in adapters.layers(edit) if n.endswith("proj_in.weight"))
    key = "lora_" + name.removesuffix(".weight").replace(".", "_")
    up, down = tensors[f"{key}.lora_up.weight"], tensors[f"{key}.lora_down.weight"]
    assert up.shape == (16, 2, 1, 1) and down.shape == (2, 16, 1, 1)
    wanted = 1.5 * edit.tensors[f"up.{name}"] @ edit.tensors[f"down.{name}"].flatten(1)
    scale = float(tensors[f"{key}.alpha"]) / 2
    torch.testing.assert_close(scale * up.flatten(1) @ down.flatten(1), wanted)


def test_the_command_line_asks_and_warns(edit, tmp_path):
    edit.save(tmp_path / "edit.safetensors")
    out = tmp_path / "lora.safetensors"
    asked = ["export", str(tmp_path / "edit.safetensors"), "--out", str(out), "--format", "kohya"]
    refused = CliRunner().invoke(app, asked)
    assert isinstance(refused.exception, SettingError) and not out.exists()
    done = CliRunner().invoke(app, [*asked, "--without-gate"])
    assert done.exit_code == 0 and out.is_file()
    assert "left out, this format cannot carry them: gate" in done.output
    assert "warning: the gate is left out" in done.output


def test_regating_needs_no_training_and_names_another_edit(model, edit):
    shut = SPM.regated(edit, factor=0.0)
    assert shut.digest != edit.digest and shut.tensors is edit.tensors
    plain = drawn(model)
    with shut.on(model):
        assert torch.equal(drawn(model), plain)
    with pytest.raises(SettingError, match="part of the training"):
        SPM.regated(edit, rank=3)
    with pytest.raises(SettingError, match="gate is 'ajar'"):
        SPM.regated(edit, gate="ajar")
    assert (
        dataclasses.replace(SPM(**edit.manifest.settings), factor=0.0).settings()
        == shut.manifest.settings
    )
