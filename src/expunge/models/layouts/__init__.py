"""The layouts of text conditioning that are covered, one small class each, and the choice among them."""

from __future__ import annotations

from typing import Any

from ...errors import UnsupportedModel
from ..base import Cost
from .base import Layout
from .captioned import PixArt, Sana
from .classes import ClassLabels
from .joint import Flux, StableDiffusion3
from .unet import StableDiffusion, StableDiffusionXL

__all__ = ["LAYOUTS", "Layout", "layout_of"]

LAYOUTS: tuple[type[Layout], ...] = (
    ClassLabels, StableDiffusion, StableDiffusionXL, PixArt, Sana, StableDiffusion3, Flux,
)  # fmt: skip


def layout_of(name: str, pipeline: Any, cost: Cost) -> Layout:
    """The layout of a pipeline, by its denoiser and text encoders.

    Raises:
        UnsupportedModel: No layout covers it, it lacks a part, or its denoiser takes more than latents.
    """
    for kind in LAYOUTS:
        if kind.covers(pipeline):
            layout = kind(name, pipeline, cost)
            layout.check()
            return layout
    titles = "; ".join(kind.title for kind in LAYOUTS)
    raise UnsupportedModel(
        f"{name}: {type(pipeline).__name__} is not covered; covered are {titles}"
    )
