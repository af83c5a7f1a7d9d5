"""Points on sampling paths: those of the stock pipeline with every scheduler, whatever the depths beside them."""

from __future__ import annotations

import diffusers
import pytest
import torch

from expunge.core import trajectories
from expunge.erase.diffusion.sld import SLD
from expunge.models.base import noise_generator
from expunge.testing import tiny_diffusion

# diffusers hands its tables to numpy the old way
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")

TEXTS = ["a red star", "a blue circle"]
SCHEDULERS = (
    "DDIM", "PNDM", "LMSDiscrete", "EulerDiscrete", "HeunDiscrete", "DPMSolverMultistep",
    "UniPCMultistep", "EulerAncestralDiscrete",
)  # fmt: skip


def sampled_by(name: str):
    model = tiny_diffusion()
    extra = {"skip_prk_steps": True} if name == "PNDM" else {}
    make = getattr(diffusers, f"{name}Scheduler")
    model.pipeline.scheduler = make.from_config(model.pipeline.scheduler.config, **extra)
    model.pipeline.set_progress_bar_config(disable=True)
    return model


def stock_path(model, text: str, row: int, steps: int, seed: int):
    """What the stock pipeline gives its denoiser at each call, and the timesteps, for one row's noise."""
    seen: list[tuple[torch.Tensor, float]] = []
    hook = model.denoiser.register_forward_pre_hook(
        lambda module, args: seen.append((args[0][:1].clone(), float(args[1])))
    )
    noise = torch.randn(model.latent_shape, generator=noise_generator(seed, "walk", row))
    model.pipeline(
        text, latents=noise[None], num_inference_steps=steps, guidance_scale=3.0, output_type="latent",
        generator=[noise_generator(seed, "walk noise", row)],
    )  # fmt: skip
    hook.remove()
    return seen


@pytest.mark.parametrize("name", SCHEDULERS)
def test_points_are_those_of_the_stock_pipeline(name):
    """Six rows of different depths in one batch; each as if it had walked alone."""
    model, steps, seed = sampled_by(name), 5, 3
    state = torch.get_rng_state()
    points = trajectories.draw(model, TEXTS, 6, steps=steps, guidance=3.0, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    depths = [
        int(torch.randint(0, steps, (1,), generator=noise_generator(seed, "depth", i)))
        for i in range(6)
    ]
    assert len(set(depths)) > 2
    order = model.scheduler.order
    for row, depth in enumerate(depths):
        path = stock_path(model, TEXTS[row % 2], row, steps, seed)
        latents, time = path[depth * order]
        assert float(points.timesteps[row]) == time
        torch.testing.assert_close(points.latents[row], latents[0], atol=1e-4, rtol=1e-4)
    noise = trajectories.draw(model, TEXTS, 6, steps=steps, guidance=3.0, seed=seed, high=1).latents
    assert 0.8 < noise.std() < 1.2  # where Euler and its like begin with a std of 14


@pytest.mark.parametrize("name", ["DDIM", "PNDM", "LMSDiscrete"])
def test_the_denoiser_is_asked_about_rows_on_their_way_only(name):
    model = sampled_by(name)
    before = model.cost.snapshot()
    points = trajectories.draw(model, TEXTS, 8, steps=5, guidance=3.0, seed=1)
    depths = [
        int(torch.randint(0, 5, (1,), generator=noise_generator(1, "depth", i))) for i in range(8)
    ]
    assert model.cost.rows("denoiser", before) == 2 * sum(depths) < 2 * 8 * max(depths)
    assert len(points.which) == 8


@pytest.mark.parametrize(("name", "calls"), [("PNDM", 6), ("HeunDiscrete", 9)])
def test_depths_are_whole_steps_of_the_asked_number(name, calls):
    """PNDM has one timestep more than steps and Heun nearly twice as many; depths run from 0 to steps - 1."""
    model = sampled_by(name)
    assert len(model.timesteps(5)) == calls
    points = trajectories.draw(model, ["a star"], 64, steps=5, guidance=1.0, seed=0)
    allowed = model.timesteps(5)[list(model.sampler(5).stops)]
    assert len(allowed) == 5 and set(points.timesteps.tolist()) == set(allowed.tolist())


@pytest.mark.parametrize("name", ["DDIM", "HeunDiscrete", "UniPCMultistep"])
def test_points_along_one_walk_are_those_of_separate_walks(name):
    """Two depths of each walk: the first as ``draw`` gives it, the second on the same path, at one cost."""
    model, ranges = sampled_by(name), [(2, 5), (0, 2)]
    before = model.cost.snapshot()
    late, early = trajectories.draw_along(model, TEXTS, 4, ranges, steps=5, guidance=3.0, seed=3)
    along = model.cost.rows("denoiser", before)
    before = model.cost.snapshot()
    alone = trajectories.draw(model, TEXTS, 4, steps=5, guidance=3.0, seed=3, low=2, high=5)
    assert model.cost.rows("denoiser", before) == along
    torch.testing.assert_close(late.latents, alone.latents)
    assert torch.equal(late.timesteps, alone.timesteps) and torch.equal(late.which, early.which)
    for row in range(4):
        path = stock_path(model, TEXTS[row % 2], row, 5, 3)
        times = [time for _, time in path]
        # Heun's times come twice; a whole step ends at the second.
        place = len(times) - 1 - times[::-1].index(float(early.timesteps[row]))
        assert place // model.scheduler.order < 2
        torch.testing.assert_close(early.latents[row], path[place][0][0], atol=1e-4, rtol=1e-4)


def test_walks_of_a_model_with_a_defence_are_its_own_walks(monkeypatch):
    """Safe Latent Diffusion acts on guidance and remembers: rows that arrive early must not disturb the rest."""
    model, depths = tiny_diffusion(), torch.tensor([3, 1, 4, 2])
    edit = SLD.configured("paper:max").erase(model, "heart")
    condition = model.encode([TEXTS[i % 2] for i in range(4)])
    noise = torch.stack(
        [torch.randn(model.latent_shape, generator=noise_generator(3, "walk", i)) for i in range(4)]
    )
    options = {"steps": 5, "guidance": 3.0, "seed": 3, "depths": depths}
    plain = trajectories.draw(model, TEXTS, 4, **options).latents
    with edit.on(model):
        found = trajectories.draw(model, TEXTS, 4, **options)
        monkeypatch.setattr(model, "initial_noise", lambda seeds, purpose="": noise)
        for row, depth in enumerate(depths.tolist()):
            expected, time = model.partial(condition, range(4), steps=5, stop=depth, guidance=3.0)
            torch.testing.assert_close(found.latents[row], expected[row], atol=1e-4, rtol=1e-4)
            assert found.timesteps[row] == time
    assert (found.latents - plain).abs().amax((1, 2, 3)).min() > 1e-3
