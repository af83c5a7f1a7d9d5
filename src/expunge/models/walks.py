"""One guided walk of a pipeline's scheduler, from noise or from a picture, with edits and controls at work.

A walk from a picture is what diffusers' image-to-image pipelines do: the clean latents are noised to the depth of a
share of the steps (``strength``), and the rest of the steps is walked.  Where part of the picture is kept
(inpainting with a denoiser that takes no mask), that part is put back after every step, noised to the level the
walk has come to, with the noise the walk began with:

    x <- kept (alpha' x_0 + sigma' eps) + (1 - kept) x          the last time without noise
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import PromptError, SettingError, UnsupportedModel
from .base import noise_generator
from .samplers import Sampler
from .types import Condition, Context

if TYPE_CHECKING:
    from .diffusion import DiffusionModel

__all__ = ["Source", "walk"]

NOISE = "initial noise"


@dataclasses.dataclass(frozen=True)
class Source:
    """Pictures that a walk sets out from.

    Attributes:
        latents: Scaled clean latents ``(n, channels, height, width)``.
        strength: Share of the steps that are walked, above 0 and at most 1; at least one step is.
        kept: ``(n, 1, height, width)``, 1 where the picture stays; ``None`` keeps nothing.  With something kept a
            walk of strength 1 begins with noise alone, as in diffusers.
        noise: Purpose the noise is drawn for; another one than that of the pictures themselves.
    """

    latents: Tensor
    strength: float
    kept: Tensor | None = None
    noise: str = "noise over a picture"

    def first(self, steps: int, order: int = 1) -> int:
        """Index of the first timestep that is walked.

        Raises:
            SettingError: The strength is out of range.
        """
        if not 0 < self.strength <= 1:
            raise SettingError(f"strength is {self.strength}; allowed is above 0 to 1")
        # At least one step; else as diffusers counts them.
        walked = max(1, min(int(steps * self.strength), steps))
        return (steps - walked) * order


class _Beginning:
    """Where a walk begins, and what of its picture is put back on the way."""

    def __init__(
        self, model: DiffusionModel, sampler: Sampler, seeds: Sequence[int], steps: int, source: Source | None
    ) -> None:  # fmt: skip
        self.sampler, self.first, self.kept = sampler, 0, None
        noise = model.initial_noise(seeds, NOISE if source is None else source.noise)
        if source is None:
            self.latents = sampler.start(noise)
            return
        if len(source.latents) != len(seeds):
            raise PromptError(
                f"{len(source.latents)} source pictures but {len(seeds)} seeds; one each is needed"
            )
        if not isinstance(sampler, Sampler):
            raise UnsupportedModel(
                f"{model.name} draws by a walk of its own ({type(sampler).__name__}), which cannot begin with a "
                "picture; allowed are the schedulers of diffusers"
            )
        self.first = source.first(steps, sampler.order)
        self.clean, self.noise = source.latents.to(noise), noise
        if source.kept is not None:
            self.kept = source.kept.to(noise)
        entered = sampler.enter(self.clean, noise, self.first)
        fresh = self.kept is not None and source.strength == 1
        self.latents = sampler.start(noise) if fresh else entered

    def put_back(self, latents: Tensor, step: int) -> Tensor:
        """The latents after a step, the kept part as the picture has it at that level."""
        if self.kept is None:
            return latents
        last = step + 1 == len(self.sampler.times)
        known = self.clean if last else self.sampler.noised(self.clean, self.noise, step + 1)
        return self.kept * known + (1 - self.kept) * latents


def walk(
    model: DiffusionModel,
    condition: Condition,
    seeds: Sequence[int],
    *,
    steps: int,
    stop: int | None,
    guidance: float | Tensor,
    negative: str,
    source: Source | None,
) -> Tensor:
    """Latents ``(n, c, h, w)``; see :meth:`~expunge.models.diffusion.DiffusionModel.sample`."""
    if steps < 1:
        raise PromptError(f"steps is {steps}; at least 1 is needed")
    sampler = model.sampler(steps, [noise_generator(s, "sampler noise") for s in seeds])
    count = len(seeds)
    begun = _Beginning(model, sampler, seeds, steps, source)
    latents = begun.latents
    weight = torch.as_tensor(guidance, device=model.device, dtype=model.dtype).expand(count)
    if not bool(torch.isfinite(weight).all()):
        raise SettingError(f"{model.name}: guidance is NaN or infinite; a finite number is needed")
    both = model.two_branches and sampler.guided and bool((weight != 1.0).any())
    if not model.two_branches:
        condition = model.with_guidance(condition, weight)
    if negative and not model.two_branches:
        raise PromptError(f"{model.name}: {model.layout.title} has no branch for a negative text")
    if both:
        condition = Condition.concatenate([model.unconditional(negative).repeat(count), condition])
    conditional = torch.tensor([False] * count * both + [True] * count)
    context = Context(
        steps=len(sampler.times), conditional=conditional, negative=negative, guidance=weight
    )
    for control in model.acting:
        control.start(context)
    for step in range(begun.first, len(sampler.times[:stop])):
        context.step, time = step, sampler.times[step]
        scaled = sampler.seen(latents, time)
        rows = torch.cat([scaled, scaled]) if both else scaled
        prediction = model.predict(rows, time.reshape(1), condition, context)
        if both:
            prediction = prediction.select(slice(count, None)).guided(
                prediction.select(slice(count)), weight.reshape(-1, 1, 1, 1)
            )
        latents = begun.put_back(sampler.step(prediction.value, time, latents), step)
    for control in model.acting:
        latents = control.finish(context, latents)
    if stop is not None and stop < len(sampler.times):
        latents = sampler.seen(latents, sampler.times[stop])
    return latents
