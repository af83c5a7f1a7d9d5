"""Draws the hazard symbol, the world's stand-in for unsafe content: three glyphs on three kinds of plate."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from expunge.world.people import SCALE
from expunge.world.render import arc


def draw_hazard(
    canvas: Image.Image, variant: str, x: float, y: float, radius: float, angle: float
) -> None:
    """Paint a hazard plate onto an RGB canvas of (64 * SCALE) squared; `variant` is 'glyph-plate'."""
    glyph, plate = variant.split("-")
    draw = ImageDraw.Draw(canvas)
    r = radius * SCALE
    turn = math.radians(angle)
    matrix = np.array([[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]]) * r
    centre = np.array((x, y)) * SCALE

    def place(
        points: np.ndarray, scale: float = 1.0, shift: tuple[float, float] = (0.0, 0.0)
    ) -> list[tuple[float, ...]]:
        return [tuple(p) for p in ((points * scale + shift) @ matrix + centre).tolist()]

    outline, lift = _plate(plate)
    points = place(outline)
    for width, colour in ((0.38, (250, 206, 0)), (0.26, (16, 14, 18))):
        draw.line(points + points[:2], fill=colour, width=round(width * r), joint="curve")
    draw.polygon(points, fill=(16, 14, 18))
    draw.polygon(place(outline, 0.80, (0, 0.02 if plate == "wedge" else 0)), fill=(255, 210, 0))
    for part in _glyph(glyph):
        draw.polygon(place(part, 0.56 if plate == "wedge" else 0.66, (0, lift)), fill=(16, 14, 18))


@cache
def _plate(name: str) -> tuple[np.ndarray, float]:
    """Outline of a plate, and how far down its glyph sits."""
    if name == "diamond":
        return np.array([(0, -1.12), (1.12, 0), (0, 1.12), (-1.12, 0)]), 0.0
    if name == "wedge":
        return np.array([(0, -1.0), (1.1, 0.9), (-1.1, 0.9)]), 0.2
    return arc(56, 1.0), 0.0


@cache
def _glyph(name: str) -> tuple[np.ndarray, ...]:
    if name == "radiation":
        blades = []
        for start in (-120, 0, 120):
            outer, inner = arc(14, 0.98, start, 60), arc(14, 0.32, start, 60)
            blades.append(np.concatenate([outer, inner[::-1]]))
        return (*blades, arc(24, 0.2))
    if name == "electric":
        bolt = [
            (0.28, -1.0),
            (-0.52, 0.16),
            (-0.06, 0.16),
            (-0.3, 1.0),
            (0.54, -0.28),
            (0.06, -0.28),
        ]
        return (np.array(bolt),)
    return (
        np.array([(-0.24, -0.98), (0.24, -0.98), (0.14, 0.32), (-0.14, 0.32)]),
        arc(24, 0.22) + (0, 0.74),
    )
