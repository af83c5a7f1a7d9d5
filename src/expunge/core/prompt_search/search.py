"""One running search: active items, current and best strings, private generators, and its results."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ...models.base import noise_generator
from .common import Ledger, Problem

__all__ = ["Result", "Search"]


@dataclasses.dataclass(frozen=True)
class Result:
    """The string found for one item.

    Attributes:
        ids: ``(n,)`` token ids.
        vectors: ``(n, d)``: rows of the table, or the free vectors of a soft search.
        text: The decoded text, ``None`` where the problem has no texts.
        retokenised: The ids of that text (of the whole realised prompt).
        realisable: The text tokenises to the ids that were searched.
        loss: Loss of ``ids`` (of ``vectors`` in a soft search); ``None`` where it was never evaluated.
        last_draw_loss: Loss of the last string drawn, where the answer is not that string (simplex).
        realised_loss: Loss of the text as tokenised again, if it can be scored.
        admissible: No forbidden word stands in the text.
        trace: ``(rows spent, best loss)`` at each improvement.
        evaluations: Rows spent, forward and backward counted alike.
    """

    ids: Tensor
    vectors: Tensor
    text: str | None
    retokenised: tuple[int, ...] | None
    realisable: bool
    loss: float | None
    realised_loss: float | None
    admissible: bool
    trace: tuple[tuple[int, float], ...]
    evaluations: int
    last_draw_loss: float | None = None


class Search:
    """One running search over all items.

    Attributes:
        active: bool ``(items,)``: still searching.
        current: Ids ``(items, n)`` the rule stands at.
        loss: Best admissible loss of each item so far; ``ids`` and ``vectors`` go with it.  Infinity:
            ``ids`` were not evaluated.
        drawn: Loss of each item's last draw, for rules whose answer is another string; else NaN.
    """

    def __init__(self, problem: Problem, ledger: Ledger, seed: int | str, purpose: str) -> None:
        items, places = problem.items, problem.length
        self.problem, self.ledger = problem, ledger
        keys = range(items) if problem.keys is None else problem.keys
        self.generators = [
            noise_generator(0, f"prompt search {purpose} {seed}", key) for key in keys
        ]
        self.active = torch.ones(items, dtype=torch.bool)
        self.loss = torch.full((items,), float("inf"))
        self.drawn = torch.full((items,), float("nan"))
        self.current = (
            self.draw(torch.arange(items)) if problem.start is None else problem.start.clone()
        )
        self.ids, self.vectors = self.current.clone(), problem.table[self.current]
        self.traces: list[list[tuple[int, float]]] = [[] for _ in range(items)]
        self.places = places
        if problem.generators is not None:
            # The start above is drawn from other ones, so that these are fresh at the first step.
            self.generators = list(problem.generators)

    @property
    def item(self) -> Tensor:
        """Indices of the active items."""
        return self.active.nonzero().flatten()

    def draw(self, item: Tensor) -> Tensor:
        """One uniform string of allowed tokens for each entry of ``item``, from the item's generator."""
        tokens, places = self.problem.tokens, self.problem.length
        rows = [
            torch.randint(len(tokens), (places,), generator=self.generators[int(i)]) for i in item
        ]
        return tokens[torch.stack(rows)] if rows else torch.zeros((0, places), dtype=torch.long)

    def draw_usable(self, item: Tensor, tries: int = 20) -> Tensor:
        """As :meth:`draw`, drawing again where the text may not be used (up to ``tries`` times)."""
        ids = self.draw(item)
        for _ in range(tries):
            bad = (~self.problem.usable(ids, item)).nonzero().flatten()
            if not len(bad):
                break
            ids[bad] = self.draw(item[bad])
        return ids

    def descend(self, vectors: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and gradient, paid for: one forward and one backward pass."""
        self.ledger.spend(item, 2 * self.problem.rows)
        return self.problem.gradient(vectors, item)

    def evaluate(self, ids: Tensor, item: Tensor) -> Tensor:
        """Scores of strings, paid for and offered as best; inadmissible ones cost nothing and get infinity."""
        good = self.problem.usable(ids, item)
        losses = torch.full((len(ids),), float("inf"))
        if bool(good.any()):
            self.ledger.spend(item[good], self.problem.rows)
            losses[good] = self.problem.scores(ids[good], item[good]).float().cpu()
            self.offer(ids[good], losses[good], item[good])
        return losses

    def offer(
        self, ids: Tensor, losses: Tensor, item: Tensor, vectors: Tensor | None = None
    ) -> None:
        """Keep the best string of each item."""
        losses = losses.float().cpu()
        low = torch.full((self.problem.items,), float("inf")).scatter_reduce(
            0, item, losses, "amin"
        )
        place = torch.arange(len(item))
        chosen = losses <= low[item]
        first = torch.full((self.problem.items,), len(item)).scatter_reduce(
            0, item[chosen], place[chosen], "amin"
        )
        better = ((low < self.loss) & (first < len(item))).nonzero().flatten()
        for i in better.tolist():
            self.loss[i], self.ids[i] = low[i], ids[first[i]]
            self.vectors[i] = (
                self.problem.table[self.ids[i]] if vectors is None else vectors[first[i]].detach()
            )
            self.traces[i].append((int(self.ledger.spent[i]), float(low[i])))

    def results(self, soft: bool = False) -> list[Result]:
        """The answer of each item, decoded, tokenised again and scored again."""
        problem, everyone = self.problem, torch.arange(self.problem.items)
        texts: Sequence[str | None] = [None] * problem.items
        again: Sequence[list[int] | None] = [None] * problem.items
        same = [not soft] * problem.items
        rescored: Sequence[float | None] = [None] * problem.items
        if problem.realise is not None:
            made = problem.realise(self.ids, everyone)
            texts, again = made[0], made[1]
            same = [flag and not soft for flag in made[2]]
            if problem.rescore is not None and not soft:
                with torch.no_grad():
                    rescored = problem.rescore(made[0], everyone).tolist()
                self.ledger.spend(everyone, problem.rows)
        usable = problem.usable(self.ids, everyone).tolist()
        found = []
        for i, retokenised in enumerate(again):
            ids = None if retokenised is None else tuple(retokenised)
            head = (
                self.ids[i].clone(),
                self.vectors[i].clone(),
                texts[i],
                ids,
                same[i],
                _known(self.loss[i]),
            )
            found.append(
                Result(
                    *head, rescored[i], usable[i], tuple(self.traces[i]), int(self.ledger.spent[i]),
                    _known(self.drawn[i]),
                )
            )  # fmt: skip
        return found


def _known(value: Tensor) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
