"""Texts of input fields as values; what is wrong is said with the name of the field."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..core.text_lines import lines_of
from ..errors import InputError
from .requests import Wanted

__all__ = ["lines", "names", "number", "wanted", "whole"]


def whole(text: Any, name: str, low: int = 0, high: int = 2**62) -> int | None:
    """A whole number, or ``None`` where the field is empty.

    Raises:
        InputError: It is none, or out of range.
    """
    typed = str(text if text is not None else "").strip()
    if not typed:
        return None
    if not re.fullmatch(r"[+-]?\d{1,20}", typed) or not low <= int(typed) <= high:
        raise InputError(
            f"{name} is {typed[:40]!r}; allowed is a whole number from {low}"
            + (f" to {high}" if high < 2**62 else "")
        )
    return int(typed)


def number(text: Any, name: str) -> float | None:
    """A number, or ``None`` where the field is empty.

    Raises:
        InputError: It is none.
    """
    typed = str(text if text is not None else "").strip()
    if not typed:
        return None
    try:
        value = float(typed)
    except ValueError:
        value = float("nan")
    if value != value or abs(value) == float("inf"):
        raise InputError(f"{name} is {typed[:40]!r}; allowed is a number")
    return value


def lines(text: str | None) -> tuple[str, ...]:
    """The lines of a text that hold something."""
    return tuple(line for _, line in lines_of(text or ""))


def names(text: str | None) -> tuple[str, ...]:
    """Names between commas."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def wanted(
    chosen: Sequence[str] | None, kind: str | None, anchor: str | None, phrases: str | None
) -> Wanted:
    """Concepts as typed; what is said of one is left out where there are several."""
    several = tuple(chosen or ())
    if len(several) != 1:
        return Wanted(several)
    return Wanted(several, kind or None, (anchor or "").strip() or None, names(phrases))
