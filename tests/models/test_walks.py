"""Walks from a picture, against diffusers' own image-to-image and inpainting pipelines."""

from __future__ import annotations

import diffusers
import pytest
import torch

from expunge.errors import PromptError, SettingError, UnsupportedModel
from expunge.models.diffusion import DiffusionModel
from expunge.models.walks import Source
from expunge.testing import tiny_diffusion
from expunge.testing.layouts import tiny_layout

PROMPT, STEPS, GUIDANCE = "a red star", 6, 3.0
SCHEDULERS = (
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "PNDMScheduler",
    "HeunDiscreteScheduler",
)


@pytest.fixture
def fixed_noise(monkeypatch):
    """The noise that the stock pipelines draw from their generator, given to the adapter."""

    def noise(self, seeds, purpose=""):
        shape = (1, *self.latent_shape)
        return torch.cat([torch.randn(shape, generator=torch.manual_seed(s)) for s in seeds])

    monkeypatch.setattr(DiffusionModel, "initial_noise", noise)
    with torch.random.fork_rng(devices=[]):
        yield


def clean() -> torch.Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(9))


def walking(name: str) -> DiffusionModel:
    model = tiny_diffusion()
    config = model.pipeline.scheduler.config
    model.pipeline.scheduler = getattr(diffusers, name).from_config(config)
    return model


def sampled(model: DiffusionModel, source: Source) -> torch.Tensor:
    with torch.no_grad():
        return model.sample(
            model.encode(PROMPT), [5], steps=STEPS, guidance=GUIDANCE, source=source
        )


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_walk_from_a_picture_is_that_of_diffusers(fixed_noise, name, strength):
    model = walking(name)
    stock = diffusers.StableDiffusionImg2ImgPipeline(
        **model.pipeline.components, requires_safety_checker=False
    )
    stock.set_progress_bar_config(disable=True)
    wanted = stock(
        PROMPT, image=clean(), strength=strength, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        generator=torch.manual_seed(5), output_type="latent",
    ).images  # fmt: skip
    found = sampled(model, Source(clean(), strength))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("strength", [0.5, 1.0])
@pytest.mark.parametrize("name", SCHEDULERS[:3])
def test_inpainting_is_that_of_diffusers(fixed_noise, name, strength):
    model = walking(name)
    stock = diffusers.StableDiffusionInpaintPipeline(
        **model.pipeline.components, requires_safety_checker=False
    )
    stock.set_progress_bar_config(disable=True)
    anew = torch.zeros(1, 1, 16, 16)
    anew[..., 4:12] = 1
    wanted = stock(
        PROMPT, image=clean(), mask_image=anew, masked_image_latents=clean(), height=16, width=16, strength=strength,
        num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=torch.manual_seed(5),
        output_type="latent",
    ).images  # fmt: skip
    kept = 1 - torch.nn.functional.max_pool2d(anew, 2)
    found = sampled(model, Source(clean(), strength, kept))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[..., :2], clean()[..., :2])


def test_flow_matching_walks_are_those_of_diffusers(fixed_noise):
    model = tiny_layout("sd3")
    stock = diffusers.StableDiffusion3Img2ImgPipeline(**model.pipeline.components)
    stock.set_progress_bar_config(disable=True)
    shape = (1, *model.latent_shape)
    start = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    wanted = stock(
        PROMPT, image=start, strength=0.5, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        height=shape[2] * model.layout.scale_factor, width=shape[3] * model.layout.scale_factor,
        generator=torch.manual_seed(5), output_type="latent",
    ).images  # fmt: skip
    found = sampled(model, Source(start, 0.5))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_all_kept_gives_the_picture_back_and_little_strength_little_change():
    model, whole = tiny_diffusion(), torch.ones(1, 1, 8, 8)
    assert torch.equal(sampled(model, Source(clean(), 1.0, whole)), clean())
    near, far = (sampled(model, Source(clean(), s)) - clean() for s in (0.2, 0.9))
    assert near.norm() < far.norm()


def test_only_the_walked_steps_are_paid_for():
    model = tiny_diffusion()
    before = model.cost.snapshot()
    sampled(model, Source(clean(), 0.5))
    assert model.cost.since(before)["denoiser.forward"] == 2 * 3


def test_refusals():
    model = tiny_diffusion()
    for strength in (0.0, -0.1, 1.5):
        with pytest.raises(SettingError, match="allowed is above 0 to 1"):
            sampled(model, Source(clean(), strength))
    with pytest.raises(PromptError, match="2 source pictures but 1 seeds"):
        sampled(model, Source(clean().repeat(2, 1, 1, 1), 0.5))
    model.pipeline.scheduler = diffusers.CMStochasticIterativeScheduler.from_config({})
    with pytest.raises(UnsupportedModel):
        sampled(model, Source(clean(), 0.5))
