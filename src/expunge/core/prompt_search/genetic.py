"""Genetic search over strings (Ring-A-Bell, arXiv 2310.10012): needs scores only, no gradients.

Each generation keeps the best half; every survivor, with probability ``crossover``, meets a random
partner and both children of a one-point cut join; then every individual, with probability
``mutation``, gets one random token.  Strings that were scored before are not scored again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from .common import Problem
from .rule import Rule
from .search import Search

__all__ = ["Genetic"]


@dataclasses.dataclass(frozen=True)
class Genetic(Rule):
    """One-point crossover and one-place mutation.

    Attributes:
        steps: Generations.
        population: Strings at the start; half of it survives each selection.
        crossover, mutation: Probabilities.
        elitism: The best string is never mutated and the best ever is the answer.  False is the
            official behaviour: mutation hits everybody, so that the best distance can get worse, and
            the answer is the best of the last generation.
        distinct: Copies of a string do not survive beside it, which keeps the population from collapsing
            onto one string.  False is the official behaviour.
        patience: An item stops after so many generations without gain; 0 never stops it.
    """

    name = "genetic"
    steps: int = 3000
    population: int = 200
    crossover: float = 0.5
    mutation: float = 0.25
    elitism: bool = True
    distinct: bool = True
    patience: int = 200

    def price(self, problem: Problem) -> int:
        """One generation at most scores about a population."""
        return self.population * problem.rows

    def advance(self, search: Search) -> Iterator[None]:
        """One generation of every active item: scores, selection, then variation for the next one."""
        everyone = torch.arange(search.problem.items)
        first = search.draw_usable(everyone.repeat_interleave(self.population))
        crowds = list(first.split(self.population))
        if search.problem.start is not None:
            for crowd, start in zip(crowds, search.problem.start, strict=True):
                crowd[0] = start
        known: list[dict[tuple[int, ...], float]] = [{} for _ in everyone]
        idle = [0] * len(everyone)
        while True:
            before = search.loss.clone()
            scored = self._scored(search, crowds, known)
            for i in search.item.tolist():
                order = scored[i].argsort(stable=True)
                if self.distinct:
                    seen: dict[tuple[int, ...], int] = {}
                    for position in order.tolist():
                        seen.setdefault(tuple(crowds[i][position].tolist()), position)
                    order = torch.tensor(list(seen.values()))
                order = order[: max(2, self.population // 2)]
                survivors = crowds[i][order]
                search.current[i] = survivors[0]
                if not self.elitism:
                    search.ids[i], search.loss[i] = survivors[0], scored[i][order[0]]
                    search.vectors[i] = search.problem.table[survivors[0]]
                idle[i] = 0 if bool(search.loss[i] < before[i]) else idle[i] + 1
                if self.patience and idle[i] >= self.patience:
                    search.active[i] = False
                crowds[i] = self._varied(search, survivors, search.generators[i])
            yield

    def _scored(
        self, search: Search, crowds: list[Tensor], known: list[dict[tuple[int, ...], float]]
    ) -> dict[int, Tensor]:
        """Losses of each active crowd; only strings that were never scored cost rows."""
        strings: list[tuple[int, tuple[int, ...]]] = []
        for i in search.item.tolist():
            fresh = dict.fromkeys(tuple(row) for row in crowds[i].tolist())
            strings += [(i, row) for row in fresh if row not in known[i]]
        if strings:
            own = torch.tensor([i for i, _ in strings])
            losses = search.evaluate(torch.tensor([row for _, row in strings]), own)
            for (i, row), loss in zip(strings, losses.tolist(), strict=True):
                known[i][row] = loss
        return {
            i: torch.tensor([known[i][tuple(row)] for row in crowds[i].tolist()])
            for i in search.item.tolist()
        }

    def _varied(self, search: Search, survivors: Tensor, generator: torch.Generator) -> Tensor:
        """Survivors and children after mutation; the first row is the best survivor."""
        count, length = survivors.shape
        meets = (torch.rand(count, generator=generator) < self.crossover).nonzero().flatten()
        partner = torch.randint(count, (len(meets),), generator=generator)
        # The cut counts from the start token: 1 swaps the whole body, `length` only the last token.
        cut = torch.randint(1, length + 1, (len(meets), 1), generator=generator)
        head = torch.arange(1, length + 1) < cut
        mine, theirs = survivors[meets], survivors[partner]
        crowd = torch.cat(
            [survivors, torch.where(head, mine, theirs), torch.where(head, theirs, mine)]
        )
        mutates = torch.rand(len(crowd), generator=generator) < self.mutation
        place = torch.randint(length, (len(crowd),), generator=generator)
        token = search.problem.tokens[
            torch.randint(int(search.problem.allowed.sum()), (len(crowd),), generator=generator)
        ]
        if self.elitism:
            mutates[0] = False
        rows = mutates.nonzero().flatten()
        crowd[rows, place[rows]] = token[rows]
        return crowd
