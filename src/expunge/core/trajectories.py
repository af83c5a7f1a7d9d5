"""Noisy latents on a model's own sampling path, drawn in one batch however far each must go.

A fine-tuning eraser needs ``x_t`` at random depths of a guided trajectory.  The denoiser is no longer asked
about rows that have arrived, so the cost is the sum of the depths, not the number of rows times the deepest; with
something on the model that acts on guidance, all rows are asked about until the last has arrived.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import SettingError
from ..models.base import noise_generator
from ..models.diffusion import DiffusionModel
from ..models.samplers import Sampler
from ..models.types import Condition, Context

__all__ = ["Trajectories", "depths_of", "draw", "draw_along", "relabelled"]


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """Points on sampling paths.

    Attributes:
        latents: ``x_t`` as the denoiser sees it, ``(n, channels, height, width)``.
        timesteps: Where each stands, ``(n,)``.
        which: Index of each row's text, ``(n,)``.
    """

    latents: Tensor
    timesteps: Tensor
    which: Tensor

    def select(self, rows: Any) -> Trajectories:
        """Some of the points, by slice, list or index tensor."""
        return Trajectories(self.latents[rows], self.timesteps[rows], self.which[rows])

    def repeat(self, each: int) -> Trajectories:
        """Each point ``each`` times in a row."""
        return self.select(torch.arange(len(self.which)).repeat_interleave(each))

    @staticmethod
    def concatenate(parts: Sequence[Trajectories]) -> Trajectories:
        """Points of several draws, one after another."""
        return Trajectories(
            torch.cat([p.latents for p in parts]),
            torch.cat([p.timesteps for p in parts]),
            torch.cat([p.which for p in parts]),
        )


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
    depths: Tensor | None = None,
    batch: int = 64,
) -> Trajectories:
    """``count`` points, the texts in turn, each after ``k ~ U{low, ..., high - 1}`` guided steps.

    Steps are whole ones: schedulers of second order ask the denoiser twice in each, and no point lies
    half-way.  Row ``i`` depends on the seed and ``first + i`` only: batches and counts do not change it.

    Args:
        model: Sampled as it is now, edits included.
        texts: Prompts that are walked towards.
        count: Number of points.
        steps: Steps of the whole trajectory.
        guidance: Classifier-free guidance of the walk.
        seed: Seed of noise and depths.
        first: Number of the first row.
        low, high: Range of depths; ``high`` defaults to ``steps``.
        depths: The depth of each row, ``(n,)``, in place of drawn ones.
        batch: Rows at a time.
    """
    (points,) = draw_along(
        model, texts, count, [(low, high)], steps=steps, guidance=guidance, seed=seed, first=first, batch=batch,
        given=depths,
    )  # fmt: skip
    return points


def draw_along(
    model: DiffusionModel,
    texts: Sequence[str],
    count: int,
    ranges: Sequence[tuple[int, int | None]],
    *,
    steps: int,
    guidance: float,
    seed: int,
    first: int = 0,
    batch: int = 64,
    given: Tensor | None = None,
    shape: tuple[int, int, int] | None = None,
) -> list[Trajectories]:
    """Several points of each of ``count`` walks, at the cost of the deepest alone.

    Args:
        ranges: ``(low, high)`` of each point's depth, independent draws; the first is that of :func:`draw`.
        given: The depths of the first range's points, in place of drawn ones.
        shape: ``(channels, height, width)`` of the latents; default: the model's own.
        model, texts, count, steps, guidance, seed, first, batch: As in :func:`draw`, of walks.

    Returns:
        The points of each range; row ``i`` of all of them lies on walk ``i``.
    """
    whole = model.sampler(steps)
    stops = torch.tensor(whole.stops)
    bounds = [(low, len(stops) if high is None else high) for low, high in ranges]
    for low, high in bounds:
        if not 0 <= low < high <= len(stops):
            raise SettingError(
                f"depths {low} to {high} are outside 0 to {len(stops)} sampling steps"
            )
    parts: list[list[Trajectories]] = [[] for _ in bounds]
    for start in range(0, count, batch):
        rows = range(first + start, first + min(start + batch, count))
        depths = [_depths(seed, index, rows, *own) for index, own in enumerate(bounds)]
        if given is not None:
            depths[0] = given[start : start + len(rows)]
        noise = torch.stack(
            [
                torch.randn(shape or model.latent_shape, generator=noise_generator(seed, "walk", i))
                for i in rows
            ]
        )
        which = torch.tensor([i % len(texts) for i in rows])
        sampler = model.sampler(steps, [noise_generator(seed, "walk noise", i) for i in rows])
        towards, weight = model.encode([texts[int(i)] for i in which]), guidance
        if not model.two_branches:
            towards, weight = model.with_guidance(towards, guidance), 1.0
        found = _walk(model, sampler, towards, noise, [stops[d] for d in depths], weight)
        for part, latents, own in zip(parts, found, depths, strict=True):
            part.append(Trajectories(latents, whole.times.cpu()[stops[own]], which))
    return [Trajectories.concatenate(part) for part in parts]


def _bins(model: DiffusionModel, steps: int) -> tuple[Tensor, Tensor]:
    """``(low, high)`` of the timesteps that are nearest below each depth's noise level: low <= t < high."""
    times = model.timesteps(steps).unique().flip(0).cpu()
    low = times - int(getattr(model.pipeline.scheduler.config, "steps_offset", 0) or 0)
    whole = times.new_tensor([int(model.pipeline.scheduler.config.num_train_timesteps)])
    return low, torch.cat([whole, low[:-1]])


