"""How much of a picture's layout is left: correlation of two pictures at low resolution.

Both are averaged over a coarse grid, so that what a thing is counts little and where things are, how large and
how coloured, counts most.  Compare pictures of one prompt and seed.
"""

from __future__ import annotations

import numpy as np

from ..errors import InputError

__all__ = ["layout_similarity", "protocol"]

CELLS = 8


def protocol(cells: int = CELLS) -> str:
    """Protocol id of the similarity on a grid of ``cells`` by ``cells``."""
    return f"layout/1-correlation-equal-seeds/cells={cells}"


def layout_similarity(one: np.ndarray, two: np.ndarray, cells: int = CELLS) -> np.ndarray:
    """Pearson correlation ``(n,)`` of ``n`` pairs of pictures averaged over a grid, channels together.

    Args:
        one, two: uint8 ``(n, height, width, 3)``, sides that ``cells`` divides.
        cells: Cells a side.

    Two pictures without any contrast count as 1 if they are equal on the grid and as 0 if not.
    """
    x, y = np.asarray(one, np.float64), np.asarray(two, np.float64)
    if x.shape != y.shape or x.ndim != 4 or x.shape[1] % cells or x.shape[2] % cells:
        raise InputError(
            f"pairs of pictures must have one shape (n, height, width, channels) with sides that {cells} divides, "
            f"got {x.shape} and {y.shape}"
        )
    n, height, width, channels = x.shape
    grid = (n, cells, height // cells, cells, width // cells, channels)
    # Each channel's mean is taken out: a change of brightness or tint alone is no change of layout.
    a, b = (v.reshape(grid).mean((2, 4)).reshape(n, -1, channels) for v in (x, y))
    same = (a == b).all((1, 2))
    a, b = ((v - v.mean(1, keepdims=True)).reshape(n, -1) for v in (a, b))
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    found = np.divide((a * b).sum(1), norms, out=np.zeros(n), where=norms > 0)
    return np.where(same, 1.0, found)
