"""A negative text: what must not be drawn stands in the unconditional branch of guidance.

    e = e_neg + g (e_p - e_neg)

The oldest defence of a pipeline whose weights nobody touches.  As a control it is part of the model, so that a text of
the user's own still counts, and whatever looks at the model's guided prediction sees it.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch

from ..errors import MissingCapability
from ..method import Control
from ..models.diffusion import DiffusionModel
from ..models.types import Condition, Context

__all__ = ["NegativeText"]


class NegativeText(Control):
    """Puts a text in the place of the unconditional branch's own, behind the user's negative where there is one.

    Args:
        model: Encodes the text, when it is needed.
        negative: The text.

    Raises:
        MissingCapability: Guidance of the model has no unconditional branch.
    """

    guides: ClassVar[bool | None] = True

    def __init__(self, model: DiffusionModel, negative: str) -> None:
        if not model.two_branches:
            raise MissingCapability(
                f"{model.name}: {model.layout.title} has no branch for a negative text"
            )
        self.model, self.negative = model, negative

    def text(self, negative: str = "") -> str | None:
        """What stands there where the user's own negative is given; ``None`` leaves the rows as they are."""
        return ", ".join(part for part in (negative, self.negative) if part)

    def condition(self, context: Context, condition: Condition) -> Condition:
        """Rows of the unconditional branch ask for the text."""
        if context.conditional is None or bool(context.conditional.all()):
            return condition
        text = self.text(context.negative)
        if text is None:
            return condition
        own = self.model.unconditional(text)
        rows = (~context.conditional).to(condition.embeddings.device)
        new = own.embeddings.to(condition.embeddings)
        mask = condition.mask
        if mask is not None and own.mask is not None:
            mask = torch.where(rows[:, None], own.mask.to(mask), mask)
        made = torch.where(rows[:, None, None], new, condition.embeddings)
        pooled = condition.pooled
        if pooled is not None and own.pooled is not None:
            pooled = torch.where(rows[:, None], own.pooled.to(pooled), pooled)
        return dataclasses.replace(condition, embeddings=made, mask=mask, pooled=pooled)
