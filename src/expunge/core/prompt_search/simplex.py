"""Relaxed simplex (UnlearnDiffAtk, arXiv 2310.11868): a distribution over tokens for each place.

``A (n, V)`` starts at ``1 / V``.  A step draws one token a row from the multinomial ``A_i``, takes the
gradient ``g_i`` of the loss at those embeddings, passes ``g_i E^T`` straight through to ``A_i`` with
every entry clipped to [-1, 1], takes an Adam step and projects each row on the simplex.  The answer is
the arg-max of the rows.  ``V`` counts allowed tokens only, so a forbidden one has no entry at all.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from ...errors import SettingError
from .common import Problem, project_simplex
from .rule import Rule
from .search import Search

__all__ = ["Simplex", "repaired"]


@dataclasses.dataclass(frozen=True)
class Simplex(Rule):
    """Straight-through multinomial draws with an exact projection.

    Attributes:
        steps: Updates.
        lr, weight_decay: Of Adam (L2 form, default betas).
        clip: Bound of each entry of the gradient with respect to the one-hot rows.
        keep: ``last``: the final arg-max, as published, for losses drawn anew at each step.  It is not
            evaluated itself: the result's loss is ``None``, and ``last_draw_loss`` that of the last
            string drawn.  ``best``: the best string drawn.
    """

    name = "simplex"
    steps: int = 2000
    lr: float = 0.01
    weight_decay: float = 0.1
    clip: float = 1.0
    keep: str = "last"

    def price(self, problem: Problem) -> int:
        """One forward and one backward pass."""
        return 2 * problem.rows

    def advance(self, search: Search) -> Iterator[None]:
        """One update of every active item."""
        problem = search.problem
        if self.keep == "last" and problem.goal is not None:
            raise SettingError(
                "simplex: with keep 'last' the answer has no loss to reach a goal with"
            )
        tokens = problem.tokens
        table = problem.table[tokens].float()
        shares = torch.full(
            (problem.items, problem.length, len(tokens)), 1 / len(tokens), device=table.device
        )
        if problem.start is not None:
            shares.zero_().scatter_(
                2, torch.searchsorted(tokens, problem.start)[..., None].to(table.device), 1.0
            )
        optimiser = torch.optim.Adam([shares], lr=self.lr, weight_decay=self.weight_decay)
        peaks = torch.full((problem.items, problem.length), -1)
        while True:
            item = search.item
            ids = tokens[self._drawn(search, shares, item)]
            loss, slope = search.descend(problem.table[ids], item)
            if self.keep == "best":
                good = problem.usable(ids, item)
                search.offer(ids[good], loss.cpu()[good], item[good])
            shares.grad = torch.zeros_like(shares)
            shares.grad[item] = (slope.float() @ table.T).clamp(-self.clip, self.clip)
            optimiser.step()
            shares[item] = project_simplex(shares[item])
            peak = shares[item].argmax(-1).cpu()
            moved = (peak != peaks[item]).any(1)
            peaks[item] = peak
            if bool(moved.any()):
                own = item[moved]
                search.current[own] = repaired(problem, tokens, shares[own].cpu(), own)
            if self.keep == "last":
                search.ids[item], search.drawn[item] = search.current[item], loss.float().cpu()
                search.vectors[item] = problem.table[search.current[item]]
            yield

    def _drawn(self, search: Search, shares: Tensor, item: Tensor) -> Tensor:
        """Columns ``(len(item), n)`` drawn from the rows, from each item's own generator."""
        rows = shares[item].cpu().clamp(min=0)
        drawn = [
            torch.multinomial(row, 1, generator=search.generators[int(i)])
            for row, i in zip(rows, item, strict=True)
        ]
        return torch.stack(drawn)[..., 0]


def repaired(
    problem: Problem, tokens: Tensor, preference: Tensor, item: Tensor, ranks: int = 24
) -> Tensor:
    """Arg-max ids; where their text may not be used, the usable string one swap away that is preferred most.

    Args:
        preference: ``(B, n, len(tokens))``; ``tokens`` are the ids of its columns.
        ranks: Next-best tokens tried at each place.  The arg-max stays where none of them helps.
    """
    best = preference.argmax(-1)
    ids = tokens[best]
    bad = (~problem.usable(ids, item)).nonzero().flatten().tolist()
    for row in bad:
        top = preference[row].topk(min(ranks + 1, len(tokens)), dim=-1)
        loss = (top.values[:, :1] - top.values[:, 1:]).flatten()
        swaps = ids[row].repeat(len(loss), 1)
        place = torch.arange(problem.length).repeat_interleave(top.indices.shape[1] - 1)
        swaps[torch.arange(len(loss)), place] = tokens[top.indices[:, 1:].flatten()]
        good = problem.usable(swaps, item[row].expand(len(loss)))
        if bool(good.any()):
            ids[row] = swaps[loss.masked_fill(~good, float("inf")).argmin()]
    return ids
