"""What a fine-tuning method gives to the training loop, and what it gets back.

:mod:`expunge.core.finetune` re-exports everything here; methods import it from there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..errors import SettingError
from ..models.base import noise_generator

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

__all__ = ["Groups", "Loop", "Optimiser", "Step", "Task", "Trained"]

Groups = dict[str, list[tuple[str, nn.Parameter]]]


@dataclasses.dataclass(frozen=True)
class Optimiser:
    """One optimiser and its schedule.

    Attributes:
        name: ``adam``, ``adamw`` or ``sgd``.
        lr: Peak learning rate.
        betas: Moment decays of Adam; the first is the momentum of SGD.
        eps: Adam's denominator guard.
        weight_decay: Decoupled for ``adamw``, added to the gradient otherwise.
        clip: Largest norm of the group's gradient; ``None`` for no limit.
        warmup: Steps over which the rate rises linearly from ``lr / warmup``.
        schedule: ``constant``, ``linear`` (to 0) or ``cosine`` (to 0), after the warm-up.
        cycles: How often ``cosine`` falls from the peak, with a hard restart before each but the first.
    """

    lr: float
    name: str = "adam"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float | None = None
    warmup: int = 0
    schedule: str = "constant"
    cycles: int = 1

    def build(self, parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
        """The torch optimiser over ``parameters``."""
        if self.name == "sgd":
            return torch.optim.SGD(
                parameters, self.lr, momentum=self.betas[0], weight_decay=self.weight_decay
            )
        if self.name not in ("adam", "adamw"):
            raise SettingError(f"optimiser {self.name!r} is unknown; allowed: adam, adamw, sgd")
        kind = torch.optim.Adam if self.name == "adam" else torch.optim.AdamW
        return kind(
            parameters, self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay
        )

    def rate(self, index: int, total: int) -> float:
        """Learning rate of step ``index`` (from 0) of ``total``."""
        if index < self.warmup:
            return self.lr * (index + 1) / self.warmup
        part = (index - self.warmup) / max(1, total - self.warmup)
        if self.schedule == "linear":
            return self.lr * (1 - part)
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * (self.cycles * part % 1.0)))
        if self.schedule != "constant":
            raise SettingError(
                f"schedule {self.schedule!r} is unknown; allowed: constant, linear, cosine"
            )
        return self.lr


@dataclasses.dataclass(frozen=True)
class Loop:
    """How long and how to train.

    Attributes:
        steps: Optimiser steps.
        optimiser: For every group that ``groups`` does not name.
        groups: Optimisers of single groups (a discriminator, a mask, a fake-score network).
        accumulate: Calls of :meth:`Task.step` whose mean gradient makes one optimiser step.
        training: Put the modules into training mode (dropout on); off by default.
        precision: ``weights`` computes in the dtype of the weights; ``bfloat16`` uses autocast.
            Half-precision weights always get float32 master copies.
        checkpoint_every: Steps between checkpoints; ``None`` writes as often as takes at most about
            5 % of the time.
    """

    steps: int
    optimiser: Optimiser
    groups: Mapping[str, Optimiser] = dataclasses.field(default_factory=dict)
    accumulate: int = 1
    training: bool = False
    precision: str = "weights"
    checkpoint_every: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.accumulate < 1:
            raise SettingError(
                f"steps and accumulate must be at least 1, got {self.steps} and {self.accumulate}"
            )
        if self.precision not in ("weights", "bfloat16"):
            raise SettingError(
                f"precision {self.precision!r} is unknown; allowed: weights, bfloat16"
            )

    def of(self, group: str) -> Optimiser:
        """The optimiser settings of a group."""
        return self.groups.get(group, self.optimiser)


@dataclasses.dataclass(frozen=True)
class Step:
    """Where training is; what :meth:`Task.step` receives.

    Attributes:
        index: Optimiser step, from 0.
        total: Optimiser steps of the whole run.
        seed: Seed of the run.
        micro: Which of the ``Loop.accumulate`` parts of this step, from 0.
        original: ``with step.original():`` gives the trained tensors their values from before the
            run, for teacher predictions without a second copy; nothing is copied.
        values: The trained tensors as they are now, float32 masters of half-precision weights, by name; they
            go on changing, so keep a copy.
    """

    index: int
    total: int
    seed: int
    micro: int = 0
    original: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext
    values: Callable[[], Mapping[str, torch.Tensor]] = dict

    def generator(self, purpose: str = "step") -> torch.Generator:
        """A private CPU generator for (seed, purpose, index, micro)."""
        return noise_generator(self.seed, f"finetune:{purpose}", f"{self.index}.{self.micro}")

    @property
    def last(self) -> bool:
        """This is the final step."""
        return self.index + 1 == self.total


class Task:
    """What a fine-tuning method adds to the loop; only the first two methods are required."""

    def parameters(self) -> Groups:
        """Group name -> ``[(canonical tensor name, parameter), ...]``; they alone are trained."""
        raise TypeError(f"{type(self).__name__} must define parameters()")

    def step(self, step: Step) -> Mapping[str, torch.Tensor]:
        """The scalar loss of each group; a group that is left out rests at this step.

        The loss of a group moves the parameters of that group only; where groups give the same tensor, one
        backward pass serves them all.  Inner attacks may call
        ``torch.autograd.grad`` freely here.
        """
        raise TypeError(f"{type(self).__name__} must define step()")

    def gradients(self, step: Step, group: str, gradients: dict[str, torch.Tensor]) -> None:
        """Change the gradients (float32, by tensor name) in place before clipping: masks, projections."""

    def movable(self) -> Mapping[str, torch.Tensor]:
        """Masks: tensor name -> bool, like the tensor: which of its entries may move at all.

        A hard constraint: entries outside get no gradient (what the clip sees included), no weight decay and
        no moments, and end bit for bit where they began.  Tensors without a mask move freely.
        """
        return {}

    def after(self, step: Step, losses: Mapping[str, float]) -> bool:
        """After the optimiser step: dual variables, evaluation; ``True`` ends training early."""
        return False

    def renewed(self) -> Mapping[str, torch.Tensor]:
        """Asked after :meth:`after`: tensor name -> indices of its rows that began anew; their moments do, too."""
        return {}

    def state(self) -> dict[str, torch.Tensor]:
        """Further tensors that later steps depend on; stored in checkpoints."""
        return {}

    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take back what :meth:`state` gave."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run of the loop gave.

    Attributes:
        values: Canonical tensor name -> trained value (float32 masters for half-precision weights).
        before: Canonical tensor name -> value before training.
        losses: Group -> loss of every step (NaN where the group rested).
        steps: Optimiser steps taken, those of earlier sessions included.
        resumed: Step at which this session took up an earlier one; 0 for a fresh run.
        stopped: :meth:`Task.after` ended training early.
        seconds: Wall time over all sessions.
    """

    values: dict[str, torch.Tensor]
    before: dict[str, torch.Tensor]
    losses: dict[str, list[float]]
    steps: int
    resumed: int
    stopped: bool
    seconds: float

    def report(self, points: int = 500) -> dict[str, Any]:
        """Losses (evenly thinned to at most ``points`` a group), steps and time, as plain values."""
        stride = max(1, math.ceil(self.steps / points))
        thin = {
            group: [None if math.isnan(v) else round(v, 6) for v in values[::stride]]
            for group, values in self.losses.items()
        }
        return {"losses": thin, "losses_every": stride, "steps": self.steps,
                "resumed_at": self.resumed, "stopped_early": self.stopped}  # fmt: skip
