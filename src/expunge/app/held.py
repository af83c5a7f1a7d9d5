"""The list of edits of a window: what is there, what is on, and in which order they go on a model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import InputError

if TYPE_CHECKING:
    from ..edit import Edit
    from ..models.base import Model

__all__ = ["MAX_FILE", "EditList", "Held", "size"]

MAX_EDITS = 64
MAX_FILE = 2**30
"""Bytes of an edit file that a window takes in."""


@dataclasses.dataclass
class Held:
    """An edit in the list: where its file is, and whether it is on."""

    edit: Edit
    file: Path
    on: bool = True

    @property
    def digest(self) -> str:
        """Names the edit."""
        return self.edit.digest

    @property
    def concepts(self) -> list[str]:
        """Names of what it erases."""
        return [str(entry["name"]) for entry in self.edit.manifest.concepts]

    @property
    def label(self) -> str:
        """Method, concepts and size."""
        bytes_ = size(self.file.stat().st_size)
        return f"{self.edit.manifest.method}: {', '.join(self.concepts)} ({bytes_})"


class EditList:
    """Edits in the order in which they go on.

    Attributes:
        held: All of them.
        rebase, sibling: What :meth:`Edit.on` is asked to allow.
    """

    def __init__(self) -> None:
        self.held: list[Held] = []
        self.rebase = self.sibling = False

    @property
    def on(self) -> list[Held]:
        """Those that are on, in order."""
        return [held for held in self.held if held.on]

    def add(self, edit: Edit, file: Path) -> Held:
        """Put an edit at the end; one that is there already is switched on instead.

        Raises:
            InputError: The list is full.
        """
        known = next((held for held in self.held if held.digest == edit.digest), None)
        if known is None:
            if len(self.held) >= MAX_EDITS:
                raise InputError(f"the list holds {MAX_EDITS} edits already; remove one first")
            known = Held(edit, file)
            self.held.append(known)
        known.on = True
        return known

    def switch(self, digests: Sequence[str]) -> None:
        """Which edits are on; the others stay in the list."""
        for held in self.held:
            held.on = held.digest in digests

    def remove(self, digest: str) -> None:
        """Take an edit off the list; its file stays in the folder of runs."""
        self.held = [held for held in self.held if held.digest != digest]

    def find(self, digest: str | None) -> Held:
        """An edit of the list by its digest.

        Raises:
            InputError: It is not there.
        """
        for held in self.held:
            if held.digest == digest:
                return held
        raise InputError(
            f"no edit {digest[:12]} is in the list"
            if digest
            else "choose an edit of the list first"
        )

    @contextlib.contextmanager
    def applied(self, model: Model, held: Sequence[Held]) -> Iterator[None]:
        """The model with these edits inside the block, as it was afterwards."""
        with contextlib.ExitStack() as stack:
            for one in held:
                stack.enter_context(one.edit.on(model, rebase=self.rebase, sibling=self.sibling))
            yield


def size(number: int) -> str:
    """Bytes for people."""
    for step, unit in ((2**30, "GB"), (2**20, "MB"), (2**10, "kB")):
        if number >= step:
            return f"{number / step:.1f} {unit}".replace(".0 ", " ")
    return f"{number} B"
