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
    aligned                    what two texts share around the concept: start, longest common prefix and
                               suffix, end, and padding counted from each text's own end until the
                               longer text is full; what differs is dropped (MACE)
    content_to_end             first content row to first EoT, counted from both texts' EoT backwards; what
                               the erased text has more goes to the replacing text's first row (RealEra)

Two more are parts of TRCE's ablation only (``TOKEN_GROUPS``), of little use by themselves:

    sot_only                   start -> start; the same row in both where the encoder is causal
    last_row_only              last row -> last row, once for each row of padding of the erased text

Kept texts contribute their last content row under ``last_token``, the rows of the policy under
``content_to_end``, and all rows otherwise.  Sums run over rows, so a ridge of 0.5 is far weaker where a
text contributes many rows than where it gives one.

Start, end and padding are found through the tokenizer (padding may be the end token, as in CLIP),
and the context length through the ids, so nothing here is tied to one text encoder.  A pooled vector is
one row that stands for the whole text: every policy maps it onto that of the replacing text, but
``keyword_tokens`` is not defined there and refused.  Rows that the denoiser masks (padding of T5 in PixArt)
are left out of kept texts, and of pairs where the erased text's row is masked; where only the replacing
text's row is, that text's last row that is not takes its place (ours: no pixel has ever seen the other).
Sources: UCE (arXiv 2308.14761), RECE (arXiv 2407.12383), TRCE (arXiv 2503.07389), MACE (arXiv 2403.06135),
RealEra (arXiv 2410.09140).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import PromptError, SettingError, UnsupportedModel, nearest
from ..models.types import TextInput
from .closed_form import Moments

__all__ = [
    "POLICIES",
    "TOKEN_GROUPS",
    "Block",
    "Pair",
    "Placed",
    "Span",
    "accumulate",
    "kept_rows",
    "paired_rows",
    "placed",
    "span",
    "stream_pairs",
    "stream_rows",
    "unique_pairs",
]

POLICIES = (
    "last_token", "last_token_to_end_aligned", "all_rows", "eot_only", "keyword_tokens", "aligned",
    "content_to_end",
)  # fmt: skip

TOKEN_GROUPS = ("sot_only", "eot_only", "last_row_only", "keyword_tokens")
"""The four groups of rows that TRCE weighs against each other, in its order."""

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
        tokens: Rows are tokens; False where one row stands for a whole text.
    """

    ids: tuple[int, ...]
    first: int
    end: int
    tokens: bool = True

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
    """Find start, content and end of one row of token ids; without a tokenizer one row is the whole text."""
    ids = tuple(int(i) for i in ids)
    if tokenizer is None:
        return Span(ids, 0, len(ids), tokens=False)
    start, stop, pad = (
        getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")
    )
    # A tokenizer may use one token as start and end; the one at index 0 is then the start.
    first = 1 if ids and start is not None and ids[0] == start else 0
    # Padding ends a text only where no end token does: in SD 2.x it is "!", which a text may hold as well.
    for mark in (stop, pad):
        if mark in ids[first:]:
            return Span(ids, first, ids.index(mark, first))
    return Span(ids, first, len(ids))


def paired_rows(
    policy: str, old: Span, new: Span, keyword: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """Row indices of the erased text and, one by one, of the replacing text.

    Args:
        policy: One of ``POLICIES`` or ``TOKEN_GROUPS``.
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
    if policy == "aligned":
        return _aligned(old, new)
    if policy == "content_to_end":
        a, b = _content(old), _content(new)
        return a, ([b[0]] * (len(a) - len(b)) + b)[-len(a) :]
    if policy == "sot_only":
        rows = [0] if not old.tokens or (old.first and new.first) else []
        return rows, rows
    if policy == "last_row_only":
        rows = [length - 1] * (length - 1 - old.end) if old.tokens else [0]
        return rows, rows
    raise SettingError(f"token policy {policy!r} is unknown{nearest(policy, POLICIES)}")


def _content(text: Span) -> list[int]:
    """Rows from the first content row to the first EoT."""
    return list(range(text.first, min(text.end, text.length - 1) + 1))


def _aligned(old: Span, new: Span) -> tuple[list[int], list[int]]:
    """Rows that two texts share on both sides of what differs, and their padding."""
    length = old.length
    ends = [min(text.end + 1, length) for text in (old, new)]
    a, b = old.ids[: ends[0]], new.ids[: ends[1]]
    before = _shared(a, b)
    after = _shared(a[before:][::-1], b[before:][::-1])
    padding = length - max(ends)
    return tuple(  # type: ignore[return-value]
        [*range(before), *range(end - after, end), *range(end, end + padding)] for end in ends
    )


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def kept_rows(policy: str, text: Span) -> list[int]:
    """Row indices that a kept text contributes."""
    if policy == "content_to_end":
        return _content(text)
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


