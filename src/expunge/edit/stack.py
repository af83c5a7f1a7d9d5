"""The edits on a model: put on, taken off, lifted for a while, always bit for bit.

Reverting restores saved originals of the touched tensors (adding and subtracting a delta is not
exact).  Removing one of several recomputes the rest from the base in the recorded order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from ..errors import (
    MissingPart,
    NonFiniteError,
    NotOnModel,
    WrongBase,
    WrongShape,
    WrongState,
    nearest,
)
from . import deltas

if TYPE_CHECKING:
    from ..models.base import Model
    from . import Edit

__all__ = ["EditStack"]


class EditStack:
    """Edits in the order in which they were put on, with the base values they replaced."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._edits: list[Edit] = []
        self.originals: dict[str, torch.Tensor] = {}

    @property
    def digests(self) -> tuple[str, ...]:
        """Digests of the edits, in order."""
        return tuple(edit.digest for edit in self._edits)

    def __iter__(self) -> Iterator[Edit]:
        return iter(tuple(self._edits))

    def __len__(self) -> int:
        return len(self._edits)

    def push(self, edit: Edit, *, rebase: bool = False, sibling: bool = False) -> None:
        """Put an edit on top.  All checks come first; an error leaves the model untouched.

        Args:
            edit: The edit.
            rebase: Allow it on another stack of edits than it was fitted on.
            sibling: Allow it on other weights of the same structure (a fine-tuned sibling).
        """
        self.check(edit, rebase=rebase, sibling=sibling)
        fresh = self._new_values(edit)
        tensors = self._model.tensors()
        with torch.no_grad():
            for name, value in fresh.items():
                if name not in self.originals:
                    self.originals[name] = tensors[name].detach().clone()
                tensors[name].copy_(value)
        self._edits.append(edit)

    def remove(self, edit: Edit, *, although: tuple[str, ...] = ()) -> None:
        """Take one edit off and recompute the others from the base, in order.

        Args:
            edit: An edit on the model (compared by digest).
            although: Digests of edits that were fitted on it and may stay all the same.

        Raises:
            NotOnModel: It is not on the model.
            WrongState: Another edit was fitted on it and is not named in ``although``.
        """
        if edit.digest not in self.digests:
            raise NotOnModel(
                f"edit {edit.digest[:12]} ({edit.manifest.method}) is not on {self._model.name}"
            )
        rest = [other for other in self._edits if other.digest != edit.digest]
        for other in rest:
            if edit.digest in other.manifest.fitted_on and other.digest not in although:
                raise WrongState(
                    f"edit {other.digest[:12]} ({other.manifest.method}) was fitted on {edit.digest[:12]}; "
                    "remove it first, or name its digest in although= to keep it"
                )
        before = list(self._edits)
        self.clear()
        try:
            for other in rest:
                self.push(other, rebase=True, sibling=True)
        except BaseException:
            self.clear()
            for other in before:
                self.push(other, rebase=True, sibling=True)
            raise

    def clear(self) -> None:
        """Take all edits off; the base values come back bit for bit."""
        if self.originals:
            tensors = self._model.tensors()
            with torch.no_grad():
                for name, value in self.originals.items():
                    tensors[name].copy_(value)
        self.originals = {}
        self._edits = []

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Without any edit inside the block; the edited values come back bit for bit.

        Nothing is recomputed: base and edited values are exchanged and exchanged back.
        """
        if not self._edits:
            yield
            return
        tensors = self._model.tensors()
        edits, originals = self._edits, self.originals
        edited = {name: tensors[name].detach().clone() for name in originals}
        self._edits, self.originals = [], {}
        with torch.no_grad():
            for name, value in originals.items():
                tensors[name].copy_(value)
        try:
            yield
        finally:
            self.clear()
            with torch.no_grad():
                for name, value in edited.items():
                    tensors[name].copy_(value)
            self._edits, self.originals = edits, originals

    def check(self, edit: Edit, *, rebase: bool = False, sibling: bool = False) -> None:
        """Refuse, in words, an edit that may not go on the model as it is now; changes nothing."""
        from .fingerprint import Fingerprint

        model = self._model
        if edit.digest in self.digests:
            raise WrongState(
                f"edit {edit.digest[:12]} ({edit.manifest.method}) is already on {model.name}"
            )
        names = [target.name for target in edit.manifest.targets]
        tensors = model.tensors()
        if not names:
            raise MissingPart(
                f"the edit of {edit.manifest.method} names no tensor, so it would do nothing"
            )
        for target in edit.manifest.targets:
            if target.name not in tensors:
                raise MissingPart(
                    f"{model.name}: there is no tensor {target.name!r}{nearest(target.name, tensors)}"
                )
            shape = tuple(tensors[target.name].shape)
            if shape != tuple(target.shape):
                raise WrongShape(
                    f"{target.name}: the edit has shape {tuple(target.shape)}, the model {shape}"
                )
        verdict, where = Fingerprint.from_dict(edit.manifest.base).agreement(
            model.fingerprint(names)
        )
        if verdict == "structure" or (verdict == "different" and not sibling):
            raise WrongBase(
                f"the edit of {edit.manifest.method} was fitted on other weights than {model.name} "
                f"({verdict}: {where})"
            )
        if not rebase and tuple(edit.manifest.fitted_on) != self.digests:
            was = ", ".join(d[:12] for d in edit.manifest.fitted_on) or "the bare base"
            has = ", ".join(d[:12] for d in self.digests) or "no edit"
            raise WrongState(
                f"the edit of {edit.manifest.method} was fitted on {was}; {model.name} has {has} on it"
            )

    def _new_values(self, edit: Edit) -> dict[str, torch.Tensor]:
        tensors = self._model.tensors()
        fresh = {}
        with torch.no_grad():
            for target in edit.manifest.targets:
                weight = tensors[target.name]
                value = (weight.double() + deltas.change(edit, target.name, weight)).to(
                    weight.dtype
                )
                if not torch.isfinite(value).all():
                    raise NonFiniteError(
                        f"{target.name}: the edit makes NaN or infinity in {weight.dtype}"
                    )
                fresh[target.name] = value
        return fresh
