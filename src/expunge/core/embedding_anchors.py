"""Text embeddings around a concept's, on which a change of a model is to do nothing (latent anchoring).

    P(c~ | c)  is proportional to  (1 - |cos(c~, c)|)^a

over all token rows of a text as one vector.  ``gaussian``: a direction from ``z ~ N(0, I)``, normalised, accepted with
probability ``(1 - |cos|)^a``, of length ``u ||c||`` with ``u ~ U[0.8, 1.2]``.  In the tens of thousands of dimensions
of a CLIP text nearly every direction is accepted.  ``vocabulary``: the embeddings of real words, drawn by that very
probability.  Source: SPM, arXiv 2312.16145.

What else a condition holds goes along: a pooled vector is a random direction too, with the same ``u``; the mask is
the concept's, and where it masks rows the anchor has none.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import MissingPart, SettingError
from ..models.diffusion import DiffusionModel
from ..models.types import Condition
from .gated_adapters import features
from .mentions import without
from .vocabulary_words import whole_words

__all__ = ["SHORTEST", "Vocabulary", "acceptance", "gaussian"]

SHORTEST, LONGEST = 0.8, 1.2
"""Length of an anchor over that of the concept's embedding."""

TRIES = 10_000
"""Directions drawn for one anchor before the exponent is called too large."""

CHUNK = 64


def acceptance(cosine: Tensor, exponent: float, signed: bool = False) -> Tensor:
    """``(1 - |cos|)^a``; ``signed`` leaves the bars out, as the published code does, and keeps within 1."""
    return (1 - (cosine if signed else cosine.abs())).clamp(0, 1) ** exponent


def gaussian(
    concepts: Condition, generator: torch.Generator, *, exponent: float = 1.0, signed: bool = False
) -> Condition:
    """One anchor for each row of ``concepts``, in its shape, device and precision.

    Args:
        concepts: ``n`` rows, whose embeddings are avoided.
        generator: A CPU generator.
        exponent, signed: See :func:`acceptance`.

    Raises:
        SettingError: No direction was accepted in ten thousand tries.
    """
    rows, found, lengths = features(concepts).cpu(), [], []
    for index, own in enumerate(rows):
        seen = torch.ones(concepts.embeddings.shape[1], 1)
        if concepts.mask is not None:
            seen = concepts.mask[index].cpu().float()[:, None]
        for _ in range(TRIES):
            z = torch.randn(concepts.embeddings.shape[1:], generator=generator) * seen
            unit = functional.normalize(z.flatten(), dim=0)
            chance = acceptance(functional.cosine_similarity(unit, own, dim=0), exponent, signed)
            if float(torch.rand((), generator=generator)) < float(chance):
                break
        else:
            raise SettingError(
                f"none of {TRIES:,} directions was accepted at an exponent of {exponent:g}; take a smaller one"
            )
        u = SHORTEST + (LONGEST - SHORTEST) * float(torch.rand((), generator=generator))
        lengths.append(u)
        found.append((u * own.norm() * unit).reshape(z.shape))
    made = concepts.with_embeddings(torch.stack(found).to(concepts.embeddings))
    if concepts.pooled is None:
        return made
    unit = torch.randn(concepts.pooled.shape, generator=generator)
    length = (
        torch.tensor(lengths)[:, None] * concepts.pooled.float().norm(dim=1, keepdim=True).cpu()
    )
    pooled = functional.normalize(unit, dim=1) * length
    return Condition(made.embeddings, made.mask, pooled.to(concepts.pooled), made.extra, made.texts)


class Vocabulary:
    """Anchors that are real words.

    Args:
        model: Whose words, and who encodes them.
        concepts: ``n`` rows, whose embeddings are avoided.
        leave: Names that are no anchors.
        limit: Number of words, the first of the tokenizer's vocabulary.
        exponent, signed: See :func:`acceptance`.

    Raises:
        MissingPart: The tokenizer has no whole word, or none may be drawn.
    """

    def __init__(
        self,
        model: DiffusionModel,
        concepts: Condition,
        leave: Sequence[str],
        *,
        limit: int,
        exponent: float = 1.0,
        signed: bool = False,
    ) -> None:
        self.model = model
        tokenizer = next(iter(model.vocabularies().values())).tokenizer
        self.words = without(whole_words(tokenizer, limit + len(leave)), leave)[:limit]
        own, cosines = functional.normalize(features(concepts), dim=1), []
        with torch.no_grad():
            for first in range(0, len(self.words), CHUNK):
                rows = features(model.encode(self.words[first : first + CHUNK]))
                cosines.append(own @ functional.normalize(rows, dim=1).T)
        self.weights = torch.cat(cosines, 1).cpu() if cosines else torch.zeros(concepts.rows, 0)
        self.weights = acceptance(self.weights, exponent, signed)
        if not len(self.words) or not bool((self.weights.sum(1) > 0).all()):
            raise MissingPart(
                f"{model.name}: none of {len(self.words)} words of its tokenizer can be an anchor"
            )

    def draw(self, which: Tensor, generator: torch.Generator) -> Condition:
        """One anchor for each of ``which``, row numbers of the concepts."""
        picked = torch.multinomial(self.weights[which], 1, generator=generator).flatten()
        with torch.no_grad():
            return self.model.encode([self.words[i] for i in picked.tolist()]).detach()
