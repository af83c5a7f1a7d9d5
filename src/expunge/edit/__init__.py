"""Edit: what an eraser returns, a portable, reversible, stackable change to a model.

edit = RECE().erase(model, star)
with edit.on(model):            # reverted bit for bit at the end
    model.generate("a red star")
edit.save("star.safetensors")
Edit.load("star.safetensors").export("star-lora.safetensors", format="diffusers", model=model)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..errors import EditFormatError, NonFiniteError
from . import adapters, deltas, files
from . import tokens as new_tokens
from .manifest import Kind, Manifest, Target

if TYPE_CHECKING:
    from ..concept import Concept
    from ..method import Method
    from ..models.base import Model

__all__ = ["Edit", "Manifest", "Target"]


@dataclasses.dataclass(frozen=True, eq=False)
class Edit:
    """A change to a model: named tensors and a manifest.  Equal when the digests are equal."""

    manifest: Manifest
    tensors: Mapping[str, torch.Tensor]

    def __post_init__(self) -> None:
        for name, tensor in self.tensors.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise NonFiniteError(
                    f"{self.manifest.method}: tensor {name!r} of the edit holds NaN or infinity"
                )
        names = tuple(target.name for target in self.manifest.targets)
        missing = deltas.required_tensors(self.manifest.kind, names) - set(self.tensors)
        if missing:
            raise EditFormatError(
                f"{self.manifest.method}: the edit lacks the tensor {sorted(missing)[0]!r}"
            )
        adapters.check_factors(self.manifest, self.tensors)
        new_tokens.check_rows(self.manifest, self.tensors)

    @classmethod
    def make(
        cls,
        method: Method,
        model: Model,
        concepts: Sequence[Concept],
        *,
        kind: Kind,
        tensors: Mapping[str, torch.Tensor],
        targets: Sequence[str] = (),
        acts: bool = False,
        tokens: Mapping[str, Sequence[str]] | None = None,
        keep: Sequence[str] = (),
        seed: int = 0,
        cost: Mapping[str, int] | None = None,
        seconds: float | None = None,
        report: Mapping[str, Any] | None = None,
        data_digest: str | None = None,
    ) -> Edit:
        """An edit fitted on ``model`` as it is now; provenance is filled in here, once for all methods.

        Args:
            method, model, concepts, keep, seed, cost, seconds, report, data_digest: Provenance.
            kind: See :class:`Manifest`; ``control`` where no weight changes.
            tensors: What the kind needs (:mod:`expunge.edit.deltas`, :mod:`expunge.edit.adapters`),
                ``tokens.<text encoder>`` of shape ``(k, width)`` for new tokens, and whatever else the method's
                control reads.
            targets: Canonical names of the weights that change.
            acts: The method's :meth:`~expunge.method.Eraser.control` is on while the edit is.
            tokens: Tokenizer (``tokenizer``, ``tokenizer_2``, ...) -> texts of new tokens.
        """
        plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        current, words = model.tensors(), {n: list(texts) for n, texts in (tokens or {}).items()}
        beside = adapters.shapes(tensors) if kind == adapters.GATED else ()
        touched = [
            *targets,
            *beside,
            *(t for t in new_tokens.tables(model, list(words)) if t not in targets),
        ]
        manifest = Manifest(
            kind=kind,
            method=method.id,
            version=method.version,
            preset=method.preset,
            settings=json.loads(json.dumps(method.settings(), default=list)),
            concepts=[concept.to_dict() for concept in concepts],
            keep=[str(name) for name in keep],
            base=model.fingerprint(touched).to_dict(),
            fitted_on=list(model.edits.digests),
            targets=[Target(name=name, shape=tuple(current[name].shape)) for name in targets],
            acts=acts,
            tokens=words,
            seed=seed,
            libraries={
                n: importlib.metadata.version(n) for n in ("torch", "transformers", "diffusers")
            },
            cost=dict(cost or {}),
            seconds=seconds,
            report=dict(report or {}),
            data_digest=data_digest,
            tensors_digest=files.tensors_digest(plain),
        )
        return cls(manifest, plain)

    @property
    def kind(self) -> Kind:
        """Kind of the edit, see :class:`Manifest`."""
        return self.manifest.kind

    @functools.cached_property
    def digest(self) -> str:
        """Names the edit in states and manifests: what it does, not how long it took to make."""
        # Of a preset only the settings count, which stand there in full.
        volatile = {"seconds", "libraries", "report", "cost", "preset"}
        fields = self.manifest.plain(exclude=volatile)
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Edit) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def apply(self, model: Model, *, rebase: bool = False, sibling: bool = False) -> None:
        """Put the edit on the model until :meth:`revert`; see :meth:`EditStack.push`."""
        model.edits.push(self, rebase=rebase, sibling=sibling)

    def revert(self, model: Model, *, although: tuple[str, ...] = ()) -> None:
        """Take the edit off; the others are recomputed from the base in their order."""
        model.edits.remove(self, although=although)

    @contextlib.contextmanager
    def on(self, model: Model, *, rebase: bool = False, sibling: bool = False) -> Iterator[Model]:
        """The model with this edit inside the block; bit-exact afterwards, also after an exception."""
        self.apply(model, rebase=rebase, sibling=sibling)
        try:
            yield model
        finally:
            self.revert(model)

    def change(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The float64 change this edit makes to one weight (given its value before the edit)."""
        return deltas.change(self, name, weight)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, atomically."""
        files.write(path, self.manifest, self.tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Edit:
        """Read an edit file; see :func:`expunge.edit.files.read` for what is refused."""
        manifest, tensors = files.read(path)
        return cls(manifest, tensors)

    def export(
        self,
        path: str | os.PathLike[str],
        *,
        format: str = "diffusers",
        model: Model | None = None,
        rank: int | None = None,
        without_gate: bool = False,
        rebase: bool = False,
        sibling: bool = False,
    ) -> dict[str, Any]:
        """Write the edit for another program: ``diffusers``, ``peft``, ``kohya`` (LoRA) or ``full``.

        See :func:`expunge.edit.export.export`.
        """
        from .export import export

        return export(
            self, path, format=format, model=model, rank=rank, without_gate=without_gate, rebase=rebase,
            sibling=sibling,
        )  # fmt: skip
