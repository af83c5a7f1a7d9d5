"""Greedy coordinate gradient (GCG, Zou et al., arXiv 2307.15043; as in MMA-Diffusion, 2311.17516).

``G = g E^T`` is the gradient with respect to the one-hot row of each place, taken at the current ids.
For every place the ``top`` tokens of the most negative entries are kept; ``candidates`` strings, each
with one place swapped, are scored, and the best becomes the current string, even if it is worse: that
is the method's exploration.  The best ever is remembered.  Candidates whose text tokenises to other ids
are dropped before they are scored: the string that is tried would not be the string that was searched.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from .common import Problem
from .rule import Rule
from .search import Search

__all__ = ["Gcg"]


@dataclasses.dataclass(frozen=True)
class Gcg(Rule):
    """Greedy coordinate gradient.

    Attributes:
        steps: Steps.
        candidates: Single swaps scored a step.
        top: Tokens kept for each place.
        places: ``random`` places (GCG) or ``spread`` evenly over the candidates (MMA).
        accept: ``always`` the best candidate, or only a ``better`` one.
        aligned: Row ``i`` of the gradient belongs to place ``i``; False shifts it by one as an official
            implementation does (its first row is that of the start token, here that of the last place).
        normalise: Divide each row of the gradient by its norm; never changes the order in a row.
        realisable: Drop candidates whose text tokenises otherwise (a start that does is drawn again).
        distinct: Drop candidates that are the current string, so that a step always moves.
    """

    name = "gcg"
    steps: int = 1000
    candidates: int = 512
    top: int = 256
    places: str = "random"
    accept: str = "always"
    aligned: bool = True
    normalise: bool = False
    realisable: bool = True
    distinct: bool = False

    def price(self, problem: Problem) -> int:
        """A gradient and one candidate at least: the last step is cut to what is left."""
        return 3 * problem.rows

    def advance(self, search: Search) -> Iterator[None]:
        """One swap of every active item."""
        problem, table = search.problem, search.problem.table.float()
        while True:
            item = search.item
            if self.realisable and problem.start is None:
                self._draw_again(search, item)
            loss, slope = search.descend(problem.table[search.current[item]], item)
            good = problem.usable(search.current[item], item)
            if self.realisable:
                good &= problem.realisable(search.current[item], item)
            search.offer(search.current[item][good], loss.cpu()[good], item[good])
            rows = (slope.float() @ table.T).cpu()
            rows = rows if self.aligned else rows.roll(1, dims=1)
            if self.normalise:
                rows = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-12)
            rows = rows.masked_fill(~problem.allowed.cpu(), float("inf"))
            made = [self._swaps(search, int(i), row) for i, row in zip(item, rows, strict=True)]
            counts = [len(part) for part in made]
            strings = torch.cat(made)
            own = item.repeat_interleave(torch.tensor(counts))
            losses = torch.full((len(strings),), float("inf"))
            scored = problem.realisable(strings, own) if self.realisable else losses > 0
            if self.distinct:
                scored &= (strings != search.current[own]).any(1)
            losses[scored] = search.evaluate(strings[scored], own[scored])
            best = [part.min(0) for part in losses.split(counts)]
            low = torch.stack([found.values for found in best])
            accepted = torch.isfinite(low)
            if self.accept == "better":
                accepted &= low < loss.float().cpu()
            chosen = torch.stack(
                [part[found.indices] for part, found in zip(made, best, strict=True)]
            )
            search.current[item[accepted]] = chosen[accepted]
            yield

    def _draw_again(self, search: Search, item: Tensor, tries: int = 20) -> None:
        """Other strings in place of those whose text tokenises otherwise: one swap may never mend them.

        Once an item stands at a realisable string it stays among them.
        """
        for _ in range(tries):
            bad = item[~search.problem.realisable(search.current[item], item)]
            if not len(bad):
                break
            search.current[bad] = search.draw(bad)

    def _swaps(self, search: Search, i: int, rows: Tensor) -> Tensor:
        """Candidates ``(c, n)`` of one item, each differing from its current string in one place."""
        problem, generator = search.problem, search.generators[i]
        count = self.candidates
        if search.ledger.limit is not None:
            # Its own rows: what others have left must not decide what this item is offered.
            left = search.ledger.limit - int(search.ledger.spent[i])
            count = max(1, min(count, left // problem.rows))
        top = rows.topk(min(self.top, int(problem.allowed.sum())), largest=False).indices
        if self.places == "spread":
            place = torch.arange(count) * problem.length // count
        else:
            place = torch.randint(problem.length, (count,), generator=generator)
        token = top[place, torch.randint(top.shape[1], (count,), generator=generator)]
        strings = search.current[i].repeat(count, 1)
        strings[torch.arange(count), place] = token
        return strings
