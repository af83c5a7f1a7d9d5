"""A progress line with rate and remaining time; silent where nobody looks at a terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Any

__all__ = ["Progress"]


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

    def __enter__(self) -> Progress:
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
        if self._bar is None:
            return
        speed = self._bar.tasks[0].speed
        rate = f"{speed:.3g} {self._unit}s/s" if speed else ""
        self._bar.update(self._task, advance=units, rate=rate, note=note)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
