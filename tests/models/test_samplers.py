"""Samplers of every kind: the stock pipeline's pictures, private noise a row, and the space the denoiser sees."""

from __future__ import annotations

import diffusers
import numpy as np
import pytest
import torch

from expunge.errors import UnsupportedModel
from expunge.models.base import noise_generator
from expunge.models.samplers import Sampler, alpha_sigma, prediction_kind
from expunge.testing import tiny_diffusion

# diffusers hands its tables to numpy the old way
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

PROMPTS = ["a red star", "a blue circle", "a photo of a heart"]
WALKS_SCALED = ("EulerDiscrete", "LMSDiscrete", "HeunDiscrete")
QUIET = ("DDIM", "PNDM", "DPMSolverMultistep", "UniPCMultistep", "TCD", *WALKS_SCALED)
RESTLESS = ("EulerAncestralDiscrete", "DDPM", "LCM", "sde-dpmsolver++")


def sampled_by(name: str, prediction_type: str = "epsilon"):
    """A tiny model whose pipeline has another scheduler."""
    model = tiny_diffusion(prediction_type=prediction_type)
    extra = {"skip_prk_steps": True} if name == "PNDM" else {}
    if name == "sde-dpmsolver++":
        name, extra = "DPMSolverMultistep", {"algorithm_type": name}
    make = getattr(diffusers, f"{name}Scheduler")
    model.pipeline.scheduler = make.from_config(model.pipeline.scheduler.config, **extra)
    model.pipeline.set_progress_bar_config(disable=True)
    return model


@pytest.mark.parametrize("name", [*QUIET, *RESTLESS])
def test_every_scheduler_gives_the_stock_pipelines_pictures_alone_and_in_a_batch(name):
    model = sampled_by(name)
    state = torch.get_rng_state()
    whole = model.generate(PROMPTS, seeds=[7, 8, 9]).astype(int)
    assert np.array_equal(model.generate(PROMPTS, seeds=[7, 8, 9]), whole)
    alone = model.generate(PROMPTS[1], seeds=8)[0]
    assert torch.equal(torch.get_rng_state(), state)
    assert np.abs(alone - whole[1]).max() <= 1
    stock = model.pipeline(
        PROMPTS, latents=model.initial_noise([7, 8, 9]), num_inference_steps=4, guidance_scale=3.0,
        generator=[noise_generator(s, "sampler noise") for s in (7, 8, 9)], output_type="np",
    ).images  # fmt: skip
    assert np.abs(whole / 255 - stock).max() <= 1 / 255


@pytest.mark.parametrize("name", RESTLESS)
def test_the_noise_of_the_steps_is_the_seeds(name):
    model = sampled_by(name)
    condition, noise = model.encode(["a star"] * 2), model.initial_noise([1, 1])
    same = model.sample(condition, [1, 1])
    torch.testing.assert_close(same[0], same[1], atol=1e-4, rtol=1e-4)
    model.initial_noise = lambda seeds, *more: noise  # control: another seed, the same first noise
    other = model.sample(condition, [1, 2])
    assert (other[0] - other[1]).abs().max() > 1e-2


def test_noise_that_cannot_be_given_is_refused_in_words():
    class Restless(diffusers.DDIMScheduler):
        noise_sampler = None

        def step(self, model_output, timestep, sample, return_dict=True):
            raise AssertionError("not reached")

    model = tiny_diffusion()
    model.pipeline.scheduler = Restless.from_config(model.pipeline.scheduler.config)
    with pytest.raises(UnsupportedModel, match="Restless draws noise in its steps but takes no"):
        model.generate("a star")
    Sampler(sampled_by("PNDM").scheduler, 4)  # control: no noise, no generator needed


@pytest.mark.parametrize("name", ["DDIM", "PNDM", "EulerDiscrete", "HeunDiscrete"])
def test_whole_steps_begin_where_the_schedulers_order_says(name):
    model = sampled_by(name)
    sampler = model.sampler(6)
    begins = sampler.times[list(sampler.stops)]
    assert len(begins) == 6
    if len(sampler.times) == 11:  # second order: the rest lies half-way or is a repetition
        plain = sampled_by("EulerDiscrete").timesteps(6)
        torch.testing.assert_close(begins, plain, atol=1e-2, rtol=1e-4)


