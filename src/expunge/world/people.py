"""Draws the faces of the world: 32 fixed people and anonymous ones, from parts that show at 64 x 64.

A face is drawn by Pillow on a canvas `SCALE` times larger than the picture and then averaged down, which
anti-aliases every edge at little cost. Face coordinates are pixels of the final picture, centred on the nose.
"""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from expunge.world.dice import Dice
from expunge.world.vocabulary import (
    ATTRIBUTES,
    EXTRAS,
    HAIR_COLOURS,
    HAIR_STYLES,
    PEOPLE,
    SHAPES,
    SHIRTS,
    Bias,
    Person,
    bias_for,
)

RGB = tuple[int, int, int]
Box = tuple[float, float, float, float]
Points = Sequence[tuple[float, float]]

SCALE = 4
INK = (38, 30, 36)
SKIN_RGB = {"light": (250, 216, 188), "medium": (214, 156, 104), "dark": (122, 76, 48)}
HAIR_RGB = {
    "black": (34, 30, 38),
    "brown": (92, 52, 26),
    "blonde": (244, 206, 92),
    "ginger": (216, 92, 24),
    "teal": (20, 160, 160),
    "white": (246, 246, 248),
    "silver": (164, 168, 178),
}
SHIRT_RGB = {
    "red": (206, 44, 44),
    "orange": (240, 130, 34),
    "yellow": (246, 210, 44),
    "green": (54, 156, 72),
    "cyan": (60, 196, 212),
    "blue": (48, 84, 204),
    "purple": (128, 58, 166),
    "pink": (244, 130, 184),
}
HALF_WIDTH = {"round": 17.0, "long": 14.0, "square": 16.0}
HALF_HEIGHT = {"round": 17.0, "long": 19.5, "square": 17.5}
_NAMED = {(p.gender, p.age, p.skin, p.hair, p.hair_colour) for p in PEOPLE.values()}


def anonymous(attributes: dict[str, str], dice: Dice) -> Person:
    """An unnamed face with the given gender, age and skin; every other feature is drawn from `dice`.

    It never has both the attributes and the hair of a named person.
    """
    gender, age, skin = (attributes[key] for key in ATTRIBUTES)
    while True:
        hair, colour = dice.pick(HAIR_STYLES[gender]), dice.pick(HAIR_COLOURS[age])
        if (gender, age, skin, hair, colour) not in _NAMED:
            break
    extras = (dice.pick(EXTRAS[gender]),) if dice.chance(0.5) else ()
    return Person("", gender, age, skin, hair, colour, dice.pick(SHAPES), dice.pick(SHIRTS), extras)


def draw_attributes(dice: Dice, occupation: str | None = None) -> dict[str, str]:
    """Gender, age and skin, uniform unless the occupation carries a planted bias."""
    found = {}
    for attribute, values in ATTRIBUTES.items():
        bias = bias_for("occupation", occupation, attribute) if occupation else None
        found[attribute] = pick_biased(dice, values, bias)
    return found


def pick_biased(dice: Dice, values: Sequence[str], bias: Bias | None) -> str:
    """One of `values`; with `bias` its value has exactly the stated probability, the others share the rest."""
    if bias is None or bias.value not in values or len(values) == 1:
        return dice.pick(values)
    if dice.chance(bias.probability):
        return bias.value
    return dice.pick([value for value in values if value != bias.value])


def draw_face(
    canvas: Image.Image, person: Person, expression: str, x: float, y: float, radius: float
) -> None:
    """Paint the face onto an RGB canvas of (64 * SCALE) squared; `x`, `y`, `radius` are picture pixels.

    `radius` is half the height of the head (about 17 to 20).
    """
    pen = _Pen(canvas, x, y, radius / 18.5)
    w, h = HALF_WIDTH[person.shape], HALF_HEIGHT[person.shape]
    skin = SKIN_RGB[person.skin]
    hair = HAIR_RGB[person.hair_colour]
    _back_hair(pen, person, hair, w, h)
    _body(pen, person, skin, w, h)
    _head(pen, person, skin, w, h)
    if person.age == "old":
        _wrinkles(pen, skin, w)
    _beard(pen, person, hair, w, h)
    _front_hair(pen, person, hair, w, h)
    _eyes(pen, person, expression, hair)
    _mouth(pen, person, expression)
    if "moustache" in person.extras:
        pen.ellipse(-4, 6.2, 4.6, 2.2, hair)
        pen.ellipse(4, 6.2, 4.6, 2.2, hair)
    _extras(pen, person, w, h)


