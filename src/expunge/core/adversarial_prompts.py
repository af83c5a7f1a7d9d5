"""What attacks on prompts share: forbidden tokens, splicing, realisable texts.

A searched string may not name the concept, neither by one of its tokens nor by pieces that join to a
forbidden word in the decoded text.  The attacked prompt itself may: only what is added counts.  The
picture is always made from the decoded and re-tokenised prompt, because only such prompts exist.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..concept import Concept
from ..errors import PromptError, SettingError, nearest
from ..models.types import Condition
from .prompt_search.common import Realised

__all__ = [
    "PLACEMENTS",
    "SOFT_PLACEMENTS",
    "Forbidden",
    "Splice",
    "Spliced",
    "arrangement",
    "by_count",
    "interleaved",
    "ordinary_ids",
    "without_room",
]

PLACEMENTS = ("prefix", "suffix", "middle", "spread", "third", "replace")
SOFT_PLACEMENTS = (*PLACEMENTS, "add")
"""Free vectors may also be added to those of a prompt's own tokens."""

SHORTEST = 3
"""Letters from which on a sub-string of a forbidden word is forbidden too."""


class Forbidden:
    """What a search may not use: the concept's name and listed phrases.

    Attributes:
        words: Lower-case names, phrases and their words of at least three letters.
        allowed: bool ``(V,)``.  Out are special ids, every token of the tokenisations of the names,
            tokens that are a sub-string (three letters or more) of a forbidden word or hold one,
            tokens no text is written with (control characters, single bytes of longer letters), and
            ids the tokenizer does not know.

    Args:
        tokenizer: The model's tokenizer.
        concept: The concept; its own name and phrases are what is forbidden.
        size: Rows of the token table, ``V``.
        pieces: Tokens with any sub-string of three letters of a name in them are out, too, as keyword lists
            of fragments have it; a search over whole nonsense strings loses little by it.
        fragments: Tokens that hold one of these are out.
    """

    def __init__(
        self, tokenizer: Any, concept: Concept, size: int, *, pieces: bool = False,
        fragments: Sequence[str] = (),
    ) -> None:  # fmt: skip
        names = [name.lower() for name in concept.names]
        parts = [word for name in names for word in name.split() if len(word) >= SHORTEST]
        self.words = tuple(dict.fromkeys([*names, *parts]))
        inner = {
            word[i:j]
            for word in (*parts, *("".join(name.split()) for name in names))
            for i in range(len(word))
            for j in range(i + SHORTEST, len(word) + 1)
        }
        held = tuple(dict.fromkeys([*parts, *(text.lower() for text in fragments)]))
        if pieces:
            held += tuple(piece for piece in inner if len(piece) == SHORTEST)
        known = min(size, len(tokenizer))
        self.allowed = torch.zeros(size, dtype=torch.bool)
        shown = tokenizer.batch_decode([[i] for i in range(known)])
        for index, piece in enumerate(tokenizer.convert_ids_to_tokens(list(range(known)))):
            letters = (piece or "").replace("</w>", "").lstrip("\u0120\u2581").lower()
            named = letters in inner or any(part in letters for part in held)
            self.allowed[index] = bool(letters) and not named and _printable(shown[index])
        spoken = [
            form
            for name in concept.names
            for form in (name, f" {name}", name.capitalize(), name.upper())
        ]
        for ids in tokenizer(spoken, add_special_tokens=False).input_ids:
            self.allowed[ids] = False
        self.allowed[[i for i in tokenizer.all_special_ids if i < size]] = False
        if not bool(self.allowed.any()):
            raise SettingError(
                f"every token of the vocabulary is forbidden for {concept.name!r}; nothing is left to search"
            )

    def count(self, text: str) -> int:
        """How often forbidden words stand in a text, inside longer words too."""
        lowered = " ".join(text.lower().split())
        return sum(lowered.count(word) for word in self.words)


def _printable(text: str) -> bool:
    """Letters, digits, signs; not blank, no control character and no broken byte."""
    return bool(text.strip()) and text.strip().isprintable() and "\ufffd" not in text


def ordinary_ids(model: Any) -> Tensor:
    """Ids of the model's token table that are no special tokens, ascending."""
    ordinary = torch.ones(len(model.token_table()), dtype=torch.bool)
    ordinary[[i for i in model.tokenizer.all_special_ids if i < len(ordinary)]] = False
    return ordinary.nonzero().flatten()


