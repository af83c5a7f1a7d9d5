"""Fingerprint: which weights an edit belongs to, cheap enough for large models.

Per touched component a structure digest (canonical names and shapes), a fixed sample of values of every tensor
kept as numbers, and an exact digest of the touched tensors.  The sample tells "the same weights in another
precision" (every value equals the other one rounded) from "other weights": a tolerance would call a light
fine-tune equal, because it moves weights by less than bfloat16 rounds.

:func:`base_digest` names the base in states and cache keys: it covers every bit of every tensor.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from .checksums import tensor_digest

if TYPE_CHECKING:
    from ..models.base import Model

__all__ = ["Fingerprint", "base_digest", "fingerprint", "tensor_digest"]

SAMPLES = 8
"""Sampled values of each tensor: no tensor of a component is left out, as an edit may change a few only."""

Agreement = Literal["equal", "precision", "different", "structure"]


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Identity of base weights.

    Attributes:
        id: Short digest of everything below.
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
    dtypes = (getattr(torch, str(one["dtype"])), getattr(torch, str(two["dtype"])))
    if set(dtypes) == {torch.float16, torch.bfloat16}:
        # Neither can be had from the other: both were rounded from one value, each by half a step at most.
        room = (_step(first, dtypes[0]) + _step(second, dtypes[1])) / 2
        return bool(((first - second).abs() <= room).all())
    return any(
        torch.equal(first.to(torch.float32).to(dtype), second.to(torch.float32).to(dtype))
        for dtype in dtypes
    )


def _step(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Distance to the next larger number of a dtype, float64."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.abs().clamp(min=info.smallest_normal))
    return torch.ldexp(torch.full_like(values, info.eps), exponent - 1)


def _base(model: Model) -> dict[str, torch.Tensor]:
    """Canonical name -> tensor of the base; what an edit has changed counts with its saved original."""
    # Originals win: a table may have been written to before a larger one took its place.
    base = {**model.edits.replaced, **model.edits.originals}
    return {name: base.get(name, p) for name, p in model.tensors().items()}


def _places(tensor: torch.Tensor) -> torch.Tensor:
    """``SAMPLES`` values (all, if there are fewer), spread so that they do not stand in one column."""
    step = max(1, (tensor.numel() - 1) // (SAMPLES - 1))
    if tensor.is_contiguous():
        return tensor.detach().view(-1)[::step][:SAMPLES]
    index = torch.arange(0, tensor.numel(), step, device=tensor.device)[:SAMPLES]
    return tensor.detach()[torch.unravel_index(index, tensor.shape)]


def _samples(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[float]]:
    """Sampled values of each tensor; one transfer for all tensors of a device and dtype."""
    alike: dict[tuple[torch.device, torch.dtype], list[str]] = {}
    for name, tensor in tensors.items():
        alike.setdefault((tensor.device, tensor.dtype), []).append(name)
    found: dict[str, list[float]] = {}
    for names in alike.values():
        parts = [_places(tensors[name]) for name in names]
        values = iter(torch.cat(parts).cpu().double().tolist())
        for name, part in zip(names, parts, strict=True):
            found[name] = [next(values) for _ in range(len(part))]
    return found


def _shortest(values: Sequence[float], dtype: torch.dtype) -> list[float]:
    """The same numbers with no more digits than float32 and below need: they stand as text in a file."""
    if dtype == torch.float64:
        return list(values)
    return [float(str(number)) for number in np.array(values, np.float32)]


def fingerprint(model: Model, names: Sequence[str] = ()) -> Fingerprint:
    """Fingerprint of the components that ``names`` touch (all components without names).

    Tensors that an edit has changed count with their saved originals.
    """
    tensors = _base(model)
    touched = {name.split(".", 1)[0] for name in names} or {n.split(".", 1)[0] for n in tensors}
    samples = _samples({n: t for n, t in tensors.items() if n.split(".", 1)[0] in touched})
    components: dict[str, dict[str, Any]] = {}
    for component in sorted(touched):
        own = sorted(name for name in samples if name.split(".", 1)[0] == component)
        shapes = "\n".join(f"{name}{tuple(tensors[name].shape)}" for name in own)
        components[component] = {
            "structure": hashlib.sha256(shapes.encode()).hexdigest()[:32],
            "dtype": str(tensors[own[0]].dtype).removeprefix("torch.") if own else "float32",
            "sample": [v for n in own for v in _shortest(samples[n], tensors[n].dtype)],
        }
    exact = {
        name: model.checksums.digest(name, tensors[name], samples[name])
        for name in sorted(names)
        if name in tensors
    }
    whole = hashlib.sha256(repr((components, exact)).encode()).hexdigest()[:32]
    return Fingerprint(whole, components, exact)


def base_digest(model: Model) -> str:
    """Digest of names and all bits of all base weights (edits lifted), for states and cache keys.

    A tensor is read in full once, and again only after it was written to or replaced.
    """
    tensors = _base(model)
    samples, digest = _samples(tensors), hashlib.sha256()
    for name in sorted(tensors):
        own = model.checksums.digest(name, tensors[name], samples[name])
        digest.update(f"{name}|{own}\n".encode())
    return digest.hexdigest()[:32]
