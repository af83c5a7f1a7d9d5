"""PEZ (Wen et al., "Hard prompts made easy", arXiv 2302.03668): descend on vectors, evaluate at tokens.

``P_hat = `` nearest row of the table by cosine; ``P <- AdamW(P, grad L(P_hat))``: the gradient is taken
at the projected point and applied to the free one.  The best ``P_hat`` is kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from .common import Problem, nearest_tokens
from .rule import Rule
from .search import Search

__all__ = ["Pez"]


@dataclasses.dataclass(frozen=True)
class Pez(Rule):
    """Projected gradients with a free copy.

    Attributes:
        steps: Updates.
        lr, weight_decay: Of AdamW.
    """

    name = "pez"
    steps: int = 3000
    lr: float = 0.1
    weight_decay: float = 0.1

    def price(self, problem: Problem) -> int:
        """One forward and one backward pass."""
        return 2 * problem.rows

    def advance(self, search: Search) -> Iterator[None]:
        """One projected update of every active item."""
        table, allowed = search.problem.table, search.problem.allowed
        vectors = table[search.current].float().clone()
        optimiser = torch.optim.AdamW([vectors], lr=self.lr, weight_decay=self.weight_decay)
        while True:
            item = search.item
            ids = nearest_tokens(vectors[item].to(table.dtype), table, allowed).cpu()
            loss, slope = search.descend(table[ids], item)
            good = search.problem.usable(ids, item)
            search.offer(ids[good], loss.cpu()[good], item[good])
            search.current[item] = ids
            vectors.grad = torch.zeros_like(vectors)
            vectors.grad[item] = slope.float()
            optimiser.step()
            yield
