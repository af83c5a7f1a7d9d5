"""Layouts as they are used: other tokenizer settings, moves, folders without a part, pipelines that take more."""

from __future__ import annotations

import pytest
import torch
from diffusers import PixArtSigmaPipeline, StableDiffusion3Pipeline

import expunge
from expunge import Concept
from expunge.core.layer_choice import trainable
from expunge.erase.diffusion.esd import ESD
from expunge.erase.diffusion.uce import UCE
from expunge.errors import UnsupportedModel
from expunge.models import autoencoder
from expunge.models.diffusion import DiffusionModel
from expunge.testing import tiny_diffusion, tiny_layout

# diffusers hands its tables to numpy the old way
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

TEXT = "a red star"


def test_ids_of_a_tokenizer_that_pads_on_the_left_belong_to_the_rows() -> None:
    # As a Gemma tokenizer comes; the pipeline turns it at its first encoding, so only the first ids were wrong.
    model = tiny_layout("sana")
    wanted = model.text_inputs()[0].segments([TEXT])[0]
    other = tiny_layout("sana")
    other.pipeline.tokenizer.padding_side = "left"
    found = other.text_inputs()[0].segments([TEXT])[0]
    assert torch.equal(found.ids, wanted.ids) and torch.equal(found.attended, wanted.attended)


@pytest.mark.parametrize("name", ["sdxl", "flux"])
def test_a_text_is_encoded_again_after_a_move_to_another_precision(name: str) -> None:
    model = tiny_layout(name)
    before = model.encode(TEXT).embeddings
    model.pipeline.to(torch.bfloat16)
    after = model.encode([TEXT, "a blue circle"]).embeddings
    assert before.dtype == torch.float32 and after.dtype == torch.bfloat16


def test_the_rows_of_a_text_stand_in_the_protocol() -> None:
    alpha = tiny_layout("pixart")
    sigma = DiffusionModel(
        PixArtSigmaPipeline(**alpha.pipeline.components), "tiny-pixart", steps=4, guidance=3.0
    )
    assert alpha.state == sigma.state and alpha.protocol_key != sigma.protocol_key
    for name, rows in (("pixart", 120), ("sana", 300), ("sd3", 256), ("flux", 512)):
        assert tiny_layout(name).conditioning["length"] == rows


def test_sd3_saved_without_t5_opens(tmp_path) -> None:
    parts = tiny_layout("sd3").pipeline.components | {"text_encoder_3": None, "tokenizer_3": None}
    pipeline = StableDiffusion3Pipeline(**parts)
    pipeline.save_pretrained(tmp_path / "model")
    model = expunge.load(str(tmp_path / "model"))
    assert "text_encoder_3" not in model.parts()
    model.pipeline.set_progress_bar_config(disable=True)
    assert model.generate(TEXT, steps=2).std() > 0
    edit = UCE().erase(model, Concept("red star", anchor="blue circle"))
    edit.export(tmp_path / "full", format="full", model=model)
    again = expunge.load(str(tmp_path / "full"))
    name = edit.manifest.targets[0].name
    with edit.on(model):
        assert torch.equal(again.tensor(name), model.tensor(name))


def test_pipelines_that_take_more_than_text_are_refused() -> None:
    distilled = tiny_diffusion().pipeline
    distilled.unet.register_to_config(time_cond_proj_dim=8)  # LCM: guidance is an input
    with pytest.raises(UnsupportedModel, match="is not covered"):
        DiffusionModel(distilled)
    for name in ("controlnet", "adapter"):
        pipeline = tiny_layout("sdxl").pipeline
        setattr(pipeline, name, torch.nn.Linear(1, 1))
        with pytest.raises(UnsupportedModel, match=f"takes a picture through its {name}"):
            DiffusionModel(pipeline)


@pytest.mark.parametrize("name", ["sdxl", "pixart", "sana", "sd3", "flux"])
def test_esd_learns_on_every_layout_and_leaves_the_model_alone(name: str) -> None:
    model = tiny_layout(name)
    before = {n: p.detach().clone() for n, p in model.tensors().items()}
    method = ESD(steps=8, lr=3e-3, sampling_steps=3, batch=4, bank=4)
    edit = method.erase(model, Concept("red star"), seed=1)
    losses = edit.manifest.report["losses"]["denoiser"]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert all(torch.equal(p, before[n]) for n, p in model.tensors().items())
    assert {t.name for t in edit.manifest.targets} <= {
        n for n, _ in trainable(model, "cross-attention")
    }


def test_an_odd_size_of_flux_is_rounded_down_as_the_library_does() -> None:
    model = tiny_layout("flux")
    model.pipeline.default_sample_size = 9
    assert model.generate(TEXT, steps=1).shape[1:3] == (16, 16)


def test_few_large_pictures_pass_through_the_autoencoder_at_a_time(monkeypatch) -> None:
    model, sizes = tiny_layout("sdxl"), []
    latents = model.initial_noise(range(5))
    whole = model.pictures_of(latents)
    decode = model.vae.decode
    monkeypatch.setattr(model.vae, "decode", lambda z: sizes.append(len(z)) or decode(z))
    monkeypatch.setattr(autoencoder, "PIXELS", 2 * 16 * 16)
    assert abs(model.pictures_of(latents).astype(int) - whole).max() <= 1
    assert sizes == [2, 2, 1]
    assert len(model.latents_of(whole)) == 5
    assert autoencoder._few(8, 10_000, 10_000) == 1
