"""Textual inversion: a word of free vectors, learnt in prompts through a model as it is (arXiv 2208.01618).

    prompts = FreePrompts(model, ["a photo of a {}", "a {} on a beach"], tokens=1)
    word = learn_word(loss, initial_word(model, "art", 1), updates=500, lr=0.08, accumulate=4)
    condition = prompts.encode(word.vectors.expand(2, -1, -1), torch.arange(2))
    save_word("star.safetensors", "<star>", word.vectors)          # pipeline.load_textual_inversion reads it

The word stands where ``{}`` stood, as a token of its own would: texts are cut at it, and what is left of it and right
of it is tokenised by itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor

from ..concept import Concept
from ..edit.files import atomic_write
from ..errors import InputError, NonFiniteError, PromptError, SettingError
from ..method import Attempts
from ..models.types import Condition
from .adversarial_prompts import ordinary_ids
from .mentions import exchanged
from .training import HALF_SCALE

__all__ = [
    "PLACE", "FreePrompts", "Word", "export_word", "fitting", "initial_word", "learn_word", "placed", "random_word",
    "save_word", "token_for", "with_place",
]  # fmt: skip

PLACE = "{}"
_CUT = "\x00"


def with_place(text: str, names: Sequence[str]) -> str:
    """The text with the word's place instead of every name; in front of it where it names none.

    Braces of the text itself are dropped, because they stand for the place.
    """
    plain = text.replace(PLACE, " ")
    placed, mention = exchanged(plain, names, _CUT)
    return placed.replace(_CUT, PLACE) if mention else f"{PLACE} {plain}"


def placed(model: Any, text: str, concept: Concept, tokens: int) -> str:
    """:func:`with_place` for a concept's names; in front where the model would not read so far."""
    found = with_place(text, concept.names)
    if fitting(model, [found], tokens) == [found]:
        return found
    return f"{PLACE} {text.replace(PLACE, ' ')}"


class FreePrompts:
    """Prompts with places for a free word, as rows of the model's context length.

    Args:
        model: A model with one token table, as it is now.
        texts: Prompts with ``{}`` at least once each.
        tokens: Vectors of the word.

    Raises:
        PromptError: A text has no place for the word, or none that fits the model's context.
    """

    def __init__(self, model: Any, texts: Sequence[str], tokens: int) -> None:
        self.model, self.table, self.tokens = model, model.token_table(), tokens
        # Some encoders read the place of the end token off the ids, so a filler must not look like one.
        self.filler = int(ordinary_ids(model)[0])
        empty = model.token_ids([""])[0].tolist()
        rows = [self._row(text, empty) for text in texts]
        self.ids = torch.tensor([ids for ids, _ in rows])
        self.order = torch.tensor([order for _, order in rows])

    def _row(self, text: str, empty: list[int]) -> tuple[list[int], list[int]]:
        """Token ids, and where each place's vector comes from: the table's row, or (from T on) the word's."""
        total, parts = len(empty), text.split(PLACE)
        if len(parts) < 2:
            raise PromptError(f"{text!r} has no place for the word; allowed are texts with {PLACE}")
        pieces = self.model.tokenizer(parts, add_special_tokens=False).input_ids
        content: list[tuple[int, int]] = []
        for number, piece in enumerate(pieces):
            if number:
                content += [(self.filler, j) for j in range(self.tokens)]
            content += [(token, -1) for token in piece]
        content = content[: total - 2]
        if sum(j == self.tokens - 1 for _, j in content) == 0:
            raise PromptError(
                f"the word's place in {text[:60]!r} lies beyond the {total} tokens this model reads"
            )
        # What is empty begins with the start token, and the end token comes next.
        ids = [empty[0], *(token for token, _ in content), *empty[1:]][:total]
        order = list(range(total))
        for place, (_, j) in enumerate(content, 1):
            order[place] = place if j < 0 else total + j
        return ids, order

    def vectors(self, word: Tensor, item: Tensor) -> Tensor:
        """Token embeddings ``(B, T, d)`` for words ``(B, k, d)``; gradients reach these."""
        base = self.table[self.ids[item]].to(word.dtype)
        order = self.order[item].to(word.device)
        return torch.cat([base, word], 1).gather(1, order[..., None].expand(-1, -1, word.shape[-1]))

    def encode(self, word: Tensor, item: Tensor) -> Condition:
        """The text condition of prompts ``(B,)`` with words ``(B, k, d)``; differentiable."""
        made = word.to(self.table.device, self.table.dtype)
        return self.model.encode_tokens(self.ids[item], self.vectors(made, item))


