"""The edits on a model: put on, taken off, lifted for a while, always bit for bit.

Reverting restores saved originals of the touched tensors (adding and subtracting a delta is not
exact).  Removing one of several recomputes the rest from the base in the recorded order.  New tokens are objects
of their own in the places of the model's tokenizer and token table, which go back there as they were.
"""

from __future__ import annotations

import contextlib
import dataclasses
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
from . import acting, adapters, deltas
from .tokens import Words, tables

if TYPE_CHECKING:
    from ..method import Control
    from ..models.base import Model
    from . import Edit

__all__ = ["EditStack"]


@dataclasses.dataclass
class _On:
    """An edit on the model, with what it brought beside changed weights."""

    edit: Edit
    words: Words | None = None
    control: Control | None = None


class EditStack:
    """Edits in the order in which they were put on, with the base values they replaced.

    Attributes:
        originals: Canonical name -> base values of a weight that was written to.
        training: Rows of tokens are being learnt (:func:`expunge.edit.tokens.in_training`), so nothing that
            a text encoder says may be remembered.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._on: list[_On] = []
        self.originals: dict[str, torch.Tensor] = {}
        self.training = False

    @property
    def digests(self) -> tuple[str, ...]:
        """Digests of the edits, in order."""
        return tuple(on.edit.digest for on in self._on)

    @property
    def acting(self) -> dict[str, Control]:
        """Digest -> control of the edits that act, in the edits' order."""
        return {on.edit.digest: on.control for on in self._on if on.control is not None}

    @property
    def controls(self) -> tuple[Control, ...]:
        """Controls of the edits that act, in the edits' order."""
        return tuple(self.acting.values())

    @property
    def replaced(self) -> dict[str, torch.Tensor]:
        """Canonical name -> the base's own token table, where larger ones stand in its place."""
        found: dict[str, torch.Tensor] = {}
        for on in self._on:
            if on.words is not None:
                found = {**on.words.replaced, **found}
        return found

    @property
    def marks(self) -> tuple[int, ...]:
        """Names the new tokens on the model, for keys of remembered texts; no two exchanges share a mark."""
        return tuple(on.words.mark for on in self._on if on.words is not None)

    def words_of(self, edit: Edit) -> Words:
        """The tokens of an edit on the model.

        Raises:
            NotOnModel: It is not on the model, or brings no tokens.
        """
        for on in self._on:
            if on.edit.digest == edit.digest and on.words is not None:
                return on.words
        raise NotOnModel(
            f"edit {edit.digest[:12]} ({edit.manifest.method}) has no tokens on {self._model.name}"
        )

    def __iter__(self) -> Iterator[Edit]:
        return iter(tuple(on.edit for on in self._on))

    def __len__(self) -> int:
        return len(self._on)

    def push(self, edit: Edit, *, rebase: bool = False, sibling: bool = False) -> None:
        """Put an edit on top: weights, then new tokens, then its control.

        All checks come first; an error leaves the model untouched.

        Args:
            edit: The edit.
            rebase: Allow it on another stack of edits than it was fitted on; gated adapters need no leave to stand
                on each other.
            sibling: Allow it on other weights of the same structure (a fine-tuned sibling).
        """
        self.check(edit, rebase=rebase, sibling=sibling)
        fresh = self._new_values(edit)
        words = Words(self._model, edit, fresh) if edit.manifest.tokens else None
        tensors, known = self._model.tensors(), {*self.originals, *self.replaced}
        saved = {name: tensors[name].detach().clone() for name in fresh}
        before, first = list(self._on), [name for name in fresh if name not in known]
        try:
            self.originals.update({name: saved[name] for name in first})
            with torch.no_grad():
                for name, value in fresh.items():
                    tensors[name].copy_(value)
            if words is not None:
                words.on()
            self._on.append(_On(edit, words))
            if edit.manifest.acts:
                self._on[-1].control = acting.build(edit, self._model)
        except BaseException:
            self._on = before
            if words is not None:
                words.off()
            with torch.no_grad():
                for name, value in saved.items():
                    tensors[name].copy_(value)
            for name in first:
                self.originals.pop(name, None)
            raise

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
        rest = [other for other in self if other.digest != edit.digest]
        for other in rest:
            if edit.digest in other.manifest.fitted_on and other.digest not in although:
                raise WrongState(
                    f"edit {other.digest[:12]} ({other.manifest.method}) was fitted on {edit.digest[:12]}; "
                    "remove it first, or name its digest in although= to keep it"
                )
        before = list(self)
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
        self._words_off()
        if self.originals:
            tensors = self._model.tensors()
            with torch.no_grad():
                for name, value in self.originals.items():
                    tensors[name].copy_(value)
        self.originals = {}
        self._on = []

    def _words_off(self) -> None:
        for on in reversed(self._on):
            if on.words is not None:
                on.words.off()

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Without any edit inside the block; the edited values come back bit for bit.

        Nothing is recomputed: base and edited values are exchanged and exchanged back.
        """
        if not self._on:
            yield
            return
        tensors = {**self._model.tensors(), **self.replaced}
        held, originals = self._on, self.originals
        edited = {name: tensors[name].detach().clone() for name in originals}
        try:
            self._words_off()
            self._on, self.originals = [], {}
            with torch.no_grad():
                for name, value in originals.items():
                    tensors[name].copy_(value)
            yield
        finally:
            self.clear()
            with torch.no_grad():
                for name, value in edited.items():
                    tensors[name].copy_(value)
            self._on, self.originals = held, originals
            for on in held:
                if on.words is not None:
                    on.words.on()

    def check(self, edit: Edit, *, rebase: bool = False, sibling: bool = False) -> None:
        """Refuse, in words, an edit that may not go on the model as it is now; changes nothing."""
        from .fingerprint import Fingerprint

        model = self._model
        if edit.digest in self.digests:
            raise WrongState(
                f"edit {edit.digest[:12]} ({edit.manifest.method}) is already on {model.name}"
            )
        names = [*(target.name for target in edit.manifest.targets), *adapters.layers(edit)]
        tensors = model.tensors()
        if not (names or edit.manifest.acts or edit.manifest.tokens):
            raise MissingPart(
                f"the edit of {edit.manifest.method} names no tensor, so it would do nothing"
            )
        if edit.manifest.acts:
            acting.check(edit, model)
        adapters.check(edit, model)
        touched = [*names, *tables(model, list(edit.manifest.tokens))]
        for target in edit.manifest.targets:
            if target.name not in tensors:
                raise MissingPart(
                    f"{model.name}: there is no tensor {target.name!r}{nearest(target.name, tensors)}; "
                    f"the edit of {edit.manifest.method} was fitted on another kind of model"
                )
            shape = tuple(tensors[target.name].shape)
            if shape != tuple(target.shape):
                raise WrongShape(
                    f"{target.name}: the edit has shape {tuple(target.shape)}, the model {shape}"
                )
        verdict, where = Fingerprint.from_dict(edit.manifest.base).agreement(
            model.fingerprint(list(dict.fromkeys(touched)))
        )
        if verdict == "structure" or (verdict == "different" and not sibling):
            raise WrongBase(
                f"the edit of {edit.manifest.method} was fitted on other weights than {model.name} "
                f"({verdict}: {where})"
            )
        below = adapters.stacked_on(edit, tuple(self))
        if not rebase and tuple(edit.manifest.fitted_on) != below:
            was = ", ".join(d[:12] for d in edit.manifest.fitted_on) or "the bare base"
            has = ", ".join(d[:12] for d in below) or "no edit"
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
