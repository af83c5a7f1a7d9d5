"""What one window has open, and what can be done with it; it knows nothing of how a window looks.

    session = Session(Desk("runs"))
    session.open("world").wait()
    job = session.erase(Erasure("world", Wanted(("star",)), "uce"))
    job.wait(); print(job.state, job.result)

Everything long is a :class:`~expunge.app.jobs.Job`; everything else answers at once.  Models carry edits
inside a job only, so windows that share a model do not disturb each other.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import catalogue
from ..cli import common
from ..errors import ConceptError, EditFormatError, InputError, RunError, nearest
from . import choices, comparing
from .held import MAX_FILE, EditList, Held, size
from .jobs import Job
from .requests import Comparison, Erasure, Examination, Wanted, folder_name

if TYPE_CHECKING:
    from ..concept import Concept
    from ..evidence import Evidence
    from ..models.base import Model
    from .shelf import Desk

__all__ = ["Audited", "Erased", "Session"]


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
        edits: The list of edits.
        job: The last job of this window.
    """

    def __init__(self, desk: Desk) -> None:
        self.desk = desk
        self.name: str | None = None
        self.edits = EditList()
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
                self.edits.held = []
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
        """Concepts as typed, completed by what the world knows.

        Raises:
            ConceptError: There is none, or what was typed is no concept.
        """
        if not wanted.names:
            raise ConceptError(
                "no concept is chosen; choose one the world knows, or type a name and press Enter"
            )
        return common.concepts_of(
            self.model,
            list(wanted.names),
            None,
            wanted.kind or None,
            list(wanted.phrases) or None,
            wanted.anchor or None,
        )

    # -- edits -------------------------------------------------------------------------------------

    def load(self, file: str | Path) -> Job:
        """Take in an edit file; everything about it is checked before it joins the list. The result is a :class:`Held`.

        Raises:
            EditFormatError: The file is too large, or is none by its name.
        """
        path, model, on = Path(file), self.model, list(self.edits.on)
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
            with common.quietly(), self.edits.applied(model, on):
                model.edits.check(edit, rebase=self.edits.rebase, sibling=self.edits.sibling)
            names = [entry["name"] for entry in edit.manifest.concepts]
            folder = folder_name(edit.manifest.method, names, "loaded", edit.digest)
            file = self.desk.runs / folder / "edit.safetensors"
            edit.save(file)  # the browser's copy is temporary
            return self.edits.add(edit, file)

        return self._submit(f"Reading {path.name}", work)

    def export(
        self, digest: str | None, format: str, rank: int | None = None, without_gate: bool = False
    ) -> Job:
        """Write an edit for another program. The result is the file or folder, and the exporter's report."""
        held, model = self.edits.find(digest), self.model
        place = self.desk.runs / held.file.parent.name / f"export-{format}"
        target = (
            place
            if format in ("peft", "full")
            else place / f"{held.edit.manifest.method}-{format}.safetensors"
        )
        below = self.edits.held[: self.edits.held.index(held)]

        def work() -> tuple[Path, dict[str, Any]]:
            fitted = [other for other in below if other.digest in held.edit.manifest.fitted_on]
            with common.quietly(), self.edits.applied(model, fitted):
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
        model, below = self.model, list(self.edits.on)
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
            """The folder depends on the state of the weights, which takes a look at all of them."""
            with common.quietly(), self.edits.applied(model, below):
                state = model.state
                made = [
                    state.base,
                    list(state.edits),
                    eraser.version,
                    eraser.settings(),
                    request.seed,
                    list(request.keep),
                    [c.to_dict() for c in concepts],
                ]
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
        held = self.edits.add(edit, file)
        return Erased(held, folder, before, request.command(below, str(folder)))

    # -- looking -----------------------------------------------------------------------------------

    def compare(self, request: Comparison, wanted: Wanted | None = None) -> Job:
        """Before, after and never at equal seeds; the result is a :class:`~expunge.app.comparing.Grid`."""
        model, held = self.model, list(self.edits.on)
        names = list(_named(held)) or list(wanted.names if wanted is not None else ())
        asked = comparing.asked(model, request, choices.prompts(model, names))

        def work() -> comparing.Grid:
            with common.quietly():
                return comparing.compare(
                    model,
                    asked,
                    request,
                    names,
                    lambda: self.edits.applied(model, held),
                    edited=bool(held),
                )

        return self._submit("Drawing" if model.family != "language" else "Answering", work)

    def audit(self, request: Examination) -> Job:
        """Measure, attack, write the report into a folder of its own; the result is an :class:`Audited`."""
        model, held = self.model, list(self.edits.on)
        if not held:
            raise InputError("no edit is on; erase something or load an edit, then audit it")
        named = _named(held)
        concepts = self.concepts(request.wanted) if request.wanted.names else tuple(named.values())
        for id in request.attacks:
            catalogue.resolve(id)
        if request.judge is None and common.own_judge(model) is None:
            raise InputError(
                f"{model.name} has no judge of its own; name one, for example classifier:model=FOLDER"
            )
        request = dataclasses.replace(request, wanted=Wanted(tuple(c.name for c in concepts)))
        digests = [one.digest for one in held]

        def work() -> Audited:
            """Judge, folder, audit, files."""
            from ..evidence import audit

            judge = common.chosen_judge(model, request.judge)
            files = [one.file for one in held]
            with common.quietly():
                asked = [
                    model.state.base,
                    digests,
                    dataclasses.asdict(request),
                    [c.to_dict() for c in concepts],
                ]
                folder = self.desk.runs / folder_name("audit", [c.name for c in concepts], *asked)
                evidence = audit(
                    model,
                    [one.edit for one in held],
                    concepts,
                    attacks=request.attacks or "none",
                    budget=request.budget,
                    judge=judge,
                    n=request.n,
                    kept_n=request.kept_n,
                    attack_n=request.attack_n,
                    seed=request.seed,
                    rebase=self.edits.rebase,
                    sibling=self.edits.sibling,
                    progress=False,
                    command=request.command(model.name, files, folder.name),
                )
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


def _named(held: Sequence[Held]) -> dict[str, Concept]:
    """Name -> concept of everything that edits erase, as they record it."""
    from ..concept import Concept

    entries = [entry for one in held for entry in one.edit.manifest.concepts]
    return {str(entry["name"]): Concept.from_dict(entry) for entry in entries}
