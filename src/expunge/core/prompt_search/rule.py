"""Rule: the loop around every optimiser.  A rule is its hyperparameters and one generator function.

``advance`` reads like the algorithm: it yields once a step, after it has set ``search.current``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

import torch

from ...errors import SettingError
from .common import Ledger, Problem, Watch
from .search import Result, Search

__all__ = ["Rule"]


class Rule(ABC):
    """Base of the optimisers; subclasses are frozen dataclasses with a field ``steps``."""

    name: ClassVar[str] = ""
    soft: ClassVar[bool] = False
    steps: int

    @abstractmethod
    def price(self, problem: Problem) -> int:
        """Rows an item must still be able to pay for a step to begin."""

    @abstractmethod
    def advance(self, search: Search) -> Iterator[None]:
        """Steps of all active items (``search.item``); sets ``search.current``, offers what it evaluates."""

    def run(
        self,
        problem: Problem,
        ledger: Ledger | None = None,
        *,
        seed: int | str = 0,
        watch: Watch | None = None,
    ) -> list[Result]:
        """Search until the steps, the ledger or ``watch`` end it; one result an item.

        Args:
            problem: What is minimised.
            ledger: Rows each item may spend; without one, ``steps`` alone end the search.
            seed: Private randomness, one generator an item: results do not depend on what else runs.
            watch: Called after each step; an item it answers False for stops.

        Raises:
            SettingError: An item cannot pay the first step: its answer would be a string nobody searched.
        """
        ledger = Ledger(problem.items) if ledger is None else ledger
        price = self.price(problem)
        if not bool(ledger.affords(price).all()):
            raise SettingError(
                f"prompt search {self.name}: the first step takes up to {price} rows an item, but the budget leaves "
                f"{int((ledger.limit or 0) - ledger.spent.max())}; choose a larger budget or smaller steps"
            )
        search = Search(problem, ledger, seed, self.name)
        body = self.advance(search)
        for step in range(self.steps):
            search.active &= ledger.affords(price)
            if problem.goal is not None:
                search.active &= search.loss > problem.goal
            if not bool(search.active.any()):
                break
            next(body)
            if watch is not None:
                search.active &= torch.as_tensor(watch(step, search.current, search.active.clone()))
        return search.results(self.soft)
