"""Pictures of a concept that an attack sets out from: files of the concept, the original model's, or its world's.

    origin, found = concept_pictures(original, concept, 16, seed=0, steps=20, guidance=4.0)

Here the world's rendered pictures come last: what an attacker can have is what the unerased model draws.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..concept import Concept
from ..errors import SettingError
from ..method import Prompt
from ..models.base import Pictures
from .examples import read_pictures
from .mentions import exchanged
from .prompt_templates import inversion_templates
from .sampling import SEED_STEP, SHARED, outputs

__all__ = [
    "concept_pictures", "concept_prompts", "drawn_of", "masks_of", "other_than", "said_of_another", "size_of",
    "world_pictures",
]  # fmt: skip


def concept_prompts(model: Any, concept: Concept, count: int, seed: int) -> list[Prompt]:
    """Development prompts of the model's world that name the concept, else the templates of its kind filled in."""
    companions = model.companions
    if companions is not None and companions.prompts is not None:
        known = companions.concept(concept.name)
        if known is not None:
            return list(companions.prompts(known.name, count, seed=seed, split="development"))
    texts = inversion_templates(concept.kind)
    return [
        Prompt(texts[i % len(texts)].format(concept.name), seed * SEED_STEP + i, concept.name)
        for i in range(count)
    ]


def concept_pictures(
    original: Any, concept: Concept, count: int, *, seed: int, steps: int, guidance: float
) -> tuple[str, Pictures]:
    """Where the pictures come from (``files`` or ``original``), and the pictures with captions that name the concept.

    Args:
        original: The unerased model; its edits are lifted.
        concept: Its own picture files are taken, all of them, where it names any.
        count: How many are drawn otherwise.
        seed: Of prompts and noise.
        steps, guidance: Of sampling.
    """
    height, width = size_of(original)
    own = read_pictures(concept, height, width, crop=True)
    if own is not None:
        return "files", own
    return "original", drawn_of(
        original, concept_prompts(original, concept, count, seed), steps=steps, guidance=guidance
    )


def drawn_of(original: Any, prompts: Sequence[Prompt], *, steps: int, guidance: float) -> Pictures:
    """What the unerased model draws of prompts, once a process."""
    with original.lifted():
        made = outputs(original, prompts, cache=SHARED, steps=steps, guidance=guidance)
    return Pictures(made, None, tuple(prompt.text for prompt in prompts))


def world_pictures(model: Any, concept: Concept, count: int, seed: int) -> Pictures | None:
    """Rendered development pictures of the model's world with exact masks, of the size the model draws, or ``None``."""
    companions = model.companions
    if companions is None or companions.pictures is None:
        return None
    known = companions.concept(concept.name)
    if known is None:
        return None
    found: Pictures = companions.pictures(known.name, count, seed=seed, split="development")
    return found if found.pictures.shape[1:3] == size_of(model) else None


def other_than(model: Any, concept: Concept) -> str:
    """Something else of the same kind: a neighbour in the model's world, else the concept's anchor.

    Raises:
        SettingError: There is neither.
    """
    companions = model.companions
    known = companions.concept(concept.name) if companions is not None else None
    if known is not None and companions.neighbours(known):
        return str(companions.neighbours(known)[0])
    if concept.anchor:
        return concept.anchor
    raise SettingError(
        f"what a picture of something other than {concept.name!r} shows is not known; give the concept an anchor"
    )


def said_of_another(prompt: Prompt, concept: Concept, other: str) -> Prompt:
    """The same prompt for another thing; where the concept is not named, a plain prompt for it."""
    text, mention = exchanged(prompt.text, concept.names, other)
    return dataclasses.replace(prompt, text=text if mention else f"a photo of {other}")


def size_of(model: Any) -> tuple[int, int]:
    """Height and width in pixels of what a model draws."""
    height, width = (side * model.layout.scale_factor for side in model.latent_shape[1:])
    return height, width


def masks_of(found: Pictures, box: float) -> np.ndarray:
    """Where the concept is, bool ``(n, height, width)``: the pictures' own masks, else a box in the middle.

    Args:
        found: Pictures.
        box: Side of the box as a share of the picture's.
    """
    if found.masks is not None:
        return np.asarray(found.masks, bool)
    count, height, width = found.pictures.shape[:3]
    masks = np.zeros((count, height, width), bool)
    rows, columns = (round(side * (1 - box) / 2) for side in (height, width))
    masks[:, rows : height - rows, columns : width - columns] = True
    return masks
