"""Inversion and regeneration: the library's own schedulers as oracles, exact round trips, and purification."""

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler

from expunge.core.inversion import invert, purify, regenerate
from expunge.erase.diffusion.sld import SLD
from expunge.errors import InputError, PromptError, UnsupportedModel
from expunge.testing import tiny_diffusion, tiny_layout

# diffusers hands its tables to numpy the old way
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

STEPS = 5


def latents(model, seed=0, count=2):
    return torch.randn(count, *model.latent_shape, generator=torch.Generator().manual_seed(seed))


def scheduled(model, **changes):
    scheduler = model.pipeline.scheduler
    # As arguments: what a copied configuration says of options that were left out is thrown away by diffusers.
    model.pipeline.scheduler = type(scheduler).from_config(scheduler.config, **changes)
    assert all(model.pipeline.scheduler.config[name] == value for name, value in changes.items())
    return model


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_inversion_is_that_of_the_inverse_scheduler(prediction, guidance, spacing):
    model = scheduled(tiny_diffusion(prediction_type=prediction), timestep_spacing=spacing)
    inverse = DDIMInverseScheduler.from_config(model.pipeline.scheduler.config)
    inverse.set_timesteps(STEPS)
    found = x = latents(model)
    condition, empty = model.encode(["a star", "a red star"]), model.unconditional().repeat(2)
    with torch.no_grad():
        for time in inverse.timesteps:
            value, other = (model.predict(x, time.reshape(1), c).value for c in (condition, empty))
            x = inverse.step(other + guidance * (value - other), int(time), x).prev_sample
    found = invert(model, found, condition, steps=STEPS, guidance=guidance)
    torch.testing.assert_close(found, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "sd3", "flux"])
def test_regeneration_is_what_the_models_own_sampler_does(kind):
    """DDIM, and Euler under flow matching, are deterministic: nothing is new on the way down."""
    own = kind in ("sd3", "flux")
    model = tiny_layout(kind) if own else tiny_diffusion(prediction_type=kind)
    condition = model.encode(["a star", "a red star"])
    noise = model.initial_noise([3, 4])
    with torch.no_grad():
        expected = model.sample(condition, [3, 4], steps=STEPS, guidance=2.0)
    found = regenerate(model, noise, condition, steps=STEPS, guidance=2.0)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "pixart", "sd3"])
def test_refined_round_trip_is_exact_and_the_plain_one_is_not(kind):
    """Steps must be short for the iteration to converge: a random network changes its mind quickly."""
    own = kind in ("epsilon", "v_prediction")
    model = tiny_diffusion(prediction_type=kind) if own else tiny_layout(kind)
    condition, start = model.encode(["a star", "a red star"]), latents(model, 1)
    gaps = []
    for refinements in (0, 6):
        noise = invert(model, start, condition, steps=20, refinements=refinements)
        back = regenerate(model, noise, condition, steps=20)
        gaps.append(float((back - start).abs().max()))
    assert gaps[1] < 0.02 * gaps[0]


def test_rows_do_not_depend_on_one_another():
    model = tiny_diffusion()
    condition, start = model.encode(["a star", "a red star"]), latents(model, 1)
    both = invert(model, start, condition, steps=STEPS, guidance=2.0)
    one = invert(model, start[1:], condition.select(slice(1, 2)), steps=STEPS, guidance=2.0)
    torch.testing.assert_close(both[1:], one, atol=1e-5, rtol=1e-4)


def test_rows_are_counted():
    model = tiny_diffusion()
    before = model.cost.snapshot()
    invert(model, latents(model), model.encode(["a star"] * 2), steps=STEPS, refinements=1)
    assert model.cost.rows("denoiser", before) == 2 * 2 * STEPS
    regenerate(model, latents(model), model.encode(["a star"] * 2), steps=STEPS, guidance=2.0)
    assert model.cost.rows("denoiser", before) == 2 * 2 * STEPS + 2 * 2 * STEPS


class TestPurify:
    pictures = np.random.default_rng(0).integers(0, 256, (3, 16, 16, 3), np.uint8)

    def test_one_prompt_stands_for_all_and_batches_do_not_matter(self):
        model = tiny_diffusion()
        whole = purify(model, self.pictures, "a star", steps=STEPS)
        parts = purify(model, self.pictures, ["a star"] * 3, steps=STEPS, batch=2)
        assert whole.shape == self.pictures.shape and whole.dtype == np.uint8
        assert np.abs(whole.astype(int) - parts).max() <= 1

    def test_an_exact_round_trip_returns_what_the_autoencoder_keeps(self):
        """So a concept is only lost by what differs between the two ways."""
        model = tiny_layout("pixart")
        kept = model.pictures_of(model.latents_of(self.pictures))
        options = {"steps": 20, "guidance": 1.0, "refinements": 6}
        same = purify(model, self.pictures, "a star", **options)
        assert np.abs(same.astype(int) - kept).max() <= 1
        other = purify(model, self.pictures, "a star", **{**options, "guidance": 3.0})
        assert np.abs(other.astype(int) - kept).max() > 1

    def test_the_original_may_invert(self):
        from expunge.erase.diffusion.esd import ESD

        model = tiny_layout("pixart")
        kept = model.pictures_of(model.latents_of(self.pictures))
        edit = ESD(steps=4, lr=1e-2, sampling_steps=4).erase(model, "star")
        options = {"steps": 20, "guidance": 1.0, "refinements": 6}
        with edit.on(model):
            one = purify(model, self.pictures, "a star", **options)
            two = purify(model, self.pictures, "a star", original_inverts=True, **options)
            assert model.edits.digests == (edit.digest,)
        assert np.abs(one.astype(int) - kept).max() <= 1 < np.abs(two.astype(int) - kept).max()

    def test_what_does_not_fit_is_refused(self):
        model = tiny_diffusion()
        with pytest.raises(InputError, match=r"\(n, 16, 16, 3\)"):
            purify(model, self.pictures[:, :8], "a star")
        with pytest.raises(PromptError, match="3 pictures but 2 prompts"):
            purify(model, self.pictures, ["a star"] * 2)
        clean = scheduled(tiny_diffusion(prediction_type="sample"), set_alpha_to_one=True)
        with pytest.raises(UnsupportedModel, match="ends without noise"):
            purify(clean, self.pictures, "a star")
        assert purify(model, self.pictures[:0], "a star").shape == (0, 16, 16, 3)


def test_a_defence_that_acts_on_guidance_acts_on_the_way_down():
    model = tiny_diffusion()
    edit = SLD.configured("paper:max").erase(model, "heart")
    noise, condition = model.initial_noise([3, 4]), model.encode(["a star", "a red star"])
    plain = regenerate(model, noise, condition, steps=STEPS, guidance=3.0)
    with edit.on(model):
        with torch.no_grad():
            expected = model.sample(condition, [3, 4], steps=STEPS, guidance=3.0)
        found = regenerate(model, noise, condition, steps=STEPS, guidance=3.0)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - plain).abs().max() > 1e-2
