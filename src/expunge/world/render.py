"""Draws pictures of the world: objects with textures, stamps and backgrounds, in numpy and Pillow.

Shapes are painted by Pillow at `SCALE` times the size and averaged down. Objects are painted as a coverage map
whose three channels are fill, outline and accent, so that textures are mixed in afterwards at picture size.
All positions are picture pixels, x to the right, y down; colours are 0 to 255.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Protocol

import numpy as np
from PIL import Image, ImageDraw

from expunge.world.dice import Dice
from expunge.world.people import SCALE

SIZE = 64
COLOUR_RGB = {
    "red": (214, 36, 40),
    "orange": (247, 128, 20),
    "yellow": (250, 214, 28),
    "green": (36, 144, 60),
    "cyan": (34, 200, 218),
    "blue": (38, 70, 208),
    "purple": (124, 46, 164),
    "pink": (250, 128, 186),
    "brown": (122, 72, 36),
    "gray": (128, 130, 134),
}
INK = (34, 28, 36)
_GRID_Y, _GRID_X = (axis.astype(np.float32) for axis in np.mgrid[0:SIZE, 0:SIZE])
_RAMP = np.linspace(0.0, 1.0, SIZE, dtype=np.float32)


class Painted(Protocol):
    """What `paint_object` needs to know of a thing; `scenes.Thing` is one."""

    @property
    def object(self) -> str: ...
    @property
    def colour(self) -> str: ...
    @property
    def style(self) -> str: ...
    @property
    def x(self) -> float: ...
    @property
    def y(self) -> float: ...
    @property
    def radius(self) -> float: ...
    @property
    def angle(self) -> float: ...


# ---------------------------------------------------------------- backgrounds


def background(name: str, dice: Dice) -> np.ndarray:
    """A clean background, float32 (64, 64, 3); horizon and shade vary a little."""
    shift = dice.between(-6, 6)
    if name == "paper":
        return np.full((SIZE, SIZE, 3), (246, 241, 230), np.float32) + shift * 0.7
    if name == "night":
        rows = (
            np.array((16, 18, 52), np.float32)
            + _RAMP[:, None] * np.array((20, 22, 40), np.float32)
            + shift
        )
        return np.repeat(rows[:, None], SIZE, axis=1)
    horizon = dice.between(34, 46)
    if name == "meadow":
        rows = _bands(((208, 234, 250), (150, 206, 106)), (horizon,))
    else:
        rows = _bands(((253, 232, 214), (96, 184, 200), (238, 206, 142)), (horizon - 9, horizon))
    return np.repeat((rows + shift * 0.7)[:, None], SIZE, axis=1)


def _bands(colours: Sequence[tuple[int, ...]], edges: Sequence[float]) -> np.ndarray:
    rows = np.tile(np.array(colours[0], np.float32), (SIZE, 1))
    for colour, edge in zip(colours[1:], edges, strict=True):
        below = np.clip(np.arange(SIZE, dtype=np.float32) - edge + 0.5, 0, 1)[:, None]
        rows = rows * (1 - below) + np.array(colour, np.float32) * below
    return rows


# ---------------------------------------------------------------- objects


def arc(
    count: int,
    radius: float,
    start: float = -90.0,
    sweep: float = 360.0,
    centre: tuple[float, float] = (0.0, 0.0),
) -> np.ndarray:
    """`count` points of a circle's arc, (count, 2); angles in degrees, clockwise from the right."""
    angles = np.radians(
        start + sweep * np.arange(count) / (count if abs(sweep) == 360 else count - 1)
    )
    return np.stack([centre[0] + radius * np.cos(angles), centre[1] + radius * np.sin(angles)], 1)


def _star() -> np.ndarray:
    points = arc(10, 1.0) * np.where(np.arange(10) % 2 == 0, 1.14, 0.5)[:, None]
    return points + (0, 0.06)


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * math.pi, 48, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x / 16.5, (y - 2.5) / 16.0], 1)


def _moon() -> np.ndarray:
    # Unit circle minus a circle of radius 0.8 at (0.45, 0); the arcs meet at these angles of either circle.
    outer = arc(40, 1.0, -51.3, -257.4)
    inner = arc(30, 0.8, 77.4, 205.2, (0.45, 0.0))
    return np.concatenate([outer, inner]) + (0.16, 0)


