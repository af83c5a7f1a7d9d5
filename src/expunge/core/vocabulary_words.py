"""Which words of a tokenizer's vocabulary lie nearest to a text embedding.

A word is a token that is a whole word by itself.  Words and other texts are compared by their rows at the
last content token and at the first end token, side by side, the mean over all words taken off: what all
texts share would else make all of them alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedModel
from ..models.types import TextInput
from .token_policy import CHUNK, Span, span

__all__ = ["Words", "whole_words"]


def whole_words(tokenizer: Any, limit: int) -> list[str]:
    """Up to ``limit`` whole words, in the order of the vocabulary (frequent ones first in the usual tokenizers)."""
    ids = sorted(set(tokenizer.get_vocab().values()))
    found: dict[str, None] = {}
    for index in ids:
        word = tokenizer.decode([index]).strip()
        if not word.isalpha() or word in found:
            continue
        # The same letters may also be a part of words; only the token that stands alone counts.
        if tokenizer(word, add_special_tokens=False).input_ids == [index]:
            found[word] = None
        if len(found) == limit:
            break
    return list(found)


class Words:
    """Words of a vocabulary with their embeddings.

    Args:
        text: Where rows come from; its first segment with a tokenizer is looked at.
        limit: Number of words.
        more: Texts that are compared as well, after the words.

    Attributes:
        words: The words, then ``more``.
        rows: ``(n, 2 width)``: last content row and end row of each.

    Raises:
        UnsupportedModel: The rows stand for whole texts.
    """

    def __init__(self, text: TextInput, limit: int, more: Sequence[str] = ()) -> None:
        self.segment = next(
            (i for i, s in enumerate(text.segments([""])) if s.tokenizer is not None), None
        )
        if self.segment is None:
            raise UnsupportedModel(f"the rows of {text.names[0]} belong to no token, so to no word")
        tokenizer = text.segments([""])[self.segment].tokenizer
        known = whole_words(tokenizer, limit) if limit else []
        self.words = list(dict.fromkeys([*known, *more]))
        parts = []
        for first in range(0, len(self.words), CHUNK):
            made = text.segments(self.words[first : first + CHUNK])[self.segment]
            spans = [span(tokenizer, ids.tolist()) for ids in made.ids]
            parts += [
                self.seen(rows[None], own) for rows, own in zip(made.rows, spans, strict=True)
            ]
        self.rows = torch.cat(parts) if parts else torch.zeros(0, 2 * text.width).double()
        self.mean = self.rows.mean(0)

    @staticmethod
    def seen(rows: Tensor, own: Span) -> Tensor:
        """What is compared of embeddings ``(n, T, width)`` of one text: ``(n, 2 width)``, float64 on the CPU."""
        both = rows[:, [own.last, min(own.end, own.length - 1)]]
        return both.flatten(1).to("cpu", torch.float64)

    def cosines(self, rows: Tensor) -> Tensor:
        """Cosine of ``m`` rows as :meth:`seen` to every word, ``(m, n)``."""
        given, own = (
            torch.nn.functional.normalize(part - self.mean, dim=1) for part in (rows, self.rows)
        )
        return given @ own.T

    def nearest(self, text: str, count: int, leave: Sequence[str] = ()) -> list[str]:
        """The ``count`` words nearest to one of ``words``, itself and those to ``leave`` not counted."""
        here = self.words.index(text)
        order = self.cosines(self.rows[here : here + 1])[0].argsort(descending=True)
        refused = {text.lower(), *(word.lower() for word in leave)}
        found = [self.words[i] for i in order.tolist()]
        return [word for word in found if word.lower() not in refused][:count]