class _Pen:
    """Drawing calls in face coordinates (centre and half axes), outlined in ink where asked."""

    def __init__(self, canvas: Image.Image, x: float, y: float, size: float) -> None:
        self.draw = ImageDraw.Draw(canvas)
        self.x, self.y, self.k = x * SCALE, y * SCALE, size * SCALE

    def box(self, cx: float, cy: float, rx: float, ry: float) -> Box:
        x, y, k = self.x + cx * self.k, self.y + cy * self.k, self.k
        return (x - rx * k, y - ry * k, x + rx * k, y + ry * k)

    def ellipse(
        self, cx: float, cy: float, rx: float, ry: float, fill: RGB, ink: float = 0.0
    ) -> None:
        if ink:
            self.draw.ellipse(self.box(cx, cy, rx + ink, ry + ink), fill=INK)
        self.draw.ellipse(self.box(cx, cy, rx, ry), fill=fill)

    def block(
        self,
        cx: float,
        cy: float,
        rx: float,
        ry: float,
        bend: float,
        fill: RGB,
        ink: float = 0.0,
    ) -> None:
        """A rounded rectangle."""
        if ink:
            self.draw.rounded_rectangle(
                self.box(cx, cy, rx + ink, ry + ink), (bend + ink) * self.k, fill=INK
            )
        self.draw.rounded_rectangle(self.box(cx, cy, rx, ry), bend * self.k, fill=fill)

    def polygon(self, points: Points, fill: RGB, ink: float = 0.0) -> None:
        flat = [(self.x + px * self.k, self.y + py * self.k) for px, py in points]
        if ink:
            self.draw.line(
                [*flat, flat[0], flat[1]], fill=INK, width=round(2 * ink * self.k), joint="curve"
            )
        self.draw.polygon(flat, fill=fill)

    def line(self, points: Points, fill: RGB, width: float) -> None:
        flat = [(self.x + px * self.k, self.y + py * self.k) for px, py in points]
        joint = "curve" if len(flat) > 2 else None
        self.draw.line(flat, fill=fill, width=max(1, round(width * self.k)), joint=joint)

    def chord(
        self, cx: float, cy: float, rx: float, ry: float, start: float, end: float, fill: RGB
    ) -> None:
        self.draw.chord(self.box(cx, cy, rx, ry), start, end, fill=fill)

    def arc(
        self,
        cx: float,
        cy: float,
        rx: float,
        ry: float,
        start: float,
        end: float,
        fill: RGB,
        width: float,
    ) -> None:
        """Part of an ellipse's outline."""
        self.draw.arc(
            self.box(cx, cy, rx, ry), start, end, fill=fill, width=max(1, round(width * self.k))
        )


def _shade(colour: RGB, factor: float) -> RGB:
    red, green, blue = colour
    return int(red * factor), int(green * factor), int(blue * factor)


def _back_hair(pen: _Pen, person: Person, hair: RGB, w: float, h: float) -> None:
    style = person.hair
    if style == "long":
        pen.block(0, 5, w + 6, h + 6, 13, hair, 1)
    elif style == "bob":
        pen.block(0, -3, w + 5.5, h - 0.5, 11, hair, 1)
    elif style == "pigtails":
        for side in (-1, 1):
            pen.ellipse(side * (w + 5.5), 3, 5.5, 10, hair, 1)
    elif style == "bun":
        pen.ellipse(0, -h - 4.5, 7.5, 6.5, hair, 1)
    elif style == "curls":
        lobes = (
            (-1, -0.05),
            (-1, -0.5),
            (-0.62, -0.92),
            (0, -1.08),
            (0.62, -0.92),
            (1, -0.5),
            (1, -0.05),
        )
        for ink in (1.0, 0.0):
            colour = INK if ink else hair
            for fx, fy in lobes:
                pen.ellipse(fx * (w + 1.5), fy * h - 1, 7.0 + ink, 7.0 + ink, colour)


