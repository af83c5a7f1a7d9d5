"""Which units are on for which rows, and products that touch only these.

For ``n`` entries ``(row r, unit c, value v)`` of a code ``z (B, K)`` and a matrix of rows:

    decode       x_hat_r = sum_c v W_d[c]            n d products, in place of B K d
    its backward dv = <g_r, W_d[c]>,  dW_d[c] = sum_r v g_r
    encode       dW_e[c] = sum_r dv x_r,  db_e[c] = sum_r dv,  db = -s db_e W_e

All are bags (:func:`torch.nn.functional.embedding_bag`), over rows or, after one sort, over units.  The order of each
sum is fixed, so that results repeat bit for bit.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

__all__ = ["Support", "decode_entries", "encode_entries"]


class Support:
    """Entries of a sparse code, sorted by row.

    Args:
        columns: Unit of each entry, ``(n,)``.
        counts: Entries of each row, ``(B,)``, or the one number of all rows.
        rows: B.
        units: K.
    """

    def __init__(self, columns: Tensor, counts: Tensor | int, rows: int, units: int) -> None:
        self.columns, self.counts, self.rows, self.units = columns, counts, rows, units
        if isinstance(counts, int):
            self.starts = torch.arange(0, rows * counts, counts, device=columns.device)
        else:
            self.starts = counts.cumsum(0) - counts

    @classmethod
    def of(cls, indices: Tensor, units: int) -> Support:
        """The support of a fixed number of units a row, ``(B, k)``."""
        return cls(indices.reshape(-1), indices.shape[1], len(indices), units)

    @functools.cached_property
    def row_of(self) -> Tensor:
        """Row of each entry, ``(n,)``."""
        rows = torch.arange(self.rows, device=self.columns.device)
        if isinstance(self.counts, int):
            return rows.repeat_interleave(self.counts)
        return rows.repeat_interleave(self.counts, output_size=len(self.columns))

    @functools.cached_property
    def _by_unit(self) -> tuple[Tensor, Tensor, Tensor]:
        """Order that sorts entries by unit, their rows in it, and where each unit begins."""
        order = torch.argsort(self.columns, stable=True)
        counts = torch.bincount(self.columns, minlength=self.units)
        return order, self.row_of[order], counts.cumsum(0) - counts

    def over_rows(self, values: Tensor, matrix: Tensor) -> Tensor:
        """``z matrix``: ``(n,)`` and ``(K, d)`` to ``(B, d)``."""
        return functional.embedding_bag(
            self.columns, matrix, self.starts, mode="sum", per_sample_weights=values
        )

    def over_units(self, values: Tensor, matrix: Tensor) -> Tensor:
        """``z^T matrix``: ``(n,)`` and ``(B, d)`` to ``(K, d)``."""
        order, rows, starts = self._by_unit
        return functional.embedding_bag(
            rows, matrix.contiguous(), starts, mode="sum", per_sample_weights=values[order]
        )

    def dense(self, values: Tensor) -> Tensor:
        """z, ``(B, K)``."""
        found = values.new_zeros(self.rows, self.units)
        return found.index_put((self.row_of, self.columns), values)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, atoms: Tensor, support: Support) -> Tensor:
        # A graph of its own for the values: their gradient then needs no (n, d) numbers at once.
        with torch.enable_grad():
            inner = values.detach().requires_grad_()
            made = support.over_rows(inner, atoms.detach())
        ctx.graph, ctx.support = (inner, made), support
        ctx.save_for_backward(values)
        return made.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (values,), (inner, made) = ctx.saved_tensors, ctx.graph
        of_values = of_atoms = None
        if ctx.needs_input_grad[0]:
            (of_values,) = torch.autograd.grad(made, inner, gradient.contiguous())
        if ctx.needs_input_grad[1]:
            of_atoms = ctx.support.over_units(values, gradient)
        return of_values, of_atoms, None


class _Encode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, offset: Tensor, bias: Tensor | None, centred: Tensor, values: Tensor, support: Support
    ) -> Tensor:  # fmt: skip
        ctx.support, ctx.with_bias = support, bias is not None
        ctx.save_for_backward(weight, centred)
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        weight, centred = ctx.saved_tensors
        ones = centred.new_ones(len(centred), 1)
        of_offset = ctx.support.over_units(gradient, ones)[:, 0]
        of_weight = ctx.support.over_units(gradient, centred) if ctx.needs_input_grad[0] else None
        of_bias = -(of_offset @ weight) if ctx.with_bias and ctx.needs_input_grad[2] else None
        return of_weight, of_offset, of_bias, None, None, None


def decode_entries(values: Tensor, atoms: Tensor, support: Support) -> Tensor:
    """``z W_d`` ``(B, d)`` from the values ``(n,)`` of a support."""
    found: Tensor = _Decode.apply(values, atoms, support)
    return found


def encode_entries(
    weight: Tensor, offset: Tensor, bias: Tensor | None, centred: Tensor, values: Tensor, support: Support
) -> Tensor:  # fmt: skip
    """The entries ``values (n,)`` of ``u = centred W_e^T + b_e``, which were computed without a graph, with one.

    Args:
        weight: W_e ``(K, d)``.
        offset: b_e ``(K)``.
        bias: b ``(d)`` where ``centred`` is ``x - b``, else ``None``.
        centred: What the encoder saw, ``(B, d)``; it gets no gradient.
        values: The entries of u.
        support: Where they stand.
    """
    found: Tensor = _Encode.apply(weight, offset, bias, centred, values, support)
    return found
