"""Metrics with exact definitions; every number of a quality table and of a comparison of two dictionaries.

    R2                   1 - sum ||x - x_hat||^2 / sum ||x - mean x||^2, the mean of each dimension
    variance explained   1 - sum_d var(x - x_hat)_d / sum_d var(x)_d, which forgives a constant offset
    L0                   mean number of non-zero units a row
    dead share           units that fire on none of the rows
    cosine               mean cosine of x and x_hat
    Hoyer                mean over rows of (sqrt K - ||z||_1 / ||z||_2) / (sqrt K - 1); 1 is one unit, 0 all alike
    loss recovered       (L_zero - L_sae) / (L_zero - L_clean)
    stability            (1/K) max over permutations P of sum_i cos(D_i, D'_P(i))
    mean max cosine      mean over atoms of the best cosine with an atom of the other dictionary
    recovery             mean over true atoms of the best |cos|

R2 with one mean over all entries, as some libraries take, is higher wherever dimensions have different means.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import SettingError
from .model import SparseAutoencoder
from .stream import as_activations

__all__ = ["loss_recovered", "mean_max_cosine", "quality", "recovery", "stability"]

DEAD_ROWS = 1_000_000
"""Rows on which a unit that never fired is called dead; fewer where there are fewer."""


class _Sums:
    """Sums over rows, in float64; rows are shifted by the first block's mean, so that variances do not cancel."""

    def __init__(self, config: Any) -> None:
        self.units, self.rows = config.units, 0
        self.shift: Tensor | None = None
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    def update(self, x: Tensor, made: Tensor, values: Tensor, kept: Tensor) -> None:
        """Add rows ``x``, their reconstructions ``made`` ``(B, d)`` and sparse codes ``(B, m)``."""
        x, made, values = x.double(), made.double(), values.double()
        if self.shift is None:
            self.shift = x.mean(0)
        error, moved, on = x - made, x - self.shift, values > 0
        self.rows += len(x)
        self.add("x", moved.sum(0))
        self.add("xx", moved.square().sum(0))
        self.add("e", error.sum(0))
        self.add("ee", error.square().sum(0))
        self.add("l0", on.sum())
        self.add("cosine", functional.cosine_similarity(x, made, dim=1).sum())
        norms = values.norm(dim=1)
        root = math.sqrt(self.units)
        hoyer = (root - values.sum(1) / norms.clamp_min(1e-300)) / max(root - 1, 1e-300)
        self.add("hoyer", hoyer[norms > 0].sum())
        self.add("coded", (norms > 0).sum())
        self.add("fired", torch.bincount(kept[on], minlength=self.units))

    def table(self) -> dict[str, Any]:
        """The numbers of the module's table that need no second dictionary."""
        s, n = self.sums, self.rows
        spread = float((s["xx"] - s["x"].square() / n).sum())
        wrong = float(s["ee"].sum())
        varied = float((s["ee"] - s["e"].square() / n).sum())
        coded = int(s["coded"])
        return {
            "r2": 1 - wrong / spread if spread > 0 else math.nan,
            "variance_explained": 1 - varied / spread if spread > 0 else math.nan,
            "l0": float(s["l0"]) / n,
            "dead_share": float((s["fired"] == 0).double().mean()),
            "cosine": float(s["cosine"]) / n,
            "hoyer": float(s["hoyer"]) / coded if coded else math.nan,
            "mse": wrong / n / len(s["ee"]),
            "rows": n,
        }


@torch.no_grad()
def quality(
    autoencoder: SparseAutoencoder,
    activations: Any,
    *,
    held_out: bool = True,
    limit: int = DEAD_ROWS,
) -> dict[str, Any]:
    """The quality table: R2, variance explained, L0, dead share, cosine, Hoyer, mean squared error, rows.

    Rows that were normalised one by one are compared in their own units.

    Args:
        autoencoder: What is measured, as it is used at inference.
        activations: Tensor ``(..., d)``, :class:`~.stream.ActivationCache`, or an iterable of tensors.
        held_out: Said in the table: the rows were not trained on.
        limit: Rows looked at.
    """
    sums = _Sums(autoencoder.config)
    device = autoencoder.bias.device
    for block in as_activations(activations).blocks():
        for rows in block[: limit - sums.rows].split(4096):
            x = rows.to(device, autoencoder.bias.dtype)
            values, kept = autoencoder.encode_sparse(x)
            sums.update(x, autoencoder.decode_sparse(values, kept, of=x), values, kept)
        if sums.rows >= limit:
            break
    if not sums.rows:
        raise SettingError("there are no activations to measure on")
    return {**sums.table(), "held_out": held_out}


def loss_recovered(clean: float, reconstructed: float, zeroed: float) -> float:
    """``(L_zero - L_sae) / (L_zero - L_clean)`` of a model's loss with its own activations, x_hat and zeros.

    Raises:
        SettingError: Zeros do not change the loss, so that nothing can be recovered.
    """
    if zeroed == clean:
        raise SettingError("the loss is the same with the activations zeroed; nothing is recovered")
    return (zeroed - reconstructed) / (zeroed - clean)


def _cosines(one: Tensor, two: Tensor) -> Tensor:
    if one.shape[1:] != two.shape[1:]:
        raise SettingError(
            f"the dictionaries have atoms of {one.shape[1]} and {two.shape[1]} numbers; allowed is one width"
        )
    return functional.normalize(one.double(), dim=1) @ functional.normalize(two.double(), dim=1).T


@torch.no_grad()
def stability(one: Tensor, two: Tensor) -> float:
    """Mean cosine of the best one-to-one matching (Hungarian) of two dictionaries ``(K, d)``.

    Raises:
        SettingError: Other numbers of atoms.
    """
    from scipy.optimize import linear_sum_assignment

    if len(one) != len(two):
        raise SettingError(
            f"the dictionaries have {len(one)} and {len(two)} atoms; stability is defined for equal numbers"
        )
    cosines = _cosines(one, two).cpu().numpy()
    rows, columns = linear_sum_assignment(cosines, maximize=True)
    return float(cosines[rows, columns].mean())


@torch.no_grad()
def mean_max_cosine(one: Tensor, two: Tensor) -> float:
    """Mean over the atoms of ``one`` of the best cosine with an atom of ``two``: a cheap stand-in for stability."""
    return float(_cosines(one, two).max(1).values.mean())


@torch.no_grad()
def recovery(true: Tensor, learned: Tensor) -> float:
    """Mean over the true atoms ``(m, d)`` of the best ``|cos|`` with a learned one."""
    return float(_cosines(true, learned).abs().max(1).values.mean())
