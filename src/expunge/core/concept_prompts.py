"""Texts a concept is read from: prompts that name it, prompts that must stay, and captions to learn from.

The two sides are to differ in the concept alone, so among the retained prompts stands every target prompt with
something else in the place of the name: whatever else it speaks of then belongs to both.  Templates go by the kind of
the concept; their texts are ours.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..concept import Concept
from ..errors import InputError, nearest
from ..models.diffusion import DiffusionModel
from .examples import texts_of
from .mentions import without
from .projections import erased_pairs, general_captions, kept_texts, registered_texts
from .prompt_templates import with_place

__all__ = ["Texts", "concept_prompts", "five"]

PEOPLE = (
    "a portrait of {}",
    "a photo of {} in the street",
    "{} at an event",
    "a drawing of {}",
    "a picture of {}",
)
STYLED = (
    "a picture by {}",
    "a painting in the style of {}",
    "{} style",
    "an artwork by {}",
    "a print by {}",
)
THINGS = ("a {}", "a photo of a {}", "a picture of the {}", "a small {}", "one {}")


def five(kind: str) -> tuple[str, ...]:
    """Five templates for a kind of concept."""
    return {"identity": PEOPLE, "style": STYLED}.get(kind, THINGS)


@dataclasses.dataclass(frozen=True)
class Texts:
    """What a concept is read from.

    Attributes:
        targets: Prompts that name a target.
        retained: Prompts that must stay, none of which names one.
        captions: What the autoencoder learns from.
    """

    targets: tuple[str, ...]
    retained: tuple[str, ...]
    captions: tuple[str, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of all texts."""
        return hashlib.sha256(json.dumps(dataclasses.astuple(self)).encode()).hexdigest()


def concept_prompts(
    method: Any,
    model: DiffusionModel,
    concepts: Sequence[Concept],
    keep: Sequence[Any],
    data: Any,
    *,
    known: bool = False,
) -> Texts:
    """Target prompts, retained prompts and captions.

    Args:
        method: An eraser with the settings ``templates``, ``guide``, ``erase_phrases``, ``context_prompts``,
            ``general_prompts`` and ``captions``.
        model: Its world gives captions, and prompts of a concept.
        concepts: What is erased.
        keep: Names, concepts or prompts that must stay.
        data: Captions, or a mapping with any of ``captions``, ``retained`` (prompts) and ``targets`` (concept's
            name -> prompts).
        known: Nothing has to be learnt from captions.

    Raises:
        InputError: ``data`` is of another form, or there are no captions.
    """
    given = _given(method.id, data, concepts)
    with_place(method.id, "templates", method.templates)
    pairs = [
        pair
        for concept in concepts
        for pair in (
            *erased_pairs(
                [concept], method.guide, phrases=method.erase_phrases, templates=method.templates or five(concept.kind)
            ),
            *registered_texts(
                model, [concept], method.guide, method.context_prompts, 0, phrases=method.erase_phrases
            )[0],
        )
    ]  # fmt: skip
    targets = [*given["targets"], *(pair.erased for pair in pairs)]
    beside = [" ".join(pair.replacing.split()) for pair in pairs]
    kinds = dict.fromkeys(concept.kind for concept in concepts)
    told = kept_texts(keep, method.templates or [form for kind in kinds for form in five(kind)])
    captions = list(given["captions"])
    general = captions[: method.general_prompts] or general_captions(
        model, concepts, method.general_prompts, kept_texts(keep)
    )
    names = [name for concept in concepts for name in concept.names]
    retained = without([*given["retained"], *told, *general, *beside], names)
    if not captions and model.companions is not None and model.companions.captions is not None:
        captions = list(model.companions.captions(method.captions, seed=0))
    if not captions and not known:
        raise InputError(
            f"{model.name}: {method.id} learns an autoencoder from captions; give thousands of them as "
            'data={"captions": [...]}, or the folder of a trained one as autoencoder='
        )
    unique = [tuple(dict.fromkeys(filter(None, t))) for t in (targets, retained, captions)]
    return Texts(*unique)


def _given(method: str, data: Any, concepts: Sequence[Concept]) -> dict[str, list[str]]:
    """The user's texts: captions, retained prompts, and target prompts of the concepts."""
    keys = ("captions", "retained", "targets")
    if data is None or isinstance(data, Mapping):
        found = dict(data or {})
    elif isinstance(data, Sequence) and not isinstance(data, str):
        found = {"captions": data}
    else:
        raise InputError(
            f"{method} takes a list of captions or a mapping with {', '.join(keys)} as data, not {type(data).__name__}"
        )
    for key in found:
        if key not in keys:
            raise InputError(f"{method}: data: unknown key {key!r}{nearest(str(key), keys)}")
    names, targets = [concept.name for concept in concepts], found.get("targets", {})
    if not isinstance(targets, Mapping):
        raise InputError(
            f"{method}: data: 'targets' must be a mapping from a concept's name to a list of prompts, not "
            f"{type(targets).__name__}"
        )
    for name in targets:
        if name not in names:
            raise InputError(
                f"{method}: data: target prompts of {name!r}, which is not erased{nearest(name, names)}"
            )
    return {
        **{
            key: texts_of(found.get(key, ()), f"{method}: data: {key!r}") for key in ("captions", "retained")
        },
        "targets": [
            text for name, own in targets.items() for text in texts_of(own, f"{method}: data: targets of {name!r}")
        ],
    }  # fmt: skip
