"""LPIPS of pictures of one prompt and seed, at the sizes papers use (arXiv:1801.03924; extra ``paper-metrics``).

    full   as the pictures are                                         lpips/alex
    esd    shorter side to 64, bilinear with antialiasing              lpips/alex-esd
    rece   64 x 64, bilinear without antialiasing, rounded to uint8    lpips/alex-rece

The two small sizes give other numbers for the same pictures.  High is good for the erased artist, low for others;
:func:`expunge.measure.composites.lpips_overall` is the difference.  Without the extra, the distance on a judge's
features (:mod:`expunge.measure.perceptual`) serves the same purpose under its own id.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np
import torch

from ..core.extras import downloading, needed
from ..core.resampling import bootstrap_mean
from ..errors import InputError, SettingError, nearest
from ..method import Measurement

__all__ = ["IDS", "Lpips", "resized"]

IDS = {"full": "lpips/alex", "esd": "lpips/alex-esd", "rece": "lpips/alex-rece"}
"""Size -> protocol id."""

SIDE = 64


class Lpips:
    """LPIPS with AlexNet, version 0.1.

    Args:
        size: ``full``, ``esd`` or ``rece``.
        device: Where AlexNet runs.

    Raises:
        SettingError: Another size.
        MissingExtra: lpips is not installed.
        ModelError: AlexNet's weights are not there and cannot be downloaded.
    """

    def __init__(self, size: str = "full", device: str = "cpu") -> None:
        if size not in IDS:
            raise SettingError(f"LPIPS: size {size!r} is unknown{nearest(size, IDS)}")
        library = needed("lpips", "lpips", "paper-metrics")
        self.size, self.protocol, self.device = size, IDS[size], device
        with downloading("lpips", "torch's cache, $TORCH_HOME/hub/checkpoints"):
            network = library.LPIPS(net="alex", version="0.1", verbose=False)
        self.network: Any = network.to(device).eval()

    @torch.no_grad()
    def pairs(self, one: np.ndarray, two: np.ndarray, batch: int = 32) -> np.ndarray:
        """Distance ``(n,)`` of ``n`` pairs of pictures, uint8 ``(n, h, w, 3)``.

        Raises:
            InputError: The pairs differ in number, shape or kind.
        """
        x, y = np.asarray(one), np.asarray(two)
        if (
            x.shape != y.shape
            or x.ndim != 4
            or x.shape[-1] != 3
            or {x.dtype, y.dtype} != {np.dtype(np.uint8)}
        ):
            raise InputError(f"pairs of pictures must be uint8 of one shape (n, h, w, 3), got {x.dtype} {x.shape} and "
                             f"{y.dtype} {y.shape}")  # fmt: skip
        found = []
        for start in range(0, len(x), batch):
            a, b = (
                resized(part[start : start + batch], self.size).to(self.device) for part in (x, y)
            )
            found.append(self.network(a, b).reshape(-1).double().cpu().numpy())
        return np.concatenate(found) if found else np.zeros(0)

    def measure(self, one: np.ndarray, two: np.ndarray, prompts: Sequence[Hashable]) -> Measurement:
        """Mean distance of pairs, with the interval over prompts."""
        if not len(one) or len(one) != len(prompts):
            raise InputError(
                f"LPIPS: {len(one)} pairs and {len(prompts)} prompts; allowed is one each, at least one"
            )
        value, interval, n = bootstrap_mean(self.pairs(one, two), prompts)
        return Measurement(value, self.protocol, n, interval)


def resized(pictures: np.ndarray, size: str) -> torch.Tensor:
    """Pixels from -1 to 1, float32 ``(n, 3, h, w)``, at a published size."""
    if size == "esd":
        pictures = np.stack([_shorter_side(picture) for picture in pictures])
    pixels = torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float()
    if size == "rece":
        pixels = torch.nn.functional.interpolate(
            pixels, size=(SIDE, SIDE), mode="bilinear", align_corners=False
        ).round()  # the library that is used there gives whole numbers back
    return pixels / 127.5 - 1


def _shorter_side(picture: np.ndarray) -> np.ndarray:
    from PIL import Image

    height, width = picture.shape[:2]
    if height <= width:
        target = (SIDE * width // height, SIDE)
    else:
        target = (SIDE, SIDE * height // width)
    return np.asarray(Image.fromarray(picture).resize(target, Image.Resampling.BILINEAR))