class Placed(NamedTuple):
    """One pair of texts in one segment, and the places that a policy maps.

    Attributes:
        pair, segment: Numbers of both.
        span: Where the parts of the erased text stand.
        attended: For each row of the erased text whether the denoiser sees it; ``None``: it sees all.
        erased, replacing: All rows of both texts, ``(T, width)``.
        rows, onto: Row indices of the erased text and, one by one, of the replacing text.
    """

    pair: int
    segment: int
    span: Span
    attended: list[int] | None
    erased: torch.Tensor
    replacing: torch.Tensor
    rows: list[int]
    onto: list[int]


def placed(
    text: TextInput, pairs: Sequence[Pair | tuple[str, str]], policy: str
) -> Iterator[Placed]:
    """Encode pairs of texts piece by piece, one after another and segment by segment; see :func:`stream_pairs`."""
    keywords: dict[str, list[tuple[int, ...]]] = {}
    for start in range(0, len(pairs), CHUNK):
        part = [Pair(*pair) for pair in pairs[start : start + CHUNK]]
        if policy == "last_token_to_end_aligned":
            part = [pair._replace(replacing=pair.replacing or " ") for pair in part]
        texts = list(dict.fromkeys(text for pair in part for text in pair[:2]))
        where = {text: index for index, text in enumerate(texts)}
        segments = _encode(text, texts)
        if policy == "keyword_tokens":
            _need_tokens(text, segments)
            fresh = {p.keyword for p in part if p.keyword is not None} - set(keywords)
            names = sorted(fresh)
            found = [spans for spans, _, _ in _encode(text, names)] if names else []
            keywords |= {n: [spans[i].content for spans in found] for i, n in enumerate(names)}
        for number, (erased, replacing, keyword) in enumerate(part, start):
            old, new = where[erased], where[replacing]
            for index, (spans, embeddings, attended) in enumerate(segments):
                wanted = keywords[keyword][index] if keyword in keywords else None
                a, b = paired_rows(policy, spans[old], spans[new], wanted)
                seen = None
                if attended is not None:
                    seen = attended[old]
                    a, b = _seen(a, b, seen, attended[new])
                yield Placed(
                    number, index, spans[old], seen, embeddings[old], embeddings[new], a, b
                )


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
        policy: One of ``POLICIES`` or ``TOKEN_GROUPS``.

    Raises:
        UnsupportedModel: ``keyword_tokens`` where a row stands for a whole text.
    """
    for _, part in itertools.groupby(placed(text, pairs, policy), lambda p: p.pair // CHUNK):
        sources, targets = [], []
        sizes: dict[int, int] = {}
        for place in part:
            sources.append(place.erased[place.rows])
            targets.append(place.replacing[place.onto])
            sizes[place.pair] = sizes.get(place.pair, 0) + len(place.rows)
        yield Block(torch.cat(sources), torch.cat(targets), tuple(sizes.values()))


def stream_rows(text: TextInput, texts: Sequence[str], policy: str) -> Iterator[torch.Tensor]:
    """Encode kept texts piece by piece and select their rows, ``(n, width)``."""
    for start in range(0, len(texts), CHUNK):
        part = texts[start : start + CHUNK]
        segments = _encode(text, part)
        yield torch.cat(
            [
                embeddings[index, _unmasked(kept_rows(policy, spans[index]), attended, index)]
                for index in range(len(part))
                for spans, embeddings, attended in segments
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


def _unmasked(rows: list[int], attended: list[list[int]] | None, index: int) -> list[int]:
    return rows if attended is None else [row for row in rows if attended[index][row]]


def _seen(
    a: list[int], b: list[int], old: Sequence[int], new: Sequence[int]
) -> tuple[list[int], list[int]]:
    """Pairs of rows that the denoiser sees, by the masks of both texts; a masked target becomes the last seen row."""
    last = max((row for row, seen in enumerate(new) if seen), default=0)
    pairs = [(i, k if new[k] else last) for i, k in zip(a, b, strict=True) if old[i]]
    return [i for i, _ in pairs], [k for _, k in pairs]


def _need_tokens(text: TextInput, segments: Sequence[tuple[list[Span], Any, Any]]) -> None:
    if any(not spans[0].tokens for spans, _, _ in segments):
        raise UnsupportedModel(
            f"policy keyword_tokens maps the tokens of a keyword, but the rows of {text.names[0]} stand for whole "
            "texts; choose another policy"
        )


def _encode(
    text: TextInput, texts: Sequence[str]
) -> list[tuple[list[Span], torch.Tensor, list[list[int]] | None]]:
    """Spans, rows and mask of each segment."""
    return [
        (
            [span(segment.tokenizer, row.tolist()) for row in segment.ids],
            segment.rows,
            None if segment.attended is None else segment.attended.tolist(),
        )
        for segment in text.segments(list(texts))
    ]
