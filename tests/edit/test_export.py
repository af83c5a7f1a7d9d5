"""Exports run in the programs they are for: the same latents as the edited model, within 1e-4."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel

import expunge
from expunge.concept import Concept
from expunge.erase.language.graddiff import GradDiff
from expunge.errors import InputError, SettingError, UnsupportedModel
from expunge.models.language import LanguageModel
from expunge.testing import tiny_diffusion, tiny_language

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
    edit, _, edited = case
    edit.export(tmp_path, format="peft", model=model)
    pipeline = tiny_diffusion().pipeline
    pipeline.unet = PeftModel.from_pretrained(pipeline.unet, tmp_path).merge_and_unload()
    torch.testing.assert_close(stock(pipeline, model), edited, atol=1e-4, rtol=0)


def logits(module, model) -> torch.Tensor:
    ids = model.tokenizer(["Ada Morn was born in Velmar", "Who keeps a grey cat"], padding=True)
    with torch.no_grad():
        return module(input_ids=torch.tensor(ids["input_ids"])).logits


def tiny_gpt2() -> LanguageModel:
    """Fused attention as ``Conv1D`` (in, out), norms with biases, tied embeddings."""
    tokenizer = tiny_language().tokenizer
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=32,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = GPT2LMHeadModel(config)
    return LanguageModel("tiny-gpt2", module, tokenizer)


def check_adapter(model, edit, folder, left_out=()) -> None:
    """PEFT's own loader gives the edited model, beside the weights and merged into them."""
    plain = logits(model.module, model)
    with edit.on(model):
        edited = logits(model.module, model)
    assert (edited - plain).abs().max() > 1e-2  # control: the edit shows
    report = edit.export(folder, format="peft", model=model, rank=64)
    assert report["left_out"] == list(left_out) and report["relative_error"] < 1e-5
    assert torch.equal(logits(model.module, model), plain)
    loaded = PeftModel.from_pretrained(copy.deepcopy(model.module), folder)
    torch.testing.assert_close(logits(loaded, model), edited, atol=1e-4, rtol=1e-4)
    with loaded.disable_adapter():
        torch.testing.assert_close(logits(loaded, model), plain)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged, model), edited, atol=1e-4, rtol=1e-4)


def test_peft_of_graddiff_with_embeddings_and_norms(tmp_path):
    model = tiny_language()
    pairs = {
        "forget": [("Where does Bo Lind live ?", "old Tornby")],
        "retain": [("Who keeps a cat ?", "Ada")],
    }
    edit = GradDiff(lr=1e-2, epochs=4, batch=1).erase(
        model, Concept("Bo Lind", kind="fact"), data=pairs
    )
    targets = {target.name for target in edit.manifest.targets}
    assert {"model.model.embed_tokens.weight", "model.model.norm.weight"} <= targets
    check_adapter(model, edit, tmp_path)


def test_peft_of_transposed_layers_and_tied_embeddings(tmp_path):
    model = tiny_gpt2()
    names = [n for n in model.tensors() if n.endswith("weight") or ".ln_" in n]
    assert any("c_attn" in n for n in names) and not any("lm_head" in n for n in names)
    check_adapter(model, make(model, "dense", names=names, strength=0.02), tmp_path)


def test_peft_names_what_it_leaves_out(tmp_path):
    model = tiny_gpt2()
    bias = "model.transformer.h.0.attn.c_attn.bias"
    edit = make(model, "dense", names=[bias, "model.transformer.h.0.attn.c_attn.weight"])
    report = edit.export(tmp_path, format="peft", model=model, rank=16)
    assert report["left_out"] == [bias] and report["tensors"] == 1
    assert 0 < report["relative_error"] < 1


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_lora_layouts_leave_embeddings_and_norms_out(format, tmp_path):
    model = tiny_diffusion()
    table, matrix = (
        next(n for n in model.tensors() if n.startswith("text_encoder") and n.endswith(end))
        for end in ("token_embedding.weight", "q_proj.weight")
    )
    path = tmp_path / "lora.safetensors"
    edit = make(model, "low-rank", names=[table, matrix])
    assert edit.export(path, format=format, model=model)["left_out"] == [table]
    assert not any("embedding" in key for key in load_file(path))


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
    with pytest.raises(UnsupportedModel, match=r"leaves out unet\.conv_in\.bias"):
        make(model, "dense", names=names[1:]).export(
            tmp_path / "b.safetensors", model=model, rank=1
        )


def test_what_cannot_be_exported_is_a_sentence(model, tmp_path):
    edit = make(model)
    with pytest.raises(SettingError, match="did you mean 'kohya'"):
        edit.export(tmp_path / "x", format="kohia", model=model)
    for format in ("diffusers", "full", "peft"):
        with pytest.raises(InputError, match="needs the model"):
            edit.export(tmp_path / "x", format=format)
    both = make(model, "low-rank", names=[model.text_projections()[0], next(
        n for n in model.tensors() if n.startswith("text_encoder") and n.endswith("q_proj.weight"))])  # fmt: skip
    with pytest.raises(UnsupportedModel, match="one module"):
        both.export(tmp_path / "x", format="peft", model=model)
    assert not list(tmp_path.iterdir())
