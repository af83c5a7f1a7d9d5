"""Factorisations that say when they cannot be trusted: guarded Cholesky, and thin factors.

:class:`Factor` refuses systems whose solution would not have five right digits in float64.
:func:`thin_factors` splits a matrix of low rank into two thin ones, exactly but for a stated tail.
"""

from __future__ import annotations

import torch
from scipy.linalg import lapack, qr

from ..errors import NonFiniteError, NumericalError

__all__ = ["Factor", "range_basis", "thin_factors"]

TRUSTED_DIGITS = 1e-5
"""A solve is refused where condition number x float64 rounding exceeds this."""

TAIL = 1e-7
"""Share of the change (Frobenius norm) that thin factors may leave out."""


class Factor:
    """Cholesky factor of a symmetric positive definite matrix, refused where it cannot be trusted.

    Attributes:
        condition: Estimated condition number in the 1-norm (within a small factor).

    Raises:
        NonFiniteError: The matrix holds NaN or infinity.
        NumericalError: The matrix is singular, or too ill-conditioned for five right digits.
    """

    def __init__(self, matrix: torch.Tensor, what: str) -> None:
        if not torch.isfinite(matrix).all():
            raise NonFiniteError(f"{what}: the moments hold NaN or infinity")
        self.lower, failed = torch.linalg.cholesky_ex(matrix)
        reciprocal = 0.0
        if not failed:
            norm = float(matrix.abs().sum(0).max())
            reciprocal = float(lapack.dpocon(self.lower.numpy().T, norm, uplo="U")[0])
        self.condition = 1.0 / reciprocal if reciprocal > 0 else float("inf")
        if self.condition * torch.finfo(torch.float64).eps > TRUSTED_DIGITS:
            raise NumericalError(
                f"{what}: the system of width {matrix.shape[0]} has condition number {self.condition:.1e}, "
                f"so its solution cannot be trusted; at most "
                f"{TRUSTED_DIGITS / torch.finfo(torch.float64).eps:.0e} is allowed (raise the ridge)"
            )

    def solve(self, right: torch.Tensor) -> torch.Tensor:
        """``matrix^{-1} right``."""
        return torch.cholesky_solve(right, self.lower)

    def solve_left(self, left: torch.Tensor) -> torch.Tensor:
        """``left matrix^{-1}``."""
        return torch.cholesky_solve(left.T, self.lower).T


def range_basis(matrix: torch.Tensor, rank_bound: int) -> torch.Tensor | None:
    """Orthonormal columns that span a matrix of small rank, or ``None`` where the bound is no help."""
    if 2 * (rank_bound + 8) >= min(matrix.shape):
        return None
    probe = torch.randn(
        matrix.shape[1],
        rank_bound + 8,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(0),
    )
    basis = torch.linalg.qr(matrix @ probe)[0]
    left_out = (matrix - basis @ (basis.T @ matrix)).norm()
    return basis if float(left_out) <= 1e-12 * float(matrix.norm()) else None


def thin_factors(matrix: torch.Tensor, rank_bound: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Rank-revealing factors ``left (out, r) @ right (r, width)`` of a float64 matrix of known rank bound.

    A small bound is used exactly: the range of a matrix of rank ``k`` is that of its product with
    ``k + 8`` random vectors.  Otherwise, or where that fails, QR with column pivoting.  ``r`` is the
    smallest rank that leaves out at most ``TAIL`` of the Frobenius norm (at least 1).

    Returns:
        ``left``, ``right`` in float64 with balanced scales, and the relative error in Frobenius norm.
    """
    total = float(matrix.norm())
    if total == 0.0:
        return matrix.new_zeros(matrix.shape[0], 1), matrix.new_zeros(1, matrix.shape[1]), 0.0
    basis = range_basis(matrix, rank_bound)
    if basis is not None:
        core = basis.T @ matrix
    else:
        q, r, order = qr(matrix.numpy(), mode="economic", pivoting=True)
        basis, core = torch.from_numpy(q), torch.empty(r.shape, dtype=torch.float64)
        core[:, torch.from_numpy(order).long()] = torch.from_numpy(r)
        tails = core.square().sum(1).flip(0).cumsum(0).flip(0).sqrt()
        rank = max(1, int((tails > TAIL / 2 * total).sum()))
        basis, core = basis[:, :rank], core[:rank]
    u, values, v = torch.linalg.svd(core, full_matrices=False)
    tails = values.square().flip(0).cumsum(0).flip(0).sqrt()
    rank = max(1, int((tails > TAIL * total).sum()))
    root = values[:rank].sqrt()
    left, right = (basis @ u[:, :rank]) * root, root[:, None] * v[:rank]
    return left, right, float((matrix - left @ right).norm()) / total
