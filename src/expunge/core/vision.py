"""What a CLIP vision tower says of pictures."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Embed", "vision_encoder"]

Embed = Callable[["np.ndarray"], Tensor]
"""uint8 pictures ``(n, height, width, 3)`` -> embeddings ``(n, embedding)``."""


def vision_encoder(
    tower: Any,
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073),
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711),
    batch: int = 64,
) -> Embed:
    """Pictures -> projected embeddings of a CLIP vision tower (CLIPVisionModelWithProjection or CLIPModel).

    Args:
        tower: The tower.
        mean, std: Of its pixels in 0 to 1; default: those of OpenAI's CLIP.
        batch: Pictures at a time.
    """
    config = getattr(tower.config, "vision_config", tower.config)

    @torch.no_grad()
    def embed(pictures: np.ndarray) -> Tensor:
        """uint8 ``(n, height, width, 3)`` -> embeddings ``(n, width)``, float as the tower's."""
        weight = tower.visual_projection.weight
        centre, spread = (torch.tensor(value).reshape(3, 1, 1) for value in (mean, std))
        parts = []
        for first in range(0, len(pictures), batch):
            pixels = torch.as_tensor(pictures[first : first + batch]).permute(0, 3, 1, 2) / 255
            side = min(pixels.shape[-2:])
            top, left = ((length - side) // 2 for length in pixels.shape[-2:])
            pixels = pixels[..., top : top + side, left : left + side]
            if side != config.image_size:
                pixels = functional.interpolate(
                    pixels, (config.image_size,) * 2, mode="bicubic", antialias=True
                ).clamp(0, 1)
            pixels = ((pixels - centre) / spread).to(weight.device, weight.dtype)
            pooled = tower.vision_model(pixel_values=pixels).pooler_output
            parts.append(tower.visual_projection(pooled))
        return torch.cat(parts)

    return embed
