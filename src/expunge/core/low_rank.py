"""Trainable low-rank changes of linear and convolution layers, added while a model runs and gone afterwards.

A layer with weight ``W (out, width)`` answers ``x W^T``; with a change of rank ``r`` on it,

    x W^T + scale (x down^T) up^T        up (out, r), down (r, width)

which is what the weight ``W + scale up down`` answers.  The model's own weights are not touched.  A convolution
with weight ``(out, in, height, width)`` is the linear layer of its patches, of width ``in height width``.
Source: LoRA, arXiv 2106.09685.  ``up`` starts at zero, so that training starts from the model as it is,
and ``down`` normal with deviation ``1 / r``, as diffusers starts its adapters, or uniform within ``1 / sqrt(width)``,
as torch starts layers (Kaiming's rule with a = sqrt 5).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..edit import deltas
from ..errors import MissingPart, SettingError
from ..models.base import noise_generator

__all__ = ["STARTS", "LowRank", "adaptable", "stored", "thinned", "widened"]

STARTS = ("normal", "kaiming")
"""Where ``down`` may begin."""


class LowRank:
    """One low-rank change for each of several linear layers, and convolutions where they are asked for.

    Args:
        model: The model; its present weights are what the changes are added to.
        names: Canonical names of the weights, each ``(out, width)`` or that of a convolution.
        rank: Rank ``r`` of each change.
        seed: Seed of ``down``; a weight's start depends on its name, not on the others.
        scale: Factor of every change.
        purpose: Another one gives another start.
        convolutions: Allow weights of convolutions with one group and zeros around the picture.
        start: Where ``down`` begins, one of ``STARTS``.

    Raises:
        MissingPart: A name is not the weight of such a layer of the model.
    """

    def __init__(
        self,
        model: Any,
        names: Sequence[str],
        *,
        rank: int = 1,
        seed: int = 0,
        scale: float = 1.0,
        purpose: str = "",
        convolutions: bool = False,
        start: str = "normal",
    ) -> None:
        if rank < 1:
            raise SettingError(f"the rank of a low-rank change is {rank}; at least 1 is needed")
        if start not in STARTS:
            raise SettingError(
                f"start={start!r} of a low-rank change; allowed: {', '.join(STARTS)}"
            )
        self.scale = scale
        self.modules: dict[str, nn.Module] = {}
        self.up: dict[str, nn.Parameter] = {}
        self.down: dict[str, nn.Parameter] = {}
        layers = _layers(model, convolutions)
        for name in names:
            weight = model.tensor(name)
            if id(weight) not in layers:
                more = ", nor of a convolution with one group" if convolutions else ""
                raise MissingPart(f"{model.name}: {name} is not the weight of a linear layer{more}")
            self.modules[name] = layers[id(weight)]
            draw = noise_generator(seed, f"low rank {purpose}".strip(), name)
            width = weight[0].numel()
            if start == "normal":
                down = torch.randn(rank, width, generator=draw) / rank
            else:
                down = (2 * torch.rand(rank, width, generator=draw) - 1) / width**0.5
            self.down[name] = nn.Parameter(down.to(weight.device))
            self.up[name] = nn.Parameter(torch.zeros(weight.shape[0], rank, device=weight.device))

    def parameters(self) -> list[tuple[str, nn.Parameter]]:
        """Every factor with a name of its own, float32."""
        return [
            (f"{name}.low_rank_{side}", factors[name])
            for name in self.modules
            for side, factors in (("up", self.up), ("down", self.down))
        ]

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """The layers answer with their changes inside the block; hooks are gone at the end."""
        handles = [
            module.register_forward_hook(self._hook(name)) for name, module in self.modules.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def added(module: nn.Module, inputs: tuple[Tensor, ...], answer: Tensor) -> Tensor:
            rows, up, down = inputs[0].to(self.down[name].dtype), self.up[name], self.down[name]
            change = widened(module, thinned(module, rows, down), up)
            return answer + (self.scale * change).to(answer.dtype)

        return added

    def factors(self, values: dict[str, Tensor] | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """Name -> ``(scale up, down)``: the change of each weight is their product, in the weight's shape.

        Args:
            values: Other values of the factors, by the names of :meth:`parameters`; default: the present.
        """
        held = dict(self.parameters()) if values is None else values
        return {
            name: (
                self.scale * held[f"{name}.low_rank_up"].detach(),
                held[f"{name}.low_rank_down"].detach(),
            )
            for name in self.modules
        }


def thinned(module: nn.Module, rows: Tensor, down: Tensor) -> Tensor:
    """What ``down (r, width)`` makes of a layer's input: ``(..., r)``, of a convolution ``(n, r, height, width)``."""
    if isinstance(module, nn.Conv2d):
        kernel = down.reshape(-1, *module.weight.shape[1:])
        return functional.conv2d(rows, kernel, None, module.stride, module.padding, module.dilation)
    return rows @ down.T


def widened(module: nn.Module, thin: Tensor, up: Tensor) -> Tensor:
    """What ``up (out, r)`` makes of it: the shape of the layer's answer."""
    if isinstance(module, nn.Conv2d):
        return functional.conv2d(thin, up[:, :, None, None])
    return thin @ up.T


def _layers(model: Any, convolutions: bool) -> dict[int, nn.Module]:
    """Identity of the weight -> layer that can be changed."""

    def fits(module: nn.Module) -> bool:
        plain = isinstance(module, nn.Conv2d) and module.padding_mode == "zeros"
        return isinstance(module, nn.Linear) or (convolutions and plain and module.groups == 1)

    modules = (module for part in model.parts().values() for module in part.modules())
    return {id(module.weight): module for module in modules if fits(module)}


def adaptable(model: Any, convolutions: bool = True) -> list[str]:
    """Canonical names of all weights of a model that can have a change."""
    layers = _layers(model, convolutions)
    return [name for name, weight in model.tensors().items() if id(weight) in layers]


def stored(
    parts: Mapping[str, Sequence[tuple[Tensor, Tensor]]],
) -> tuple[Literal["low-rank", "dense"], dict[str, Tensor]]:
    """The tensors of an edit whose changes are sums of low-rank ones: as factors or dense, whichever are smaller.

    Args:
        parts: Name of each weight -> factors ``(up, down)`` that are added up, at least one pair.
    """
    factors = {
        name: tuple(
            torch.cat([pair[side].detach().to("cpu", torch.float64) for pair in pairs], 1 - side)
            for side in (0, 1)
        )
        for name, pairs in parts.items()
    }
    thin = sum(up.numel() + down.numel() for up, down in factors.values())
    if thin < sum(up.shape[0] * down.shape[1] for up, down in factors.values()):
        found = {deltas.UP + name: up.float() for name, (up, _) in factors.items()}
        found |= {deltas.DOWN + name: down.float() for name, (_, down) in factors.items()}
        return "low-rank", found
    return "dense", {
        deltas.DENSE + name: (up @ down).float() for name, (up, down) in factors.items()
    }
