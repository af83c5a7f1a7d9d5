"""Seeded choices that stay the same from one version of Python or numpy to the next."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Dice:
    """A seeded stream of choices; only `random.random` is used, whose output Python keeps across versions."""

    def __init__(self, seed: int, salt: int = 0) -> None:
        self.roll = random.Random(int(seed) * 64 + salt).random

    def pick(self, options: Sequence[T]) -> T:
        """One of `options`, uniformly."""
        return options[int(self.roll() * len(options))]

    def weighted(self, options: Sequence[T], weights: Sequence[float]) -> T:
        """One of `options` with probability proportional to `weights`."""
        left = self.roll() * sum(weights)
        for option, weight in zip(options, weights, strict=True):
            left -= weight
            if left < 0:
                return option
        return options[-1]

    def between(self, low: float, high: float) -> float:
        """A number in [low, high)."""
        return low + (high - low) * self.roll()

    def chance(self, probability: float) -> bool:
        """True with the given probability."""
        return self.roll() < probability
