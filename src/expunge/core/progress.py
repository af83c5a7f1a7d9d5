"""A progress line with rate and remaining time; silent where nobody looks at a terminal.

Programs that show progress elsewhere (a window, a log) watch it instead:

    with watching(lambda report: print(report.done, "of", report.total)):
        eraser.erase(model, "star")
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

__all__ = ["Progress", "Report", "watching"]


@dataclasses.dataclass(frozen=True)
class Report:
    """How far some work is.

    Attributes:
        label: What is being done.
        done, total: Units done, by earlier sessions too, and units in all.
        unit: Name of a unit.
        note: The last short note, for example losses.
    """

    label: str
    done: int
    total: int
    unit: str = "step"
    note: str = ""


_watcher: contextvars.ContextVar[Callable[[Report], None] | None] = contextvars.ContextVar(
    "watcher", default=None
)


@contextlib.contextmanager
def watching(watcher: Callable[[Report], None]) -> Iterator[None]:
    """Inside the block, in this thread, ``watcher`` is told of every step of every :class:`Progress`.

    Raising ``KeyboardInterrupt`` or a subclass of it stops the work as an interrupt from a terminal does:
    training writes its checkpoint first.
    """
    before = _watcher.set(watcher)
    try:
        yield
    finally:
        _watcher.reset(before)


class Progress:
    """``with Progress("training", 200) as bar: bar.advance("loss 0.31")``.

    Args:
        label: What is being done.
        total: Number of units.
        done: Units done by an earlier session.
        unit: Name of a unit, shown in the rate.
        shown: ``None`` shows it on a terminal only.
    """

    def __init__(
        self,
        label: str,
        total: int,
        *,
        done: int = 0,
        unit: str = "step",
        shown: bool | None = None,
    ):
        self._label, self._total, self._done, self._unit, self._shown = (
            label,
            total,
            done,
            unit,
            shown,
        )
        self._bar: Any = None
        self._task: Any = None
        self._watcher: Callable[[Report], None] | None = None

    def __enter__(self) -> Progress:
        self._watcher = _watcher.get()
        self._tell()
        from rich.console import Console

        console = Console(stderr=True)
        if self._shown if self._shown is not None else console.is_terminal:
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[rate]}"),
                progress.TimeRemainingColumn(),
                progress.TextColumn("{task.fields[note]}"),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task(
                self._label, total=self._total, completed=self._done, rate="", note=""
            )
            self._bar.start()
        return self

    def advance(self, note: str = "", units: int = 1) -> None:
        """Count units as done and show a short note."""
        self._done += units
        self._tell(note)
        if self._bar is None:
            return
        speed = self._bar.tasks[0].speed
        rate = f"{speed:.3g} {self._unit}s/s" if speed else ""
        self._bar.update(self._task, advance=units, rate=rate, note=note)

    def _tell(self, note: str = "") -> None:
        if self._watcher is not None:
            self._watcher(Report(self._label, self._done, self._total, self._unit, note))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