@pytest.mark.parametrize("name", [*WALKS_SCALED, "DDIM"])
def test_partial_gives_what_the_denoiser_is_given(name):
    model = sampled_by(name)
    condition, seen = model.encode(PROMPTS), []
    plain = model.predict
    model.predict = lambda noised, times, *rest: (
        seen.append((noised[:3].clone(), float(times))) or plain(noised, times, *rest)
    )
    model.sample(condition, [0, 1, 2], steps=4, guidance=3.0)
    for stop in (0, 2, 3):
        latents, time = model.partial(condition, [0, 1, 2], steps=4, stop=stop, guidance=3.0)
        assert float(time) == seen[stop][1]
        torch.testing.assert_close(latents, seen[stop][0], atol=1e-5, rtol=1e-5)
        assert stop or 0.8 < latents.std() < 1.2  # Euler and its like begin with a std of 14


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", [*WALKS_SCALED, "DDIM"])
def test_noised_latents_are_in_the_space_the_denoiser_sees(name, kind):
    model = sampled_by(name, kind)
    clean, noise = model.initial_noise([1]), model.initial_noise([2])
    for index in (0, 1, 2, 4):
        scheduler = model.scheduler
        scheduler.set_timesteps(5)  # for Euler and its like: times between two training timesteps
        time = scheduler.timesteps[index]
        walked = scheduler.add_noise(clean, noise, time.reshape(1))
        seen = scheduler.scale_model_input(walked, time)
        noised = model.noised(clean, noise, time.reshape(1))
        torch.testing.assert_close(noised, seen, atol=1e-5, rtol=1e-5)
        if "Heun" in name:
            continue  # its step gives no clean latents
        # The prediction's clean latents are those the scheduler itself reads off.
        with torch.no_grad():
            made = model.predict(noised, time.reshape(1), model.encode("a star"))
        theirs = scheduler.step(made.value, time, walked).pred_original_sample
        torch.testing.assert_close(made.x0(noised), theirs, atol=1e-3, rtol=1e-3)


def test_noise_levels_between_timesteps_are_interpolated():
    scheduler = sampled_by("EulerDiscrete").scheduler
    alpha, sigma = alpha_sigma(scheduler, torch.tensor([10.0, 10.5, 11.0, 999.0]))
    exact = alpha_sigma(scheduler, torch.tensor([10, 11, 999]))
    assert torch.equal(alpha[[0, 2, 3]], exact[0]) and torch.equal(sigma[[0, 2, 3]], exact[1])
    ratio = sigma / alpha
    assert ratio[1] == pytest.approx(float(ratio[0] + ratio[2]) / 2)
    assert float(alpha[1] ** 2 + sigma[1] ** 2) == pytest.approx(1)


def test_schedules_that_are_not_known_are_refused():
    assert prediction_kind(diffusers.FlowMatchEulerDiscreteScheduler()) == "flow"
    alpha, sigma = alpha_sigma(diffusers.FlowMatchEulerDiscreteScheduler(), torch.tensor([250.0]))
    assert (float(alpha), float(sigma)) == (0.75, 0.25)
    for make in (diffusers.EDMEulerScheduler, diffusers.IPNDMScheduler):
        with pytest.raises(UnsupportedModel, match=make.__name__):
            prediction_kind(make())
    other = diffusers.DDIMScheduler(prediction_type="flow_prediction")
    with pytest.raises(UnsupportedModel, match="flow_prediction"):
        prediction_kind(other)


def test_flow_matching_in_a_solver_with_a_table_of_alphas():
    make = diffusers.DPMSolverMultistepScheduler
    scheduler = make(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    assert prediction_kind(scheduler) == "flow"
    sampler = Sampler(scheduler, 5)
    alpha, sigma = alpha_sigma(scheduler, sampler.times)
    # Timesteps are whole thousandths there, the solver's own noise levels are not rounded.
    torch.testing.assert_close(sigma.float(), scheduler.sigmas[:5], atol=1e-3, rtol=0)
    torch.testing.assert_close(alpha + sigma, torch.ones(5, dtype=torch.float64))
    for half in ({"prediction_type": "flow_prediction"}, {"use_flow_sigmas": True}):
        with pytest.raises(UnsupportedModel, match="flow matching needs both"):
            prediction_kind(make(**half))
