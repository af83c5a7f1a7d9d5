"""Texts of a small closed vocabulary as numbers and back: words, marks and line ends, nothing learned.

A code of answers must give back what was written: ``unsafe``, a line end, titles with commas.  Words keep their case
and their hyphens; blanks are not kept, and stand where writing puts them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

from ..errors import InputError

__all__ = ["ANSWER", "BEGIN", "END", "PAD", "UNKNOWN", "WordCodes"]

SPECIAL = ("<pad>", "<begin>", "<answer>", "<end>", "<unknown>")
PAD, BEGIN, ANSWER, END, UNKNOWN = range(len(SPECIAL))
PIECE = re.compile(r"\n|\w+(?:[-'’]\w+)*|[^\w\s]")
TIGHT = frozenset(",.:;?!)")
"""Marks that follow without a blank."""


class WordCodes:
    """Numbers of words.

    Args:
        words: All but the special ones, each once.

    Raises:
        InputError: A word stands twice, or is no single piece of writing.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        for word in self.words:
            if not PIECE.fullmatch(word):
                raise InputError(f"{word!r} is no single word, mark or line end")
        if len(set(self.words)) != len(self.words):
            twice = next(w for w, n in Counter(self.words).items() if n > 1)
            raise InputError(f"the word {twice!r} stands twice in the vocabulary")
        self._numbers = {word: place for place, word in enumerate(self.words, len(SPECIAL))}

    @classmethod
    def of(cls, needed: Iterable[str], further: Iterable[str] = (), most: int = 8000) -> WordCodes:
        """Every word of the needed texts, then the most frequent ones of further texts, ``most`` in all."""
        own = sorted({word for text in needed for word in PIECE.findall(text)})
        counts = Counter(word for text in further for word in PIECE.findall(text))
        rest = sorted(counts.keys() - set(own), key=lambda word: (-counts[word], word))
        return cls([*own, *rest[: max(0, most - len(own))]])

    def __len__(self) -> int:
        return len(SPECIAL) + len(self.words)

    def encode(self, text: str) -> list[int]:
        """Numbers of a text's words; what the vocabulary has not is ``UNKNOWN``."""
        return [self._numbers.get(word, UNKNOWN) for word in PIECE.findall(text)]

    def decode(self, numbers: Iterable[int]) -> str:
        """The text up to the first ``END``; other special numbers are left out, unknown words show as such."""
        text = ""
        for number in numbers:
            if number == END:
                break
            if number < len(SPECIAL) and number != UNKNOWN:
                continue
            word = SPECIAL[UNKNOWN] if number == UNKNOWN else self.words[number - len(SPECIAL)]
            tight = not text or text[-1] in "\n(" or word == "\n" or word in TIGHT
            text += word if tight else f" {word}"
        return text
