"""Words for scenes: caption templates, synonyms, negations, and prompts with known truth for audits.

A caption names a style whenever it is not plain, so a caption without a style word shows a plain object.
Colour, background and expression may go unsaid and are then free. About one template in four is held out of
training by the hash of its text. Stamps are never spoken of.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, NamedTuple

from expunge.world import vocabulary as v
from expunge.world.dice import Dice
from expunge.world.templates import HAZARD_MIX, RELATION_WORDS, ROUTES, TEMPLATES, WORD_MIX

_AN = re.compile(r"\b(a) (?=[aeio]|u(?!niform))")


@dataclass(frozen=True)
class Prompt:
    """A prompt with its truth: `labels` holds exactly what the text determines about a picture of it."""

    text: str
    concept: str
    route: str
    labels: dict[str, str] = field(default_factory=dict)
    seed: int = 0


class Content(NamedTuple):
    """What a caption speaks of; a `Scene` has the same fields."""

    kind: str
    things: tuple = ()
    background: str = "paper"
    person: str | None = None
    expression: str | None = None
    attributes: dict[str, str] | None = None
    occupation: str | None = None
    hazard_variant: str | None = None
    relation: str | None = None
    negated: tuple[str, ...] = ()


class Look(NamedTuple):
    """An object's looks without its place."""

    object: str
    colour: str
    style: str


@cache
def templates(group: str, part: str) -> tuple[str, ...]:
    """The templates of a group: `part` is "train", "held-out" or "any"; ValueError for another part."""
    if part not in ("train", "held-out", "any"):
        raise ValueError(f"Templates are 'train', 'held-out' or 'any', not {part!r}.")
    wanted = {"train": (False,), "held-out": (True,), "any": (False, True)}[part]
    return tuple(text for text in TEMPLATES[group] if v.held_out_template(text) in wanted)


def word(name: str, dice: Dice, route: str | None = None) -> str:
    """A text for the concept; without a `route` one is drawn as in training captions."""
    entry = v.concept(name)
    if route is None:
        if entry.kind == "unsafe":
            route = dice.weighted(tuple(HAZARD_MIX), tuple(HAZARD_MIX.values()))
        else:
            route = dice.weighted(ROUTES[:3], WORD_MIX[entry.kind])
    return dice.pick(spoken(entry, route) or (entry.name,))


def spoken(entry: v.Entry, route: str) -> tuple[str, ...]:
    """The texts of a concept along a route, possibly none; ValueError for an unknown route."""
    if route not in ROUTES:
        raise ValueError(f"A route is one of {', '.join(ROUTES)}, not {route!r}.")
    return {
        "name": (entry.name,),
        "phrase": entry.phrases,
        "unlisted": entry.unlisted,
        "euphemism": entry.euphemisms,
        "metaphor": entry.metaphors,
    }[route]


@cache
def _slots(template: str) -> frozenset[str]:
    return frozenset(re.findall(r"{(\w+)}", template))


def _finish(text: str) -> str:
    return _AN.sub("an ", text.lower())


def caption_for(
    scene: Any, dice: Dice, part: str = "train", routes: Mapping[str, str] | None = None
) -> str:
    """A caption of a scene (or `Content`), lower case, at most about 14 words.

    `part` selects the templates, `routes` fixes how a concept is called (by name), else words are drawn.
    """
    return _describe(scene, dice, part, routes or {}, frozenset())[0]


def _describe(
    scene: Any, dice: Dice, part: str, routes: Mapping[str, str], needed: frozenset[str]
) -> tuple[str, frozenset[str]]:
    """Caption and the slots it fills; `needed` slots must occur where any template of the group has them."""
    group = _group(scene)
    hazard = None
    if scene.kind == "hazard":
        route = routes.get(v.HAZARD) or dice.weighted(tuple(HAZARD_MIX), tuple(HAZARD_MIX.values()))
        hazard = word(v.HAZARD, dice, route)
        group = "implicit" if route in ("euphemism", "metaphor") else "hazard"
    options = templates(group, part)
    if group in ("object", "negation", "negated style", "count"):
        # A style that is not plain must be said; a plain one may be.
        styled = scene.things[0].style != "plain" or "style" in needed or dice.chance(0.3)
        if not styled and not any(
            needed <= _slots(t) and "style" not in _slots(t) for t in options
        ):
            styled = True
        options = tuple(t for t in options if ("style" in _slots(t)) == styled)
    options = tuple(t for t in options if needed <= _slots(t)) or options
    template = dice.pick(options)
    slots = _slots(template)
    return _finish(template.format(**_fill(scene, slots, dice, routes, hazard))), slots


def _group(scene: Any) -> str:
    if scene.kind == "face":
        return "occupation" if scene.occupation else "face"
    if scene.kind == "object" and scene.negated:
        return "negated style" if scene.negated[0] in v.STYLES else "negation"
    return scene.kind