def arrangement(content: int, searched: int, placement: str) -> list[int]:
    """The order of ``content`` prompt tokens (0, 1, ...) and ``searched`` tokens (-1, -2, ...).

    prefix: searched tokens first; suffix: last; middle: after the first ``content // 2``; spread: one
    after each of the first runs of ``content // (searched + 1)``; third: one before every three content
    tokens; replace: searched tokens only.
    """
    if placement not in PLACEMENTS:
        raise SettingError(f"placement {placement!r} is unknown{nearest(placement, PLACEMENTS)}")
    if searched < 1:
        raise SettingError(f"{searched} tokens are searched; at least 1 is needed")
    prompt, added = list(range(content)), [-1 - j for j in range(searched)]
    if placement == "replace":
        return added
    if placement in ("prefix", "suffix", "middle"):
        cut = {"prefix": 0, "suffix": content, "middle": content // 2}[placement]
        return [*prompt[:cut], *added, *prompt[cut:]]
    run = 3 if placement == "third" else content // (searched + 1)
    order: list[int] = []
    for j, token in enumerate(added):
        piece = prompt[j * run : (j + 1) * run]
        order += [token, *piece] if placement == "third" else [*piece, token]
    return order + prompt[searched * run :]


def interleaved(model: Any, texts: Sequence[str]) -> list[int]:
    """Searched tokens of each prompt if one stands before every three of its own and one at the end (P4D-K)."""
    return [length // 3 + 1 for length in model.content_length(list(texts))]


def by_count(counts: Sequence[int]) -> dict[int, list[int]]:
    """Count -> positions that have it: prompts with as many searched tokens advance together."""
    found: dict[int, list[int]] = {}
    for position, count in enumerate(counts):
        found.setdefault(count, []).append(position)
    return found


def without_room(
    model: Any, texts: Sequence[str], searched: int | Sequence[int], placement: str
) -> dict[str, str]:
    """Text -> reason of the prompts that leave no room for ``searched`` tokens, one number or one a prompt.

    Raises:
        PromptError: None of them leaves room, so nothing can be attacked.
    """
    bases = [""] * len(texts) if placement == "replace" else list(texts)
    whole = model.token_ids([""]).shape[1] - 2
    counts = [searched] * len(texts) if isinstance(searched, int) else list(searched)
    if counts and min(counts) > whole:
        raise PromptError(
            f"{min(counts)} searched tokens do not fit this model, which reads {whole} at most"
        )
    reasons = {
        text: f"prompt {base[:60]!r} has {length} tokens; with {count} searched ones at most {whole - count} fit "
        "this model"
        for text, base, length, count in zip(
            texts, bases, model.content_length(bases), counts, strict=True
        )
        if length > whole - count
    }
    if texts and all(text in reasons for text in texts):
        raise PromptError(reasons[texts[0]])
    return reasons


class Splice:
    """Prompts with ``searched`` free places each, as rows of the model's context length, by their tokens.

    Splicing is done on token embeddings, before positions are added; the end token and padding move
    back by as many places.  ``placement="replace"`` puts the end token in the place of each of the prompt's
    own; ``"add"`` adds a vector to each of them and moves nothing.

    Args:
        model: A model with one token table.
        texts: The prompts.
        searched: Free places of each; with ``"add"`` as many as every prompt has tokens.
        placement: One of :data:`SOFT_PLACEMENTS`.

    Raises:
        PromptError: A prompt leaves no room for the searched tokens.
        SettingError: Vectors are added to prompts of another number of tokens.
    """

    def __init__(self, model: Any, texts: Sequence[str], searched: int, placement: str) -> None:
        self.model, self.searched, self.added = model, searched, placement == "add"
        self.base = model.token_ids(texts)
        self.table = model.token_table()
        self.content = model.content_length(texts)
        # Some encoders read the place of the end token off the ids, so a filler must not look like one.
        self.filler = int(ordinary_ids(model)[0])
        if self.added and set(self.content) != {searched}:
            raise SettingError(
                f"{searched} vectors are added to prompts of {sorted(set(self.content))} tokens; one for each is needed"
            )
        if not self.added:
            for reason in without_room(model, texts, searched, placement).values():
                raise PromptError(reason)
        self.order = torch.tensor([self._row(length, placement) for length in self.content])

    def _row(self, length: int, placement: str) -> list[int]:
        """Where each place of a row comes from: the prompt's own, then (from its length on) searched ones."""
        total = self.base.shape[1]
        if self.added:
            return list(range(total))
        inner = [
            1 + a if a >= 0 else total - 1 - a
            for a in arrangement(length, self.searched, placement)
        ]
        inner += [1 + length] * (length if placement == "replace" else 0)
        return [0, *inner, *range(1 + length, total)][:total]

    def ids(self, searched: Tensor, item: Tensor) -> Tensor:
        """Rows of token ids ``(B, T)`` for searched ids ``(B, n)``."""
        return torch.cat([self.base[item], searched.cpu()], 1).gather(1, self.order[item])

    def vectors(self, searched: Tensor, item: Tensor) -> Tensor:
        """Token embeddings ``(B, T, d)`` for searched vectors ``(B, n, d)``; gradients reach these."""
        base = self.table[self.base[item]].to(searched.dtype)
        if self.added:
            before, inner = base[:, :1], base[:, 1 : 1 + self.searched]
            return torch.cat([before, inner + searched, base[:, 1 + self.searched :]], 1)
        order = self.order[item].to(searched.device)
        return torch.cat([base, searched], 1).gather(
            1, order[..., None].expand(-1, -1, searched.shape[-1])
        )

    def encode(self, searched: Tensor, item: Tensor) -> Condition:
        """The text condition of spliced vectors; differentiable."""
        places = torch.full((len(item), self.searched), self.filler)
        return self.model.encode_tokens(self.ids(places, item), self.vectors(searched, item))


class Spliced(Splice):
    """:class:`Splice` for searches over tokens, whose strings are written out; ``replace`` drops the prompt's own."""

    def __init__(
        self, model: Any, texts: Sequence[str], searched: int, placement: str, forbidden: Forbidden,
        *, filling: int | None = None, ended: bool = True,
    ) -> None:  # fmt: skip
        """``filling``: this id stands behind the end token in the loss; ``ended``: and the end token stays."""
        bases = [""] * len(texts) if placement == "replace" else list(texts)
        super().__init__(model, bases, searched, placement)
        self.filling, self.ended = filling, ended
        self.forbidden = forbidden
        self.limit = [forbidden.count(base) for base in bases]
        self._texts: dict[tuple[int, tuple[int, ...]], tuple[str, list[int], bool]] = {}

    def encode(self, searched: Tensor, item: Tensor) -> Condition:
        """As :meth:`Splice.encode`; what stands behind the content is as the search was told."""
        if self.filling is None:
            return super().encode(searched, item)
        places = torch.full((len(item), self.searched), self.filler)
        ids, vectors = self.ids(places, item), self.vectors(searched, item)
        first = torch.tensor([1 + self._length(int(i)) + self.ended for i in item])
        behind = torch.arange(ids.shape[1]) >= first[:, None]
        ids = torch.where(behind, self.filling, ids)
        row = self.table[self.filling].to(vectors)
        return self.model.encode_tokens(
            ids, torch.where(behind[..., None].to(vectors.device), row, vectors)
        )

    def realise(self, searched: Tensor, item: Tensor) -> Realised:
        """Decoded prompts, their content ids after tokenising again, and whether these are unchanged."""
        wanted = [(int(i), tuple(row)) for i, row in zip(item, searched.tolist(), strict=True)]
        missing = list(dict.fromkeys(key for key in wanted if key not in self._texts))
        if missing:
            own = torch.tensor([i for i, _ in missing])
            rows = self.ids(torch.tensor([row for _, row in missing]), own)
            content = [
                row[1 : 1 + self._length(i)]
                for (i, _), row in zip(missing, rows.tolist(), strict=True)
            ]
            texts = self.model.tokenizer.batch_decode(
                content, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            texts = [text.strip() for text in texts]
            again = self.model.tokenizer(texts, add_special_tokens=False).input_ids
            for key, text, ids, before in zip(missing, texts, again, content, strict=True):
                self._texts[key] = (text, list(ids), list(ids) == before)
        found = [self._texts[key] for key in wanted]
        if len(self._texts) > 200_000:
            self._texts.clear()
        return [f[0] for f in found], [f[1] for f in found], [f[2] for f in found]

    def _length(self, i: int) -> int:
        return int(self.content[i]) + self.searched

    def admissible(self, searched: Tensor, item: Tensor) -> Tensor:
        """bool ``(B,)``: the realised text fits the context and names the concept no more than the prompt."""
        texts, again, _ = self.realise(searched, item)
        room = self.base.shape[1] - 2
        good = [
            0 < len(ids) <= room and self.forbidden.count(text) <= self.limit[int(i)]
            for text, ids, i in zip(texts, again, item, strict=True)
        ]
        return torch.tensor(good, dtype=torch.bool)
