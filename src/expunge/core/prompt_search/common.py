"""What every prompt optimiser is given: the problem and the ledger of rows.

A search minimises ``L`` over ``n`` token places of a prompt.  Several items (prompts) advance in lock
step: row ``b`` of a batch belongs to item ``item[b]``, so that small batches are not wasted.

    Problem  what is minimised, over which tokens, and how ids become a text
    Ledger   rows spent by each item, forward and backward counted alike
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...errors import NonFiniteError, SettingError
from ..training import HALF_SCALE

__all__ = ["Ledger", "Problem", "Realised", "Watch", "nearest_tokens", "project_simplex"]

Realised = tuple[list[str], list[list[int]], list[bool]]
"""Texts, their ids after tokenising again, and whether these equal the ids that were decoded."""

Watch = Callable[[int, Tensor, Tensor], Tensor]
"""``watch(step, ids (items, n), active (items,)) -> (items,)``: which items go on; called after each step."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is minimised.

    Attributes:
        table: Token table ``E (V, d)``.
        length: ``n``, searched places of each item.
        allowed: bool ``(V,)``; ids outside never appear in a result.
        loss: ``loss(vectors (B, n, d), item (B,)) -> (B,)``, differentiable; ``None`` for black boxes.
        score: ``score(ids (B, n), item (B,)) -> (B,)``; ``None`` takes the loss at the rows of the table.
        realise: ``realise(ids, item)``: decode, tokenise again; ``None`` where ids are the artefact.
        admissible: ``admissible(ids, item) -> bool (B,)``: refuses strings whose text may not be used.
        rescore: ``rescore(texts, item) -> (B,)``: the loss of texts as they were tokenised again.
        items: Number of items in lock step.
        keys: One name an item for its private randomness; default 0, 1, 2, ...
        generators: The items' generators from the first step on, for a caller that shares or rewinds
            them; default: made from the seed and ``keys``.
        start: Ids ``(items, n)`` to start from; ``None`` starts as the rule does.
        rows: Network rows one evaluation of one string costs, in one direction.
        counted: Called with the rows of each backward pass.
        goal: An item stops once its best loss is at most this.
        batch: Strings scored at a time.
    """

    table: Tensor
    length: int
    allowed: Tensor
    loss: Callable[[Tensor, Tensor], Tensor] | None = None
    score: Callable[[Tensor, Tensor], Tensor] | None = None
    realise: Callable[[Tensor, Tensor], Realised] | None = None
    admissible: Callable[[Tensor, Tensor], Tensor] | None = None
    rescore: Callable[[Sequence[str], Tensor], Tensor] | None = None
    items: int = 1
    keys: Sequence[str | int] | None = None
    generators: Sequence[torch.Generator] | None = None
    start: Tensor | None = None
    rows: int = 1
    counted: Callable[[int], None] | None = None
    goal: float | None = None
    batch: int = 1024

    def __post_init__(self) -> None:
        if self.allowed.shape != self.table.shape[:1] or not bool(self.allowed.any()):
            raise SettingError(
                f"the mask of allowed tokens has shape {tuple(self.allowed.shape)} with "
                f"{int(self.allowed.sum())} tokens left; {self.table.shape[0]} entries, at least one true, are needed"
            )
        if self.loss is None and self.score is None:
            raise SettingError("a search needs a loss or a score; both are missing")
        if self.length < 1:
            raise SettingError(
                f"the searched string has {self.length} places; at least 1 is needed"
            )
        if self.start is not None and not bool(
            self.allowed.to(self.start.device)[self.start].all()
        ):
            raise SettingError("the start of a search holds a token that is not allowed")

    @property
    def tokens(self) -> Tensor:
        """The allowed ids, ascending."""
        return self.allowed.nonzero().flatten()

    def gradient(self, vectors: Tensor, item: Tensor) -> tuple[Tensor, Tensor]:
        """Loss ``(B,)`` and its gradient ``(B, n, d)``; row ``i`` belongs to searched place ``i``.

        Raises:
            NonFiniteError: It is NaN or infinite; the search would stray without a word.
        """
        if self.loss is None:
            raise SettingError(
                "this rule follows gradients, but the problem has only a score; use genetic or random"
            )
        # Losses are means over a picture: unscaled, most of their gradient vanishes on its way through float16.
        scale = HALF_SCALE if vectors.dtype == torch.float16 else 1.0
        with torch.enable_grad():
            leaf = vectors.detach().clone().requires_grad_(True)
            value = self.loss(leaf, item)
            (slope,) = torch.autograd.grad(value.sum() * scale, leaf)
        if self.counted is not None:
            self.counted(len(item) * self.rows)
        if scale != 1.0:
            slope = slope.float() / scale
        if not bool(torch.isfinite(slope).all()):
            raise NonFiniteError("the loss of a prompt search has a gradient that is not finite")
        return value.detach(), slope

    def scores(self, ids: Tensor, item: Tensor) -> Tensor:
        """Losses ``(B,)`` of strings, without gradients."""
        made = []
        with torch.no_grad():
            for part, own in zip(ids.split(self.batch), item.split(self.batch), strict=True):
                if self.score is not None:
                    made.append(self.score(part, own))
                elif self.loss is not None:
                    made.append(self.loss(self.table[part], own))
        return torch.cat(made) if made else torch.zeros(0)

    def usable(self, ids: Tensor, item: Tensor) -> Tensor:
        """bool ``(B,)``: the text of the string may be used."""
        if self.admissible is None or not len(ids):
            return torch.ones(len(ids), dtype=torch.bool)
        return self.admissible(ids, item)

    def realisable(self, ids: Tensor, item: Tensor) -> Tensor:
        """bool ``(B,)``: the string's text tokenises to the string itself; all where there are no texts."""
        if self.realise is None or not len(ids):
            return torch.ones(len(ids), dtype=torch.bool)
        return torch.tensor(self.realise(ids, item)[2], dtype=torch.bool)


