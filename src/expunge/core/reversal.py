"""Late sampling steps, and classifier-free guidance turned round in them with the model as it is.

What ANT (arXiv 2504.12782) trains a denoiser to predict is what this control makes of the frozen one's prediction:
with ``u`` and ``v`` the predictions for the empty and the given text and ``delta = v - u``,

    v -> u - eta delta        where t' or fewer of 50 steps are left (the same share of other numbers)
    v -> v                    before

Guidance ``g`` then gives ``u - g eta delta``.  It turns away from the whole given text, so it shows what a late
reversal does to a picture; it erases no concept from among others.
"""

from __future__ import annotations

from typing import Any

from ..errors import MissingCapability, SettingError
from ..method import Control

__all__ = ["COUNTED", "Reversal", "depths", "late"]


COUNTED = 50
"""Sampling steps of the published counts: from 50, pure noise, down to 1."""


def late(steps: int, t_prime: int) -> int:
    """How many of ``steps`` sampling steps are late where ``t_prime`` of 50 are: the same share, rounded down.

    Raises:
        SettingError: ``t_prime`` is no number from 0 to 50.
    """
    if not 0 <= t_prime <= COUNTED:
        raise SettingError(f"t_prime is {t_prime} of {COUNTED} steps; allowed is 0 to {COUNTED}")
    return steps * t_prime // COUNTED


def depths(steps: int, t_prime: int, swapped: bool = False) -> dict[str, tuple[int, int]]:
    """Depths ``k`` of the points that are turned (``erase``) and held (``preserve``), ``low <= k < high``.

    A point after ``k`` guided steps from noise stands at step ``steps - k``, counted down to 1.  Late are the last
    ``L = max(1, late(steps, t_prime))``, so early is ``k < steps - L``.  ``swapped``: the last ``steps - L`` are held
    and all noisier ones turned.  ``preserve`` is missing where no step is left for it.
    """
    last = max(1, late(steps, t_prime))
    found = {"erase": (steps - last, steps), "preserve": (0, steps - last)}
    if swapped:
        found = {"erase": (0, last), "preserve": (last, steps)}
    return {name: (low, high) for name, (low, high) in found.items() if low < high}


class Reversal(Control):
    """Turns the conditional branch round in late steps, at the same share of samplings of any length.

    Args:
        t_prime: Steps of 50 left, the present one included, from which on it is turned; 0 turns none, 50 all.
        eta: Strength; ``-1`` changes nothing.

    Raises:
        SettingError: ``t_prime`` is no number from 0 to 50.
    """

    def __init__(self, t_prime: int, eta: float = 1.0) -> None:
        late(COUNTED, t_prime)
        self.t_prime, self.eta = t_prime, eta

    def prediction(self, context: Any, prediction: Any) -> Any:
        """The typed prediction; rows of both branches, of any kind of prediction.

        Raises:
            MissingCapability: Only one branch runs, so there is nothing to turn round.
        """
        if context.step < 0 or context.step < context.steps - late(context.steps, self.t_prime):
            return prediction
        conditional = context.conditional
        if conditional is None or bool(conditional.all()):
            raise MissingCapability(
                "the reversal of guidance needs the unconditional branch beside the conditional one; sample with a "
                "guidance other than 1, with a model that has both"
            )
        own = conditional.to(prediction.value.device)
        value = prediction.value.clone()
        empty = value[~own]
        # Linear in predictions for one and the same point, so it holds for every kind of them.
        value[own] = empty - self.eta * (value[own] - empty)
        return prediction.replace(value)