def relabelled(
    model: DiffusionModel, points: Trajectories, *, steps: int, seed: int, first: int = 0
) -> Trajectories:
    """Points of :func:`draw`, each with a timestep drawn anew between its own and that of the next noisier step.

    With the 50 steps of Stable Diffusion, level ``s`` (0 is the cleanest) gets ``t ~ U{20 s, ..., 20 s + 19}``, as
    the code of several fine-tuning erasers does it.  Row ``i`` depends on the seed and ``first + i`` only.

    Args:
        model: Its schedule is read.
        points: Points with their own timesteps.
        steps, seed, first: As they were drawn with.
    """
    low, high = (bound[depths_of(model, points, steps=steps)] for bound in _bins(model, steps))
    draws = [noise_generator(seed, "label", first + i) for i in range(len(low))]
    share = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in draws])
    made = low + share * (high - low)
    if not points.timesteps.is_floating_point():
        made = made.floor()
    return dataclasses.replace(points, timesteps=made.to(points.timesteps))


def depths_of(
    model: DiffusionModel, points: Trajectories, *, steps: int, binned: bool = False
) -> Tensor:
    """After how many steps each point stands, ``(n,)``; ``binned`` where they were :func:`relabelled`."""
    bounds = _bins(model, steps)[0] if binned else model.timesteps(steps).unique().flip(0).cpu()
    return (bounds[None] > points.timesteps.cpu()[:, None]).sum(1)


def _depths(seed: int, index: int, rows: Sequence[int], low: int, high: int) -> Tensor:
    """How deep the ``index``-th point of each walk lies, ``(n,)``."""
    purpose = "depth" if index == 0 else f"depth {index}"
    drawn = (
        torch.randint(low, high, (1,), generator=noise_generator(seed, purpose, i)) for i in rows
    )
    return torch.tensor([int(depth) for depth in drawn])


def _guided(model: DiffusionModel, sampler: Sampler, count: int, guidance: float) -> Context | None:
    """What is told to whatever acts on guidance (SLD, a negative text), if anything does."""
    if not any(control.on_guidance() for control in model.acting):
        return None
    weight = torch.full((count,), guidance, device=model.device, dtype=model.dtype)
    flags = torch.tensor([False] * count + [True] * count)
    context = Context(steps=len(sampler.times), conditional=flags, guidance=weight)
    for control in model.acting:
        control.start(context)
    return context


@torch.no_grad()
def _walk(
    model: DiffusionModel,
    sampler: Sampler,
    condition: Condition,
    noise: Tensor,
    stops: Sequence[Tensor],
    guidance: float,
) -> list[Tensor]:
    """The rows at ``times[stops]`` for each of several ``stops (n,)``, scaled for the denoiser."""
    both = guidance != 1.0 and sampler.guided
    context = _guided(model, sampler, len(noise), guidance) if both else None
    latents = sampler.start(noise.to(model.device, model.dtype))
    done, value = [latents.clone() for _ in stops], torch.zeros_like(latents)
    last = torch.stack(list(stops)).amax(0)
    empty = model.unconditional()
    for call, time in enumerate(sampler.times):
        seen = sampler.seen(latents, time)
        for found, stop in zip(done, stops, strict=True):
            arrived = (stop == call).nonzero().flatten()
            found[arrived] = seen[arrived].to(found.dtype)
        active = (last > call).nonzero().flatten()
        if not len(active):
            break
        if context is not None:  # what acts on guidance remembers all pictures from step to step
            active, context.step = torch.arange(len(noise)), call
        rows, scaled = condition.select(active), seen[active]
        if not both:
            prediction = model.predict(scaled, time.reshape(1), rows)
        else:
            asked = Condition.concatenate([empty.repeat(len(active)), rows])
            two = model.predict(torch.cat([scaled, scaled]), time.reshape(1), asked, context)
            half = len(active)
            weight = torch.full((half, 1, 1, 1), guidance, device=model.device, dtype=model.dtype)
            prediction = two.select(slice(half, None)).guided(two.select(slice(half)), weight)
        # Multistep schedulers keep earlier values of every row, so rows that have arrived go on through
        # the step, with what was last predicted for them, and are not looked at again.
        value = value.clone()
        value[active] = prediction.value
        latents = sampler.step(value, time, latents)
    return done
