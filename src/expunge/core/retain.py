"""What an eraser holds in place: retain prompts, and points on the frozen model's own walks towards them.

    chosen = retain_prompts(model, concepts, keep, captions, count=243)
    retain = RetainSource(model, chosen.prompts, steps=50, guidance=3.0, seed=0, batch=5)
    points, texts, answers = retain.at(step, number, like=erasing_points)
    loss = (epsilon(model, points, model.encode(texts)) - answers).square().mean()

Prompts that speak of what is erased are left out: by label where the prompts come from a model's world, which knows
all words for a concept, by the listed names and phrases elsewhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..concept import Concept
from ..errors import InputError
from ..models.base import noise_generator
from ..models.diffusion import DiffusionModel
from . import scores, trajectories
from .everyday_objects import EVERYDAY_OBJECTS
from .mentions import without
from .projections import general_captions, kept_texts
from .tasks import Step
from .trajectories import Trajectories

__all__ = ["RetainPrompts", "RetainSource", "retain_prompts"]

TEMPLATE = "a photo of {}"


@dataclasses.dataclass(frozen=True)
class RetainPrompts:
    """Retain prompts.

    Attributes:
        prompts: The texts, each once.
        origin: ``data``, ``world`` or ``objects`` (everyday ones).
        left_out: How many spoke of what is erased.
    """

    prompts: tuple[str, ...]
    origin: str
    left_out: int


def retain_prompts(
    model: DiffusionModel,
    concepts: Sequence[Concept],
    keep: Sequence[Any] = (),
    captions: Sequence[str] = (),
    *,
    count: int,
    filtered: bool = True,
) -> RetainPrompts:
    """The user's prompts, else captions of the model's world, else everyday objects; and whatever is to be kept.

    Args:
        model: Its companions are asked where there are no captions.
        concepts: What is erased.
        keep: Names of concepts; each joins the prompts as "a photo of" it.
        captions: The user's prompts, all of which are taken.
        count: How many otherwise, at most.
        filtered: Leave out prompts that speak of what is erased; ``False`` is a negative control.

    Raises:
        InputError: Every prompt speaks of what is erased.
    """
    told = kept_texts(keep)
    found, origin = list(captions), "data"
    if not found:
        found, origin = general_captions(model, concepts, count, told, filtered=filtered), "world"
    if not found:
        found = [TEMPLATE.replace("{}", name) for name in EVERYDAY_OBJECTS[:count]]
        origin = "objects"
    found = list(dict.fromkeys([*found, *(TEMPLATE.replace("{}", name) for name in told)]))
    names = [name for concept in concepts for name in concept.names]
    chosen = without(found, names) if filtered else found
    if not chosen:
        raise InputError(
            f"all {len(found)} retain prompts name {names[0]!r} or a phrase of it; give others as "
            'data={"captions": [...]}'
        )
    return RetainPrompts(tuple(chosen), origin, len(found) - len(chosen))


class RetainSource:
    """Points on walks towards retain prompts, and the frozen model's predictions there.

    Prompts are taken without replacement until all had their turn, in an order drawn anew each time round.  Fresh
    points stand as deep as the points they accompany and carry their timesteps.  A bank is drawn once, with depths
    of its own; its rows are taken without replacement.

    Args:
        model: As it was before training.
        prompts: Retain prompts.
        steps, guidance: Of the walks.
        seed: Seed of noise, depths and order.
        batch: Points a step.
        bank: Points drawn once; ``None`` draws fresh ones.
        walked: ``frozen`` or ``student``, as in :class:`expunge.core.scores.PointSource`.
        binned: As there.
    """

    def __init__(
        self,
        model: DiffusionModel,
        prompts: Sequence[str],
        *,
        steps: int,
        guidance: float,
        seed: int,
        batch: int,
        bank: int | None = None,
        walked: str = "frozen",
        binned: bool = False,
    ) -> None:
        self.model, self.prompts, self.batch = model, list(prompts), batch
        self.seed = noise_generator(seed, "retain").initial_seed()
        self.steps, self.guidance, self.walked, self.binned = steps, guidance, walked, binned
        self._orders: dict[int, list[int]] = {}
        self.bank: tuple[Trajectories, Tensor] | None = None
        if bank is not None:
            points = trajectories.draw(
                model, self.prompts, bank, steps=steps, guidance=guidance, seed=self.seed
            )
            if binned:
                points = trajectories.relabelled(model, points, steps=steps, seed=self.seed)
            self.bank = points, self._answers(points)

    def turn(self, number: int) -> list[int]:
        """Which prompts (rows of a bank) the ``number``-th step takes."""
        total = len(self.prompts) if self.bank is None else len(self.bank[1])
        taken = []
        for place in range(number * self.batch, (number + 1) * self.batch):
            epoch, index = divmod(place, total)
            if epoch not in self._orders:
                draw = noise_generator(self.seed, "retain order", epoch)
                self._orders = {
                    **{e: o for e, o in self._orders.items() if e == epoch - 1},
                    epoch: torch.randperm(total, generator=draw).tolist(),
                }
            taken.append(self._orders[epoch][index])
        return taken

    def at(
        self, step: Step, number: int, like: Trajectories | None = None
    ) -> tuple[Trajectories, list[str], Tensor]:
        """Points, their prompts, and what the frozen model predicts there, ``(n, c, h, w)``.

        Args:
            step: The step.
            number: The how manieth draw this is, from 0.
            like: Points whose depths and timesteps fresh points take, in turn; drawn for themselves without.
        """
        turn = self.turn(number)
        if self.bank is not None:
            points, answers = self.bank[0].select(turn), self.bank[1][turn]
            return points, [self.prompts[int(i)] for i in points.which], answers
        texts = [self.prompts[i] for i in turn]
        if self.walked == "student":
            points = self._fresh(texts, number, like)
            with step.original():
                return points, texts, self._answers(points, texts)
        with step.original():
            points = self._fresh(texts, number, like)
            return points, texts, self._answers(points, texts)

    def _fresh(self, texts: list[str], number: int, like: Trajectories | None) -> Trajectories:
        first, depths, own = number * self.batch, None, None
        if like is not None:
            own = like.select([i % len(like.which) for i in range(self.batch)])
            depths = trajectories.depths_of(self.model, own, steps=self.steps, binned=self.binned)
        points = trajectories.draw(
            self.model, texts, self.batch, steps=self.steps, guidance=self.guidance, seed=self.seed,
            first=first, depths=depths,
        )  # fmt: skip
        if own is not None:
            return dataclasses.replace(points, timesteps=own.timesteps)
        if self.binned:
            return trajectories.relabelled(
                self.model, points, steps=self.steps, seed=self.seed, first=first
            )
        return points

    @torch.no_grad()
    def _answers(self, points: Trajectories, texts: Sequence[str] | None = None) -> Tensor:
        texts = self.prompts if texts is None else texts
        found = []
        for start in range(0, len(points.which), scores.BATCH):
            some = points.select(slice(start, start + scores.BATCH))
            rows = self.model.encode([texts[int(i)] for i in some.which])
            found.append(scores.epsilon(self.model, some, rows))
        return torch.cat(found)
