"""Free vectors (textual inversion, Gal et al., arXiv 2208.01618): the upper bound of all other rules.

``P <- AdamW(P, grad L(P))`` with ``P (n, d)``; nothing is projected, so the result is an embedding and
no text.  The published learning rate is 5e-3 times the batch size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from .common import Problem, nearest_tokens
from .rule import Rule
from .search import Search

__all__ = ["Soft"]


@dataclasses.dataclass(frozen=True)
class Soft(Rule):
    """Gradient descent on the vectors themselves.

    Attributes:
        steps: Updates.
        lr, weight_decay: Of AdamW.
        keep: ``best`` vectors seen, or the ``last`` ones (for losses drawn anew at each step).
    """

    name = "soft"
    soft = True
    steps: int = 5000
    lr: float = 5e-3
    weight_decay: float = 1e-2
    keep: str = "best"

    def price(self, problem: Problem) -> int:
        """One forward and one backward pass."""
        return 2 * problem.rows

    def advance(self, search: Search) -> Iterator[None]:
        """One AdamW update of every active item."""
        table, allowed = search.problem.table, search.problem.allowed
        vectors = table[search.current].float().clone()
        optimiser = torch.optim.AdamW([vectors], lr=self.lr, weight_decay=self.weight_decay)
        while True:
            item = search.item
            before = vectors[item].clone()
            loss, slope = search.descend(before.to(table.dtype), item)
            nearest = nearest_tokens(before.to(table.dtype), table, allowed).cpu()
            if self.keep == "last":
                search.ids[item], search.vectors[item], search.loss[item] = (
                    nearest,
                    before.to(table.dtype),
                    loss.cpu(),
                )
            else:
                search.offer(nearest, loss, item, before.to(table.dtype))
            search.current[item] = nearest
            vectors.grad = torch.zeros_like(vectors)
            vectors.grad[item] = slope.float()
            optimiser.step()
            yield
