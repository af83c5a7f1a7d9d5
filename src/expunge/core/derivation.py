"""Embeddings that bring back, in edited matrices, what others did in the original ones.

For edited matrices ``W_l`` and original ones ``O_l``, with ``G = sum W_l^T W_l`` and
``H = sum W_l^T O_l``, the row ``c'`` whose edited values best equal the original values of ``c`` is

    c' = argmin sum_l ||W_l c' - O_l c||^2 + ridge ||c'||^2 = (ridge I + G)^{-1} H c

(RECE, arXiv 2407.12383).  An edit is invertible almost always, so without a penalty the residual
goes to zero and only the norm of ``c'`` grows: results mean something under a norm budget only
(:func:`norm_budgeted`).

Regularisations (``r`` is the ridge, ``t`` the text the concept was mapped to):

    zero      r ||c'||^2                                  (G + r I)^{-1} H c
    standard  r ||c' - t||^2                              (G + r I)^{-1} (H c + r t)
    first     r sum ||W c' - W c||^2                      ((1 + r) G)^{-1} (H + r G) c
    second    r ||c' - c||^2                              (G + r I)^{-1} (H + r I) c
    both      the last two                                ((1 + r) G + r I)^{-1} (H + r G + r I) c
"""

from __future__ import annotations

import dataclasses

import torch

from ..errors import SettingError
from .factors import Factor

__all__ = ["REGULARISATIONS", "Derivation", "derive", "norm_budgeted", "residuals"]

REGULARISATIONS = ("zero", "standard", "first", "second", "both")


@dataclasses.dataclass(frozen=True)
class Derivation:
    """The linear map ``c' = from_source c + from_target t``, each ``(width, width)`` float64.

    Attributes:
        from_source: Map of the concept's row.
        from_target: Map of the row it was mapped to, or ``None`` where that row does not matter.
        condition: Condition number of the solved system.
    """

    from_source: torch.Tensor
    from_target: torch.Tensor | None
    condition: float

    def rows(self, sources: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Derived rows ``(n, width)`` of rows ``c`` (and ``t``)."""
        derived = sources.detach().to("cpu", torch.float64) @ self.from_source.T
        if self.from_target is not None and targets is not None:
            derived = derived + targets.detach().to("cpu", torch.float64) @ self.from_target.T
        return derived


def derive(
    edited: torch.Tensor, cross: torch.Tensor, ridge: float, regularisation: str = "zero"
) -> Derivation:
    """The map to derived rows.

    Args:
        edited: ``G = sum W^T W`` ``(width, width)`` of the edited matrices.
        cross: ``H = sum W^T O``.
        ridge: Weight of the penalty, in units of squared matrix entries.
        regularisation: One of ``REGULARISATIONS``.

    Raises:
        NumericalError: The system is too ill-conditioned; raise the ridge.
    """
    if regularisation not in REGULARISATIONS:
        raise SettingError(
            f"regularisation is {regularisation!r}; allowed: {', '.join(REGULARISATIONS)}"
        )
    identity = torch.eye(edited.shape[0], dtype=torch.float64)
    surrogate = ridge if regularisation in ("first", "both") else 0.0
    plain = 0.0 if regularisation == "first" else ridge
    factor = Factor((1 + surrogate) * edited + plain * identity, "derivation of embeddings")
    right = cross + surrogate * edited
    if regularisation in ("second", "both"):
        right = right + ridge * identity
    target = factor.solve(ridge * identity) if regularisation == "standard" else None
    return Derivation(factor.solve(right), target, factor.condition)


def norm_budgeted(
    edited: torch.Tensor, cross: torch.Tensor, rows: torch.Tensor, budget: float, steps: int = 80
) -> tuple[torch.Tensor, torch.Tensor]:
    """Derived rows with ``||c'|| <= budget ||c||``, each with its own ridge.

    The norm of ``(ridge I + G)^{-1} H c`` falls with the ridge, so the ridge that meets the budget is
    found by bisection of its logarithm in the eigenbasis of ``G``.  A row whose norm stays below the
    budget at a negligible ridge (1e-12 of the mean eigenvalue) is the free minimiser.

    Args:
        edited: ``G``.
        cross: ``H``.
        rows: ``c``, ``(n, width)``.
        budget: Allowed norm in units of ``||c||``.
        steps: Bisection steps; 80 reach float64 accuracy.

    Returns:
        Rows ``(n, width)`` in float64 and their ridges ``(n,)``.
    """
    c = rows.detach().to("cpu", torch.float64)
    values, basis = torch.linalg.eigh(edited)
    values = values.clamp_min(0)
    right = c @ cross.T @ basis
    allowed = budget * c.norm(dim=1)
    mean = max(float(values.mean()), torch.finfo(torch.float64).tiny)
    floor = 1e-12 * mean

    def size(ridge: torch.Tensor) -> torch.Tensor:
        return (right / (values + ridge[:, None])).norm(dim=1)

    low = torch.full_like(allowed, floor)
    # ||c'|| <= ||H c|| / ridge, so this ridge meets the budget.
    high = (right.norm(dim=1) / allowed.clamp_min(torch.finfo(torch.float64).tiny)).clamp_min(floor)
    free = size(low) <= allowed
    for _ in range(steps):
        middle = (low * high).sqrt()
        over = size(middle) > allowed
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    ridge = torch.where(free, torch.full_like(high, floor), high)
    return (right / (values + ridge[:, None])) @ basis.T, ridge


def residuals(
    edited: torch.Tensor,
    cross: torch.Tensor,
    original: torch.Tensor,
    derived: torch.Tensor,
    rows: torch.Tensor,
) -> torch.Tensor:
    """``||W c' - O c|| / ||O c||`` ``(n,)``, all matrices stacked, from the three Gram matrices.

    0: the edited model sees what the original saw; 1: as far from it as its own norm.
    """
    x, c = (t.detach().to("cpu", torch.float64) for t in (derived, rows))
    whole = ((c @ original) * c).sum(1)
    square = ((x @ edited) * x).sum(1) - 2 * ((x @ cross) * c).sum(1) + whole
    tiny = torch.finfo(torch.float64).tiny
    return (square.clamp_min(0) / whole.clamp_min(tiny)).sqrt()
