"""Which rows of a text embedding a closed-form edit maps, and onto which rows of the replacement.

A text becomes ``T`` rows: start (SoT), content, end (EoT), padding.  With ``i`` and ``k`` the last
content rows of the erased and the replacing text (the start row where a text is empty):

    last_token                 i -> k (UCE, 2025 form)
    last_token_to_end_aligned  rows i ... -> rows k ..., both to the last row that the longer text
                               leaves: with m = max(i, k), [i, T-(m-i)) -> [k, T-(m-k)) (UCE, 2023
                               form, used by RECE); padding is mapped too
    all_rows                   every row onto the row of the same index (RECE's derived embeddings)
    eot_only                   first EoT -> first EoT, each at its own place (TRCE)
    keyword_tokens             every token of the keyword -> last row of the replacing text (the
                               keyword group of TRCE's ablation)

Kept texts contribute their last content row under ``last_token`` and all rows otherwise.  Sums run
over rows, so a ridge of 0.5 is far weaker where a text contributes many rows than where it gives one.

Start, end and padding are found through the tokenizer (padding may be the end token, as in CLIP),
and the context length through the ids, so nothing here is tied to one text encoder.
Sources: UCE (arXiv 2308.14761), RECE (arXiv 2407.12383), TRCE (arXiv 2503.07389).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import PromptError, SettingError, nearest
from ..models.types import TextInput
from .closed_form import Moments

__all__ = [
    "POLICIES",
    "Block",
    "Pair",
    "Span",
    "accumulate",
    "kept_rows",
    "paired_rows",
    "span",
    "stream_pairs",
    "stream_rows",
    "unique_pairs",
]

POLICIES = ("last_token", "last_token_to_end_aligned", "all_rows", "eot_only", "keyword_tokens")

CHUNK = 32
"""Texts encoded at a time: memory does not grow with the number of phrases."""


class Pair(NamedTuple):
    """A text to erase and what takes its place.

    Attributes:
        erased, replacing: The two texts.
        keyword: The part of the erased text that is to go; the whole text where it is ``None``.
    """

    erased: str
    replacing: str
    keyword: str | None = None


def unique_pairs(pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs without those whose texts came before; of two keywords in one text the longer one stays."""
    found: dict[tuple[str, str], Pair] = {}
    for pair in pairs:
        held = found.setdefault(pair[:2], pair)
        if len(pair.keyword or pair.erased) > len(held.keyword or held.erased):
            found[pair[:2]] = pair
    return list(found.values())


@dataclasses.dataclass(frozen=True)
class Span:
    """Where the parts of one tokenised text stand.

    Attributes:
        ids: Its ``T`` token ids.
        first: Index of the first content row; ``first == end`` where the text is empty.
        end: Index of the first EoT (of the first padding row where the tokenizer sets no EoT).
    """

    ids: tuple[int, ...]
    first: int
    end: int

    @property
    def length(self) -> int:
        """Rows ``T``."""
        return len(self.ids)

    @property
    def last(self) -> int:
        """The last content row; the row before the end (SoT) for an empty text."""
        return max(0, self.end - 1)

    @property
    def content(self) -> tuple[int, ...]:
        """Token ids of the content."""
        return self.ids[self.first : self.end]


def span(tokenizer: Any, ids: Sequence[int]) -> Span:
    """Find start, content and end of one row of token ids."""
    ids = tuple(int(i) for i in ids)
    start, stop, pad = (
        getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")
    )
    # A tokenizer may use one token as start and end; the one at index 0 is then the start.
    first = 1 if ids and start is not None and ids[0] == start else 0
    for index in range(first, len(ids)):
        if ids[index] in (stop, pad):
            return Span(ids, first, index)
    return Span(ids, first, len(ids))


