"""Fingerprint: which weights an edit belongs to, cheap enough for large models.

Per touched component a structure digest (canonical names and shapes), a fixed sample of values kept
as numbers, and an exact digest of the touched tensors.  The sample tells "the same weights in
another precision" (every value equals the other one rounded) from "other weights": a tolerance
would call a light fine-tune equal, because it moves weights by less than bfloat16 rounds.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from ..models.base import Model

__all__ = ["Fingerprint", "fingerprint", "tensor_digest"]

SAMPLES = 64
"""Sampled tensors a component, and values a tensor: 4,096 numbers are read for each component."""

Agreement = Literal["equal", "precision", "different", "structure"]


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Identity of base weights.

    Attributes:
        id: Short digest of everything below; names the base in states and cache keys.
        components: Component -> ``{"structure": digest, "dtype": name, "sample": [numbers]}``.
        exact: Touched tensor -> digest of its bytes; empty when none was named.
    """

    id: str
    components: Mapping[str, Mapping[str, Any]]
    exact: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {"id": self.id, "components": dict(self.components), "exact": dict(self.exact)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Fingerprint:
        """The inverse of :meth:`to_dict`."""
        return cls(str(data["id"]), dict(data["components"]), dict(data["exact"]))

    def agreement(self, other: Fingerprint) -> tuple[Agreement, str]:
        """How two fingerprints agree, and on which component they do not.

        Components that only one of them covers are not compared.  ``equal`` needs equal samples and
        equal exact digests; ``precision`` means the same weights in another dtype.
        """
        shared = sorted(set(self.components) & set(other.components))
        verdict: Agreement = "equal"
        for name in shared:
            mine, theirs = self.components[name], other.components[name]
            if mine["structure"] != theirs["structure"]:
                return "structure", name
            if mine["sample"] == theirs["sample"] and mine["dtype"] == theirs["dtype"]:
                continue
            if not _same_values(mine, theirs):
                return "different", name
            verdict = "precision"
        if not shared:
            return "structure", "no common component"
        if verdict == "equal":
            for name in sorted(set(self.exact) & set(other.exact)):
                if self.exact[name] != other.exact[name]:
                    return "different", name
        return verdict, ""


def _same_values(one: Mapping[str, Any], two: Mapping[str, Any]) -> bool:
    first = torch.tensor(one["sample"], dtype=torch.float64)
    second = torch.tensor(two["sample"], dtype=torch.float64)
    if first.shape != second.shape or one["dtype"] == two["dtype"]:
        return False
    coarse = (getattr(torch, str(one["dtype"])), getattr(torch, str(two["dtype"])))
    return any(
        torch.equal(first.to(torch.float32).to(dtype), second.to(torch.float32).to(dtype))
        for dtype in coarse
    )


def tensor_digest(tensor: torch.Tensor) -> str:
    """Digest of dtype, shape and bytes of a tensor."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    head = f"{tensor.dtype}|{tuple(tensor.shape)}|".encode()
    return hashlib.sha256(head + flat.numpy().tobytes()).hexdigest()[:32]


def _sample(tensor: torch.Tensor) -> list[float]:
    flat = tensor.detach().reshape(-1)
    index = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64)
    values: list[float] = flat[index.long().to(flat.device)].to("cpu", torch.float64).tolist()
    return values


def fingerprint(model: Model, names: Sequence[str] = ()) -> Fingerprint:
    """Fingerprint of the components that ``names`` touch (all components without names).

    Tensors that an edit has changed count with their saved originals.
    """
    originals = model.edits.originals
    tensors = {name: originals.get(name, p) for name, p in model.tensors().items()}
    touched = {name.split(".", 1)[0] for name in names} or {n.split(".", 1)[0] for n in tensors}
    components: dict[str, dict[str, Any]] = {}
    for component in sorted(touched):
        own = sorted(name for name in tensors if name.split(".", 1)[0] == component)
        shapes = "\n".join(f"{name}{tuple(tensors[name].shape)}" for name in own)
        step = max(1, len(own) // SAMPLES)
        chosen = own[::step][:SAMPLES]
        components[component] = {
            "structure": hashlib.sha256(shapes.encode()).hexdigest()[:32],
            "dtype": str(tensors[own[0]].dtype).removeprefix("torch.") if own else "float32",
            "sample": [v for name in chosen for v in _sample(tensors[name])],
        }
    exact = {name: tensor_digest(tensors[name]) for name in sorted(names) if name in tensors}
    whole = hashlib.sha256(repr((components, exact)).encode()).hexdigest()[:32]
    return Fingerprint(whole, components, exact)