def _fill(
    scene: Any, slots: frozenset[str], dice: Dice, routes: Mapping[str, str], hazard: str | None
) -> dict[str, str]:
    def say(name: str) -> str:
        return word(name, dice, routes.get(name))

    filled: dict[str, str] = {}
    if scene.things and scene.kind in ("object", "count"):
        first = scene.things[0]
        for slot in ("colour", "style", "object"):
            if slot in slots:
                filled[slot] = say(getattr(first, slot))
    if "objects" in slots:
        filled["objects"] = v.plural(say(scene.things[0].object))
        filled["number"] = v.NUMBERS[len(scene.things)]
    for slot, thing in zip("abc", scene.things, strict=False):
        if slot in slots:
            style = "" if thing.style == "plain" else say(thing.style) + " "
            filled[slot] = f"a {say(thing.colour)} {style}{say(thing.object)}"
    if "relation" in slots:
        filled["relation"] = dice.pick(RELATION_WORDS[scene.relation])
    if "other" in slots:
        name = scene.negated[0]
        if name in v.STYLES:
            filled["other"] = v.concept(name).nouns[-1]
        else:
            filled["other"] = word(name, dice, "phrase" if name == v.HAZARD else None)
    for slot in ("background", "person", "expression"):
        if slot in slots:
            filled[slot] = say(getattr(scene, slot))
    for slot in v.ATTRIBUTES:
        if slot in slots:
            filled[slot] = scene.attributes[slot]
    if "occupation" in slots:
        filled["occupation"] = scene.occupation
    if "variant" in slots:
        filled["variant"] = scene.hazard_variant.split("-")[0]
    if hazard is not None:
        # Listed and unlisted names take an article from the template; euphemisms bring their own.
        filled["hazard"] = hazard
    return filled


def prompts_for(
    concept_name: str,
    n: int,
    seed: int = 0,
    split: str = "test",
    templates: str = "held-out",
    route: str = "name",
    combinations: str = "any",
) -> list[Prompt]:
    """`n` evaluation prompts that call for the concept, with what they determine about the picture.

    `split` ("development" or "test") decides the range the noise seeds come from; `templates` and
    `combinations` are "train", "held-out" or "any"; `route` says how the concept is called, all other words
    are plain names. A mark is never captioned: its prompts are ordinary ones, unless the route is "phrase"
    or "unlisted", which asks for it by a word that no caption ever held. ValueError for unknown names and for a
    route that the concept does not have (only the hazard has euphemisms and metaphors).
    """
    entry = v.concept(concept_name)
    ranges = {"development": v.DEVELOPMENT_SEEDS, "test": v.TEST_SEEDS}
    if split not in ranges:
        raise ValueError(f"A split is 'development' or 'test', not {split!r}.")
    if not spoken(entry, route):
        raise ValueError(f"The world has no {route} for {concept_name!r}.")
    chosen = ranges[split]
    dice = Dice(chosen[0] + (seed * 1_000_003) % len(chosen), 7)
    found: list[Prompt] = []
    seen: set[str] = set()
    for index in range(n):
        for _ in range(
            12
        ):  # few held-out templates: prefer new texts, accept a repeat when they run out
            prompt = _prompt(
                entry,
                dice,
                templates,
                route,
                combinations,
                chosen[(seed * n + index) % len(chosen)],
            )
            if prompt.text not in seen:
                break
        seen.add(prompt.text)
        found.append(prompt)
    return found


def _prompt(
    entry: v.Entry, dice: Dice, part: str, route: str, combinations: str, seed: int
) -> Prompt:
    scene = _content(entry, dice, combinations)
    routes = dict.fromkeys(v.concept_names(), "name")
    routes[entry.name] = route
    slot = {"identity": "person", "unsafe": "hazard", "mark": "object"}.get(entry.kind, entry.kind)
    text, slots = _describe(scene, dice, part, routes, frozenset((slot,)))
    labels: dict[str, str] = {}
    for key in ("object", "colour", "style"):
        if scene.things and (key in slots or key == "style"):
            labels[key] = getattr(scene.things[0], key)
    for key in ("background", "person", "expression"):
        if key in slots:
            labels[key] = getattr(scene, key)
    if scene.hazard_variant is not None:
        labels["hazard"] = scene.hazard_variant if "variant" in slots else "any"
    if entry.kind == "mark" and route != "name":
        text = _finish(f"{text} with a {dice.pick(spoken(entry, route))}")
        labels["mark"] = entry.name
    return Prompt(text, entry.name, route, labels, seed)


def _content(entry: v.Entry, dice: Dice, combinations: str) -> Content:
    background = entry.name if entry.kind == "background" else dice.pick(v.BACKGROUNDS)
    if entry.kind in ("identity", "expression"):
        person = entry.name if entry.kind == "identity" else dice.pick(v.PEOPLE_NAMES)
        expression = entry.name if entry.kind == "expression" else dice.pick(v.EXPRESSIONS)
        return Content("person", (), background, person, expression)
    if entry.kind == "unsafe":
        return Content("hazard", (), background, hazard_variant=dice.pick(v.HAZARD_VARIANTS))
    fixed = {entry.kind: entry.name}
    options = _looks(combinations, fixed.get("object"), fixed.get("colour"), fixed.get("style"))
    if not options:
        raise ValueError(f"No {combinations} combination shows {entry.name!r}.")
    return Content("object", (dice.pick(options),), background)


@cache
def _looks(part: str, object: str | None, colour: str | None, style: str | None) -> Sequence[Look]:
    """All object x colour x style combinations of a part that have the given values."""
    if part not in ("train", "held-out", "any"):
        raise ValueError(f"Combinations are 'train', 'held-out' or 'any', not {part!r}.")
    return [
        Look(o, c, s)
        for o in v.OBJECTS
        for c in v.COLOURS
        for s in v.STYLES
        if object in (None, o) and colour in (None, c) and style in (None, s)
        if part == "any" or v.held_out_combination(o, c, s) == (part == "held-out")
    ]
