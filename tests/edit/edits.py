"""Edits for the tests of this folder: three kinds, on the tiny diffusion model."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import torch

from expunge.concept import Concept
from expunge.edit import Edit
from expunge.method import Method, setting

STAR = Concept("star")


@dataclasses.dataclass(frozen=True)
class Maker(Method):
    """Makes edits; nobody's method."""

    id: ClassVar[str] = "maker"
    families: ClassVar[tuple[str, ...]] = ("diffusion",)

    strength: float = setting(0.05, "size of the random change", minimum=0)


def make(
    model: Any,
    kind: str = "shared-low-rank",
    seed: int = 0,
    names: Any = None,
    strength: float = 0.05,
) -> Edit:
    """A random edit fitted on the model as it is."""
    names = tuple(names or model.text_projections())
    draw = torch.Generator().manual_seed(seed)
    table = model.tensors()
    tensors: dict[str, torch.Tensor] = {}
    if kind == "shared-low-rank":
        width = table[names[0]].shape[1]
        tensors["shared.left"] = strength * torch.randn(width, 2, generator=draw)
        tensors["shared.right"] = torch.randn(2, width, generator=draw)
    for name in names:
        shape = table[name].shape
        if kind == "dense":
            tensors[f"delta.{name}"] = strength * torch.randn(shape, generator=draw)
        if kind == "low-rank":
            tensors[f"up.{name}"] = strength * torch.randn(shape[0], 2, generator=draw)
            tensors[f"down.{name}"] = torch.randn(2, table[name][0].numel(), generator=draw)
    return Edit.make(
        Maker(strength=strength),
        model,
        (STAR,),
        kind=kind,
        tensors=tensors,
        targets=names,
        seed=seed,
    )


def values(model: Any) -> dict[str, torch.Tensor]:
    """A copy of every parameter."""
    return {name: p.detach().clone() for name, p in model.tensors().items()}


def same(model: Any, before: dict[str, torch.Tensor]) -> bool:
    """Bit for bit, so that -0.0 and 0.0 differ."""
    return all(
        torch.equal(p.detach().view(torch.uint8), before[n].view(torch.uint8))
        for n, p in model.tensors().items()
    )
