"""What a window shows, as HTML; every text of a user is escaped here and nowhere else."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .. import catalogue
from ..evidence.gallery import data_uri

if TYPE_CHECKING:
    from .comparing import Cell, Grid, Row
    from .held import Held
    from .jobs import Job

__all__ = [
    "about",
    "card",
    "clock",
    "code",
    "edits",
    "exported",
    "grid",
    "judges",
    "note",
    "progress",
    "report_frame",
]

escape = html.escape
COLUMNS = {"before": "Before", "after": "After", "never": "Never"}
MEANING = {
    "before": "the model as it was",
    "after": "with the edits that are on",
    "never": "trained the same way, without the concept",
}
SMALL_PX = 128


def note(text: str, tone: str = "") -> str:
    """A quiet line; ``tone``: ``good`` or ``bad``."""
    return f'<p class="x-note {tone}">{escape(text)}</p>'


def about(method: str) -> str:
    """A line about a method: its published name, source, and how far its evidence goes."""
    found = catalogue.system(method)
    state = (
        "claims recorded"
        if catalogue.status(method) == "works"
        else "tested, its claims are not recorded yet"
    )
    source = ", ".join(filter(None, (found.paper, str(found.year or ""))))
    return note(f"{found.title.rstrip('.')}. {source or 'No paper'}; {state}.")


def card(rows: Sequence[tuple[str, str]]) -> str:
    """Labels and values."""
    cells = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in rows)
    return f'<dl class="x-card">{cells}</dl>'


def code(command: str) -> str:
    """The same on the command line."""
    inner = f"<summary>The same on the command line</summary><pre>{escape(command)}</pre>"
    return f'<details class="x-code">{inner}</details>'


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    whole = int(seconds + 0.5)
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"


def progress(job: Job, before: int = 0) -> str:
    """How far a job is, or how it ended."""
    if job.state == "waiting":
        turn = (
            f"{before} {'job' if before == 1 else 'jobs'} before this one"
            if before
            else "about to begin"
        )
        return _bar(job.label, None, [turn], "wait")
    if job.state == "stopped":
        return _bar(job.label, _share(job), ["stopped", *_counts(job)], "stopped")
    if job.state == "failed":
        return _bar(job.label, 1.0, [job.error], "bad")
    if job.state == "done":
        return _bar(job.label, 1.0, [f"done in {_took(job.seconds)}"], "good")
    facts = _counts(job)
    if job.left is not None:
        facts.append(f"{clock(job.left)} left")
    facts.append(f"{clock(job.seconds)} so far")
    if job.passes:
        facts.append(f"{job.passes:,} passes")
    if job.stopping:
        facts.insert(0, "stopping at the next step")
    text = job.report.note if job.report is not None else ""
    return _bar(job.label, _share(job), facts, "run", text)


def _took(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else clock(seconds)


def _share(job: Job) -> float | None:
    if job.report is None or not job.report.total:
        return None
    return min(1.0, job.report.done / job.report.total)


def _counts(job: Job) -> list[str]:
    report = job.report
    if report is None:
        return []
    facts = [f"{report.label}: {report.done:,} of {report.total:,} {report.unit}s"]
    if job.rate is not None and job.state == "running":
        facts.append(
            f"{job.rate:.3g} {report.unit}s/s"
            if job.rate >= 1
            else f"{1 / job.rate:.3g} s a {report.unit}"
        )
    return facts


def _bar(label: str, share: float | None, facts: Sequence[str], tone: str, text: str = "") -> str:
    width = "" if share is None else f' style="width:{100 * share:.1f}%"'
    unknown = " unknown" if share is None and tone == "run" else ""
    now = "" if share is None else f' aria-valuenow="{100 * share:.0f}"'
    said = " \u00b7 ".join(escape(fact) for fact in facts)
    last = f'<span class="x-last">{escape(text)}</span>' if text else ""
    return (
        f'<div class="x-job {tone}"><b>{escape(label)}</b>'
        f'<div class="x-bar{unknown}" role="progressbar" aria-label="{escape(label)}" aria-valuemin="0" '
        f'aria-valuemax="100"{now}><i{width}></i></div><p>{said}{last}</p></div>'
    )


def judges(ids: Sequence[str], own: bool) -> str:
    """Which judges can be named."""
    first = "" if own else "This model has no judge of its own, so one must be named. "
    return note(f"{first}ID or ID:setting=value,... of {', '.join(ids)}.")


def edits(held: Sequence[Held]) -> str:
    """What the list of edits holds, where it is empty or where an edit has something to say."""
    if not held:
        return note("No edit yet. Erase a concept, or load an edit file.")
    on = sum(one.on for one in held)
    return note(
        f"{on} of {len(held)} {'is' if on == 1 else 'are'} on. The model itself is never changed."
    )


def exported(report: Mapping[str, Any], path: Path) -> str:
    """What an export carries and what it had to leave out."""
    error = report["relative_error"] if report.get("rank") else 0.0
    lost = f", relative error {error:.1e}" if error > 1e-6 else ", without loss"
    lines = [note(f"{report['tensors']} tensors{lost}; in {path}", "good")]
    if report.get("left_out"):
        lines.append(
            note(f"Left out, this format cannot carry them: {', '.join(report['left_out'])}.")
        )
    if "warning" in report:
        lines.append(note(str(report["warning"]), "bad"))
    return "".join(lines)


def grid(made: Grid) -> str:
    """Cards with a picture or text for each column, under a line of counts."""
    heads = []
    named = ", ".join(made.concepts)
    for column in made.columns:
        shown = made.shown(column)
        count = (
            f"<strong>{shown[0]} of {shown[1]}</strong> show {escape(named)}"
            if shown
            else escape(MEANING[column])
        )
        heads.append(
            f'<div class="x-count {column}" title="{escape(MEANING[column])}">'
            f"<b>{COLUMNS[column]}</b><span>{count}</span></div>"
        )
    notes = "".join(note(text) for text in made.notes)
    cards = "".join(_row(row, made) for row in made.rows)
    return f'<div class="x-counts">{"".join(heads)}</div>{notes}<div class="x-cards">{cards}</div>'


def _row(row: Row, made: Grid) -> str:
    cells = "".join(_cell(row.cells[column], column, row, made) for column in made.columns)
    return (
        f'<article class="x-cardrow"><p class="x-prompt">\u201c{escape(row.prompt)}\u201d '
        f'<span>seed {row.seed}</span></p><div class="x-trio n{len(made.columns)}">{cells}</div></article>'
    )


def _cell(cell: Cell, column: str, row: Row, made: Grid) -> str:
    named = ", ".join(made.concepts)
    named = ", ".join(made.concepts)
    said = "" if cell.hit is None else f"{'shows' if cell.hit else 'does not show'} {named}"
    if isinstance(cell.output, np.ndarray):
        alt = f"{COLUMNS[column]}, prompt: {row.prompt}; {said}".rstrip("; ")
        small = " small" if cell.output.shape[0] <= SMALL_PX else ""
        inner = (
            f'<label class="x-zoom"><input type="checkbox" aria-label="Enlarge {escape(alt)}">'
            f'<img class="pic{small}" src="{_uri(cell.output)}" alt="{escape(alt)}"></label>'
        )
    else:
        inner = f"<blockquote>{escape(str(cell.output)) or '<i>nothing</i>'}</blockquote>"
    # On a prompt that asks for something else only a sighting is worth a word.
    word = (
        ("shown" if cell.hit else "not shown") if row.asks else f"{named} seen" if cell.hit else ""
    )
    mark = (
        f'<span class="{"hit" if cell.hit else "miss"}">{escape(word)}</span>'
        if said and word
        else ""
    )
    # The verdict stands below, so that pictures side by side begin at one height.
    head = f'<figcaption><b class="{column}">{COLUMNS[column]}</b></figcaption>'
    return f'<figure class="x-cell">{head}{inner}{mark}</figure>'


def _uri(picture: np.ndarray) -> str:
    """Small pictures as they are; large ones as WebP, a tenth of the bytes."""
    if picture.shape[0] <= SMALL_PX:
        return data_uri(picture)
    from PIL import Image

    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "WEBP", quality=92)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def report_frame(address: str, name: str) -> str:
    """The report of a run inside the window; it may neither run scripts nor reach out of its frame."""
    safe, title = escape(address, quote=True), escape(f"Report {name}", quote=True)
    return f'<iframe class="x-report" sandbox="allow-popups" src="{safe}" title="{title}"></iframe>'
