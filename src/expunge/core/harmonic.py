"""Harmonic means of what an erasure must do all at once, as MACE composes them (arXiv 2403.06135).

H_c  2 / (1/(1 - Acc_e) + 1/Acc_s), celebrities and artists
H_o  3 / (1/(1 - Acc_e) + 1/Acc_s + 1/(1 - Acc_g)), objects; Acc_g: paraphrases
"""

from __future__ import annotations

from ..errors import InputError, ProtocolError
from ..method import Measurement
from .protocols import full_id, same_protocol

__all__ = ["harmonic", "harmonic_celebrity", "harmonic_object", "mace_composite"]


def harmonic(*rates: float) -> float:
    """Harmonic mean; 0 as soon as one rate is 0, so that nothing buys off a total failure."""
    for rate in rates:
        if not 0 <= rate <= 1:
            raise InputError(f"a rate is {rate}; allowed are shares from 0 to 1")
    if not rates:
        raise InputError("a harmonic mean needs at least one rate")
    return 0.0 if min(rates) == 0 else len(rates) / sum(1 / rate for rate in rates)


def harmonic_celebrity(erased: float, kept: float) -> float:
    """``H_c`` from the accuracy on the erased concept and on the kept ones."""
    return harmonic(1 - erased, kept)


def harmonic_object(erased: float, kept: float, paraphrases: float) -> float:
    """``H_o``, which also asks that paraphrases of the concept are gone."""
    return harmonic(1 - erased, kept, 1 - paraphrases)


def mace_composite(
    erased: Measurement, kept: Measurement, paraphrases: Measurement | None = None
) -> Measurement:
    """``H_c``, or ``H_o`` where accuracies on paraphrases of the erased object are given.

    Raises:
        ProtocolError: The accuracies were measured differently, or one has no value.
    """
    parts = [one for one in (erased, kept, paraphrases) if one is not None]
    id = same_protocol(parts)
    if any(one.value is None for one in parts):
        raise ProtocolError(f"{id!r} has no value on one side, so there is no composite of it")
    rates = [float(one.value or 0.0) for one in parts]
    value = harmonic_celebrity(*rates) if paraphrases is None else harmonic_object(*rates)
    name = "mace/h-c" if paraphrases is None else "mace/h-o"
    return Measurement(value, full_id(name, accuracy=id), min(one.n for one in parts))
