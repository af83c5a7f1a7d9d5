"""Further branches of guidance: what a control asks of the same latents, in the same pass of the denoiser.

Their rows stand behind all others and are taken apart again, so that nobody but the control that asked for them
sees more rows than the sampling loop has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import ModelError
from .types import Condition, Context, Prediction

if TYPE_CHECKING:
    from ..method import Control

__all__ = ["apart", "together"]


def together(
    controls: Sequence[Control],
    context: Context,
    noised: Tensor,
    timesteps: Tensor,
    condition: Condition,
) -> tuple[Tensor, Tensor, Condition, list[Control]]:
    """Latents, timesteps and condition of all rows, and who asked for each further branch.

    Outside a sampling loop, where nobody knows which rows are pictures, no control is asked.

    Raises:
        ModelError: A condition has neither one row nor one a picture.
    """
    if context.conditional is None:
        return noised, timesteps, condition, []
    asked = [(control, own) for control in controls for own in control.branches(context) or ()]
    if not asked:
        return noised, timesteps, condition, []
    pictures = context.conditional.to(noised.device)
    count = int(pictures.sum())
    blocks = [condition]
    for control, own in asked:
        if own.rows not in (1, count):
            raise ModelError(
                f"{type(control).__name__} asks for a branch of {own.rows} rows; allowed are 1 or {count}, one "
                "a picture"
            )
        blocks.append(own if own.rows == count else own.repeat(count))
    times = len(asked)
    return (
        torch.cat([noised, *[noised[pictures]] * times]),
        torch.cat([timesteps, *[timesteps[pictures]] * times]),
        Condition.concatenate(blocks),
        [control for control, _ in asked],
    )


def apart(made: Prediction, context: Context, owners: Sequence[Control]) -> Prediction:
    """The prediction of the loop's own rows; those of further branches go to ``context.further``."""
    context.further = {}
    rows = context.rows
    if context.blank and context.conditional is not None:
        kept = torch.cat(
            [context.conditional, torch.ones(len(made.value) - rows, dtype=torch.bool)]
        )
        made = made.replace(made.value * kept.to(made.value).reshape(-1, 1, 1, 1))
    if not owners:
        return made
    count = (len(made.value) - rows) // len(owners)
    for number, control in enumerate(owners):
        first = rows + number * count
        own = made.select(slice(first, first + count))
        context.further.setdefault(control, []).append(own)
    return made.select(slice(rows))
