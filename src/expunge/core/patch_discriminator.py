"""A discriminator of latents that answers for patches, as PatchGAN does (arXiv 1611.07004).

Strided convolutions halve the sides at most four times and to no less than four, a last one answers with a logit for
each patch: 3 x 3 for the 64 x 64 latents of Stable Diffusion, as in DoCo's published code (arXiv 2405.15304), 7 x 7
for 128 x 128.  Each halving doubles the channels, up to 512; all but the first normalise over the batch.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import SettingError
from ..models.base import noise_generator

__all__ = ["PatchDiscriminator"]

SMALLEST, WIDEST, SLOPE = 4, 512, 0.2
DEVIATION = 0.02


class PatchDiscriminator(nn.Module):
    """Latents ``(n, c, h, w)`` -> logits ``(n, 1, h', w')``; positive means the first of two kinds is denied.

    Batch statistics are those of the batch at hand and are never kept: there is no state beside the weights.

    Args:
        shape: ``(c, h, w)`` of the latents.
        seed: Seed of the weights, normal with deviation 0.02.
        width: Channels after the first halving.

    Raises:
        SettingError: Latents too small to answer in patches.
    """

    def __init__(self, shape: tuple[int, int, int], seed: int, width: int = 64) -> None:
        super().__init__()
        channels, side = shape[0], min(shape[1:])
        halvings = max(1, min(4, round(math.log2(max(1, side) / SMALLEST))))
        if side < 2 * SMALLEST:
            raise SettingError(
                f"latents of {shape[1]} x {shape[2]} are too small for a discriminator of patches; at least "
                f"{2 * SMALLEST} a side are needed"
            )
        layers: list[nn.Module] = []
        for number in range(halvings):
            wide = min(WIDEST, width * 2**number)
            layers.append(_convolution(channels, wide, 4, 2, 1, bias=number == 0))
            if number:
                layers.append(nn.BatchNorm2d(wide, track_running_stats=False))
            layers.append(nn.LeakyReLU(SLOPE))
            channels = wide
        layers.append(_convolution(channels, 1, 4, 1, 1))
        self.layers = nn.Sequential(*layers)
        for name, parameter in self.named_parameters():
            own = noise_generator(seed, "discriminator", name)
            draw = torch.randn(parameter.shape, generator=own)
            with torch.no_grad():
                if parameter.ndim > 1:
                    parameter.copy_(DEVIATION * draw)
                else:  # scales of the normalisation begin around one, shifts and biases at zero
                    scale = name.endswith("weight")
                    parameter.copy_(1 + DEVIATION * draw if scale else torch.zeros_like(parameter))

    def forward(self, latents: Tensor) -> Tensor:
        """The logits of each patch."""
        answer: Tensor = self.layers(latents)
        return answer


def _convolution(*sizes: int, **options: Any) -> nn.Module:
    """A convolution whose weights nobody has drawn yet, least of all from the process's own random state."""
    made: nn.Module = nn.utils.skip_init(nn.Conv2d, *sizes, **options)
    return made
