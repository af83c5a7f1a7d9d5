"""Uniform random strings: the control every search is measured against, at equal rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

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
            counts = torch.full((len(item),), self.draws)
            if search.ledger.limit is not None:
                left = (search.ledger.limit - search.ledger.spent[item]) // search.problem.rows
                counts = counts.minimum(left)
            own = item.repeat_interleave(counts)
            ids = search.draw_usable(own)
            if fresh:
                ids[counts.cumsum(0) - counts] = search.current[item]
                fresh = False
            search.evaluate(ids, own)
            search.current[item] = search.ids[item]
            yield
