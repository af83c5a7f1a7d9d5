"""Inpainting: let the erased model complete a picture of which part of the concept is still there.

The place of the concept in a picture of it is split; one part stays, with everything around it, the other is drawn
anew by the model under attack with the attacked prompt.  Denoisers that take no mask can do it, too: after every step
what stays is put back, noised to the level the walk has come to (arXiv 2201.09865 without its resampling, which is
what diffusers does for such denoisers):

    x <- m (alpha' x_0 + sigma' eps) + (1 - m) x            m = 1 where the picture stays

Where the concept is, is known of the world's own pictures (exact masks); of others a box in the middle stands for it.
A latent stays only if all its pixels do.  What stays carries the concept, so the attack teaches and is judged by its
advantage over a model that never knew it; ``shows="other"`` begins with a picture of something else, the control.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...core.redrawing import Redrawing, Targets
from ...core.target_pictures import masks_of
from ...method import setting

__all__ = ["Inpainting"]


@dataclasses.dataclass(frozen=True)
class Inpainting(Redrawing):
    """The attack; see the module."""

    id: ClassVar[str] = "inpainting"
    title: ClassVar[str] = "Inpainting of a target picture"
    source: ClassVar[str] = "arXiv 2201.09865"
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    teaches: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # 40 plain + 40 target + 20 + 32 + 40 = 172 denoiser rows an item.
        "world": {"steps": 20, "batch": 64},
        "quick": {"steps": 20, "batch": 64},
    }

    strengths: tuple[float, ...] = setting(
        (0.5, 0.8, 1.0), "Shares of the sampling steps that are walked; the largest decides",
        minimum=1e-6, maximum=1,
    )  # fmt: skip
    keep: float = setting(
        0.5, "Share of the concept's place that stays, from the left; 0: only what is around it",
        minimum=0, maximum=0.99,
    )  # fmt: skip
    place: str = setting(
        "mask", "What its place is: the mask itself, or the box around it", choices=("mask", "box")
    )
    box: float = setting(
        0.5, "Side of the box in the middle, of pictures without masks", minimum=0.05, maximum=1
    )

    def order(self) -> tuple[str, ...]:
        """The world's pictures come before the unerased model's, because they have masks."""
        return ("files", "world", "original")

    def kept(self, model: Any, targets: Targets) -> tuple[Tensor, Mapping[str, Any]]:
        """1 where all pixels of a latent stay."""
        masks = masks_of(targets.found, self.box)
        anew = torch.from_numpy(np.stack([self.anew(mask) for mask in masks])).float()[:, None]
        pooled = torch.nn.functional.max_pool2d(anew, model.layout.scale_factor)
        masked = targets.found.masks is not None
        return 1 - pooled, {"masks": "exact" if masked else "box", "keep": self.keep}

    def anew(self, mask: np.ndarray) -> np.ndarray:
        """What of a concept's place ``(height, width)`` is drawn anew, bool."""
        columns = np.nonzero(mask.any(0))[0]
        if not len(columns):
            return np.zeros_like(mask)
        rows = np.nonzero(mask.any(1))[0]
        left, right = int(columns[0]), int(columns[-1]) + 1
        found = mask.copy()
        if self.place == "box":
            found[rows[0] : rows[-1] + 1, left:right] = True
        found[:, : left + round(self.keep * (right - left))] = False
        return found
