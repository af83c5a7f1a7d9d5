"""Evidence: the validated result of an audit, with what to do with it."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import PrivateAttr, ValidationError

from ..errors import InputError
from .gallery import Gallery
from .schema import ARMS, ConceptFields, EvidenceFields

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Evidence", "write_atomically"]

NARROW = 90
"""Columns of a terminal that the table with intervals beside the rates needs, by its longest usual labels."""


class Evidence(EvidenceFields):
    """The result of an audit; ``gallery`` holds outputs to look at and is not part of the JSON."""

    _gallery: dict[str, Gallery] = PrivateAttr(default_factory=dict)

    @property
    def gallery(self) -> dict[str, Gallery]:
        """Concept -> outputs kept for the report; empty after :meth:`load`."""
        return self._gallery

    def to_json(self) -> str:
        """The document ``evidence.json``, indented, keys in the order of the schema."""
        return json.dumps(self.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n"

    def save(self, folder: str | os.PathLike[str]) -> dict[str, Path]:
        """Write ``evidence.json``, ``report.html`` and, where there are pictures, ``contact-sheet.png``.

        Each file is written atomically.  Returns name -> path.
        """
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        written = {"evidence": place / "evidence.json", "report": place / "report.html"}
        write_atomically(written["evidence"], self.to_json().encode())
        self.report(written["report"])
        if any(gallery.has_pictures for gallery in self._gallery.values()):
            written["contact_sheet"] = place / "contact-sheet.png"
            self.contact_sheet(written["contact_sheet"])
        return written

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Evidence:
        """Read ``evidence.json`` (or the folder that holds it).

        Raises:
            InputError: It cannot be read, or a key or value is not of this version's schema.
        """
        file = Path(path)
        file = file / "evidence.json" if file.is_dir() else file
        try:
            return cls.model_validate_json(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{file.name}: cannot be read ({error.strerror})") from None
        except UnicodeDecodeError as error:
            raise InputError(f"{file.name}: byte {error.start} is not UTF-8") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "document"
            raise InputError(f"{file.name}: {where}: {first['msg']}") from None

    def report(self, path: str | os.PathLike[str]) -> Path:
        """Write the self-contained HTML report."""
        from .report import render

        write_atomically(Path(path), render(self).encode())
        return Path(path)

    def contact_sheet(self, path: str | os.PathLike[str]) -> Path:
        """Write the pictures of the first concept as one labelled PNG."""
        from .contact_sheet import sheet

        write_atomically(Path(path), sheet(self))
        return Path(path)

    def value(self, path: str, concept: str | None = None) -> Any:
        """The field at a dotted path of a concept, as used by ``intervals``; ``None`` where null."""
        found: Any = self.of(concept)
        for part in path.split("."):
            if found is None:
                return None
            if isinstance(found, list):
                found = next((entry for entry in found if getattr(entry, "id", None) == part), None)
            elif isinstance(found, dict):
                # Names of concepts may hold dots themselves; then the rest of the path is the key.
                rest = path.split(f".{part}", 1)
                found = found.get(part, found.get(part + (rest[1] if len(rest) > 1 else "")))
            else:
                found = getattr(found, part)
        return found

    def of(self, concept: str | None = None) -> ConceptFields:
        """The fields of one concept (the first without a name)."""
        if concept is None:
            return next(iter(self.concepts.values()))
        if concept not in self.concepts:
            raise InputError(
                f"the evidence has no concept {concept!r}; it has {', '.join(self.concepts)}"
            )
        return self.concepts[concept]

    def table(self, concept: str | None = None, width: int | None = None) -> Table:
        """A short table for the terminal: the three models, attacks, n and intervals.

        Args:
            concept: Whose; the first without a name.
            width: Columns of the terminal; below 90 an interval stands under its rate.
        """
        from rich.markup import escape
        from rich.table import Table

        name = concept or next(iter(self.concepts))
        fields = self.of(name)
        line = fields.verdict.line if fields.verdict else ""
        table = Table(
            title=f"{escape(name)}: {escape(line)}", title_justify="left", caption_justify="left"
        )
        table.add_column("% of outputs", overflow="fold")
        for arm in ARMS:
            table.add_column(arm, justify="right", no_wrap=True)
        table.add_column("n", justify="right", no_wrap=True)
        between = "\n" if width is not None and width < NARROW else " "
        assert fields.models is not None
        rows = [("shows the concept", "target_hit"), ("shows kept concepts", "kept_hit")]
        for label, key in (*rows, ("unrecognisable", "unrecognisable")):
            cells = [
                _cell(fields, f"models.{arm}.{key}", getattr(fields.models, arm), key, between)
                for arm in ARMS
            ]
            table.add_row(label, *cells, str(fields.n.get(f"models.erased.{key}", "")))
        for attack in fields.attacks:
            cells = [
                _rate(
                    getattr(attack, f"hit_{arm}"),
                    fields.intervals.get(f"attacks.{attack.id}.hit_{arm}"),
                    between,
                )
                for arm in ARMS
            ]
            note = "" if attack.status == "valid" else f" ({attack.status})"
            table.add_row(f"after {escape(attack.id)}{note}", *cells, str(attack.n))
        table.caption = "Brackets: 95 % interval. n: prompts. -: not measured."
        return table


def _cell(fields: ConceptFields, path: str, record: Any, key: str, between: str) -> str:
    return _rate(getattr(record, key, None), fields.intervals.get(path), between)


def _rate(value: float | None, interval: tuple[float, float] | None, between: str) -> str:
    if value is None:
        return "-"
    low, high = interval or (0.0, 0.0)
    # The bracket is escaped for rich, which reads [x] as a style.
    span = f"{between}\\[{100 * low:.0f}, {100 * high:.0f}]" if interval else ""
    return f"{100 * value:.1f}{span}"


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that readers see the old or the new one, never half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)  # temporary files are private; a report is meant to be read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
