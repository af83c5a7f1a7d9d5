"""What erasers that regress a denoiser's scores share: points, the frozen model's answers, noised pictures.

    source = PointSource(model, ["star"], steps=50, guidance=3, seed=0, batch=1, answer=targets)
    points, answers = source.at(step)              # inside Task.step
    loss = (epsilon(model, points, condition.select(points.which)) - answers["target"]).square().mean()

Answers come from the model before training, whatever stands on it while it trains.  Everything is asked for as
noise, in the units of the papers; the adapter converts what ``v`` and flow-matching denoisers predict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import SettingError
from ..models.diffusion import DiffusionModel
from ..models.types import Condition
from . import trajectories
from .tasks import Step
from .trajectories import Trajectories

__all__ = [
    "WALKED", "Answer", "PointSource", "asked", "denoising_error", "epsilon", "noised", "random_times",
]  # fmt: skip

Answer = Callable[[Trajectories], Mapping[str, Tensor]]
"""Points -> tensors with one row a point."""

WALKED = ("frozen", "student")
"""Whose sampling gives the points: the model before training, or as it is while it trains."""

BATCH = 64


def epsilon(model: DiffusionModel, points: Trajectories, condition: Condition) -> Tensor:
    """The noise that the model, as it is now, sees in each point: float32 ``(n, c, h, w)``."""
    made = model.predict(points.latents, points.timesteps, condition)
    # Squares of small differences vanish in half precision.
    return made.epsilon(points.latents).float()


@torch.no_grad()
def asked(
    model: DiffusionModel, points: Trajectories, conditions: Sequence[Condition], batch: int = BATCH
) -> list[Tensor]:
    """:func:`epsilon` of all points under each condition, without gradients, ``batch`` rows at a time.

    Args:
        model: As it is now.
        points: ``n`` points.
        conditions: Each of ``n`` rows, or of one row for all points.
        batch: Rows of a pass.
    """
    count, several = len(points.which), len(conditions)
    whole = [c.repeat(count) if c.rows == 1 and count != 1 else c for c in conditions]
    each = max(1, batch // max(1, several))
    made: list[list[Tensor]] = [[] for _ in conditions]
    for start in range(0, count, each):
        part = slice(start, start + each)
        some = points.select(part)
        stacked = Trajectories.concatenate([some] * several)
        rows = Condition.concatenate([condition.select(part) for condition in whole])
        for found, piece in zip(made, epsilon(model, stacked, rows).chunk(several), strict=True):
            found.append(piece)
    return [torch.cat(found) for found in made]


class PointSource:
    """Points on sampling paths and the frozen model's answers about them, for each step of a training.

    Without a bank each step draws fresh points, as the papers do: with the model as it was before training
    (``walked="frozen"``) or as it is by now (``"student"``).  ``bank`` draws that many points and their answers
    once, before training, and steps pick among them; that is exact in kind for frozen walks, where points and
    answers both come from the frozen model, and refused for the student's, which no bank can follow.

    Args:
        model: The model; when the source is made it must be as it was before training.
        texts: What is walked towards, in turn.
        steps, guidance, low, high: Of :func:`expunge.core.trajectories.draw`.
        seed: Seed of noise and depths.
        batch: Points a step.
        answer: Points -> answers; called while the model is as before training, without gradients.
        bank: Points drawn once; ``None`` draws fresh ones.
        walked: ``frozen`` or ``student``.
        ranges: Instead of ``low`` and ``high``: depths of several points of each walk, see
            :func:`expunge.core.trajectories.draw_along`.  Points and answers then come range by range,
            ``batch`` walks of the first range before those of the second; a bank holds ``bank`` walks.
        binned: Timesteps are drawn anew inside bins, see :func:`expunge.core.trajectories.relabelled`.
        partial: A bank may be smaller than the number of texts and leave the last ones out.

    Raises:
        SettingError: ``walked`` is unknown, a bank was asked for of the student's walks, or it has no point for
            some of the texts.
    """

    def __init__(
        self,
        model: DiffusionModel,
        texts: Sequence[str],
        *,
        steps: int,
        guidance: float,
        seed: int,
        batch: int,
        answer: Answer,
        bank: int | None = None,
        walked: str = "frozen",
        low: int = 0,
        high: int | None = None,
        ranges: Sequence[tuple[int, int | None]] | None = None,
        binned: bool = False,
        partial: bool = False,
    ) -> None:
        if walked not in WALKED:
            raise SettingError(f"walked is {walked!r}; allowed: {', '.join(map(repr, WALKED))}")
        if bank is not None and walked == "student":
            raise SettingError(
                "a bank of points cannot follow the student's own walks; allowed is walked='frozen' or no bank"
            )
        if bank is not None and bank < len(texts) and not partial:
            raise SettingError(
                f"bank={bank} has no point for {len(texts) - bank} of {len(texts)} texts; allowed is at least one each"
            )
        self.model, self.texts, self.answer, self.batch = model, list(texts), answer, batch
        self.walked, self.seed, self.binned = walked, seed, binned
        self.walk: dict[str, Any] = {"steps": steps, "guidance": guidance}
        self.ranges = [(low, high)] if ranges is None else list(ranges)
        self.bank: tuple[Trajectories, Mapping[str, Tensor]] | None = None
        if bank is not None:
            points = self._drawn(0, bank)
            self.bank = points, self._answers(points)

    def at(
        self,
        step: Step,
        *,
        batch: int | None = None,
        first: int | None = None,
        shape: tuple[int, int, int] | None = None,
    ) -> tuple[Trajectories, Mapping[str, Tensor]]:
        """The points of one step and the answers about them.

        Args:
            step: The step.
            batch: Another number of walks than the source's own.
            first: For several draws in one step: the number of the first walk, different for each of them.
            shape: ``(channels, height, width)`` of fresh points; default: the model's own.  A bank has but one.
        """
        count = self.batch if batch is None else batch
        start = step.index * self.batch if first is None else first
        if self.bank is not None:
            points, answers = self.bank
            draw = step.generator("pick" if first is None else f"pick {first}")
            walks = len(points.which) // len(self.ranges)
            pick = torch.randint(walks, (count,), generator=draw)
            pick = torch.cat([pick + block * walks for block in range(len(self.ranges))])
            return points.select(pick), {name: found[pick] for name, found in answers.items()}
        if self.walked == "student":
            points = self._drawn(start, count, shape)
            with step.original():
                return points, self._answers(points)
        with step.original():
            points = self._drawn(start, count, shape)
            return points, self._answers(points)

    def _drawn(
        self, first: int, count: int, shape: tuple[int, int, int] | None = None
    ) -> Trajectories:
        found = trajectories.draw_along(
            self.model, self.texts, count, self.ranges, seed=self.seed, first=first, shape=shape, **self.walk
        )  # fmt: skip
        if self.binned:
            own = {"steps": self.walk["steps"], "seed": self.seed, "first": first}
            found = [trajectories.relabelled(self.model, points, **own) for points in found]
        return Trajectories.concatenate(found)

    @torch.no_grad()
    def _answers(self, points: Trajectories) -> Mapping[str, Tensor]:
        parts = [
            self.answer(points.select(slice(start, start + BATCH)))
            for start in range(0, len(points.which), BATCH)
        ]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


# -- pictures ----------------------------------------------------------------------------------------


def random_times(
    model: DiffusionModel,
    count: int,
    generator: torch.Generator,
    *,
    low: float = 0.0,
    high: float = 1.0,
) -> Tensor:
    """Training timesteps ``(n,)``, uniform over a share of the schedule; 0 is clean, 1 is noise.

    Whole timesteps ``{low T, ..., high T - 1}`` where the model was trained on those, any number in ``(low T,
    high T]`` under flow matching.
    """
    if not 0.0 <= low < high <= 1.0:
        raise SettingError(f"timesteps from {low} to {high} of the schedule; allowed is 0 to 1")
    whole = int(model.pipeline.scheduler.config.num_train_timesteps)
    if model.prediction_kind == "flow":
        share = torch.rand(count, generator=generator, dtype=torch.float64)
        return ((high - (high - low) * share) * whole).float()
    first = min(int(low * whole), whole - 1)
    return torch.randint(first, max(first + 1, int(high * whole)), (count,), generator=generator)


def noised(
    model: DiffusionModel,
    latents: Tensor,
    generator: torch.Generator,
    *,
    which: Tensor | None = None,
    low: float = 0.0,
    high: float = 1.0,
) -> tuple[Trajectories, Tensor]:
    """Clean latents ``(n, c, h, w)`` at random training timesteps, and the noise that was added.

    Args:
        model: Its schedule, device and precision are used.
        latents: Scaled clean latents.
        generator: A CPU generator; timesteps and noise come from it.
        which: Index of each row's text; default: its own number.
        low, high: Share of the schedule, see :func:`random_times`.
    """
    count = len(latents)
    times = random_times(model, count, generator, low=low, high=high)
    noise = torch.randn(latents.shape, generator=generator).to(model.device, model.dtype)
    clean = latents.to(model.device, model.dtype)
    own = torch.arange(count) if which is None else which
    return Trajectories(model.noised(clean, noise, times), times, own), noise.float()


def denoising_error(
    model: DiffusionModel, points: Trajectories, clean: Tensor, noise: Tensor, condition: Condition
) -> Tensor:
    """The loss the model was trained with, of each row: float32 ``(n,)``, means over channels and places.

    It is the squared error in what the denoiser itself predicts: noise, velocity, or clean latents.

    Args:
        model: As it is now; gradients reach its text encoders through the condition.
        points, noise: Of :func:`noised`.
        clean: The latents ``(n, c, h, w)`` that were noised.
        condition: One row a point.
    """
    made = model.predict(points.latents, points.timesteps, condition)
    wanted = made.target(clean.to(noise.device).float(), noise.float())
    return (made.value.float() - wanted.float()).square().flatten(1).mean(1)
