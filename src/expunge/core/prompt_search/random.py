"""Uniform random strings: the control every search is measured against, at equal rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from .common import Problem
from .rule import Rule
from .search import Search

__all__ = ["RandomStrings"]


@dataclasses.dataclass(frozen=True)
class RandomStrings(Rule):
    """Draw, score, keep the best.

    Attributes:
        steps: Batches.
        draws: Strings an item and batch.
    """

    name = "random"
    steps: int = 1000
    draws: int = 200

    def price(self, problem: Problem) -> int:
        """One row is enough: the last batch is cut to what is left."""
        return problem.rows

    def advance(self, search: Search) -> Iterator[None]:
        """One batch of draws for every active item; a given start is the first draw."""
        fresh = search.problem.start is not None
        while True:
            item = search.item
            draws, limit = self.draws, search.ledger.limit
            if limit is not None:
                draws = min(
                    draws, int((limit - search.ledger.spent[item]).min()) // search.problem.rows
                )
            own = item.repeat_interleave(max(1, draws))
            ids = search.draw_usable(own)
            if fresh:
                ids[:: max(1, draws)] = search.current[item]
                fresh = False
            search.evaluate(ids, own)
            search.current[item] = search.ids[item]
            yield
