"""Image to image: let the erased model draw on from a picture of what it was to forget.

An erased model that still denoises the concept once it is in sight hides it and has not lost it.  A picture of the
concept (the unerased model's of the same prompt and seed, or one of the concept's files) is noised to a share of the
sampling steps and denoised with the attacked prompt:

    x_s = alpha_s x_0 + sigma_s eps,   then the remaining steps of the model's own sampler        strength s

Source: SDEdit, arXiv 2108.01073; steps and noise levels are those of diffusers' image-to-image pipelines.  The target
carries the concept, so the attack teaches: at a small strength any model gives the picture back.  What counts is the
advantage over a model that never knew the concept, strength by strength; ``shows="other"`` begins with a picture of
something else, the control at equal cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from ...core.redrawing import Redrawing

__all__ = ["ImageToImage"]


@dataclasses.dataclass(frozen=True)
class ImageToImage(Redrawing):
    """The attack; see the module."""

    id: ClassVar[str] = "img2img"
    title: ClassVar[str] = "Image to image from a target picture"
    source: ClassVar[str] = "arXiv 2108.01073"
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    teaches: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # 40 plain + 40 target + 12 + 20 + 28 + 36 = 176 denoiser rows an item.
        "world": {"steps": 20, "batch": 64},
        "quick": {"steps": 20, "batch": 64},
    }
