"""Pictures made smaller and larger for training, as concept ablation does with objects (arXiv 2303.13516)."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["augmented"]

SMALLEST, SMALL, SHRUNK, ENLARGED = 1 / 3, 0.6, 0.66, (1.2, 1.4)
GREY = 127


def augmented(
    pictures: np.ndarray, cell: int, generator: torch.Generator
) -> tuple[np.ndarray, np.ndarray, list[str | None]]:
    """Pictures made smaller (two thirds of them, to a third and more) or larger (1.2 to 1.4 times).

    A smaller picture lies at a random place on grey; a larger one is cut at a random place.

    Args:
        pictures: uint8 ``(n, height, width, 3)``.
        cell: Pixels of one latent along each side.
        generator: Draws sizes and places.

    Returns:
        The pictures; masks ``(n, height / cell, width / cell)`` of latents that count, one cell less on each side
        of a smaller picture and all of a larger one; and of each what its prompt may say, ``small``, ``large`` or
        ``None``.
    """
    from PIL import Image

    height, width = pictures.shape[1:3]
    made = np.full_like(pictures, GREY)
    masks = np.ones((len(pictures), height // cell, width // cell), bool)
    sizes: list[str | None] = []
    for index, picture in enumerate(pictures):
        draw = torch.rand(4, generator=generator).tolist()
        low, high = (SMALLEST, 1.0) if draw[0] < SHRUNK else ENLARGED
        scale = low + (high - low) * draw[1]
        tall, wide = (max(cell, round(side * scale)) for side in (height, width))
        image = Image.fromarray(picture).resize((wide, tall), Image.Resampling.BILINEAR)
        scaled = np.asarray(image)
        y, x = int(draw[2] * (abs(tall - height) + 1)), int(draw[3] * (abs(wide - width) + 1))
        if scale <= 1.0:
            made[index, y : y + tall, x : x + wide] = scaled
            masks[index] = False
            top, left = -(-y // cell) + 1, -(-x // cell) + 1
            masks[index, top : (y + tall) // cell - 1, left : (x + wide) // cell - 1] = True
            if not masks[index].any():  # too small for a border
                masks[index, (y + tall // 2) // cell, (x + wide // 2) // cell] = True
        else:
            made[index] = scaled[y : y + height, x : x + width]
        sizes.append("small" if scale < SMALL else "large" if scale > 1.0 else None)
    return made, masks, sizes