def paired_rows(
    policy: str, old: Span, new: Span, keyword: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """Row indices of the erased text and, one by one, of the replacing text.

    Args:
        policy: One of ``POLICIES``.
        old: The erased text.
        new: The replacing text, of the same context length.
        keyword: Token ids that ``keyword_tokens`` looks for in the erased text; default: all content.

    Raises:
        PromptError: The keyword does not stand in the text.
    """
    length = old.length
    if policy == "last_token":
        return [old.last], [new.last]
    if policy == "last_token_to_end_aligned":
        i, k = old.last, new.last
        m = max(i, k)
        return list(range(i, length - (m - i))), list(range(k, length - (m - k)))
    if policy == "all_rows":
        return list(range(length)), list(range(length))
    if policy == "eot_only":
        return [min(old.end, length - 1)], [min(new.end, length - 1)]
    if policy == "keyword_tokens":
        rows = _occurrences(old, tuple(keyword) if keyword is not None else old.content)
        return rows, [length - 1] * len(rows)
    raise SettingError(f"token policy {policy!r} is unknown{nearest(policy, POLICIES)}")


def kept_rows(policy: str, text: Span) -> list[int]:
    """Row indices that a kept text contributes."""
    return [text.last] if policy == "last_token" else list(range(text.length))


def _occurrences(text: Span, keyword: tuple[int, ...]) -> list[int]:
    size = len(keyword)
    starts = [
        s for s in range(text.first, text.end - size + 1) if text.ids[s : s + size] == keyword
    ]
    if not keyword or not starts:
        raise PromptError(
            f"the keyword (token ids {list(keyword)}) does not stand in the erased text "
            f"(token ids {list(text.content)}); policy keyword_tokens needs it there"
        )
    return sorted({s + offset for s in starts for offset in range(size)})


@dataclasses.dataclass(frozen=True)
class Block:
    """Rows of some texts, stacked: ``sources (n, width)``, ``targets (n, width)`` and rows a text."""

    sources: torch.Tensor
    targets: torch.Tensor
    sizes: tuple[int, ...]


def stream_pairs(
    text: TextInput,
    pairs: Sequence[Pair | tuple[str, str]],
    policy: str,
) -> Iterator[Block]:
    """Encode pairs of texts piece by piece and select their rows, one block a piece.

    An empty replacing text is written as one space under ``last_token_to_end_aligned``, as the 2023
    form does; both are the same to a tokenizer that strips spaces.  Where a model strings together
    the rows of several text encoders, the policy holds in each of them.

    Args:
        text: Where rows come from.
        pairs: The texts; ``keyword_tokens`` maps the rows of their keywords only.
        policy: One of ``POLICIES``.
    """
    keywords: dict[str, list[tuple[int, ...]]] = {}
    for start in range(0, len(pairs), CHUNK):
        part = [Pair(*pair) for pair in pairs[start : start + CHUNK]]
        if policy == "last_token_to_end_aligned":
            part = [pair._replace(replacing=pair.replacing or " ") for pair in part]
        texts = list(dict.fromkeys(text for pair in part for text in pair[:2]))
        where = {text: index for index, text in enumerate(texts)}
        segments = _encode(text, texts)
        if policy == "keyword_tokens":
            fresh = {p.keyword for p in part if p.keyword is not None} - set(keywords)
            names = sorted(fresh)
            found = [spans for spans, _ in _encode(text, names)] if names else []
            keywords |= {n: [spans[i].content for spans in found] for i, n in enumerate(names)}
        sources, targets, sizes = [], [], []
        for old, new, keyword in part:
            size = 0
            for index, (spans, embeddings) in enumerate(segments):
                wanted = keywords[keyword][index] if keyword in keywords else None
                a, b = paired_rows(policy, spans[where[old]], spans[where[new]], wanted)
                sources.append(embeddings[where[old], a])
                targets.append(embeddings[where[new], b])
                size += len(a)
            sizes.append(size)
        yield Block(torch.cat(sources), torch.cat(targets), tuple(sizes))


def stream_rows(text: TextInput, texts: Sequence[str], policy: str) -> Iterator[torch.Tensor]:
    """Encode kept texts piece by piece and select their rows, ``(n, width)``."""
    for start in range(0, len(texts), CHUNK):
        part = texts[start : start + CHUNK]
        segments = _encode(text, part)
        yield torch.cat(
            [
                embeddings[index, kept_rows(policy, spans[index])]
                for index in range(len(part))
                for spans, embeddings in segments
            ]
        )


def accumulate(
    text: TextInput,
    pairs: Sequence[Pair | tuple[str, str]],
    kept: Sequence[str],
    policy: str,
    *,
    erase: float,
    keep: float,
    kept_policy: str | None = None,
) -> Moments:
    """Moments of pairs (scale ``erase``) and kept texts (scale ``keep``), streamed."""
    moments = Moments(text.width)
    for block in stream_pairs(text, pairs, policy):
        moments.erase(block.sources, block.targets, erase)
    for rows in stream_rows(text, kept, kept_policy or policy):
        moments.keep(rows, keep)
    return moments


def _encode(text: TextInput, texts: Sequence[str]) -> list[tuple[list[Span], torch.Tensor]]:
    return [
        ([span(segment.tokenizer, row.tolist()) for row in segment.ids], segment.rows)
        for segment in text.segments(list(texts))
    ]