def _shapes() -> dict[str, dict]:
    """Unit outlines by object: `fill` parts (with outline), `hole` cut out, `accent` parts drawn on top."""
    a = 0.36
    cross = [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a)]
    cross += [(-px, -py) for px, py in cross]
    crown = [[(-0.62, -0.22), (0, -1.15), (0.62, -0.22)], [(-0.95, 0.58), (0, -0.62), (0.95, 0.58)]]
    walls = [(-0.76, -0.2), (0.76, -0.2), (0.76, 1.0), (-0.76, 1.0)]
    body = arc(40, 1.0) * (0.80, 0.60) + (-0.22, 0)
    tail = [(0.35, 0.0), (1.08, -0.66), (0.92, 0.0), (1.08, 0.66)]
    petals = [
        arc(28, 0.43) + 0.62 * np.array((math.cos(k), math.sin(k)))
        for k in np.radians(np.arange(0, 360, 60))
    ]
    return {
        "circle": {"fill": [arc(56, 0.97)]},
        "square": {"fill": [[(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)]]},
        "triangle": {"fill": [[(0, -1.04), (1.06, 0.82), (-1.06, 0.82)]]},
        "star": {"fill": [_star()]},
        "heart": {"fill": [_heart()]},
        "cross": {"fill": [cross]},
        "ring": {"fill": [arc(56, 1.0)], "hole": arc(44, 0.47)},
        "moon": {"fill": [_moon() + (0.1, 0)]},
        "tree": {"under": [(-0.2, 0.4), (0.2, 0.4), (0.2, 1.1), (-0.2, 1.1)], "fill": crown},
        "house": {
            "fill": [walls, [(-1.06, -0.12), (0, -1.06), (1.06, -0.12)]],
            "accent": [(-0.24, 0.34), (0.24, 0.34), (0.24, 1.0), (-0.24, 1.0)],
            "line": [(-1.06, -0.12), (1.06, -0.12)],
        },
        "fish": {"fill": [body, tail], "eye": (-0.62, -0.14, 0.13)},
        "flower": {"fill": [*petals, arc(24, 0.4)], "accent": arc(28, 0.30)},
    }  # fmt: skip


@cache
def _shape(name: str) -> dict:
    found = dict(_shapes()[name])
    for key, value in found.items():
        if key == "fill":
            found[key] = [np.asarray(part, np.float64) for part in value]
        elif key != "eye":
            found[key] = np.asarray(value, np.float64)
    return found


def coverage(
    name: str, x: float, y: float, radius: float, angle: float, ink: float
) -> tuple[tuple, np.ndarray]:
    """Cover of an object: (x0, y0, x1, y1) window and float32 (h, w, 3) of fill, outline, accent in 0 to 1.

    `angle` is in degrees, `ink` the outline's width in pixels; the window is clipped to the picture.
    """
    reach = 1.2 * radius + ink + 1
    x0, y0 = max(0, math.floor(x - reach)), max(0, math.floor(y - reach))
    x1, y1 = min(SIZE, math.ceil(x + reach)), min(SIZE, math.ceil(y + reach))
    canvas = Image.new("RGB", ((x1 - x0) * SCALE, (y1 - y0) * SCALE))
    draw = ImageDraw.Draw(canvas)
    turn = math.radians(angle)
    matrix = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]]) * (
        radius * SCALE
    )
    offset = np.array(((x - x0) * SCALE, (y - y0) * SCALE)) - 0.5
    width = max(1, round(2 * ink * SCALE))
    bend = (width - 1) / 2
    shape = _shape(name)

    def placed(points: np.ndarray) -> list[tuple[float, ...]]:
        return [tuple(point) for point in (points @ matrix + offset).tolist()]

    def stroke(points: list[tuple[float, ...]], closed: bool = True) -> None:
        draw.line([*points, points[0]] if closed else points, fill=(0, 255, 0), width=width)
        if (
            len(points) < 20
        ):  # round the corners; smooth outlines have none (Pillow's own joints are slow)
            for px, py in points:
                draw.ellipse((px - bend, py - bend, px + bend, py + bend), fill=(0, 255, 0))

    if "under" in shape:
        points = placed(shape["under"])
        stroke(points)
        draw.polygon(points, fill=(0, 0, 255))
    parts = [placed(part) for part in shape["fill"]]
    for points in parts:
        stroke(points)
    for points in parts:
        draw.polygon(points, fill=(255, 0, 0))
    if "hole" in shape:
        points = placed(shape["hole"])
        stroke(points)
        draw.polygon(points, fill=(0, 0, 0))
    if "line" in shape:
        stroke(placed(shape["line"]), closed=False)
    if "accent" in shape:
        points = placed(shape["accent"])
        stroke(points)
        draw.polygon(points, fill=(0, 0, 255))
    if "eye" in shape:
        _eye(draw, placed(np.array([shape["eye"][:2]]))[0], shape["eye"][2] * radius * SCALE)
    cover = np.asarray(canvas.reduce(SCALE), np.float32) * np.float32(1 / 255)
    return (x0, y0, x1, y1), cover


