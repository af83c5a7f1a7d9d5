"""Noisy latents on a model's own sampling path, drawn in one batch however far each must go.

A fine-tuning eraser needs ``x_t`` at random depths of a guided trajectory.  Rows that have arrived leave
the batch, so the cost is the sum of the depths, not the number of rows times the deepest.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import SettingError
from ..models.base import noise_generator
from ..models.diffusion import DiffusionModel
from ..models.types import Condition

__all__ = ["Trajectories", "draw"]


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """Points on sampling paths.

    Attributes:
        latents: ``x_t``, ``(n, channels, height, width)``.
        timesteps: Where each stands, ``(n,)``.
        which: Index of each row's text, ``(n,)``.
    """

    latents: Tensor
    timesteps: Tensor
    which: Tensor


def draw(
    model: DiffusionModel,
    texts: Sequence[str],
    count: int,
    *,
    steps: int,
    guidance: float,
    seed: int,
    first: int = 0,
    low: int = 0,
    high: int | None = None,
    batch: int = 64,
) -> Trajectories:
    """``count`` points, the texts in turn, each after ``k ~ U{low, ..., high - 1}`` guided steps.

    ``x_t`` after ``k`` steps stands at the sampler's ``timesteps[k]``.  Row ``i`` depends on the seed
    and ``first + i`` only: batches and counts do not change it.

    Args:
        model: Sampled as it is now, edits included.
        texts: Prompts that are walked towards.
        count: Number of points.
        steps: Steps of the whole trajectory.
        guidance: Classifier-free guidance of the walk.
        seed: Seed of noise and depths.
        first: Number of the first row.
        low, high: Range of depths; ``high`` defaults to ``steps``.
        batch: Rows at a time.
    """
    times = model.timesteps(steps)
    high = len(times) if high is None else high
    if not 0 <= low < high <= len(times):
        raise SettingError(f"depths {low} to {high} are outside 0 to {len(times)} sampling steps")
    parts = []
    for start in range(0, count, batch):
        rows = range(first + start, first + min(start + batch, count))
        depths = torch.tensor(
            [
                int(torch.randint(low, high, (1,), generator=noise_generator(seed, "depth", i)))
                for i in rows
            ]
        )
        noise = torch.stack(
            [
                torch.randn(model.latent_shape, generator=noise_generator(seed, "walk", i))
                for i in rows
            ]
        )
        which = torch.tensor([i % len(texts) for i in rows])
        latents = _walk(
            model, model.encode([texts[int(i)] for i in which]), noise, depths, times, guidance
        )
        parts.append(Trajectories(latents, times[depths], which))
    return Trajectories(
        torch.cat([p.latents for p in parts]),
        torch.cat([p.timesteps for p in parts]),
        torch.cat([p.which for p in parts]),
    )


@torch.no_grad()
def _walk(
    model: DiffusionModel,
    condition: Condition,
    noise: Tensor,
    depths: Tensor,
    times: Tensor,
    guidance: float,
) -> Tensor:
    scheduler = model.scheduler
    scheduler.set_timesteps(len(times), device=model.device)
    latents = noise.to(model.device, model.dtype) * scheduler.init_noise_sigma
    done = latents.clone()
    active = torch.arange(len(depths))
    empty = model.encode([""])
    for step, time in enumerate(scheduler.timesteps):
        arrived = depths[active] == step
        done[active[arrived]] = latents[arrived]
        latents, active = latents[~arrived], active[~arrived]
        if not len(active):
            break
        rows = condition.select(active)
        scaled = scheduler.scale_model_input(latents, time)
        if guidance == 1.0:
            prediction = model.predict(scaled, time.reshape(1), rows)
        else:
            both = Condition.concatenate([empty.repeat(len(active)), rows])
            two = model.predict(torch.cat([scaled, scaled]), time.reshape(1), both)
            half = len(active)
            weight = torch.full((half, 1, 1, 1), guidance, device=model.device, dtype=model.dtype)
            prediction = two.select(slice(half, None)).guided(two.select(slice(half)), weight)
        latents = scheduler.step(prediction.value, time, latents, return_dict=False)[0]
    return done
