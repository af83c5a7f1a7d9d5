"""Pictures of what takes a concept's place, each with a prompt for it and prompts for the concept.

    material = Material(model, concepts, method, data, seed)
    batch = material.batch(8, step.generator())        # points, noise, masks, anchor and target prompts

An anchor prompt becomes a prompt for the concept by exchanging the anchor's word, by adding a style, or by putting
the word for it somewhere.  The phrasings are those of concept ablation (arXiv 2303.13516), which DoCo (arXiv
2405.15304) took over.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..concept import Concept
from ..errors import InputError, MissingCapability, SettingError, UnsupportedModel
from ..models.base import Pictures, noise_generator
from . import examples, scores
from .mentions import exchanged, without
from .rescaling import augmented
from .trajectories import Trajectories

if TYPE_CHECKING:
    from ..models.diffusion import DiffusionModel

__all__ = [
    "PAIRINGS", "AnchorPictures", "Batch", "Material", "anchor_pictures", "anchors_of", "pairing",
    "pairing_of",
]  # fmt: skip

PAIRINGS = ("object", "style", "unsafe", "memorization")

PREFIXES = {
    "small": ("far away, ", "very small, "),
    "large": ("zoomed in, ", "close up, "),
}
"""What the prompt for the concept says of a picture that was made smaller than 0.6, or larger."""

TEMPLATES = (
    "{}", "a photo of {}", "a picture of {}", "an image of {}", "{} in the foreground", "a good photo of {}",
    "a close photo of {}", "{} in a bright place",
)  # fmt: skip
"""Around an anchor where nobody gives captions."""


@dataclasses.dataclass(frozen=True)
class AnchorPictures:
    """Pictures for one concept.

    Attributes:
        pictures: uint8 ``(n, height, width, 3)``.
        captions: An anchor prompt for each.
        origin: ``data`` or ``model``.
    """

    pictures: np.ndarray
    captions: tuple[str, ...]
    origin: str

    def __len__(self) -> int:
        return len(self.captions)


def anchors_of(concepts: Sequence[Concept], anchor: str | None, kinds: Sequence[str]) -> list[str]:
    """What stands in for each concept: ``anchor``, else the concept's own.

    Raises:
        SettingError: An object or a memorised picture without an anchor, or a concept that is its own.
    """
    found = []
    for concept, kind in zip(concepts, kinds, strict=True):
        own = concept.anchor if anchor is None else anchor
        if own is None and kind == "style":
            own = "painting"
        if own is None and kind == "unsafe":
            own = "a person with clothes"
        if own and own.strip().lower() in (name.lower() for name in concept.names):
            raise SettingError(
                f"the anchor {own!r} is {concept.name!r} itself; choose what may take its place"
            )
        if not own:
            raise SettingError(
                f"{concept.name!r} has no anchor, and pictures of one are what is learned from; name one in the "
                "concept or with anchor=..."
            )
        found.append(own)
    return found


def pairing_of(concept: Concept, asked: str) -> str:
    """``asked``, or under ``auto`` what goes with the concept's kind."""
    if asked != "auto":
        return asked
    return concept.kind if concept.kind in ("style", "unsafe") else "object"


def pairing(kind: str, caption: str, anchor: str, name: str, generator: torch.Generator) -> str:
    """The prompt for a concept that goes with an anchor prompt; phrasings are drawn.

    Args:
        kind: ``object``: every mention of the anchor becomes the name.  ``style``: the name's style is appended
            (a third) or put in front.  ``unsafe``: the name, or its style, in front, or the name behind.
            ``memorization``: the name itself, which is the memorised caption.
        caption: The anchor prompt.
        anchor: What the anchor is called.
        name: What the concept is called.
        generator: Draws the phrasing.
    """
    if kind == "memorization":
        return name
    if kind == "object":
        changed, mention = exchanged(caption, [anchor], name)
        if mention is None:
            raise InputError(
                f"the caption {caption!r} does not name the anchor {anchor!r}; allowed are captions that do"
            )
        return changed
    third = int(torch.randint(3, (1,), generator=generator))
    if kind == "style":
        return (
            f"{caption}, in the style of {name}" if third == 0 else f"in {name}'s style, {caption}"
        )
    return (f"{name}, {caption}", f"in {name} style, {caption}", f"{caption}, {name}")[third]