def _eye(draw: ImageDraw.ImageDraw, centre: tuple[float, ...], radius: float) -> None:
    cx, cy = centre
    draw.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=(0, 255, 0))


def _jittered(colour: str, dice: Dice) -> np.ndarray:
    return np.clip(
        [channel + dice.between(-8, 8) for channel in COLOUR_RGB[colour]], 0, 255
    ).astype(np.float32)


def outline_width(thing: Painted) -> float:
    """Width of a thing's outline in pixels; a sketch has a bold one in its own colour."""
    return (2.2 if thing.style == "sketch" else 1.3) * (0.8 if thing.radius < 15 else 1.0)


def paint_object(picture: np.ndarray, thing: Painted, dice: Dice) -> None:
    """Paint `thing` (object, colour, style, x, y, radius, angle) onto a float32 (64, 64, 3) picture, in place."""
    base = _jittered(thing.colour, dice)
    light = base + (np.float32(255) - base) * np.float32(0.86)
    sketch = thing.style == "sketch"
    ink = outline_width(thing)
    (x0, y0, x1, y1), cover = coverage(
        thing.object, thing.x, thing.y, thing.radius, thing.angle, ink
    )
    mix = texture(thing, x0, y0, x1, y1, dice)
    fill = base if mix is None else light + (base - light) * mix[:, :, None]
    outline = base * np.float32(0.88) if sketch else np.array(INK, np.float32)
    accent = np.array(_accent(thing), np.float32)
    view = picture[y0:y1, x0:x1]
    view *= 1 - cover.sum(2, keepdims=True)
    view += cover[:, :, :1] * fill
    view += cover[:, :, 1:2] * outline
    view += cover[:, :, 2:] * accent


def _accent(thing: Painted) -> tuple[int, int, int]:
    if thing.object == "tree":
        return (98, 62, 40)
    if thing.object == "house":
        return (70, 48, 44)
    return (252, 244, 214) if thing.colour != "yellow" else (130, 76, 30)  # the heart of a flower


def texture(thing: Painted, x0: int, y0: int, x1: int, y1: int, dice: Dice) -> np.ndarray | None:
    """How much of the full colour each pixel of the window takes, float32 (h, w) in 0 to 1; None where plain."""
    style = thing.style
    if style == "plain":
        return None
    k = 0.8 if thing.radius < 15 else 1.0
    x = _GRID_X[y0:y1, x0:x1] - np.float32(thing.x - dice.between(-4, 4))
    y = _GRID_Y[y0:y1, x0:x1] - np.float32(thing.y - dice.between(-4, 4))
    if style == "gradient":
        reach = np.float32(thing.radius * 0.9)
        return np.clip((y + reach) / (2 * reach), 0, 1)
    if style == "striped":
        turn = math.radians(45 + dice.between(-14, 14))
        along = x * np.float32(math.cos(turn)) + y * np.float32(math.sin(turn))
        return _wave(along, 8.0 * k, 0.5)
    if style == "sketch":
        turn = math.radians(-45 + dice.between(-8, 8))
        along = x * np.float32(math.cos(turn)) + y * np.float32(math.sin(turn))
        return _wave(along, 5.0, 0.3) * np.float32(0.75)
    if style == "dotted":
        pitch = np.float32(9.0 * k)
        row = np.floor(y / pitch)
        dx = (x + row % 2 * pitch * np.float32(0.5)) % pitch - pitch / 2
        dy = y - (row + np.float32(0.5)) * pitch
        distance = np.sqrt(dx * dx + dy * dy)
        return np.clip(distance - np.float32(2.9 * k) + np.float32(0.5), 0, 1)
    side = np.float32(7.0 * k)
    waves = np.sin(x * (np.pi / side)) * np.sin(y * (np.pi / side))
    return np.clip(waves * np.float32(2.8 * k) + np.float32(0.5), 0, 1)


