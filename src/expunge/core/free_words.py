"""Free words: vectors found by textual inversion through whatever acts on the model, in short prompts.

    found = free_word(model, concept, pictures, steps=1000, lr=5e-3, batch=4, seed=0)
    rows = found.rows(sites(model, (8,)))          # hidden states of the prompts that hold the word

With ``v (k, d)`` in the place of a word, ``x_t`` a noised picture of the concept and ``eps`` its noise:

    v = argmin E || eps - eps_theta(x_t, t, c(prompt with v)) ||^2

``c`` is the model's own text encoder, edits and controls included, so that ``v`` is what still brings the concept back.
Source: textual inversion, arXiv 2208.01618.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..concept import Concept
from ..models.base import Pictures, noise_generator
from ..models.diffusion import DiffusionModel
from . import scores
from .adversarial_prompts import Forbidden, Spliced
from .soft_prompts import descend, random_start
from .text_activations import Rows, Site, heard_of

__all__ = ["FreeWord", "free_word"]

BEFORE = ("a photo of a", "a", "a picture of the", "one", "a drawing of a")
"""What stands before the word."""


@dataclasses.dataclass(frozen=True)
class FreeWord:
    """A word that is a vector.

    Attributes:
        vectors: ``(1, k, d)`` float32.
        prompts: The prompts it was learnt in.
        losses: Squared error of the noise before each step.
    """

    vectors: Tensor
    prompts: Spliced
    losses: tuple[float, ...]

    def rows(self, wanted: Sequence[Site]) -> Mapping[str, Rows]:
        """Hidden states of the prompts, as the model is now."""
        item = torch.arange(len(BEFORE))
        vectors = self.vectors.expand(len(item), -1, -1)
        return heard_of(self.prompts.model, wanted, lambda: self.prompts.encode(vectors, item))


def free_word(
    model: DiffusionModel,
    concept: Concept,
    pictures: Pictures,
    *,
    steps: int,
    lr: float,
    batch: int,
    seed: int,
    tokens: int = 1,
    purpose: str = "free word",
) -> FreeWord:
    """Learn a word that makes the model, as it is now, draw a concept.

    Args:
        model: One CLIP text encoder; edits and controls on it take part.
        concept: What the pictures show.
        pictures: Pictures of it.
        steps, lr: Of Adam.
        batch: Pictures a step.
        seed: Seed of start, pictures, timesteps and noise.
        tokens: Vectors of the word.
        purpose: Tells the private randomness of several words apart.

    Raises:
        MissingCapability: The model has several text encoders, or one that is no CLIP.
    """
    table = model.token_table()
    spliced = Spliced(
        model, BEFORE, tokens, "suffix", Forbidden(model.tokenizer, concept, len(table))
    )
    start = random_start(model, 1, tokens, noise_generator(seed, purpose, concept.name))
    with torch.no_grad():
        latents = model.latents_of(pictures.pictures)

    def loss(step: int, vectors: Tensor) -> Tensor:
        draw = noise_generator(seed, f"{purpose}: {concept.name}", step)
        pick = torch.randint(len(latents), (batch,), generator=draw)
        points, noise = scores.noised(model, latents[pick.to(latents.device)], draw)
        item = torch.randint(len(BEFORE), (batch,), generator=draw)
        condition = spliced.encode(vectors.to(table.dtype).expand(batch, -1, -1), item)
        made = scores.epsilon(model, points, condition)
        model.cost.add("denoiser", batch, "backward")
        return (made - noise.float()).square().mean()[None]

    found = descend(loss, start, steps=steps, lr=lr, half=model.dtype == torch.float16)
    return FreeWord(found.vectors, spliced, found.losses)
