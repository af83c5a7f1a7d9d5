"""A concept as a direction in the space of text embeddings, and the search for texts along it.

The direction is the mean difference of prompt pairs that differ by the concept only.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..concept import Concept
from ..errors import InputError, SettingError
from .adversarial_prompts import Forbidden, Spliced
from .mentions import exchanged
from .prompt_search import Problem

__all__ = ["concept_pairs", "concept_vector", "matching_problem", "read_pairs", "read_vector"]

TEMPLATES = (
    "a {}", "a red {}", "a blue {}", "a green {}", "a photo of a {}", "a picture of a {}", "a small {}",
    "a large {}", "a {} on paper", "a {} in the night", "one {} alone", "a drawing of a {}",
)  # fmt: skip
NEUTRAL = {"style": "plain", "identity": "person"}
"""What stands in a pair for a concept without an anchor; ``thing`` for all other kinds."""


def concept_pairs(model: Any, concept: Concept, count: int = 12) -> list[tuple[str, str]]:
    """Prompts with the concept, and the same ones with its anchor or a neutral word in its place.

    They come from development prompts of the model's world where there is one, so that no attacked
    prompt is among them, and else from general templates.
    """
    other = concept.anchor or NEUTRAL.get(concept.kind, "thing")
    companions = model.companions
    texts = [template.format(concept.name) for template in TEMPLATES[:count]]
    if (
        companions is not None
        and companions.prompts is not None
        and companions.concept(concept.name) is not None
    ):
        texts = [
            prompt.text for prompt in companions.prompts(concept.name, count, split="development")
        ]
    pairs = [(text, exchanged(text, concept.names, other)[0]) for text in texts]
    return [pair for pair in pairs if pair[0] != pair[1]]


def concept_vector(model: Any, pairs: Sequence[tuple[str, str]]) -> Tensor:
    """``c_hat (T, d)``: mean over pairs of ``f(with) - f(without)``.

    Rows before the first differing token are exactly zero where the encoder is causal.
    """
    if not pairs:
        raise SettingError(
            "no prompt pair holds the concept; give pairs of texts with and without it"
        )
    shown = model.encode([a for a, _ in pairs]).embeddings
    return (shown - model.encode([b for _, b in pairs]).embeddings).mean(0)


def read_pairs(pairs: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs written as ``"text with the concept|text without it"``."""
    split = [tuple(part.strip() for part in pair.split("|")) for pair in pairs]
    for pair, parts in zip(pairs, split, strict=True):
        if len(parts) != 2 or not all(parts):
            raise SettingError(f"pair {pair[:60]!r} must be two texts written as 'with|without'")
    return [(parts[0], parts[1]) for parts in split]


def read_vector(file: str, like: Tensor) -> Tensor:
    """A concept vector as it is published: a .npy file of ``(T, d)`` or ``(1, T, d)`` numbers; never unpickled.

    Args:
        file: The file.
        like: A text's embedding ``(T, d)`` of the model it is for.

    Raises:
        InputError: It cannot be read, or is of another encoder.
    """
    try:
        found = np.load(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{Path(file).name}: is no .npy file of numbers ({error})") from None
    vector = torch.from_numpy(np.asarray(found, dtype=np.float32)).squeeze()
    if vector.shape != like.shape or not bool(torch.isfinite(vector).all()):
        raise InputError(
            f"{Path(file).name}: holds {tuple(found.shape)}, or numbers that are not finite; this model's text encoder "
            f"makes {tuple(like.shape)}"
        )
    return vector.to(like)


def matching_problem(
    model: Any,
    wanted: Tensor,
    length: int,
    forbidden: Forbidden,
    *,
    realised: bool = True,
    keys: Sequence[str] | None = None,
) -> Problem:
    """Find texts of ``length`` tokens whose embeddings are nearest to ``wanted (items, T, d)``.

    The score is the squared distance over all positions and channels, ``(B,)``.

    Args:
        model: Its text encoder is searched; a row is one pass of it.
        wanted: One target sequence an item.
        length: Searched tokens; cut to the context.
        forbidden: Tokens and words that may not be used.
        realised: Score a string as its text tokenises again, not as the searched ids.
        keys: Names of the items for their private randomness.
    """
    items, places = len(wanted), min(length, wanted.shape[1] - 2)
    spliced = Spliced(model, [""] * items, places, "replace", forbidden)

    def distance(rows: Tensor, item: Tensor) -> Tensor:
        hidden = model.encode_tokens(rows).embeddings
        return (hidden - wanted[item.to(wanted.device)]).float().square().flatten(1).sum(1)

    def rescore(texts: Sequence[str], item: Tensor) -> Tensor:
        return distance(model.token_ids(texts), item)

    def score(ids: Tensor, item: Tensor) -> Tensor:
        if realised:
            return rescore(spliced.realise(ids, item)[0], item)
        return distance(spliced.ids(ids, item), item)

    return Problem(
        spliced.table,
        places,
        forbidden.allowed,
        score=score,
        realise=spliced.realise,
        rescore=rescore,
        admissible=spliced.admissible,
        items=items,
        keys=keys,
    )