def _wave(along: np.ndarray, period: float, share: float) -> np.ndarray:
    """Anti-aliased stripes: 1 on the given share of each period (pixels), 0 between."""
    distance = np.abs(along % np.float32(period) - np.float32(period / 2))
    return np.clip(np.float32(period * share / 2) - distance + np.float32(0.5), 0, 1)


# ---------------------------------------------------------------- stamps

STAMP_SIZE = {"watermark": (24, 14), "code": (17, 17), "text": (25, 12)}  # width, height in pixels
_LETTERS = {  # 3 x 5 pixels each, drawn at twice the size
    "A": "010101111101101", "C": "111100100100111", "E": "111100111100111", "F": "111100111100100",
    "H": "101101111101101", "K": "101110100110101", "L": "100100100100111", "N": "111101101101101",
    "P": "111101111100100", "T": "111010010010010", "X": "101101010101101", "Z": "111001010100111",
}  # fmt: skip


def paint_stamp(picture: np.ndarray, name: str, x: int, y: int, dice: Dice) -> None:
    """Paint a stamp with its top left corner at (x, y) onto a float32 (64, 64, 3) picture, in place."""
    width, height = STAMP_SIZE[name]
    view = picture[y : y + height, x : x + width]
    if name == "watermark":
        colour, alpha = _watermark()
        view *= 1 - alpha
        view += alpha * colour
    elif name == "code":
        view[:] = _code(dice)[:, :, None]
    else:
        view[:] = 250
        for index in range(3):
            ink = np.array(
                [int(bit) for bit in _LETTERS[dice.pick(tuple(_LETTERS))]], bool
            ).reshape(5, 3)
            left = 1 + 8 * index
            view[1:11, left : left + 6][np.repeat(np.repeat(ink, 2, 0), 2, 1)] = (20, 20, 30)


@cache
def _watermark() -> tuple[np.ndarray, np.ndarray]:
    """A translucent slanted badge with three bright slashes: colour and alpha, (14, 24, 3) and (14, 24, 1)."""
    width, height = STAMP_SIZE["watermark"]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    slanted = x + (y - (height - 1) / 2) * 0.5 - (width - 1) / 2
    inside = np.clip(8.4 - np.abs(slanted) + 0.5, 0, 1)
    slash = _wave(slanted + 2.8, 5.6, 0.44) * np.clip(5.1 - np.abs(y - (height - 1) / 2), 0, 1)
    colour = np.array((70, 76, 98), np.float32) + slash[:, :, None] * np.array(
        (185, 179, 157), np.float32
    )
    alpha = inside * (0.62 + 0.26 * slash)
    return colour.astype(np.float32), alpha[:, :, None].astype(np.float32)


def _code(dice: Dice) -> np.ndarray:
    """A 5 x 5 matrix code of 3 pixel modules with a white rim: the corners fixed, the rest random, (17, 17)."""
    bits = np.array([[dice.chance(0.5) for _ in range(5)] for _ in range(5)])
    bits[0, 0] = bits[0, 4] = bits[4, 0] = True
    bits[0, 1] = bits[1, 0] = bits[4, 4] = False
    patch = np.full((17, 17), 252, np.float32)
    patch[1:16, 1:16] = np.where(np.repeat(np.repeat(bits, 3, 0), 3, 1), 14, 252)
    return patch
