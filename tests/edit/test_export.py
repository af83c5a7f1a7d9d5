"""Exports run in the programs they are for: the same latents as the edited model, within 1e-4."""

from __future__ import annotations

import pytest
import torch

import expunge
from expunge.errors import InputError, SettingError, UnsupportedModel
from expunge.testing import tiny_diffusion

from .edits import make, same, values


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


def stock(pipeline, model) -> torch.Tensor:
    """Latents that the plain pipeline samples, from the noise of two seeds."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        ["a red star", "a blue circle"], latents=model.initial_noise([0, 1]), num_inference_steps=4,
        guidance_scale=3.0, output_type="latent",
    ).images  # fmt: skip


@pytest.fixture(scope="module", params=["shared-low-rank", "low-rank"])
def case(request, model):
    names = model.text_projections()
    if request.param == "low-rank":
        names = (*names, "unet.conv_in.weight")
    edit = make(model, request.param, names=names, strength=0.3)
    plain = stock(model.pipeline, model)
    with edit.on(model):
        edited = stock(model.pipeline, model)
    assert (edited - plain).abs().max() > 1e-2  # control: the edit shows
    return edit, plain, edited


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_lora_files_load_in_a_plain_pipeline(model, case, format, tmp_path):
    edit, plain, edited = case
    before, path = values(model), tmp_path / "lora.safetensors"
    report = edit.export(path, format=format, model=model)
    assert report["relative_error"] < 1e-6 and report["left_out"] == [] and report["rank"] >= 2
    assert same(model, before)
    pipeline = tiny_diffusion().pipeline
    pipeline.load_lora_weights(tmp_path, weight_name=path.name)
    torch.testing.assert_close(stock(pipeline, model), edited, atol=1e-4, rtol=0)
    pipeline.fuse_lora()
    torch.testing.assert_close(stock(pipeline, model), edited, atol=1e-4, rtol=0)
    pipeline.unfuse_lora()
    pipeline.unload_lora_weights()
    torch.testing.assert_close(stock(pipeline, model), plain, atol=1e-4, rtol=0)


def test_peft_folder(model, case, tmp_path):
    from peft import PeftModel

    edit, _, edited = case
    edit.export(tmp_path, format="peft", model=model)
    pipeline = tiny_diffusion().pipeline
    pipeline.unet = PeftModel.from_pretrained(pipeline.unet, tmp_path).merge_and_unload()
    torch.testing.assert_close(stock(pipeline, model), edited, atol=1e-4, rtol=0)


def test_full_folder_opens_with_load(model, case, tmp_path):
    edit, _, edited = case
    before = values(model)
    edit.export(tmp_path / "full", format="full", model=model)
    assert same(model, before)
    again = expunge.load(str(tmp_path / "full"))
    torch.testing.assert_close(stock(again.pipeline, model), edited, atol=1e-5, rtol=0)
    assert not list((tmp_path / "full").rglob("*.bin")) and not again.edits.digests


def test_a_dense_edit_needs_a_rank_and_says_what_is_lost(model, tmp_path):
    edit, path = make(model, "dense"), tmp_path / "lora.safetensors"
    with pytest.raises(SettingError, match="rank="):
        edit.export(path, model=model)
    assert not path.exists()
    errors = [
        edit.export(path, model=model, rank=rank)["relative_error"] for rank in (1, 4, 16, 32)
    ]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.5 and errors[-1] < 1e-6
    assert edit.export(path, model=model, rank=4)["rank"] == 4


def test_biases_are_named_as_left_out(model, tmp_path):
    names = [model.text_projections()[0], "unet.conv_in.bias"]
    edit = make(model, "dense", names=names)
    report = edit.export(tmp_path / "a.safetensors", model=model, rank=16)
    assert report["left_out"] == ["unet.conv_in.bias"] and report["tensors"] == 1
    assert 0 < report["relative_error"] < 1
    with pytest.raises(UnsupportedModel, match="biases only"):
        make(model, "dense", names=names[1:]).export(
            tmp_path / "b.safetensors", model=model, rank=1
        )


def test_what_cannot_be_exported_is_a_sentence(model, tmp_path):
    edit = make(model)
    with pytest.raises(SettingError, match="did you mean 'kohya'"):
        edit.export(tmp_path / "x", format="kohia", model=model)
    for format in ("diffusers", "full"):
        with pytest.raises(InputError, match="needs the model"):
            edit.export(tmp_path / "x", format=format)
    both = make(model, "low-rank", names=[model.text_projections()[0], next(
        n for n in model.tensors() if n.startswith("text_encoder") and n.endswith("q_proj.weight"))])  # fmt: skip
    with pytest.raises(UnsupportedModel, match="one module"):
        both.export(tmp_path / "x", format="peft", model=model)
    assert not list(tmp_path.iterdir())