def fitting(model: Any, texts: Sequence[str], tokens: int) -> list[str]:
    """The texts whose places for a word of ``tokens`` vectors a model reads; the word alone where none has one."""
    found = []
    for text in texts:
        with contextlib.suppress(PromptError):
            FreePrompts(model, [text], tokens)
            found.append(text)
    return found or [PLACE]


@dataclasses.dataclass(frozen=True)
class Word:
    """A word that was learnt.

    Attributes:
        vectors: ``(k, d)`` float32.
        losses: Mean loss of each update.
    """

    vectors: Tensor
    losses: tuple[float, ...]


def initial_word(model: Any, text: str, tokens: int) -> Tensor:
    """``(k, d)`` float32: ``k`` times the table's row of a word, the mean of its rows where it has several.

    Raises:
        SettingError: The text has no token.
    """
    ids = model.tokenizer(text, add_special_tokens=False).input_ids
    if not ids:
        raise SettingError(f"the initial word {text!r} has no token; give a word of the vocabulary")
    return model.token_table()[ids].float().mean(0).repeat(tokens, 1)


def random_word(model: Any, tokens: int, generator: torch.Generator) -> Tensor:
    """``(k, d)`` float32: random directions, as long as the token table's rows are in the mean."""
    table = model.token_table().float()
    drawn = torch.randn(tokens, table.shape[1], generator=generator).to(table.device)
    return drawn / drawn.norm(dim=1, keepdim=True) * table.norm(dim=1).mean()


def learn_word(
    loss: Callable[[int, int, Tensor], Tensor],
    start: Tensor,
    *,
    updates: int,
    lr: float,
    weight_decay: float = 1e-2,
    accumulate: int = 1,
    half: bool = False,
    after: Callable[[int, Tensor], None] | None = None,
) -> Word:
    """AdamW on the word's vectors alone.

    Args:
        loss: ``loss(update, part, vectors (k, d)) -> ()``, differentiable; ``part`` counts up to ``accumulate``.
        start: ``(k, d)``; not changed.
        updates: How many.
        lr, weight_decay: Of AdamW.
        accumulate: Parts whose mean gradient makes one update.
        half: Gradients pass through float16: the loss is scaled on their way.
        after: Called with the number of updates made and the vectors.

    Raises:
        NonFiniteError: A loss or a gradient is NaN or infinite.
    """
    vectors = start.detach().float().clone()
    optimiser = torch.optim.AdamW([vectors], lr=lr, weight_decay=weight_decay)
    scale, losses = HALF_SCALE if half else 1.0, []
    for update in range(updates):
        slope, total = torch.zeros_like(vectors), 0.0
        for part in range(accumulate):
            leaf = vectors.detach().clone().requires_grad_(True)
            with torch.enable_grad():
                value = loss(update, part, leaf)
                (own,) = torch.autograd.grad(value * scale, leaf)
            slope += own / (scale * accumulate)
            total += float(value.detach()) / accumulate
        if not (torch.isfinite(slope).all() and total == total and abs(total) != float("inf")):
            raise NonFiniteError(f"the loss of the inversion is not finite at update {update + 1}")
        losses.append(total)
        vectors.grad = slope
        optimiser.step()
        if after is not None:
            after(update + 1, vectors.detach().clone())
    return Word(vectors.detach(), tuple(losses))


def save_word(path: str | os.PathLike[str], token: str, vectors: Tensor) -> None:
    """A file of textual inversion, token -> row or rows, which ``pipeline.load_textual_inversion`` of diffusers reads.

    Raises:
        InputError: The token is empty, holds spaces, or is safetensors' own.
    """
    if not token or token.split() != [token] or token == "__metadata__":
        raise InputError(
            f"{token!r} cannot be a token; allowed is a text without spaces, such as <star>"
        )
    rows = vectors.detach().float().cpu()
    kept = rows[0].clone() if len(rows) == 1 else rows.contiguous()
    atomic_write(path, safetensors.save({token: kept}, metadata={"format": "pt"}))


def export_word(attempts: Attempts, path: str | os.PathLike[str]) -> str:
    """Write the word that an inversion found (``details["word"]`` of its first item); returns its token.

    Raises:
        InputError: The attempts hold no word.
    """
    found = attempts.items[0].details.get("word") if attempts.items else None
    if found is None:
        raise InputError(f"the attempts of {attempts.attack} hold no learnt word")
    save_word(path, found["token"], torch.tensor(found["vectors"]))
    return str(found["token"])


def token_for(concept: Concept) -> str:
    """What the word is called in a file: ``<name>`` without spaces."""
    return f"<{'-'.join(concept.name.lower().split())}>"
