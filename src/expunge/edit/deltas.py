"""From the tensors of an edit to the change of each weight.

Shared low rank: the change of layer ``l`` is ``W_l D`` with ``D = left right`` for all layers, where
``W_l`` is the weight the edit was fitted on.  Low rank: ``up down`` per layer.  Dense: the change
itself.  All products are formed in float64 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ..errors import EditFormatError, UnsupportedModel, WrongShape

if TYPE_CHECKING:
    from . import Edit

__all__ = ["change", "factors", "low_rank", "required_tensors"]

DENSE, DOWN, UP, LEFT, RIGHT = "delta.", "down.", "up.", "shared.left", "shared.right"

RANK_TOLERANCE = 1e-6
"""Singular values below this share of the largest do not count towards the numerical rank."""


def required_tensors(kind: str, names: Iterator[str] | tuple[str, ...]) -> set[str]:
    """Names of the tensors a weight edit of this kind must hold."""
    if kind == "shared-low-rank":
        return {LEFT, RIGHT}
    if kind == "low-rank":
        return {prefix + name for name in names for prefix in (DOWN, UP)}
    if kind == "dense":
        return {DENSE + name for name in names}
    return set()


def factors(
    edit: Edit, name: str, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """``(up, down)`` in float64 with change = ``up @ down``, or ``None`` for a dense edit.

    Args:
        edit: The edit.
        name: Canonical name of the weight.
        weight: The current weight, ``(out, in)``; only shared factors need it.
    """
    if edit.kind == "shared-low-rank":
        left, right = (edit.tensors[key].to(weight.device, torch.float64) for key in (LEFT, RIGHT))
        return weight.detach().double() @ left, right
    if edit.kind == "low-rank":
        up, down = (edit.tensors[p + name].to(weight.device, torch.float64) for p in (UP, DOWN))
        return up, down
    return None


def change(edit: Edit, name: str, weight: torch.Tensor) -> torch.Tensor:
    """The float64 change of one weight, in the weight's shape.

    Raises:
        UnsupportedModel: The edit is of a kind that does not change weights.
        WrongShape: Factors and weight do not fit.
        EditFormatError: The edit lacks the tensor.
    """
    if edit.kind not in ("dense", "low-rank", "shared-low-rank"):
        raise UnsupportedModel(
            f"a {edit.kind} edit acts while the model runs; it changes no weights"
        )
    missing = required_tensors(edit.kind, (name,)) - set(edit.tensors)
    if missing:
        raise EditFormatError(
            f"the edit of {edit.manifest.method} lacks the tensor {sorted(missing)[0]!r}"
        )
    try:
        pair = factors(edit, name, weight)
        if pair is None:
            delta = edit.tensors[DENSE + name].to(weight.device, torch.float64)
        else:
            up, down = pair
            delta = (
                (up @ down).reshape(weight.shape)
                if up.shape[0] * down.shape[1] == weight.numel()
                else up @ down
            )
    except RuntimeError as error:
        raise WrongShape(
            f"{name}: the edit's factors do not fit a weight of {tuple(weight.shape)} ({error})"
        ) from None
    if delta.shape != weight.shape:
        raise WrongShape(
            f"{name}: the edit has shape {tuple(delta.shape)}, the model {tuple(weight.shape)}"
        )
    return delta


def low_rank(
    delta: torch.Tensor, rank: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Best factors ``(up, down)`` of a matrix and the relative Frobenius error of leaving the rest out.

    Args:
        delta: ``(out, ...)``; trailing dimensions are flattened.
        rank: Columns to keep; ``None`` keeps the numerical rank at ``RANK_TOLERANCE``.
    """
    flat = delta.double().reshape(delta.shape[0], -1)
    left, values, right = torch.linalg.svd(flat, full_matrices=False)
    numerical = int((values > RANK_TOLERANCE * values[0]).sum()) if values[0] > 0 else 0
    keep = max(1, numerical if rank is None else min(rank, len(values)))
    root = values[:keep].sqrt()
    total = values.square().sum().sqrt()
    lost = values[keep:].square().sum().sqrt()
    error = float(lost / total) if total > 0 else 0.0
    return left[:, :keep] * root, root[:, None] * right[:keep], error
