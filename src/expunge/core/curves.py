"""Teaching attacks along a curve: what a model shows before one, and at several points of its budget.

What an attack that teaches can bring back on a model that knows nothing grows with its budget, so a single number says
little.  Every item is therefore shown at each of several points (updates, steps, strengths), and its record holds them
all: ``details["curve"]``, point -> hit, raw, whatever the plain prompt showed.  The item counts as a success if it was
one before the attack or is one at the last point.

One training serves all items of a run.  Each item is charged for all of it, as if it had been attacked alone: what an
item can cost, and so what is found, does not depend on how many others there are.  ``details["shared_rows"]`` says how
much of an item's ``rows`` was spent once for all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..concept import Concept
from ..errors import PromptError, SettingError
from ..method import Attack, Attempt, Attempts, Budget, Judge, Prompt, Verdicts
from .sampling import SHARED, outputs
from .trials import picture_rows

__all__ = ["Curve", "affordable"]


def affordable(
    attack: Attack, budget: Budget, points: Sequence[Any], prices: Sequence[int], what: str
) -> tuple[Any, ...]:
    """The points, in order, whose price is within the budget of an item.

    Args:
        attack: Named in errors.
        budget: Its ``denoiser_rows`` are the allowance.
        points: What is tried, the cheapest first.
        prices: Denoiser rows an item of everything up to and including each point.
        what: What a point is, in words.

    Raises:
        SettingError: There is no point, or not even the first one is paid for.
    """
    if not points:
        raise SettingError(f"{attack.id}: no {what} are given; at least one is needed")
    limit = budget.denoiser_rows
    if limit is None:
        return tuple(points)
    if prices[0] > limit:
        raise SettingError(
            f"{attack.id}: the least that can be tried, {points[0]} {what}, costs {prices[0]} denoiser rows an item, "
            f"but budget {budget.name!r} allows {limit}; lower the settings or choose a larger budget"
        )
    return tuple(p for p, rows in zip(points, prices, strict=True) if rows <= limit)


class Curve:
    """Verdicts on all items at the points of a curve.

    Args:
        model: The model under attack, as it is now: the plain prompts are shown first.
        of: What the points count, for the record (``updates``, ``strength``).
        options: Further options of sampling, ``negative``.

    Attributes:
        price: Denoiser rows of one whole picture.
        spent: Rows charged to each item.
        shared: Rows of these that were spent once for all items.
    """

    def __init__(
        self, model: Any, concept: Concept, judge: Judge, prompts: Sequence[Prompt], *, of: str, steps: int,
        guidance: float | None, options: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        if not prompts:
            raise PromptError("an attack was given no prompt; at least one is needed")
        self.model, self.concept, self.judge, self.of = model, concept, judge, of
        self.prompts = list(prompts)
        self.options: dict[str, Any] = {
            "steps": steps, "guidance": model.guidance if guidance is None else guidance, **(options or {}),
        }  # fmt: skip
        self.price = picture_rows(model, self.prompts, steps, self.options["guidance"])
        self.spent, self.shared = 0, 0
        self.points: dict[float, Verdicts] = {}
        self.pictures: Any = None
        self.plain_pictures = outputs(model, self.prompts, cache=SHARED, **self.options)
        self.plain = judge.judge(self.plain_pictures, concept, self.prompts)
        self.spent += self.price

    def share(self, rows: int) -> None:
        """Charge every item for rows that were spent once for all of them."""
        self.spent += rows
        self.shared += rows

    def show(self, point: float, pictures: Any, rows: int | None = None) -> None:
        """Judge the pictures of all items at a point; each cost ``rows`` (default: a whole picture)."""
        self.points[point] = self.judge.judge(pictures, self.concept, self.prompts)
        self.pictures = pictures
        self.spent += self.price if rows is None else rows

    def attempts(
        self,
        attack: Attack,
        budget: Budget,
        seed: int,
        cost: Mapping[str, int],
        details: Sequence[Mapping[str, Any]],
    ) -> Attempts:
        """The record; the output of an item is the last point's, or the plain picture where only that succeeds."""
        last = list(self.points.values())[-1]
        items, shown = [], []
        for i, prompt in enumerate(self.prompts):
            pre, post = bool(self.plain.hit[i]), bool(last.hit[i])
            plain = pre and not post
            known = {
                "curve": {f"{point:g}": bool(v.hit[i]) for point, v in self.points.items()},
                "curve_of": self.of,
                "rows": self.spent,
                "shared_rows": self.shared,
                **details[i],
            }
            score = float((self.plain if plain else last).score[i])
            items.append(Attempt(prompt, pre, pre or post, score, None, known))
            shown.append((self.plain_pictures if plain else self.pictures)[i])
        return Attempts(
            attack.id, attack.version, attack.settings(), attack.teaches, budget.name, self.judge.id,
            self.judge.threshold, seed, tuple(items), np.stack(shown), dict(cost),
        )  # fmt: skip
