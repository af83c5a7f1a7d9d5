"""What one window has open, and what can be done with it; it knows nothing of how a window looks.

    session = Session(Desk("runs"))
    session.open("world").wait()
    job = session.erase(Erasure("world", Wanted(("star",)), "uce"))
    job.wait(); print(job.state, job.result)

Everything long is a :class:`~expunge.app.jobs.Job`; everything else answers at once.  Models carry edits
inside a job only, so windows that share a model do not disturb each other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import catalogue
from ..cli import common
from ..errors import EditFormatError, InputError, RunError, nearest
from . import choices, comparing, judging
from .jobs import Job
from .requests import Comparison, Erasure, Examination, Wanted, folder_name

if TYPE_CHECKING:
    from ..concept import Concept
    from ..edit import Edit
    from ..evidence import Evidence
    from ..models.base import Model
    from .shelf import Desk

__all__ = ["Audited", "Erased", "Held", "Session"]

MAX_FILE = 2**30
"""Bytes of an edit file that a window takes in."""
MAX_EDITS = 64


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
        return f"{self.edit.manifest.method}: {', '.join(self.concepts)} ({size(self.file.stat().st_size)})"


@dataclasses.dataclass(frozen=True)
class Erased:
    """What an erasure gave: the edit, its folder, whether it had been made before, and the same as a command."""

    held: Held
    folder: Path
    before: bool
    command: str


@dataclasses.dataclass(frozen=True)
class Audited:
    """What an audit gave, and its files by name."""

    evidence: Evidence
    files: dict[str, Path]


class Session:
    """One window.

    Attributes:
        name: The chosen model, or ``None``.
        held: Edits in the order in which they go on.
        rebase, sibling: What :meth:`Edit.on` is asked to allow.
        job: The last job of this window.
    """

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.name: str | None = None
        self.held: list[Held] = []
        self.rebase = self.sibling = False
        self.job: Job | None = None

    # -- the model ---------------------------------------------------------------------------------

    def open(self, name: str) -> Job:
        """Open a model; the edits of another one are put away. The result is the model."""
        wanted = (name or "").strip()
        if not wanted:
            raise InputError("no model was named; a model is `world`, a folder or a hub id")

        def work() -> Model:
            with common.quietly():
                model = self.desk.model(wanted)
            self.desk.use(id(self), wanted)
            if self.name != wanted:
                self.held = []
            self.name = wanted
            return model

        return self._submit(f"Opening {wanted}", work)

    @property
    def model(self) -> Model:
        """The open model.

        Raises:
            InputError: None is.
        """
        model = self.desk.models.get(self.name) if self.name is not None else None
        if model is None:
            raise InputError("no model is open yet; choose one and press Open")
        return model

    def close(self) -> None:
        """The window is gone: its job is stopped, and a model nobody else uses is closed."""
        if self.job is not None:
            self.job.stop()
        self.desk.queue.submit("closing", lambda: self.desk.use(id(self), None))

    def _submit(self, label: str, work: Any) -> Job:
        if self.job is not None and not self.job.over:
            raise RunError(
                f"this window is still busy ({self.job.label.lower()}); stop that first, or wait for it"
            )
        self.job = self.desk.queue.submit(label, work)
        return self.job

    def concepts(self, wanted: Wanted) -> tuple[Concept, ...]:
        """Concepts as typed, completed by what the world knows."""
        return common.concepts_of(
            self.model,
            list(wanted.names),
            None,
            wanted.kind or None,
            list(wanted.phrases) or None,
            wanted.anchor or None,
        )

    # -- edits -------------------------------------------------------------------------------------

    @property
    def on(self) -> list[Held]:
        """The edits that are on, in order."""
        return [held for held in self.held if held.on]

    def load(self, file: str | Path) -> Job:
        """Take in an edit file; everything about it is checked before it joins the list. The result is a :class:`Held`.

        Raises:
            EditFormatError: The file is too large, or is none by its name.
        """
        path, model, on = Path(file), self.model, list(self.on)
        if path.suffix != ".safetensors":
            raise EditFormatError(
                f"{path.name}: an edit is one file whose name ends in .safetensors"
            )
        if path.stat().st_size > MAX_FILE:
            raise EditFormatError(
                f"{path.name}: has {size(path.stat().st_size)}; at most {size(MAX_FILE)} are taken in"
            )

        def work() -> Held:
            from ..edit import Edit

            edit = Edit.load(path)
            self._fresh(edit)
            with common.quietly(), self._edits_on(model, on):
                model.edits.check(edit, rebase=self.rebase, sibling=self.sibling)
            names = [entry["name"] for entry in edit.manifest.concepts]
            folder = folder_name(edit.manifest.method, names, "loaded", edit.digest)
            file = self.desk.runs / folder / "edit.safetensors"
            edit.save(file)  # the browser's copy is temporary
            self.held.append(Held(edit, file))
            return self.held[-1]

        return self._submit(f"Reading {path.name}", work)

    def _fresh(self, edit: Edit) -> None:
        if any(held.digest == edit.digest for held in self.held):
            raise InputError(f"this edit ({edit.manifest.method}) is in the list already")
        if len(self.held) >= MAX_EDITS:
            raise InputError(f"the list holds {MAX_EDITS} edits already; remove one first")

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
            "choose an edit of the list first"
            if not digest
            else f"no edit {digest[:12]} is in the list"
        )

    @contextlib.contextmanager
    def _edits_on(self, model: Model, held: Sequence[Held]) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for one in held:
                stack.enter_context(one.edit.on(model, rebase=self.rebase, sibling=self.sibling))
            yield

    def export(
        self, digest: str | None, format: str, rank: int | None = None, without_gate: bool = False
    ) -> Job:
        """Write an edit for another program. The result is the file or folder, and the exporter's report."""
        held, model = self.find(digest), self.model
        place = self.desk.runs / held.file.parent.name / f"export-{format}"
        target = (
            place
            if format in ("peft", "full")
            else place / f"{held.edit.manifest.method}-{format}.safetensors"
        )
        below = self.held[: self.held.index(held)]

        def work() -> tuple[Path, dict[str, Any]]:
            fitted = [other for other in below if other.digest in held.edit.manifest.fitted_on]
            with common.quietly(), self._edits_on(model, fitted):
                report = held.edit.export(
                    target, format=format, model=model, rank=rank, without_gate=without_gate
                )
            return target, report

        return self._submit(f"Exporting {held.label}", work)

    # -- erasing -----------------------------------------------------------------------------------

    def methods(self) -> list[choices.Choice]:
        """Implemented erasers for the open model's family."""
        return choices.methods(self.model.family)

    def erase(self, request: Erasure) -> Job:
        """Erase, on top of the edits that are on; the result is an :class:`Erased`, and the edit joins the list.

        The folder is named after the request: asking for the same again takes up what was interrupted, and what
        was finished is read instead of made again.
        """
        model, below = self.model, list(self.on)
        concepts = self.concepts(request.wanted)
        ids = [choice.id for choice in self.methods()]
        if request.method not in ids:
            raise InputError(
                f"{request.method!r} is no eraser for {model.family} models{nearest(request.method, ids)}"
            )
        pairs = [f"{key}={value}" for key, value in request.settings.items()]
        eraser = common.configured(request.method, "erase", model, request.preset, pairs, concepts)
        named = ", ".join(c.name for c in concepts)

        def work() -> Erased:
            with common.quietly(), self._edits_on(model, below):
                state = model.state
                made = [state.base, list(state.edits), eraser.version, eraser.settings(), request.seed, list(request.keep),
                        [c.to_dict() for c in concepts]]  # fmt: skip
                folder = self.desk.runs / folder_name(
                    request.method, [c.name for c in concepts], *made
                )
                return self._erase(
                    model, eraser, concepts, request, folder, [one.file for one in below]
                )

        return self._submit(f"Erasing {named} with {request.method}", work)

    def _erase(
        self,
        model: Model,
        eraser: Any,
        concepts: Sequence[Concept],
        request: Erasure,
        folder: Path,
        below: Sequence[Path],
    ) -> Erased:
        from ..edit import Edit
        from ..edit.files import atomic_write

        file = folder / "edit.safetensors"
        before = file.exists()
        if before:
            edit = Edit.load(file)
        else:
            atomic_write(folder / "request.json", json.dumps(request.to_dict(), indent=1).encode())
            judge = common.own_judge(model)
            edit = eraser.erase(
                model,
                concepts,
                keep=request.keep,
                judge=judge,
                seed=request.seed,
                run=folder / "run",
            )
            text = json.dumps(edit.manifest.model_dump(mode="json"), indent=1) + "\n"
            atomic_write(folder / "edit.json", text.encode())
            edit.save(file)  # last: what has an edit is finished
        known = next((held for held in self.held if held.digest == edit.digest), None)
        held = known or Held(edit, file)
        if known is None:
            self._fresh(edit)
            self.held.append(held)
        held.on = True
        return Erased(held, folder, before, request.command(below, str(folder)))

    # -- looking -----------------------------------------------------------------------------------

    def compare(self, request: Comparison, wanted: Wanted = Wanted(())) -> Job:
        """Before, after and never at equal seeds; the result is a :class:`~expunge.app.comparing.Grid`."""
        model, held = self.model, list(self.on)
        names = list(dict.fromkeys(name for one in held for name in one.concepts)) or list(
            wanted.names
        )
        asked = comparing.asked(model, request, choices.prompts(model, names))

        def work() -> comparing.Grid:
            with common.quietly():
                return comparing.compare(
                    model,
                    asked,
                    request,
                    names,
                    lambda: self._edits_on(model, held),
                    edited=bool(held),
                )

        return self._submit("Drawing" if model.family != "language" else "Answering", work)

    def audit(self, request: Examination) -> Job:
        """Measure, attack, write the report into a folder of its own; the result is an :class:`Audited`."""
        model, held = self.model, list(self.on)
        if not held:
            raise InputError("no edit is on; erase something or load an edit, then audit it")
        wanted = request.wanted if request.wanted.names else Wanted(_names(held))
        concepts = self.concepts(wanted)
        for id in request.attacks:
            catalogue.resolve(id)
        request = dataclasses.replace(request, wanted=wanted)
        digests = [one.digest for one in held]

        def work() -> Audited:
            from ..evidence import audit

            judge = judging.judge_of(model, concepts, request.clip, request.labels)
            files = [one.file for one in held]
            with common.quietly():
                named = [
                    model.state.base,
                    digests,
                    dataclasses.asdict(request),
                    [c.to_dict() for c in concepts],
                ]
                folder = self.desk.runs / folder_name("audit", [c.name for c in concepts], *named)
                evidence = audit(
                    model, [one.edit for one in held], concepts, attacks=request.attacks or "none", budget=request.budget,
                    judge=judge, n=request.n, kept_n=request.kept_n, attack_n=request.attack_n, seed=request.seed,
                    rebase=self.rebase, sibling=self.sibling, progress=False,
                    command=None if request.clip else request.command(model.name, files, folder.name),
                )  # fmt: skip
                return Audited(evidence, evidence.save(folder))

        return self._submit(f"Auditing {', '.join(c.name for c in concepts)}", work)

    def reports(self) -> list[tuple[str, Path]]:
        """Reports in the folder of runs, the newest first."""
        files = sorted(
            self.desk.runs.glob("*/report.html"), key=lambda f: f.stat().st_mtime, reverse=True
        )
        return [(file.parent.name, file) for file in files]

    def report(self, folder: str) -> Path:
        """One of :meth:`reports`, by the name of its folder.

        Raises:
            InputError: There is no such report.
        """
        found = dict(self.reports())
        if folder not in found:
            raise InputError(f"no report {folder!r} is in the folder of runs")
        return found[folder]


def _names(held: Sequence[Held]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for one in held for name in one.concepts))


def size(number: int) -> str:
    """Bytes for people."""
    for step, unit in ((2**30, "GB"), (2**20, "MB"), (2**10, "kB")):
        if number >= step:
            return f"{number / step:.1f} {unit}".replace(".0 ", " ")
    return f"{number} B"