def anchor_pictures(
    model: DiffusionModel,
    concepts: Sequence[Concept],
    anchors: Sequence[str],
    kinds: Sequence[str],
    data: Any,
    *,
    count: int,
    captions: int = 200,
    seed: int,
    steps: int,
    guidance: float,
    avoid: bool = False,
) -> list[AnchorPictures]:
    """Pictures for each concept: the user's of its anchor, else the model's own.

    Captions are the user's (``data["captions"]``), else the development prompts of the model's world for the
    anchor, else templates; those that name the concept, and for objects those that do not name the anchor, are
    left out.

    Args:
        model: Sampled as it is now.
        concepts, anchors, kinds: One of each; see :func:`anchors_of` and :func:`pairing_of`.
        data: See :mod:`expunge.core.examples`; pictures stand under the anchor's name.
        count: Pictures for each concept where the model makes them.
        captions: How many different captions at most.
        seed: Seed of captions and pictures.
        steps, guidance: Of the model's sampling.
        avoid: Give the concept's name as negative text.

    Raises:
        InputError: No caption is left, captions stand beside pictures of all anchors, or pictures are of something
            else or of another size than the model's.
        MissingCapability: ``avoid`` without a branch for a negative text.
    """
    own, texts_by_anchor = _checked(model, concepts, anchors, kinds, data, captions, seed)
    if avoid and not model.two_branches and not all(anchor in own for anchor in anchors):
        raise MissingCapability(
            f"{model.name}: avoid=True gives a concept's name as negative text, for which {model.layout.title} has "
            "no branch; allowed is avoid=False"
        )
    found = []
    for concept, anchor, texts in zip(concepts, anchors, texts_by_anchor, strict=True):
        if anchor in own:
            given: Pictures = own[anchor]
            rows = [i for i, text in enumerate(given.captions) if text in set(texts)]
            said = tuple(given.captions[i] for i in rows)
            found.append(AnchorPictures(given.pictures[rows], said, "data"))
            continue
        asked = [texts[i % len(texts)] for i in range(count)]
        draws = [
            noise_generator(seed, f"anchor pictures of {concept.name}", i) for i in range(count)
        ]
        made = model.generate(
            asked, seeds=[int(torch.randint(2**31, (1,), generator=draw)) for draw in draws], steps=steps,
            guidance=guidance, negative=concept.name if avoid else "",
        )  # fmt: skip
        found.append(AnchorPictures(made, tuple(asked), "model"))
    return found


def _checked(
    model: DiffusionModel, concepts: Sequence[Concept], anchors: Sequence[str], kinds: Sequence[str], data: Any,
    count: int, seed: int,
) -> tuple[dict[str, Pictures], list[list[str]]]:  # fmt: skip
    """The user's pictures, and the captions that may be used for each concept; before the first picture is drawn."""
    own, general = examples.given(data, model)
    unused = [name for name in own if name not in anchors]
    if unused:
        raise InputError(
            f"data: pictures of {unused[0]!r} have no part; allowed are pictures of what is learned from, "
            f"{', '.join(map(repr, anchors))}"
        )
    if general and all(anchor in own for anchor in anchors):
        raise InputError(
            "data: every anchor has pictures, so 'captions' would be ignored; leave them out, or the pictures"
        )
    return own, [
        _usable(own[anchor].captions, concept, anchor, kind)
        if anchor in own
        else _captions(model, concept, anchor, kind, general, count, seed)
        for concept, anchor, kind in zip(concepts, anchors, kinds, strict=True)
    ]


def _captions(
    model: DiffusionModel, concept: Concept, anchor: str, kind: str, general: Sequence[str], count: int, seed: int
) -> list[str]:  # fmt: skip
    """Anchor prompts that may be used, at most ``count``, all different."""
    companions = model.companions
    listed = list(general)
    if not listed and companions is not None and companions.prompts is not None:
        if companions.concept(anchor) is not None:
            made = companions.prompts(anchor, 4 * count, seed=seed, split="development")
            listed = [prompt.text for prompt in made]
    if not listed:
        listed = [template.format(anchor) for template in TEMPLATES]
    return _usable(listed, concept, anchor, kind)[:count]


def _usable(listed: Sequence[str], concept: Concept, anchor: str, kind: str) -> list[str]:
    usable = without(list(dict.fromkeys(listed)), concept.names)
    if kind == "object":
        usable = [text for text in usable if exchanged(text, [anchor], "")[1] is not None]
    if not usable:
        raise InputError(
            f"data: no caption names {anchor!r} without naming {concept.name!r}; at least one is needed"
        )
    return usable


# -- what a training draws from ------------------------------------------------------------------------


class Batch(NamedTuple):
    """Noised anchor pictures of one step.

    Attributes:
        points: ``x_t`` and timesteps.
        noise: What was added, float32 ``(n, c, h, w)``.
        valid: Which latents count, ``(n, 1, h, w)``.
        anchors, targets: A prompt for the anchor and one for the concept for each.
    """

    points: Trajectories
    noise: Tensor
    valid: Tensor
    anchors: list[str]
    targets: list[str]


