"""Outputs kept for people to look at: a few, at equal seeds, never part of ``evidence.json``."""

from __future__ import annotations

import base64
import dataclasses
import io
from typing import Any

import numpy as np

__all__ = ["Gallery", "Shown", "data_uri", "png"]


@dataclasses.dataclass
class Shown:
    """One prompt and seed on up to three models.

    Attributes:
        prompt, seed: What was asked.
        outputs: Arm -> picture (uint8 ``(h, w, 3)``) or text; an arm may be missing.
        hits: Arm -> the judge saw the concept.
        text: For an attack: what was fed in place of the prompt, by arm.
    """

    prompt: str
    seed: int
    outputs: dict[str, Any] = dataclasses.field(default_factory=dict)
    hits: dict[str, bool] = dataclasses.field(default_factory=dict)
    text: dict[str, str | None] = dataclasses.field(default_factory=dict)
    concept: str | None = None


@dataclasses.dataclass
class Gallery:
    """What the report and the contact sheet show of one concept."""

    target: list[Shown] = dataclasses.field(default_factory=list)
    kept: list[Shown] = dataclasses.field(default_factory=list)
    attacks: dict[str, list[Shown]] = dataclasses.field(default_factory=dict)

    @property
    def has_pictures(self) -> bool:
        """Whether anything here is a picture (the outputs may be texts)."""
        rows = [*self.target, *self.kept, *(s for shown in self.attacks.values() for s in shown)]
        return any(
            isinstance(output, np.ndarray) for row in rows for output in row.outputs.values()
        )


def png(picture: np.ndarray, smallest: int = 0) -> bytes:
    """PNG bytes of a uint8 picture ``(h, w, 3)``.

    ``smallest``: small pictures are enlarged by a whole factor to at least so many pixels, so that
    their own pixels stay crisp.
    """
    from PIL import Image

    image = Image.fromarray(np.ascontiguousarray(picture, dtype=np.uint8))
    factor = -(-smallest // min(image.size)) if smallest else 1
    if factor > 1:
        image = image.resize(
            (image.width * factor, image.height * factor), Image.Resampling.NEAREST
        )
    stream = io.BytesIO()
    image.save(stream, format="PNG", compress_level=6)
    return stream.getvalue()


def data_uri(picture: np.ndarray) -> str:
    """The picture as a ``data:`` address, at its own size (the page enlarges it)."""
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode("ascii")
