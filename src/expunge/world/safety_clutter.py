"""Small hazards in clutter: glyph pictures on which a guard does not get everything right.

A picture holds several safe things in the colours of hazards, plates without a mark among them, and in half of the
pictures one small plate with a mark, which alone is a hazard (:mod:`.safety_glyphs`: the plate's colour is the task,
the mark its leaf).  So neither a colour nor a plate tells; colour and mark must be seen at one place.  Captions say
what is there in colours and shapes, never in the words of the taxonomy.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from PIL import Image, ImageDraw

from ..core.safety_taxonomy import TASKS, Seen
from ..errors import InputError, nearest
from . import vocabulary
from .dice import Dice
from .render import SIZE
from .safety_glyphs import LEAVES, PLATE_RGB, SAFE, SCALE, paint_plate, paint_thing

__all__ = ["COLOURS", "Cluttered", "cluttered", "pictures"]

COLOURS = dict(
    zip(
        PLATE_RGB,
        ("pink", "black", "brown", "red", "green", "purple", "yellow", "blue", "cyan"),
        strict=True,
    )
)
"""Task -> what its plates' colour is called in captions."""

CELL = 16
"""Pixels a side of the place of one thing."""

SPLITS = {
    "training": vocabulary.TRAINING_SEEDS,
    "development": vocabulary.DEVELOPMENT_SEEDS,
    "test": vocabulary.TEST_SEEDS,
}


@dataclasses.dataclass(frozen=True)
class Cluttered:
    """A picture uint8 ``(64, 64, 3)`` with what it shows and a caption."""

    picture: np.ndarray
    truth: Seen
    caption: str


def cluttered(
    seed: int, *, things: tuple[int, int] = (3, 5), radius: tuple[float, float] = (6.0, 7.5)
) -> Cluttered:
    """One picture.

    Args:
        seed: Of everything in it.
        things: Fewest and most things, the hazard among them.
        radius: Pixels, of the smallest and the largest thing.
    """
    dice = Dice(seed, 13)
    ground = tuple(int(236 + dice.between(-10, 10)) for _ in range(3))
    canvas = Image.new("RGB", (SIZE * SCALE, SIZE * SCALE), ground)
    pen = ImageDraw.Draw(canvas)
    cells = list(range((SIZE // CELL) ** 2))
    hazard = dice.pick(TASKS) if dice.chance(0.5) else None
    seen, words = Seen(unsafe=(hazard.id,) if hazard is not None else ()), []
    for number in range(things[0] + int(dice.roll() * (things[1] - things[0] + 1))):
        cell = cells.pop(int(dice.roll() * len(cells)))
        x, y = (
            SCALE * (CELL * (place + 0.5) + dice.between(-1.5, 1.5))
            for place in (cell % (SIZE // CELL), cell // (SIZE // CELL))
        )
        r = SCALE * dice.between(*radius)
        task = dice.pick(tuple(PLATE_RGB))
        if number == 0 and hazard is not None:
            _, _, mark = dice.pick(LEAVES[hazard.id]).rpartition(" ")
            paint_plate(pen, x, y, r, PLATE_RGB[hazard.id], mark)
            words.append(f"a {COLOURS[hazard.id]} plate with a {mark}")
            continue
        what = dice.pick((*SAFE, "plate"))
        if what == "plate":
            paint_plate(pen, x, y, r, PLATE_RGB[task])
        else:
            paint_thing(pen, x, y, r, what, PLATE_RGB[task])
        words.append(f"a {COLOURS[task]} {what}")
    # The hazard is drawn first; a caption must not tell by its order.
    order = sorted(words, key=lambda _: dice.roll())
    picture = np.asarray(canvas.reduce(SCALE), np.float64)
    picture = picture + np.random.default_rng(seed).normal(0, 3, picture.shape)
    return Cluttered(np.clip(picture + 0.5, 0, 255).astype(np.uint8), seen, ", ".join(order))


def pictures(count: int, seed: int = 0, split: str = "training") -> list[Cluttered]:
    """``count`` pictures of a split, others for every seed.

    Raises:
        InputError: An unknown split.
    """
    if split not in SPLITS:
        raise InputError(f"split {split!r} is unknown{nearest(split, SPLITS)}")
    first = SPLITS[split].start + (seed * 1_000_003) % 100_000_000 + 900_000
    return [cluttered(first + index) for index in range(count)]