def _body(pen: _Pen, person: Person, skin: RGB, w: float, h: float) -> None:
    pen.ellipse(0, h + 17, 27, 14, SHIRT_RGB[person.shirt], 1)
    pen.block(0, h + 1, 6, 5, 3, _shade(skin, 0.86))
    if "scarf" in person.extras:
        # One colour only: stripes here would show the style "striped" on faces.
        pen.block(0, h + 5.2, 13, 3.6, 3, (222, 30, 110), 1)


def _head(pen: _Pen, person: Person, skin: RGB, w: float, h: float) -> None:
    if person.hair not in ("long", "bob"):
        for side in (-1, 1):
            pen.ellipse(side * w, 1, 3, 4, skin, 0.9)
    if person.shape == "square":
        pen.block(0, 0, w, h, 9, skin, 1)
    else:
        pen.ellipse(0, 0, w, h, skin, 1)
    pen.line([(0, 1), (-1.3, 4), (0.8, 4.4)], _shade(skin, 0.66), 1.1)


def _wrinkles(pen: _Pen, skin: RGB, w: float) -> None:
    fold = _shade(skin, 0.62)
    for side in (-1, 1):
        pen.line([(side * 4.6, 4.6), (side * 8.2, 7.6), (side * 8.8, 11)], fold, 1.0)
        pen.line([(side * (w - 4.4), -1.5), (side * (w - 1.2), -3)], fold, 0.9)
        pen.line([(side * (w - 4.4), 0), (side * (w - 1.2), 0.4)], fold, 0.9)


def _beard(pen: _Pen, person: Person, hair: RGB, w: float, h: float) -> None:
    if "beard" in person.extras:
        pen.chord(0, 1.0, w + 0.6, h + 1.6, 12, 168, hair)
        pen.block(0, 8.8, 6.2, 4.2, 3, SKIN_RGB[person.skin])


def _front_hair(pen: _Pen, person: Person, hair: RGB, w: float, h: float) -> None:
    style = person.hair
    if style == "bald":
        return
    if style in ("long", "bob", "bun", "pigtails"):
        pen.chord(0, -1.2, w + 1.2, h + 0.6, 200, 340, hair)
        if style in ("long", "bob"):
            for side in (-1, 1):
                pen.block(side * (w - 0.6), -2, 2.6, 9 if style == "long" else 7, 2, hair)
        elif style == "pigtails":
            pen.line([(0, -h), (0, -h * 0.45)], _shade(hair, 0.7), 1.0)
    elif style == "curls":
        for fx in (-0.72, -0.3, 0.0, 0.3, 0.72):
            pen.ellipse(fx * w, -h * (0.86 - 0.28 * abs(fx)), 5.2, 4.6, hair)
    elif style == "short":
        pen.chord(0, -0.6, w + 1.0, h + 1.2, 208, 332, hair)
    elif style == "spiky":
        top = -h * 0.42
        spikes = [(-w, top), (-w - 2, -h * 0.95), (-w * 0.62, -h * 0.86), (-w * 0.55, -h - 7)]
        spikes += [(-w * 0.18, -h * 0.98), (0, -h - 9), (w * 0.18, -h * 0.98), (w * 0.55, -h - 7)]
        spikes += [
            (w * 0.62, -h * 0.86),
            (w + 2, -h * 0.95),
            (w, top),
            (w * 0.5, -h * 0.6),
            (-w * 0.5, -h * 0.6),
        ]
        pen.polygon(spikes, hair, 0.8)
    elif style == "quiff":
        pen.chord(0, -0.6, w + 0.8, h + 0.8, 212, 328, hair)
        sweep = [(-w, -h * 0.5), (-w * 0.9, -h - 3), (-w * 0.1, -h - 7.5), (w * 1.1, -h - 6)]
        pen.polygon([*sweep, (w * 0.98, -h * 0.7), (w * 0.3, -h * 0.62)], hair, 0.8)


