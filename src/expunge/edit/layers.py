"""Which layer a tensor belongs to: other programs name layers, not tensors, and treat each kind in its own way."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from torch import nn

if TYPE_CHECKING:
    from ..models.base import Model

__all__ = ["Kind", "Layer", "kind_of_shape", "layers"]

Kind = Literal["linear", "transposed", "convolution", "embedding", "vector", "other"]


@dataclasses.dataclass(frozen=True)
class Layer:
    """The layer that holds a tensor.

    Attributes:
        path: Its name inside its part, as the library has it.
        module: The layer.
        kind: ``linear`` and ``convolution`` (2-d) weights, ``embedding`` tables, ``transposed`` matrices
            ``(in, out)`` of transformers' ``Conv1D``, ``vector`` for all of a layer that holds nothing
            larger (norms), ``other`` for biases and the rest.
        ties: Paths and modules of the other layers that hold the same tensor (an output embedding).
    """

    path: str
    module: nn.Module
    kind: Kind
    ties: tuple[tuple[str, nn.Module], ...] = ()


def layers(model: Model) -> dict[str, Layer]:
    """Canonical tensor name -> the layer that holds it."""
    found: dict[str, Layer] = {}
    for part, root in model.parts().items():
        holders: dict[int, list[tuple[str, nn.Module]]] = {}
        for path, module in root.named_modules():
            for parameter in module._parameters.values():
                if parameter is not None:
                    place = (path.replace(".base_layer", ""), module)
                    holders.setdefault(id(parameter), []).append(place)
        for name, parameter in root.named_parameters():
            (path, module), *others = holders[id(parameter)]
            kind = _kind(module, name.rpartition(".")[2])
            found[f"{part}.{model.canonical(name)}"] = Layer(path, module, kind, tuple(others))
    return found


def kind_of_shape(shape: Sequence[int]) -> Kind:
    """What a weight most likely is, where there is no model to ask."""
    kinds: dict[int, Kind] = {2: "linear", 4: "convolution"}
    return kinds.get(len(shape), "other")


def _kind(module: nn.Module, attribute: str) -> Kind:
    from transformers.pytorch_utils import Conv1D

    if not list(module.children()) and all(p.ndim < 2 for p in module.parameters()):
        return "vector"
    if attribute != "weight" or (isinstance(module, nn.Conv2d) and module.groups != 1):
        return "other"
    kinds: tuple[tuple[type[nn.Module], Kind], ...] = (
        (nn.Linear, "linear"), (Conv1D, "transposed"), (nn.Conv2d, "convolution"), (nn.Embedding, "embedding"),
    )  # fmt: skip
    return next((kind for cls, kind in kinds if isinstance(module, cls)), "other")
