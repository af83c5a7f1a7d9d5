"""What is in a picture: a `Scene` and its parts, sampled from an integer seed under a `Setting`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from expunge.world import captions, people, vocabulary
from expunge.world.dice import Dice
from expunge.world.people import pick_biased
from expunge.world.render import SIZE, STAMP_SIZE
from expunge.world.settings import Setting
from expunge.world.vocabulary import Entry, bias_for

# How far an object may turn, in degrees either way, and still be read at a glance.
TURN = {
    "circle": 0, "square": 12, "triangle": 10, "star": 15, "heart": 12, "cross": 10,
    "ring": 0, "moon": 18, "tree": 5, "house": 5, "fish": 12, "flower": 180,
}  # fmt: skip


@dataclass(frozen=True)
class Thing:
    """One object with its place: centre and radius in pixels (x right, y down), angle in degrees."""

    object: str  # an object, or "face" or "hazard"
    colour: str
    style: str
    x: float
    y: float
    radius: float
    angle: float


@dataclass(frozen=True)
class Stamp:
    """An uncaptioned mark with its top left corner at (x, y), in pixels; sizes are in `STAMP_SIZE`."""

    name: str
    x: int
    y: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        """(x0, y0, x1, y1) in pixels."""
        width, height = STAMP_SIZE[self.name]
        return self.x, self.y, self.x + width, self.y + height


@dataclass(frozen=True)
class Scene:
    """All there is to know about one picture; `seed` also fixes its small variations (shades, texture phase)."""

    kind: str
    things: tuple[Thing, ...] = ()
    background: str = "paper"
    person: str | None = None
    expression: str | None = None
    attributes: dict[str, str] | None = None  # gender, age, skin of a face
    occupation: str | None = None
    hazard_variant: str | None = None
    stamps: tuple[Stamp, ...] = ()
    relation: str | None = None  # of the first thing to the second
    caption: str = ""
    negated: tuple[str, ...] = ()  # concepts the caption says are not there
    seed: int = 0


def sample_scene(seed: int, setting: Setting) -> Scene:
    """The scene of a seed under a setting, with its caption; the same seed always gives the same scene."""
    dice = Dice(seed, 1)
    forced = _forced(dice, setting)
    kind = _kind(dice, setting, forced)
    draw = {"person": _person, "face": _person, "hazard": _hazard}.get(kind, _objects)
    scene = draw(dice, setting, kind, forced, seed)
    scene = replace(scene, stamps=_stamps(dice, setting, scene))
    return replace(scene, caption=captions.caption_for(scene, Dice(seed, 2), setting.split))


def _forced(dice: Dice, setting: Setting) -> Entry | None:
    left = dice.roll()
    for name, share in setting.boost.items():
        left -= share
        if left < 0:
            return vocabulary.concept(name)
    return None


def _kind(dice: Dice, setting: Setting, forced: Entry | None) -> str:
    kinds, shares = setting._kinds
    if forced is not None:
        possible = {
            "identity": ("person",),
            "expression": ("person", "face"),
            "unsafe": ("hazard",),
            "background": kinds,
        }.get(forced.kind, ("object", "pair", "trio", "count"))
        shares = tuple(
            share if kind in possible else 0.0 for kind, share in zip(kinds, shares, strict=True)
        )
        if not any(shares):
            return possible[0]
    return dice.weighted(kinds, shares)


def _chosen(dice: Dice, setting: Setting, kind: str, forced: Entry | None) -> str:
    return (
        forced.name
        if forced is not None and forced.kind == kind
        else dice.pick(setting.options(kind))
    )


def _look(dice: Dice, setting: Setting, forced: Entry | None, small: bool) -> tuple[str, str, str]:
    """Object, colour and style; biases act on the colour, so that holding out styles cannot bend them."""
    for _ in range(200):
        name = _chosen(dice, setting, "object", forced)
        bias = bias_for("object", name, "colour") if setting.biases else None
        colour = pick_biased(dice, setting.options("colour"), bias)
        if forced is not None and forced.kind == "colour":
            colour = forced.name
        styles = setting._looks[name, colour]
        if forced is not None and forced.kind == "style":
            styles = tuple(style for style in styles if style == forced.name)
        elif small and "plain" in styles and dice.chance(0.4):
            styles = ("plain",)
        weights = [setting.styles.get(style, 0.0) for style in styles]
        if styles:
            return (
                name,
                colour,
                dice.weighted(styles, weights) if any(weights) else dice.pick(styles),
            )
    raise ValueError(f"Setting {setting.name!r} leaves no combination to draw.")


def _objects(dice: Dice, setting: Setting, kind: str, forced: Entry | None, seed: int) -> Scene:
    if kind == "object":
        name, colour, style = _look(dice, setting, forced, False)
        radius = dice.between(18, 23)
        thing = _placed(dice, (name, colour, style), (31.5, 31.5), radius, (6.0, 6.0))
        background = _background(dice, setting, forced, name)
        negated = _negated(dice, setting, name, style) if dice.chance(setting.negations) else ()
        return Scene(kind, (thing,), background, negated=negated, seed=seed)
    relation = None
    if kind == "count":
        spots = _SPOTS[2 + int(dice.roll() * 3)]
        looks = [_look(dice, setting, forced, True)] * len(spots)
    elif kind == "trio":
        spots = _SPOTS[3]
        looks = _distinct(dice, setting, forced, 3)
    else:
        relation = dice.pick(vocabulary.RELATIONS)
        spots = _PAIR_SPOTS[relation]
        looks = _distinct(dice, setting, forced, 2)
    two = len(spots) == 2
    upright = relation in ("above", "below")
    # Two things may wander across the line that joins them, hardly along it, so that they stay apart.
    wander = ((5.0, 1.0) if upright else (1.0, 5.0)) if two else (1.5, 1.5)
    radius = dice.between(11.5, 13.5) if two else dice.between(10.5, 12.0)
    things = tuple(
        _placed(dice, look, spot, radius, wander) for look, spot in zip(looks, spots, strict=True)
    )
    return Scene(
        kind, things, _background(dice, setting, forced, None), relation=relation, seed=seed
    )


_PAIR_SPOTS = {
    "left of": ((16.5, 31.5), (46.5, 31.5)),
    "right of": ((46.5, 31.5), (16.5, 31.5)),
    "above": ((31.5, 16.5), (31.5, 46.5)),
    "below": ((31.5, 46.5), (31.5, 16.5)),
}
_SPOTS = {
    2: ((16.5, 31.5), (46.5, 31.5)),
    3: ((31.5, 16.0), (16.5, 46.0), (46.5, 46.0)),
    4: ((16.5, 16.5), (46.5, 16.5), (16.5, 46.5), (46.5, 46.5)),
}  # fmt: skip


def _distinct(
    dice: Dice, setting: Setting, forced: Entry | None, count: int
) -> list[tuple[str, str, str]]:
    """Looks of things that a caption can tell apart: different objects, or colours where one object is left."""
    looks = [_look(dice, setting, forced, True)]
    key = 0 if len(setting.options("object")) >= count else 1
    while len(looks) < count:
        for _ in range(50):
            look = _look(dice, setting, None, True)
            if look[key] not in {other[key] for other in looks}:
                break
        looks.append(look)
    if dice.chance(0.5):  # the forced one is not always first
        looks.reverse()
    return looks


def _placed(
    dice: Dice,
    look: tuple[str, str, str],
    spot: tuple[float, float],
    radius: float,
    wander: tuple[float, float],
) -> Thing:
    x, y = (centre + dice.between(-far, far) for centre, far in zip(spot, wander, strict=True))
    margin = 1.1 * radius + 1.5
    x, y = min(max(x, margin), SIZE - 1 - margin), min(max(y, margin), SIZE - 1 - margin)
    turn = TURN[look[0]]
    return Thing(
        *look, round(x, 2), round(y, 2), round(radius, 2), round(dice.between(-turn, turn), 1)
    )


def _background(dice: Dice, setting: Setting, forced: Entry | None, cue: str | None) -> str:
    if forced is not None and forced.kind == "background":
        return forced.name
    bias = bias_for("object", cue, "background") if setting.biases and cue else None
    return pick_biased(dice, setting.options("background"), bias)


def _negated(dice: Dice, setting: Setting, name: str, style: str) -> tuple[str, ...]:
    if dice.chance(0.4):
        options = tuple(s for s in setting.options("style") if s not in ("plain", style))
    else:
        options = tuple(o for o in setting.options("object") if o != name)
        if vocabulary.HAZARD not in setting.exclude and dice.chance(0.15):
            options = (vocabulary.HAZARD,)
    return (dice.pick(options),) if options else ()


def _person(dice: Dice, setting: Setting, kind: str, forced: Entry | None, seed: int) -> Scene:
    background = _background(dice, setting, forced, None)
    expression = _chosen(dice, setting, "expression", forced)
    radius = dice.between(17.6, 19.2)
    face = Thing(
        "face",
        "",
        "",
        round(31.5 + dice.between(-3, 3), 2),
        round(32.5 + dice.between(-2, 2), 2),
        radius,
        0.0,
    )
    if kind == "person":
        name = _chosen(dice, setting, "identity", forced)
        known = vocabulary.PEOPLE[name]
        attributes = {key: getattr(known, key) for key in vocabulary.ATTRIBUTES}
        return Scene(kind, (face,), background, name, expression, attributes, seed=seed)
    occupation = dice.pick(vocabulary.OCCUPATIONS) if dice.chance(0.5) else None
    attributes = people.draw_attributes(dice, occupation if setting.biases else None)
    return Scene(kind, (face,), background, None, expression, attributes, occupation, seed=seed)


def _hazard(dice: Dice, setting: Setting, kind: str, forced: Entry | None, seed: int) -> Scene:
    background = _background(dice, setting, forced, None)
    x, y = (round(31.5 + dice.between(-5, 5), 2) for _ in range(2))
    plate = Thing(
        "hazard", "", "", x, y, round(dice.between(19, 23), 2), round(dice.between(-8, 8), 1)
    )
    variant = dice.pick(vocabulary.HAZARD_VARIANTS)
    return Scene(kind, (plate,), background, hazard_variant=variant, seed=seed)


def _stamps(dice: Dice, setting: Setting, scene: Scene) -> tuple[Stamp, ...]:
    found: list[Stamp] = []
    for name, rate in setting.stamps.items():
        if name in setting.exclude or not dice.chance(rate):
            continue
        width, height = STAMP_SIZE[name]
        for _ in range(6):  # anywhere, but rather not on the middle of a thing or on another stamp
            stamp = Stamp(
                name, int(dice.roll() * (SIZE - width + 1)), int(dice.roll() * (SIZE - height + 1))
            )
            middle = np.hypot(
                [stamp.x + width / 2 - t.x for t in scene.things],
                [stamp.y + height / 2 - t.y for t in scene.things],
            )
            apart = all(_apart(stamp.box, other.box) for other in found)
            if apart and (middle > [0.65 * t.radius for t in scene.things]).all():
                break
        found.append(stamp)
    return tuple(found)


def _apart(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
