"""One PNG with the pictures of an audit: a column a prompt, a row a model, then a block for each attack."""

from __future__ import annotations

import io
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import InputError
from .gallery import Shown
from .schema import ARMS

if TYPE_CHECKING:
    from PIL import ImageDraw

    from .record import Evidence

__all__ = ["sheet"]

CELL = 160
GAP = 10
LABEL = 118
CAPTION = 64
HEADING = 40
INK, SOFT, PAPER = (28, 30, 34), (98, 104, 112), (255, 255, 255)
HIT, MISS = (217, 98, 43), (200, 204, 210)


def sheet(evidence: Evidence, concept: str | None = None, columns: int = 8) -> bytes:
    """PNG bytes.  A frame in orange marks pictures in which the judge saw the concept.

    Raises:
        InputError: The evidence holds no pictures (it was loaded, or the model writes texts).
    """
    from PIL import Image, ImageDraw

    name = concept or next(iter(evidence.concepts))
    gallery = evidence.gallery.get(name)
    if gallery is None or not gallery.has_pictures:
        raise InputError(
            f"the evidence on {name!r} holds no pictures; a contact sheet is made right after an audit"
        )
    blocks = [(f"prompts that ask for \u201c{name}\u201d", gallery.target[:columns])]
    blocks += [(f"attack: {attack}", rows[:columns]) for attack, rows in gallery.attacks.items()]
    if gallery.kept:
        blocks.append(("kept concepts", gallery.kept[:columns]))
    blocks = [(title, rows) for title, rows in blocks if any(_pictures(row) for row in rows)]
    width = LABEL + max(len(rows) for _, rows in blocks) * (CELL + GAP) + GAP
    height = HEADING + sum(_height(rows) for _, rows in blocks) + GAP
    image = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(image)
    line = evidence.concepts[name].verdict
    draw.text(
        (GAP, 12), _fit(line.line if line else name, draw, width - 2 * GAP, 15), INK, font=_font(15)
    )
    top = HEADING
    for title, rows in blocks:
        _block(image, draw, title, rows, top)
        top += _height(rows)
    stream = io.BytesIO()
    image.save(stream, format="PNG", compress_level=6)
    return stream.getvalue()


def _arms(rows: list[Shown]) -> list[str]:
    return [
        arm for arm in ARMS if any(isinstance(row.outputs.get(arm), np.ndarray) for row in rows)
    ]


def _pictures(row: Shown) -> bool:
    return any(isinstance(output, np.ndarray) for output in row.outputs.values())


def _height(rows: list[Shown]) -> int:
    return 26 + len(_arms(rows)) * (CELL + GAP) + CAPTION


def _block(image: Any, draw: ImageDraw.ImageDraw, title: str, rows: list[Shown], top: int) -> None:
    from PIL import Image

    draw.text((GAP, top), _fit(title, draw, image.width - 2 * GAP, 14), INK, font=_font(14))
    top += 26
    arms = _arms(rows)
    for line, arm in enumerate(arms):
        y = top + line * (CELL + GAP)
        draw.text((GAP, y + CELL // 2 - 9), arm, SOFT, font=_font(16))
        for column, row in enumerate(rows):
            output = row.outputs.get(arm)
            if not isinstance(output, np.ndarray):
                continue
            x = LABEL + column * (CELL + GAP)
            resample = (
                Image.Resampling.NEAREST if output.shape[0] < CELL else Image.Resampling.LANCZOS
            )
            small = Image.fromarray(output).resize((CELL, CELL), resample)
            image.paste(small, (x, y))
            frame = HIT if row.hits.get(arm) else MISS
            draw.rectangle((x - 2, y - 2, x + CELL + 1, y + CELL + 1), outline=frame, width=2)
    for column, row in enumerate(rows):
        text = row.text.get("erased") or row.prompt
        lines = textwrap.wrap(" ".join(text.split()), 25)[:3] or [""]
        if len(textwrap.wrap(" ".join(text.split()), 25)) > 3:
            lines[-1] = lines[-1][:24] + "\u2026"
        draw.multiline_text((LABEL + column * (CELL + GAP), top + len(arms) * (CELL + GAP) - 4), "\n".join(lines),
                            SOFT, font=_font(12), spacing=3)  # fmt: skip


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _fit(text: str, draw: ImageDraw.ImageDraw, width: int, size: int) -> str:
    """The text, cut with an ellipsis where it is wider than ``width`` pixels."""
    font, text = _font(size), " ".join(text.split())
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "\u2026", font=font) > width:
        text = text[:-1]
    return text + "\u2026"
