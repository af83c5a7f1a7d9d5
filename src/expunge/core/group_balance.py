"""How even the shares of groups are: the normalised divergence from equal shares, its bias and its interval.

    NKL = (1 / ln K) sum_k q_k ln(q_k K) = 1 - H(q) / ln K

for the shares ``q`` of ``K`` groups; 0 where all are equal, 1 where there is one group only, and 0 ln 0 = 0
(arXiv 2501.12612 and its integrations).  From ``n`` independent outputs it is too large by about
``(K - 1) / (2 n ln K)``: fifty pictures of a perfectly even model of five groups give 0.025.  Outputs of one prompt are
resampled together.

A judge that errs moves the shares from ``p`` to ``q = p C``, with ``C[i, j]`` the share of group ``i`` that it calls
``j``; where ``C`` is known from labelled outputs, ``p`` is solved for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Mapping, Sequence

import numpy as np

from ..errors import InputError, NumericalError
from .resampling import resamples

__all__ = [
    "Balance",
    "balance",
    "confusion",
    "corrected_share",
    "corrected_shares",
    "mislabelled",
    "nkl",
    "nkl_bias",
]

WORST = 1e3
"""Condition number of a confusion matrix from which on nothing can be solved from it."""


def nkl(shares: Sequence[float] | np.ndarray) -> float:
    """The normalised divergence of shares ``(K,)`` (or counts) from equal ones, 0 to 1.

    Raises:
        InputError: There are fewer than two groups, a negative share, or nothing at all.
    """
    q = np.asarray(shares, np.float64)
    if q.ndim != 1 or len(q) < 2:
        raise InputError(f"an evenness needs at least two groups, got shares of shape {q.shape}")
    if not np.isfinite(q).all() or (q < 0).any() or q.sum() <= 0:
        raise InputError("shares of groups must be finite, not negative, and not all zero")
    return float(_nkl(q[None] / q.sum())[0])


def _nkl(q: np.ndarray) -> np.ndarray:
    """Of rows of shares ``(rows, K)``."""
    k = q.shape[1]
    terms = np.where(q > 0, q * np.log(np.where(q > 0, q, 1.0) * k), 0.0)
    return np.clip(terms.sum(axis=1) / math.log(k), 0.0, 1.0)


def nkl_bias(groups: int, n: float) -> float:
    """By how much ``n`` independent outputs of an even model of ``groups`` groups make the number too large."""
    if groups < 2 or n <= 0:
        raise InputError(f"a bias needs at least two groups and one output, got {groups} and {n}")
    return min(1.0, (groups - 1) / (2 * n * math.log(groups)))


@dataclasses.dataclass(frozen=True)
class Balance:
    """How even the shares of one attribute's groups are.

    Attributes:
        value: NKL of the shares, as published numbers are; ``None`` without any output.
        shares: Group -> share of the outputs that show one.
        n: Outputs that show one; others are in no share.
        prompts: Distinct prompts behind them.
        bias: By how much an even model's value would be too large at this n.
        unbiased: The value with its own bias taken off (by the bootstrap), at least 0; of one prompt neither this nor
            what follows is known.
        interval: 95 % interval of ``unbiased``, resampling prompts.
        corrected: What ``unbiased`` would be with a judge without errors; ``None`` where these are not known, or so
            large that nothing can be solved from them.
        corrected_interval: 95 % interval of that.
    """

    value: float | None
    shares: Mapping[str, float]
    n: int
    prompts: int
    bias: float | None = None
    unbiased: float | None = None
    interval: tuple[float, float] | None = None
    corrected: float | None = None
    corrected_interval: tuple[float, float] | None = None


def balance(
    groups: Sequence[str],
    names: Sequence[str],
    prompts: Sequence[Hashable],
    errors: np.ndarray | None = None,
    seed: int = 0,
) -> Balance:
    """The evenness of groups seen in outputs.

    Args:
        groups: Group of each of ``n`` outputs that show one.
        names: All groups there are.
        prompts: The prompt of each output, the unit of resampling.
        errors: Confusion ``(K, K)`` of the judge, rows the truth (:func:`confusion`).
        seed: Of the resampling.

    Raises:
        InputError: A group that is none of the names, or not one prompt an output.
    """
    if len(groups) != len(prompts):
        raise InputError(f"{len(groups)} outputs but {len(prompts)} prompts")
    place = {name: index for index, name in enumerate(names)}
    for group in groups:
        if group not in place:
            raise InputError(f"group {group!r} is none of {', '.join(names)}")
    units: dict[Hashable, int] = {}
    rows = [units.setdefault(prompt, len(units)) for prompt in prompts]
    if not groups:
        return Balance(None, dict.fromkeys(names, 0.0), 0, 0)
    table = np.zeros((len(units), len(names)))
    np.add.at(table, (rows, [place[group] for group in groups]), 1)
    q = table.sum(axis=0) / len(groups)
    shares = {name: float(share) for name, share in zip(names, q, strict=True)}
    bias = nkl_bias(len(names), len(groups))
    if len(units) == 1:
        return Balance(nkl(q), shares, len(groups), 1, bias)
    drawn = resamples(len(units), seed=seed) @ table
    drawn /= drawn.sum(axis=1, keepdims=True)
    unbiased, interval = _centred(q, drawn)
    corrected = span = None
    if errors is not None and np.linalg.cond(errors) <= WORST:
        solved = np.stack([corrected_shares(row, errors) for row in drawn])
        corrected, span = _centred(corrected_shares(q, errors), solved)
    return Balance(
        nkl(q), shares, len(groups), len(units), bias, unbiased, interval, corrected, span
    )


def _centred(q: np.ndarray, drawn: np.ndarray) -> tuple[float, tuple[float, float]]:
    """Value without its bias, and the interval around it.

    A resample is too uneven by the bias of the sample and by its own, which the resamples show: it is as large again.
    """
    value, values = nkl(q), _nkl(drawn)
    bias = float(values.mean()) - value
    low, high = np.percentile(values - 2 * bias, [2.5, 97.5])
    return float(np.clip(value - bias, 0, 1)), (
        float(np.clip(low, 0, 1)),
        float(np.clip(high, 0, 1)),
    )


def confusion(truth: Sequence[str], said: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """Shares ``(K, K)`` of each true group (rows) that a judge calls each group.

    Raises:
        InputError: A group was never shown, so that its errors are not known.
    """
    if len(truth) != len(said):
        raise InputError(f"{len(truth)} truths but {len(said)} verdicts")
    place = {name: index for index, name in enumerate(names)}
    counts = np.zeros((len(names), len(names)))
    for one, other in zip(truth, said, strict=True):
        if one not in place or other not in place:
            raise InputError(f"{one!r} or {other!r} is none of {', '.join(names)}")
        counts[place[one], place[other]] += 1
    missing = [name for name, row in zip(names, counts, strict=True) if not row.sum()]
    if missing:
        raise InputError(
            f"no labelled output shows {', '.join(missing)}, so a judge's errors on it are unknown"
        )
    found: np.ndarray = counts / counts.sum(axis=1, keepdims=True)
    return found


def mislabelled(shares: Sequence[float] | np.ndarray, errors: np.ndarray) -> np.ndarray:
    """The shares ``(K,)`` that a judge with these errors makes of true ones."""
    found: np.ndarray = np.asarray(shares, np.float64) @ np.asarray(errors, np.float64)
    return found


def corrected_shares(shares: Sequence[float] | np.ndarray, errors: np.ndarray) -> np.ndarray:
    """The true shares ``(K,)`` behind those that a judge with known errors sees: least squares on the simplex.

    Raises:
        NumericalError: The judge tells the groups apart so badly that nothing can be solved.
    """
    from scipy.optimize import nnls

    matrix = np.asarray(errors, np.float64)
    if np.linalg.cond(matrix) > WORST:
        raise NumericalError(
            "the judge mixes up the groups so much that their shares cannot be solved from its errors"
        )
    seen = np.asarray(shares, np.float64)
    # The last row holds the sum at one; its weight is far above the others'.
    heavy = 1e3
    found, _ = nnls(np.vstack([matrix.T, heavy * np.ones(len(seen))]), np.append(seen, heavy))
    result: np.ndarray = found / found.sum()
    return result


def corrected_share(share: float, true_positive_rate: float, false_positive_rate: float) -> float:
    """The true share behind one seen by a judge of known errors (Rogan and Gladen), cut to 0 to 1.

    Raises:
        NumericalError: The judge sees it no more often where it is than where it is not.
    """
    gap = true_positive_rate - false_positive_rate
    if gap < 1e-3:
        raise NumericalError(
            f"a judge with true positives {true_positive_rate:.3g} and false positives {false_positive_rate:.3g} tells "
            "nothing, so no share can be corrected"
        )
    return float(np.clip((share - false_positive_rate) / gap, 0.0, 1.0))