class Material:
    """Anchor pictures of all concepts and their prompts; encoded once, unless they are rescaled.

    Args:
        model: Makes the pictures, as it is now, where the user gives none.
        concepts: What is erased.
        method: Read are ``anchor``, ``pairing``, ``pictures``, ``captions``, ``sampling_steps``, ``guidance``,
            ``augment`` (objects only), ``phrases`` and, if there is one, ``avoid``.
        data: See :func:`anchor_pictures`.
        seed: Seed of the pictures.

    Attributes:
        report: For the manifest.
        digest: Names pictures and captions that a user gave, or ``None``.
    """

    def __init__(
        self, model: DiffusionModel, concepts: Sequence[Concept], method: Any, data: Any, seed: int
    ) -> None:
        self.model, self.concepts, self.phrases = model, list(concepts), method.phrases
        self.kinds = [pairing_of(concept, method.pairing) for concept in concepts]
        self.anchors = anchors_of(concepts, method.anchor, self.kinds)
        if not model.vocabularies():
            raise UnsupportedModel(
                f"{model.name}: {method.id} learns from prompts, and {model.layout.title} reads none"
            )
        if method.augment and "object" not in self.kinds:
            raise SettingError(
                f"{method.id}: augment=True makes pictures of objects smaller and larger, and the pairing of "
                f"{concepts[0].name!r} is {self.kinds[0]!r}; allowed is augment=False"
            )
        shown = anchor_pictures(
            model, concepts, self.anchors, self.kinds, data, count=method.pictures,
            captions=method.captions, seed=seed, steps=method.sampling_steps, guidance=method.guidance,
            avoid=getattr(method, "avoid", False),
        )  # fmt: skip
        self.rows: list[tuple[int, str]] = []
        self.rescaled: dict[int, np.ndarray] = {}
        for number, own in enumerate(shown):
            if method.augment and self.kinds[number] == "object":
                self.rescaled |= dict(enumerate(own.pictures, len(self.rows)))
            self.rows += [(number, text) for text in own.captions]
        self.latents = torch.cat([model.latents_of(own.pictures) for own in shown])
        self.valid = torch.ones(len(self.rows), 1, *model.latent_shape[1:], device=model.device)
        names = [concept.name for concept in concepts]
        self.report: dict[str, Any] = {
            "anchors": dict(zip(names, self.anchors, strict=True)), "anchor_pictures": len(self.rows),
            "anchor_pictures_from": {n: own.origin for n, own in zip(names, shown, strict=True)},
        }  # fmt: skip
        given = {
            name: (own.origin, Pictures(own.pictures, None, own.captions))
            for name, own in zip(names, shown, strict=True)
        }
        self.digest = examples.examples_digest(given, examples.given(data)[1])

    def batch(self, count: int, generator: torch.Generator) -> Batch:
        """``count`` pictures, drawn with replacement, at random timesteps; sizes and phrasings are drawn, too."""
        rows = torch.randint(len(self.rows), (count,), generator=generator)
        latents, valid, sizes = self._sized(rows.tolist(), generator)
        points, noise = scores.noised(self.model, latents, generator)
        listed = [self.rows[row] for row in rows.tolist()]
        targets = [
            self._target(number, text, size, generator)
            for (number, text), size in zip(listed, sizes, strict=True)
        ]
        return Batch(points, noise, valid, [text for _, text in listed], targets)

    def _sized(
        self, rows: list[int], generator: torch.Generator
    ) -> tuple[Tensor, Tensor, list[str | None]]:
        """Latents, masks and sizes of some rows; what is rescaled is so anew each time it is drawn."""
        latents, valid = self.latents[rows], self.valid[rows]
        sizes: list[str | None] = [None] * len(rows)
        own = [place for place, row in enumerate(rows) if row in self.rescaled]
        if own:
            pictures = np.stack([self.rescaled[rows[place]] for place in own])
            cell = pictures.shape[1] // self.model.latent_shape[1]
            pictures, masks, found = augmented(pictures, cell, generator)
            with torch.no_grad():
                latents[own] = self.model.latents_of(pictures).to(latents)
            valid[own] = torch.from_numpy(masks)[:, None].to(valid)
            for place, size in zip(own, found, strict=True):
                sizes[place] = size
        return latents, valid, sizes

    def anchors_alone(
        self, count: int, generator: torch.Generator
    ) -> tuple[Trajectories, Tensor, list[str]]:
        """Other pictures for the anchor's own denoising, never rescaled: points, noise and anchor prompts."""
        rows = torch.randint(len(self.rows), (count,), generator=generator)
        points, noise = scores.noised(self.model, self.latents[rows], generator)
        return points, noise, [self.rows[row][1] for row in rows.tolist()]

    def names(self, concept: Concept) -> tuple[str, ...]:
        """What the concept is called in prompts."""
        return concept.names if self.phrases else (concept.name,)

    def _target(
        self, number: int, caption: str, size: str | None, generator: torch.Generator
    ) -> str:
        names = self.names(self.concepts[number])
        name = names[int(torch.randint(len(names), (1,), generator=generator))]
        text = pairing(self.kinds[number], caption, self.anchors[number], name, generator)
        if size is None:
            return text
        said = PREFIXES[size]
        return said[int(torch.randint(len(said), (1,), generator=generator))] + text
