"""Guided predictions outside a sampling, with whatever defends the model at work, so that gradients can pass through.

    steps = GuidedSteps(model, guidance=7.5, steps=50)
    safe = steps.defended(clean, noise, times, condition)      # both branches, over a chain of timesteps
    bare = steps.undefended(clean, noise, times[-1], texts)    # the same network with nothing on it

A defence that remembers (the momentum of Safe Latent Diffusion, arXiv 2211.05105) is run through a chain of timesteps
of the same pictures under one noise; controls keep what they remember in the context of the chain, with its gradients.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import MissingCapability, SettingError
from ..method import Method
from ..models.diffusion import DiffusionModel
from ..models.types import Condition, Context, Prediction

__all__ = ["GuidedSteps", "defence_of", "needs_branches"]


def defence_of(model: DiffusionModel, negative: str = "") -> str:
    """What defends a model while it samples: ``guided``, ``negative`` or ``plain`` (its weights alone, or its layers).

    Args:
        model: As it is now.
        negative: Text of the unconditional branch.
    """
    hooks = [control.hooks() for control in model.acting]
    if any(own & {"branches", "prediction"} for own in hooks):
        return "guided"
    # A control that changes conditions alone writes into the other branch of guidance; gates read layers as well.
    writes = any("condition" in own and "activations" not in own for own in hooks)
    return "negative" if negative or writes else "plain"


def needs_branches(method: Method, model: DiffusionModel, guidance: float, loss: str) -> None:
    """Refuse a loss of guided predictions where there is one branch only; ``plain`` is no such loss.

    Raises:
        MissingCapability: The model never has two.
        SettingError: At guidance 1 it has one.
    """
    if loss != "plain" and not model.two_branches:
        raise MissingCapability(
            f"{model.name}: the loss {loss!r} compares guided predictions, and {model.layout.title} has one branch "
            "only; allowed is loss='plain'"
        )
    if loss != "plain" and guidance == 1:
        raise SettingError(
            f"{method.id}: at guidance 1 a model has one branch only, so there is nothing for the loss {loss!r}; "
            "allowed is loss='plain' or another guidance"
        )


class GuidedSteps:
    """Guided steps of a model as it is when they are asked for.

    Args:
        model: A model whose guidance has two branches.
        guidance: Classifier-free guidance of all rows.
        steps: Length of the sampling that controls are told of.
        negative: Text of the unconditional branch.
    """

    def __init__(
        self, model: DiffusionModel, *, guidance: float, steps: int, negative: str = ""
    ) -> None:
        self.model, self.guidance, self.negative = model, guidance, negative
        self.times = model.timesteps(steps).cpu()

    def branches(self) -> int:
        """Rows of one picture in a pass: the two branches, and those that controls ask for."""
        context = self._context(1)
        context.step = context.steps - 1
        with torch.no_grad():
            context.condition = self.model.unconditional().repeat(2)
            more = [own for control in self.model.acting for own in control.branches(context) or ()]
        return 2 + len(more)

    def step_of(self, time: Tensor) -> int:
        """The step of a sampling that stands at this timestep or comes to it next."""
        return min(int((self.times > float(time)).sum()), len(self.times) - 1)

    def defended(
        self,
        clean: Tensor,
        noise: Tensor,
        times: Tensor,
        condition: Condition,
        *,
        step: int | None = None,
        graph: str = "full",
    ) -> Prediction:
        """The guided prediction at the last timestep, after the others were passed through.

        Args:
            clean, noise: ``(n, c, h, w)``.
            times: Timesteps of the chain ``(k,)``, in the order in which a sampling would come to them.
            condition: ``n`` rows of the conditional branch; gradients reach them.
            step: What controls are told the step is; default: where a sampling would be.
            graph: ``full``, or ``last``: gradients go through the last timestep alone.
        """
        model, count = self.model, len(clean)
        context = self._context(count)
        with torch.no_grad():
            empty = model.unconditional(self.negative).repeat(count)
        both = Condition.concatenate([empty, condition])
        for control in model.acting:
            control.start(context)
        for number, time in enumerate(times):
            context.step = self.step_of(time) if step is None else step
            seen = model.noised(clean, noise, time.expand(count))
            learning = torch.is_grad_enabled() and (graph == "full" or number + 1 == len(times))
            before = model.cost.snapshot()
            with torch.set_grad_enabled(learning):
                made = model.predict(torch.cat([seen, seen]), time.reshape(1), both, context)
            if learning:
                model.cost.add("denoiser", model.cost.rows("denoiser", before), "backward")
        return self._guided(made, count)

    @torch.no_grad()
    def undefended(
        self, clean: Tensor, noise: Tensor, time: Tensor, texts: Sequence[str]
    ) -> Prediction:
        """The guided prediction for texts by the same network, every edit and control lifted, beside the empty text."""
        count, bare = len(clean), self.model
        with bare.lifted():
            seen = bare.noised(clean, noise, time.expand(count))
            both = Condition.concatenate(
                [bare.unconditional().repeat(count), bare.encode(list(texts))]
            )
            made = bare.predict(torch.cat([seen, seen]), time.reshape(1), both)
        return self._guided(made, count)

    def _guided(self, made: Prediction, count: int) -> Prediction:
        weight = torch.full_like(made.alpha[:1], self.guidance)
        return made.select(slice(count, None)).guided(made.select(slice(count)), weight)

    def _context(self, count: int) -> Context:
        weight = torch.full(
            (count,), self.guidance, device=self.model.device, dtype=self.model.dtype
        )
        return Context(
            steps=len(self.times), negative=self.negative, guidance=weight,
            conditional=torch.tensor([False] * count + [True] * count),
        )  # fmt: skip
