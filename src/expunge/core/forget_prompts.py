"""What a data-free eraser asks for: prompts for a concept, what they shall draw instead, and prompts of the rest.

No picture is read.  A prompt for the concept becomes its override by exchanging the name; an unsafe word in front of
or behind a subject becomes the subject; a class becomes another class.  The phrasings are those of Score Forgetting
Distillation (arXiv 2409.11219).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..concept import Concept
from ..errors import InputError, SettingError, nearest
from .mentions import exchanged, without

if TYPE_CHECKING:
    from ..models.diffusion import DiffusionModel

__all__ = ["KEYS", "SUBJECTS", "ForgetPrompts", "forget_prompts"]

Pairs = list[tuple[str, tuple[str, ...]]]
"""Prompts for a concept, each with what may be drawn instead."""

KEYS = ("forget", "override", "captions", "subjects")
"""What a user may give: prompts for the concept, one override for each, prompts of the rest, subjects."""

TEMPLATES = (
    "{}", "a photo of {}", "a picture of {}", "an image of {}", "a good photo of {}", "a close photo of {}",
)  # fmt: skip

SUBJECTS = (
    "a man", "a woman", "a person", "a young man", "a young woman", "an old man", "an old woman", "two people",
    "a group of people", "a couple", "an athlete", "a dancer",
)  # fmt: skip
"""Generic adult subjects for unsafe words; ours."""


@dataclasses.dataclass(frozen=True)
class ForgetPrompts:
    """Prompts by pairs and the rest.

    Attributes:
        forget: Prompts for the concepts.
        overrides: For each, what may be drawn instead; one of several is drawn at random at each step.
        remain: Prompts of what is to stay.
        negative: Joined unsafe words, or "".
        digest: Names what a user gave, or ``None``.
    """

    forget: tuple[str, ...]
    overrides: tuple[tuple[str, ...], ...]
    remain: tuple[str, ...]
    negative: str = ""
    digest: str | None = None

    def drawn(
        self, count: int, generator: torch.Generator
    ) -> tuple[list[str], list[str], list[str]]:
        """``count`` prompts for the concepts, an override of each, and ``count`` of the rest."""
        picks = torch.randint(len(self.forget), (count,), generator=generator).tolist()
        forget = [self.forget[i] for i in picks]
        instead = []
        for own in (self.overrides[i] for i in picks):
            instead.append(own[int(torch.randint(len(own), (1,), generator=generator))])
        rest = torch.randint(len(self.remain), (count,), generator=generator).tolist()
        return forget, instead, [self.remain[i] for i in rest]

    def anything(self, count: int, generator: torch.Generator) -> list[str]:
        """``count`` prompts of concepts and rest alike."""
        both = [*dict.fromkeys([*self.forget, *self.remain])]
        return [both[i] for i in torch.randint(len(both), (count,), generator=generator).tolist()]


def forget_prompts(
    model: DiffusionModel,
    concepts: Sequence[Concept],
    data: Any,
    keep: Sequence[str],
    *,
    override: str | None,
    unsafe: bool,
    phrases: bool,
    count: int,
    seed: int,
) -> ForgetPrompts:
    """Prompts for a model of texts or of classes.

    Prompts of the concept are the user's, else the development prompts of the model's world, else templates.  The
    rest are the user's captions, else those of the world, else templates around ``keep``; for a model of classes
    all other classes.  Those that name a concept are left out.

    Args:
        model: Whose world and classes are asked.
        concepts: What is forgotten.
        data: A mapping with some of ``KEYS``, or ``None``.
        keep: Names to keep.
        override: What the concepts are to look like; each one's own anchor when ``None``, for a class without one
            any other class.  The concept itself forgets nothing.
        unsafe: Names are words beside a subject.
        phrases: Listed phrases are forgotten as well as the name.
        count: Prompts from a world, of the concept and of the rest.
        seed: Seed of such prompts.

    Raises:
        InputError: The data is not as described or would be ignored, a prompt does not name its concept, or nothing is
            left of the rest.
        SettingError: A concept has nothing to take its place, or unsafe words were given something else.
    """
    given = _given(data)
    classes = tuple(model.layout.classes)
    _all_read(given, keep, model.name, classes, unsafe, override)
    _no_forgotten_override(concepts, override)
    forget: list[str] = []
    overrides: list[tuple[str, ...]] = []
    # The user's prompts are for all concepts together.
    own = given.get("forget") if not (classes or unsafe) else None
    pairs = [_of_users(concepts, own, override, given.get("override"), phrases)] if own else []
    for concept in () if own else concepts:
        names = concept.names if phrases else (concept.name,)
        if classes:
            pairs.append(_of_class(model.name, concept, override, classes, concepts))
        elif unsafe:
            pairs.append(_of_words(names, given.get("subjects", SUBJECTS)))
        else:
            listed = _listed(model, concept, names, count, seed)
            pairs.append(_of_names([concept], listed, override, phrases))
    for text, instead in (pair for made in pairs for pair in made):
        forget.append(text)
        overrides.append(instead)
    gone = [name for concept in concepts for name in concept.names]
    rest = _rest(model, concepts, given.get("captions"), keep, classes, count, seed)
    if not rest:
        raise InputError(
            "sfd needs prompts of what is to stay, and there are none that say nothing of "
            f"{', '.join(repr(c.name) for c in concepts)}; give data={{'captions': [...]}}, or names to keep"
        )
    words = ", ".join(gone) if unsafe and not classes else ""
    digest = (
        hashlib.sha256(json.dumps(given, sort_keys=True).encode()).hexdigest() if given else None
    )
    return ForgetPrompts(tuple(forget), tuple(overrides), tuple(rest), words, digest)


def _given(data: Any) -> dict[str, list[str]]:
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise InputError(
            f"data is {type(data).__name__}; allowed is a mapping with some of {', '.join(KEYS)}"
        )
    found = {}
    for key, texts in data.items():
        if key not in KEYS:
            raise InputError(f"data: unknown key {key!r}{nearest(str(key), KEYS)}")
        listed = list(texts) if isinstance(texts, Iterable) else [texts]
        if isinstance(texts, str) or not all(isinstance(text, str) for text in listed):
            raise InputError(f"data: {key!r} must be a list of texts; no pictures are read")
        found[str(key)] = listed
    pairs = [found.get(key) for key in ("override", "forget")]
    if pairs[0] is not None and len(pairs[0]) != len(pairs[1] or ()):
        raise InputError(
            f"data: {len(pairs[0])} overrides for {len(pairs[1] or ())} prompts to forget; one for each is needed"
        )
    for key in ("forget", "subjects"):
        if key in found and not found[key]:
            raise InputError(f"data: {key!r} is an empty list; leave it out, or name at least one")
    return found


def _all_read(
    given: Mapping[str, Any], keep: Sequence[str], model: str, classes: Sequence[str], unsafe: bool,
    override: str | None,
) -> None:  # fmt: skip
    """Refuse what would be ignored."""
    for name in keep if classes else ():
        if name.strip().lower() not in (known.lower() for known in classes):
            raise InputError(
                f"{model} draws classes; {name!r} to keep is none{nearest(name, classes)}"
            )
    unread: tuple[str, ...] = ("subjects",)
    reason = "subjects stand beside unsafe words only"
    if classes:
        unread, reason = ("forget", "override", "subjects"), f"{model} draws classes"
    elif unsafe:
        unread, reason = ("forget", "override"), "unsafe words are put beside subjects"
    for key in unread:
        if key in given:
            raise InputError(f"data: {key!r} would be ignored, because {reason}; leave it out")
    if "override" in given and override is not None:
        raise SettingError(
            f"override={override!r} would be ignored, because data has an 'override' for each prompt; leave one out"
        )
    if unsafe and classes:
        raise SettingError(f"pairing='unsafe' would be ignored, because {model} draws classes")
    if unsafe and override is not None:
        raise SettingError(
            f"override={override!r} would be ignored, because unsafe words are left out and nothing takes their place; "
            "leave it out, or do without pairing='unsafe'"
        )


def _instead(concept: Concept, override: str | None) -> str | None:
    return concept.anchor if override is None else override


def _no_forgotten_override(concepts: Sequence[Concept], override: str | None) -> None:
    """Refuse to draw one concept to another that is forgotten too; to itself it is plain distillation."""
    for concept in concepts:
        instead = (_instead(concept, override) or "").strip().casefold()
        for other in concepts:
            if other is not concept and instead in (name.casefold() for name in other.names):
                raise SettingError(
                    f"{concept.name!r} is to look like {other.name!r}, which is to be forgotten too; choose another "
                    "override"
                )


def _of_class(
    model: str,
    concept: Concept,
    override: str | None,
    classes: Sequence[str],
    concepts: Sequence[Concept],
) -> Pairs:
    known = {name.lower(): name for name in classes}
    own, instead = concept.name.lower(), _instead(concept, override)
    for name in (own, *(() if instead is None else (instead.strip().lower(),))):
        if name not in known:
            raise SettingError(
                f"{model} draws classes; {name!r} is none of them{nearest(name, known)}"
            )
    if instead is not None:
        return [(known[own], (known[instead.strip().lower()],))]
    gone = {other.name.lower() for other in concepts}
    others = tuple(name for name in classes if name.lower() not in gone)
    if not others:
        raise SettingError(
            f"{model}: all its classes are to be forgotten, so none can take the place of {own!r}"
        )
    return [(known[own], others)]


def _of_words(names: Sequence[str], subjects: Sequence[str]) -> Pairs:
    pairs = [(name, subject) for subject in subjects for name in names]
    before: Pairs = [(f"{name} {subject}", (subject,)) for name, subject in pairs]
    return before + [(f"{subject}, {name}", (subject,)) for name, subject in pairs]


def _of_users(
    concepts: Sequence[Concept],
    listed: Sequence[str],
    override: str | None,
    given: Sequence[str] | None,
    phrases: bool,
) -> Pairs:
    """The user's prompts, each for whichever concepts it names."""
    if given is not None:
        return [(text, (own,)) for text, own in zip(listed, given, strict=True)]
    made = _of_names(concepts, listed, override, phrases)
    for concept in concepts:
        names = concept.names if phrases else (concept.name,)
        if len(without(listed, names)) == len(listed):
            raise InputError(
                f"data: none of the {len(listed)} prompts to forget names {concept.name!r}; each concept needs one"
            )
    return made


