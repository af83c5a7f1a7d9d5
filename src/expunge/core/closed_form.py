"""Closed-form edits of linear maps of text embeddings: streamed moments, one solve for all layers.

The editors UCE, RECE, TRCE (stage 1) and the refinement of MACE minimise, for every matrix ``W``,

    sum_i a_i ||W c_i - W_old g_i||^2 + sum_j b_j ||W p_j - W_old p_j||^2 + ridge ||W - W_old||_F^2

over rows ``c_i`` (what is erased), ``g_i`` (what takes its place) and ``p_j`` (what stays).  With
``K = ridge I + sum a c c^T + sum b p p^T`` and ``S = sum a (g - c) c^T`` the minimiser is

    W = W_old (I + D),    D = S K^{-1}

with one ``D`` (width x width) for all matrices: one Cholesky factorisation, whatever the number of
layers.  ``S``, and so ``D``, has at most as many dimensions as there are erased rows, which makes
thin factors of ``D`` exact (:mod:`factors`).  Sources of the objective: UCE, arXiv 2308.14761;
RECE, arXiv 2407.12383.

Where the target values are not of the form ``W_old g`` (MACE and ANT fusion, UCE's ``tensor``) there
is no shared ``D``; :class:`ValueMoments` then keeps one right-hand side a matrix and shares ``K``.

Shapes: rows are ``(n, width)``; matrices ``(out, width)``; everything is summed, not averaged, in
float64 on the CPU.  Scales and ridge are in the units of squared embedding norms.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch

from ..errors import SettingError
from .factors import Factor, range_basis

if TYPE_CHECKING:
    from .derivation import Derivation

__all__ = [
    "Moments",
    "Solution",
    "ValueMoments",
    "gram",
    "layer_changes",
    "moved",
]

CHUNK = 1024
"""Rows that are widened to float64 and summed at a time: bounds memory, whatever is passed in."""


@dataclasses.dataclass(frozen=True)
class Solution:
    """The shared right factor ``I + change`` of a closed-form edit.

    Attributes:
        change: ``D`` ``(width, width)`` float64; every matrix moves by ``W_old D``.
        rank_bound: Largest rank ``D`` can have: the number of erased rows, or the width.
        condition: Condition number of the solved system.
        ridge_share: Ridge over the mean eigenvalue of the moments; small values mean that the ridge
            protects little.
    """

    change: torch.Tensor
    rank_bound: int
    condition: float
    ridge_share: float

    def then(self, later: Solution) -> Solution:
        """This edit followed by one that was solved from the weights it gives."""
        change = self.change + later.change + self.change @ later.change
        return Solution(
            change,
            min(self.rank_bound + later.rank_bound, change.shape[0]),
            max(self.condition, later.condition),
            min(self.ridge_share, later.ridge_share),
        )


class Moments:
    """Streamed second moments of erased pairs and kept rows.

    Memory is four ``width^2`` matrices and at most ``CHUNK`` rows that wait to be summed together.

    Attributes:
        erase_rows, keep_rows: Rows taken in.
    """

    def __init__(self, width: int) -> None:
        self.width = width
        self._sums = {
            name: torch.zeros(width, width, dtype=torch.float64)
            for name in ("shift", "source", "target", "kept")
        }
        self._waiting: dict[str, list[list[torch.Tensor]]] = {"erase": [], "keep": []}
        self.erase_rows = 0
        self.keep_rows = 0

    @property
    def shift(self) -> torch.Tensor:
        """``S = sum a (g - c) c^T``."""
        return self._sum("shift")

    @property
    def source(self) -> torch.Tensor:
        """``sum a c c^T``."""
        return self._sum("source")

    @property
    def target(self) -> torch.Tensor:
        """``sum a g g^T``; only derived sources need it."""
        return self._sum("target")

    @property
    def kept(self) -> torch.Tensor:
        """``sum b p p^T``."""
        return self._sum("kept")

    @property
    def cross(self) -> torch.Tensor:
        """``sum a g c^T``."""
        return self.shift + self.source

    def erase(
        self,
        sources: torch.Tensor,
        targets: torch.Tensor,
        scale: float = 1.0,
        weights: torch.Tensor | None = None,
    ) -> None:
        """Take in pairs ``c -> g``, ``(n, width)`` each, with weight ``scale`` (times ``weights (n,)``)."""
        for part in _chunks(self.width, scale, weights, sources, targets):
            self._waiting["erase"].append(part)
            self.erase_rows += len(part[0])
            self._flush(CHUNK)

    def keep(
        self, rows: torch.Tensor, scale: float = 1.0, weights: torch.Tensor | None = None
    ) -> None:
        """Take in rows ``p`` ``(n, width)`` that shall stay, with weight ``scale`` (times ``weights``)."""
        for part in _chunks(self.width, scale, weights, rows):
            self._waiting["keep"].append(part)
            self.keep_rows += len(part[0])
            self._flush(CHUNK)

    def _sum(self, name: str) -> torch.Tensor:
        self._flush(1)
        return self._sums[name]

    def _flush(self, least: int) -> None:
        # A product of a thousand rows costs little more than one of ten: the sums are read and
        # written once instead of a hundred times.
        for kind, parts in self._waiting.items():
            if sum(len(part[0]) for part in parts) < max(1, least):
                continue
            *rows, w = (torch.cat(column) for column in zip(*parts, strict=True))
            parts.clear()
            if kind == "keep":
                self._sums["kept"] += rows[0].T @ (rows[0] * w)
                continue
            c, g = rows
            weighted = c * w
            self._sums["shift"] += (g - c).T @ weighted
            self._sums["source"] += c.T @ weighted
            self._sums["target"] += g.T @ (g * w)

    def keep_moment(self, moment: torch.Tensor, rows: int, scale: float = 1.0) -> None:
        """Take in a precomputed ``sum p p^T`` over ``rows`` rows."""
        self._sums["kept"] += scale * moment.to("cpu", torch.float64)
        self.keep_rows += rows

    def plus(self, other: Moments, *, erase: float = 1.0, keep: float = 1.0) -> Moments:
        """The sum of both, the other one's erased and kept part scaled."""
        total = Moments(self.width)
        total._sums = {
            "shift": self.shift + erase * other.shift,
            "source": self.source + erase * other.source,
            "target": self.target + erase * other.target,
            "kept": self.kept + keep * other.kept,
        }
        total.erase_rows = self.erase_rows + other.erase_rows * bool(erase)
        total.keep_rows = self.keep_rows + other.keep_rows * bool(keep)
        return total

    def derived(self, derivation: Derivation) -> Moments:
        """The moments after every source ``c`` was replaced by its derived row, targets as they are.

        The derivation is linear in ``(c, g)``, so no row is needed again.
        """
        cross = self.cross
        m = derivation.from_source
        target_source = cross @ m.T  # sum a g c'^T
        source = m @ self.source @ m.T
        if derivation.from_target is not None:
            n = derivation.from_target
            mixed = n @ cross @ m.T
            source = source + mixed + mixed.T + n @ self.target @ n.T
            target_source = target_source + self.target @ n.T
        fresh = Moments(self.width)
        fresh._sums |= {
            "shift": target_source - source,
            "source": source,
            "target": self.target.clone(),
        }
        fresh.erase_rows = self.erase_rows
        return fresh

    def solve(self, ridge: float, shift: torch.Tensor | None = None) -> Solution:
        """Minimise the objective of this module; see :class:`Factor` for what is refused.

        Args:
            ridge: Weight of ``||W - W_old||_F^2``; zero needs moments of full rank.
            shift: ``sum a (g - c) c^T`` of other targets for the same sources, in place of these.
        """
        shift = self.shift if shift is None else shift
        system = self.source + self.kept
        factor = Factor(_ridged(system, ridge), "closed-form edit")
        bound = min(self.erase_rows, self.width)
        basis = range_basis(shift, bound)
        if basis is None:
            change = factor.solve_left(shift)
        else:
            change = basis @ factor.solve_left(basis.T @ shift)
        return Solution(
            change=change,
            rank_bound=bound,
            condition=factor.condition,
            ridge_share=_share(ridge, system),
        )


