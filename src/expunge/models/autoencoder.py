"""Pictures to latents and back, for autoencoders with a posterior (AutoencoderKL) or without (AutoencoderDC).

Without an autoencoder (``vae`` is ``None``) the latents are pixels from -1 to 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import NonFiniteError

__all__ = ["latents_of", "pictures_of"]

PIXELS = 4 * 1024**2
"""Pixels that pass through the autoencoder at a time: four pictures of 1024 x 1024 take about 20 GB in float32."""


def _few(most: int, height: int, width: int) -> int:
    """Pictures at a time."""
    return max(1, min(most, PIXELS // (height * width)))


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """``(shift, scale)`` with ``scaled = (latents - shift) * scale``."""
    config = vae.config
    mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
    if mean is None or std is None:
        return getattr(config, "shift_factor", None) or 0.0, config.scaling_factor
    mean, std = (like.new_tensor(values).reshape(1, -1, 1, 1) for values in (mean, std))
    return mean, config.scaling_factor / std


@contextlib.contextmanager
def _widened(vae: Any, wide: bool) -> Iterator[None]:
    """float32 for autoencoders that overflow in float16 and say so; both casts are exact."""
    wide = wide and getattr(vae.config, "force_upcast", False)
    if vae.dtype != torch.float16 or not wide:
        yield
        return
    vae.to(torch.float32)
    try:
        yield
    finally:
        vae.to(torch.float16)


def _drawn(found: Any, generator: torch.Generator | None) -> Tensor:
    """Mean of a posterior or, with a generator, a draw; noise does not depend on device or precision."""
    if not hasattr(found, "latent_dist"):
        return found.latent
    mean = found.latent_dist.mean
    if generator is None:
        return mean
    noise = torch.randn(mean.shape, generator=generator)
    return mean + found.latent_dist.std * noise.to(mean.device, mean.dtype)


@torch.no_grad()
def latents_of(
    vae: Any,
    pictures: np.ndarray,
    device: torch.device,
    wide: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Scaled means of the autoencoder's posterior, ``(n, c, h, w)``, of uint8 ``(n, H, W, 3)``.

    Args:
        vae: The autoencoder.
        pictures: uint8 ``(n, H, W, 3)``.
        device: Where the autoencoder is.
        wide: Compute in float32 where a float16 autoencoder asks for it.
        generator: A CPU generator: one draw of the posterior for each, where there is one, instead of its mean.
    """
    # Numbers are made of a few pictures at a time: of a thousand large ones they would take gigabytes.
    parts = torch.from_numpy(np.ascontiguousarray(pictures)).split(_few(64, *pictures.shape[1:3]))
    pixels = (part.permute(0, 3, 1, 2).float() / 127.5 - 1 for part in parts)
    if vae is None:
        return torch.cat([part.to(device) for part in pixels])
    with _widened(vae, wide):
        found = [vae.encode(part.to(device, vae.dtype)) for part in pixels]
    latents = torch.cat([_drawn(f, generator) for f in found])
    shift, scale = _statistics(vae, latents)
    return (latents - shift) * scale


@torch.no_grad()
def pictures_of(
    vae: Any, latents: Tensor, name: str, wide: bool = False, factor: int = 8
) -> np.ndarray:
    """Decoded pictures, uint8 ``(n, H, W, 3)``; ``wide`` as in :func:`latents_of`, ``factor`` pixels a latent.

    Raises:
        NonFiniteError: NaN or infinity in what was decoded.
    """
    if vae is None:
        return _shown(latents, name)
    # On a CPU, eight at a time in this layout fit its caches and take 40 % less time than 64 in the other.
    cpu = latents.device.type == "cpu"
    few, layout = (8, torch.channels_last) if cpu else (64, torch.preserve_format)
    with _widened(vae, wide):
        widened = latents.to(vae.dtype)
        shift, scale = _statistics(vae, widened)
        scaled = widened / scale + shift
        few = _few(few, *(side * factor for side in latents.shape[2:]))
        parts = [part.to(memory_format=layout) for part in scaled.split(few)]
        pixels = torch.cat([vae.decode(part).sample for part in parts])
    return _shown(pixels, name)


def _shown(pixels: Tensor, name: str) -> np.ndarray:
    if not torch.isfinite(pixels).all():
        raise NonFiniteError(f"{name}: decoded pictures hold NaN or infinity")
    values = (pixels.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    return (values * 255).round().to(torch.uint8).cpu().numpy()