def _of_names(
    concepts: Sequence[Concept], listed: Sequence[str], override: str | None, phrases: bool
) -> Pairs:
    """Prompts with every name of the concepts exchanged for what takes its place."""
    made: Pairs = []
    for text in listed:
        changed, named = text, False
        for concept in concepts:
            instead = _instead(concept, override)
            if instead is None:
                raise SettingError(
                    f"{concept.name!r} has nothing to take its place; name an anchor in the concept, or override=..."
                )
            names = concept.names if phrases else (concept.name,)
            changed, mention = exchanged(changed, names, instead)
            named = named or mention is not None
        if not named:
            said = " or ".join(repr(concept.name) for concept in concepts)
            raise InputError(
                f"data: the prompt {text!r} does not name {said}; allowed are prompts that do, or "
                "an 'override' for each"
            )
        made.append((text, (changed,)))
    return made


def _listed(
    model: DiffusionModel, concept: Concept, names: Sequence[str], count: int, seed: int
) -> list[str]:
    companions = model.companions
    if companions is not None and companions.prompts is not None:
        if companions.concept(concept.name) is not None:
            made = companions.prompts(concept.name, count, seed=seed, split="development")
            own = [p.text for p in made if exchanged(p.text, names, "")[1] is not None]
            if own:
                return list(dict.fromkeys(own))
    return [template.format(name) for name in names for template in TEMPLATES]


def _rest(
    model: DiffusionModel, concepts: Sequence[Concept], captions: Sequence[str] | None, keep: Sequence[str],
    classes: Sequence[str], count: int, seed: int,
) -> list[str]:  # fmt: skip
    companions = model.companions
    gone = [name for concept in concepts for name in concept.names]
    if captions is not None:
        listed = list(captions)
    elif classes:
        listed = list(classes)
    elif companions is not None and companions.captions is not None:
        # A world is asked by the names of its concepts; it knows none by a phrase.
        known = [c.name for c in concepts if companions.concept(c.name) is not None]
        listed = list(companions.captions(count, seed, tuple(known)))
    else:
        listed = []
    if not classes:
        listed += [template.format(name) for name in keep for template in TEMPLATES]
    if classes:  # a class is its whole name: "tiger shark" is no "shark"
        forgotten = {name.lower() for name in gone}
        return [n for n in dict.fromkeys(listed) if n.strip().lower() not in forgotten]
    return without(list(dict.fromkeys(listed)), gone)
