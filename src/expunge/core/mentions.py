"""Where a text names something, and the same text with something else in its place.

Names are whole words, but a word need not end in a letter: "Yahoo!", "C++", "St.", and in many scripts a
combining mark, are names too.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence

__all__ = ["exchanged", "without"]


@functools.lru_cache(maxsize=256)
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    # Longest first, or "star" would be taken out of "star fish".
    listed = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.compile(rf"(?<!\w)(?:{listed})(?!\w)", re.IGNORECASE)


def _mark(character: str) -> bool:
    """Whether it belongs to the letter before it; Python counts such marks as no part of a word."""
    return unicodedata.category(character).startswith("M") and not "\ufe00" <= character <= "\ufe0f"


def exchanged(text: str, names: Sequence[str], instead: str) -> tuple[str, str | None]:
    """The text with every name exchanged, and the first name as it stood there (``None``: there was none).

    Args:
        text: Any text.
        names: Names to look for, whatever their case.
        instead: What takes their place, letter by letter.
    """
    found: list[str] = []

    def swap(match: re.Match[str]) -> str:
        beside = text[max(0, match.start() - 1) : match.start()] + text[match.end() :][:1]
        if any(map(_mark, beside)):
            return match.group()
        found.append(match.group())
        return instead

    changed = _pattern(tuple(names)).sub(swap, text)
    return changed, found[0] if found else None


def without(texts: Sequence[str], names: Sequence[str]) -> list[str]:
    """The texts that say none of the names."""
    listed = tuple(dict.fromkeys(names))
    return [text for text in texts if exchanged(text, listed, "")[1] is None]
