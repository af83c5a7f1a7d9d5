"""What a model predicts in the midst of sampling, at points that no sampling came to: guidance and all.

Defences that act on guidance (Safe Latent Diffusion, a negative text) are not there in a single prediction of the
denoiser, so a loss on that prediction does not see them.  Here both branches run, and what acts on the model is told
of the sampling step that stands next to the point's timestep.  With ``e_u`` and ``e_p`` for the empty text and the
prompt, ``g`` guidance:

    guided      e   = e_u + g (e_p - e_u), changed by whatever acts
    effective   e~  = e_u + (e - e_u) / g,  e_u with nothing acting on it

``e~`` is what the prompt alone would have had to predict for plain guidance to come to ``e``: without a control it is
``e_p`` itself, so losses on predictions (denoising a picture) keep their meaning.  A lone point has no history: what a
control keeps from step to step (momentum) is empty, unless ``compat="official"``, where it is carried from one
evaluation to the next, steps are counted in evaluations and further branches are compared with nothing in the place of
the empty text, as P4D's code has it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..models.types import Condition, Context, Prediction

__all__ = ["GuidedPrediction", "acts_on_guidance"]


def acts_on_guidance(model: Any) -> bool:
    """Whether anything that acts on the model is seen only where both branches of guidance run."""
    return bool(model.two_branches) and any(c.on_guidance() for c in model.acting)


class GuidedPrediction:
    """Guided predictions of a model with two branches; differentiable.

    Args:
        model: In the state that is asked.
        guidance: Of each item, ``(items,)``.
        steps: Steps of the sampling that the points are thought to belong to.
        compat: ``paper`` or ``official``; see the module.

    Attributes:
        rows: Denoiser rows that one guided prediction takes at most, further branches included.
        extra: Rows beyond these that an effective one takes.
    """

    def __init__(self, model: Any, guidance: Tensor, steps: int, *, compat: str = "paper") -> None:
        self.model, self.guidance = model, guidance
        self.times = model.timesteps(steps).cpu().double()
        self.official = compat == "official"
        self.changed = any("condition" in c.hooks() and c.on_guidance() for c in model.acting)
        self.further = any("branches" in c.hooks() for c in model.acting)
        self.rows = 2 + self._branches()
        self.extra = int(self.changed)
        self.calls = 0
        self._items: tuple[int, ...] = ()
        self._memory: dict[Any, Any] = {}

    def _branches(self) -> int:
        """Further branches of one picture, asked for where most are: in the last step."""
        both = self.model.unconditional().repeat(2)
        context = self._context(1, len(self.times) - 1, torch.tensor([2.0]))
        context.condition, context.rows = both, 2
        return sum(len(c.branches(context) or ()) for c in self.model.acting)

    def _context(self, count: int, step: int, guidance: Tensor) -> Context:
        flags = torch.tensor([False] * count + [True] * count)
        return Context(
            step=step,
            steps=len(self.times),
            conditional=flags,
            guidance=guidance.to(self.model.device, self.model.dtype),
            blank=self.official and self.further,
        )

    def step_of(self, time: float) -> int:
        """The sampling step whose timestep stands next to ``time``."""
        return int((self.times - float(time)).abs().argmin())

    def guided(
        self, noised: Tensor, time: float, condition: Condition, item: Tensor
    ) -> tuple[Prediction, Prediction]:
        """``(e, e_u as it acted)`` of points ``(B, c, h, w)`` at one timestep; ``item (B,)`` says whose guidance."""
        count = len(noised)
        weight = self.guidance[item.cpu()]
        context = self._context(count, self.step_of(time), weight)
        if self.official:
            same = self._items == tuple(item.tolist())
            context.step, context.memory = self.calls, self._memory if same else {}
        for control in self.model.acting:
            control.start(context)
        both = Condition.concatenate([self.model.unconditional().repeat(count), condition])
        times = torch.full((2 * count,), float(time), device=noised.device)
        made = self.model.predict(torch.cat([noised, noised]), times, both, context)
        if self.official:
            self._items, self.calls = tuple(item.tolist()), self.calls + 1
            self._memory = {k: _without_history(v) for k, v in context.memory.items()}
        empty, prompt = made.select(slice(count)), made.select(slice(count, None))
        return prompt.guided(empty, weight.to(made.value).reshape(-1, 1, 1, 1)), empty

    def effective(
        self, noised: Tensor, time: float, condition: Condition, item: Tensor
    ) -> Prediction:
        """``e~``; an item without guidance (0) has the plain empty text's prediction."""
        made, empty = self.guided(noised, time, condition, item)
        if self.changed:
            times = torch.full((len(noised),), float(time), device=noised.device)
            with torch.no_grad():
                plain = self.model.unconditional().repeat(len(noised))
                empty = self.model.predict(noised, times, plain)
        weight = self.guidance[item.cpu()].to(made.value).reshape(-1, 1, 1, 1)
        share = torch.where(weight == 0, 0.0, 1 / weight.where(weight != 0, 1.0))
        return made.replace(empty.value + share * (made.value - empty.value))


def _without_history(value: Any) -> Any:
    """What is carried on to the next evaluation has no gradient."""
    return value.detach() if isinstance(value, Tensor) else value