class Ledger:
    """Rows spent by each item; the one unit in which attacks are compared."""

    def __init__(self, items: int = 1, limit: int | None = None) -> None:
        self.spent = torch.zeros(items, dtype=torch.long)
        self.limit = limit

    def spend(self, item: Tensor | Sequence[int], rows: int = 1) -> None:
        """``rows`` rows for each entry of ``item`` (an item may occur several times)."""
        index = torch.as_tensor(item, dtype=torch.long).cpu()
        self.spent.index_add_(0, index, torch.full_like(index, rows))

    def affords(self, rows: int) -> Tensor:
        """bool ``(items,)``: the item can still pay ``rows`` rows."""
        if self.limit is None:
            return torch.ones(len(self.spent), dtype=torch.bool)
        return self.spent + rows <= self.limit


def nearest_tokens(vectors: Tensor, table: Tensor, allowed: Tensor) -> Tensor:
    """Ids of the nearest allowed rows by cosine; ``vectors (..., d)`` -> ``(...)``.

    Cosine, not Euclidean: the norms of token embeddings differ, so the two disagree.
    """
    unit = torch.nn.functional.normalize
    likeness = unit(vectors, dim=-1) @ unit(table, dim=-1).T
    return likeness.masked_fill(~allowed.to(likeness.device), float("-inf")).argmax(-1)


def project_simplex(rows: Tensor) -> Tensor:
    """Euclidean projection of each row on ``{a >= 0, sum a = 1}``, exact, by sorting; ``(..., m)``."""
    ordered = rows.double().sort(-1, descending=True).values
    rank = torch.arange(1, rows.shape[-1] + 1, dtype=torch.float64, device=rows.device)
    shift = (ordered.cumsum(-1) - 1) / rank
    count = (ordered > shift).sum(-1, keepdim=True)
    return (rows.double() - shift.gather(-1, count - 1)).clamp(min=0).to(rows.dtype)