class ValueMoments:
    """Moments with one right-hand side a matrix, for target values that are not ``W_old g``.

    Minimises ``sum a ||W c - v||^2 + sum b ||W p - u||^2 + ridge ||W - centre||_F^2`` for each matrix,
    with values ``v`` given per matrix and ``u = original p`` (``original`` defaults to ``centre``).

    Args:
        centres: Name -> matrix ``(out, width)`` the ridge pulls towards.
    """

    def __init__(self, centres: Mapping[str, torch.Tensor]) -> None:
        self.centres = dict(centres)
        self.width = next(iter(self.centres.values())).shape[1]
        self.system = torch.zeros(self.width, self.width, dtype=torch.float64)
        self.residuals = {
            name: torch.zeros(matrix.shape, dtype=torch.float64)
            for name, matrix in self.centres.items()
        }
        self.erase_rows = 0
        self.keep_rows = 0

    def erase(
        self, sources: torch.Tensor, values: Mapping[str, torch.Tensor], scale: float = 1.0
    ) -> None:
        """Take in rows ``(n, width)`` and, for every matrix, their wished values ``(n, out)``."""
        c = sources.detach().to("cpu", torch.float64)
        self.system += scale * (c.T @ c)
        self.erase_rows += len(c)
        for name, centre in self.centres.items():
            wished = values[name].detach().to("cpu", torch.float64)
            self.residuals[name] += scale * (wished - c @ _double(centre).T).T @ c

    def erase_moment(
        self,
        moment: torch.Tensor,
        rows: int,
        changes: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
        scale: float = 1.0,
    ) -> None:
        """Take in ``sum x x^T`` over rows that shall get the values of ``centre + up down``.

        The same as :meth:`erase` with those values; no row is needed again, and rank-one changes cost little.

        Args:
            moment: ``(width, width)``, summed over ``rows`` rows.
            rows: Their number.
            changes: Name -> ``up (out, r)`` and ``down (r, width)``, for every matrix.
            scale: Weight of the rows.
        """
        moment = scale * moment.to("cpu", torch.float64)
        self.system += moment
        self.erase_rows += rows
        for name in self.centres:
            up, down = changes[name]
            self.residuals[name] += _double(up) @ (_double(down) @ moment)

    def keep_moment(
        self,
        moment: torch.Tensor,
        rows: int,
        scale: float = 1.0,
        originals: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Take in ``sum p p^T`` over ``rows`` rows that keep the value of ``originals`` (or the centres)."""
        moment = scale * moment.to("cpu", torch.float64)
        self.system += moment
        self.keep_rows += rows
        for name, original in (originals or {}).items():
            difference = _double(original) - _double(self.centres[name])
            self.residuals[name] += difference @ moment

    def solve(self, ridge: float) -> tuple[Iterator[tuple[str, torch.Tensor]], Factor]:
        """Stream ``(name, W - centre)`` in float64, and the shared factorisation."""
        factor = Factor(_ridged(self.system, ridge), "closed-form edit")
        changes = ((name, factor.solve_left(residual)) for name, residual in self.residuals.items())
        return changes, factor

    def ridge_share(self, ridge: float) -> float:
        """As :attr:`Solution.ridge_share`."""
        return _share(ridge, self.system)


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float64)


def _share(ridge: float, system: torch.Tensor) -> float:
    """The ridge over the mean eigenvalue of the moments."""
    mean = float(system.diagonal().mean())
    return ridge / mean if mean > 0 else float("inf")


def _ridged(matrix: torch.Tensor, ridge: float) -> torch.Tensor:
    return matrix + ridge * torch.eye(matrix.shape[0], dtype=torch.float64)


def _chunks(
    width: int, scale: float, weights: torch.Tensor | None, *rows: torch.Tensor
) -> Iterator[list[torch.Tensor]]:
    """Slices of rows in float64 on the CPU, followed by their weights ``(n, 1)``."""
    n = rows[0].shape[0]
    for tensor in rows:
        if tensor.shape != (n, width):
            raise SettingError(
                f"closed-form rows have shape {tuple(tensor.shape)}; allowed is {(n, width)}"
            )
    if weights is not None and weights.shape != (n,):
        raise SettingError(
            f"closed-form weights have shape {tuple(weights.shape)}; allowed is {(n,)}"
        )
    for start in range(0, n, CHUNK):
        part = slice(start, start + CHUNK)
        found = [_double(tensor[part]) for tensor in rows]
        weight = torch.full((len(found[0]), 1), float(scale), dtype=torch.float64)
        if weights is not None:
            weight *= _double(weights[part])[:, None]
        yield [*found, weight]


def gram(
    weights: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """``sum_l W_l^T V_l`` in float64 on the CPU; ``V = W`` without ``others``.

    The norm of all layers' values of a row ``x`` stacked is ``sqrt(x^T gram(W) x)``: with this matrix
    no layer needs to be touched again.
    """
    total: torch.Tensor | None = None
    for name, weight in weights.items():
        w = weight.detach()
        w = w.double() if w.device.type != "mps" else w.cpu().double()
        v = (
            w
            if others is None or others[name] is weight
            else others[name].detach().to(w.device, torch.float64)
        )
        part = (w.T @ v).cpu()
        total = part if total is None else total.add_(part)
    if total is None:
        raise SettingError("closed form: no matrix was given; at least one is needed")
    return total


def moved(shift: torch.Tensor, values: torch.Tensor, rows: torch.Tensor) -> float:
    """Mean of ``||C u||^2 / ||W u||^2`` over rows ``u (n, width)``, for changes ``C`` of the matrices ``W``.

    Args:
        shift: ``gram(C)``, all matrices stacked.
        values: ``gram(W)``.
        rows: Rows of text embeddings.
    """
    u = _double(rows)
    below = ((u @ values) * u).sum(1).clamp_min(torch.finfo(torch.float64).tiny)
    return float((((u @ shift) * u).sum(1).clamp_min(0) / below).mean())


def layer_changes(
    weights: Mapping[str, torch.Tensor], left: torch.Tensor, right: torch.Tensor
) -> dict[str, float]:
    """``||W_l D||_F / ||W_l||_F`` for each matrix, with ``D = left right``."""
    overlap = (right @ right.T).float()
    found = {}
    for name, weight in weights.items():
        up = weight.detach().to("cpu", torch.float32) @ left.float()
        size = float(((up @ overlap) * up).sum().clamp_min(0).sqrt())
        norm = float(weight.detach().float().norm())
        found[name] = size / norm if norm > 0 else 0.0
    return found