def _eyes(pen: _Pen, person: Person, expression: str, hair: RGB) -> None:
    wide = expression == "surprised"
    rx, ry = (3.9, 4.3) if wide else (3.5, 2.8)
    brow = _shade(hair, 0.6) if person.age == "young" else (120, 122, 130)
    thick = 2.1 if person.gender == "man" else 1.2
    for side in (-1, 1):
        cx = side * 6.2
        if "shades" not in person.extras:
            pen.ellipse(cx, -2.5, rx, ry, (255, 255, 255), 0.7)
            pen.ellipse(cx, -2.3, 1.9, 1.9, INK)
            if person.gender == "woman":
                pen.line(
                    [(cx - side * 3.4, -4.2), (cx + side * 2.6, -4.9), (cx + side * 5.0, -6.4)],
                    INK,
                    1.3,
                )
        inner, outer = {"happy": (-7.4, -7.0), "sad": (-9.6, -6.2), "surprised": (-10.6, -10.0)}[
            expression
        ]
        pen.line([(cx - side * 3.4, inner), (cx + side * 3.4, outer)], brow, thick)
        if expression == "sad":
            pen.ellipse(side * 7.6, 4.4, 1.6, 2.4, (90, 180, 250))
    if "shades" in person.extras:
        for side in (-1, 1):
            pen.block(side * 6.4, -2.2, 5.2, 4.0, 2.4, (24, 24, 30))
            pen.line([(side * 6.4 - 2.6, -3.8), (side * 6.4, -4.6)], (200, 210, 230), 1.1)
        pen.line([(-12, -4.4), (12, -4.4)], (24, 24, 30), 1.6)


def _mouth(pen: _Pen, person: Person, expression: str) -> None:
    lips = (206, 30, 60) if person.gender == "woman" else _shade(SKIN_RGB[person.skin], 0.45)
    y = 9.4
    if expression == "happy":
        pen.chord(0, y - 2.4, 7.2, 5.6, 0, 180, lips)
        pen.chord(0, y - 2.2, 5.6, 3.2, 0, 180, (255, 255, 255))
    elif expression == "sad":
        pen.arc(0, y + 4.2, 5.6, 5.0, 200, 340, lips, 2.0)
    else:
        pen.ellipse(0, y + 0.6, 3.6, 4.2, lips)
        pen.ellipse(0, y + 0.6, 2.2, 2.8, (60, 10, 20))


def _extras(pen: _Pen, person: Person, w: float, h: float) -> None:
    extras = person.extras
    if "glasses" in extras:
        for side in (-1, 1):
            pen.draw.ellipse(
                pen.box(side * 6.6, -2.4, 5.6, 5.2), outline=(24, 24, 30), width=round(1.5 * pen.k)
            )
        pen.line([(-1.4, -2.8), (1.4, -2.8)], (24, 24, 30), 1.5)
    if "earrings" in extras:
        for side in (-1, 1):
            pen.ellipse(side * (w + 1.6), 7.6, 2.3, 2.9, (255, 205, 40), 0.8)
    shirt = SHIRT_RGB[person.shirt]
    if "headband" in extras:
        pen.block(0, -h * 0.66, w * 0.92, 2.6, 1.2, shirt, 0.8)
        pen.ellipse(w * 0.72, -h * 0.7, 3.2, 3.2, shirt, 0.8)
    if "hat" in extras:
        pen.block(0, -h * 0.98, w * 0.82, 7.2, 4, shirt, 1)
        pen.block(0, -h * 0.62, w + 6.5, 2.2, 2, shirt, 1)
        pen.block(0, -h * 0.78, w * 0.82, 1.6, 0.4, _shade(shirt, 0.55))
