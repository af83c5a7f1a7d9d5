"""`expunge sweep` and `expunge leaderboard`: the matrix and its pages."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from . import common
from .options import (
    AttackNOption,
    BudgetOption,
    DeviceOption,
    DtypeOption,
    KeptNOption,
    ModelOption,
    NOption,
    OutOption,
)

__all__ = ["leaderboard", "sweep"]

ConceptsOption = Annotated[
    list[str],
    typer.Option(
        "--concepts",
        "--concept",
        "-c",
        help="Names of the world's concepts, joined by commas or by repeating the option.",
    ),
]
ErasersOption = Annotated[
    str, typer.Option(help="`all`, or ids with settings joined by commas: `uce,trce:stage2=false`.")
]
AttacksOption = Annotated[
    str, typer.Option(help="`all`, `none`, or ids with settings joined by commas.")
]
SeedsOption = Annotated[
    str, typer.Option(help="Seeds joined by commas; each fits, asks and attacks anew.")
]
SplitOption = Annotated[str, typer.Option(help="`test`, or `development` while choosing settings.")]
JobsOption = Annotated[int, typer.Option("--jobs", "-j", min=1, help="Processes on this machine.")]
RayOption = Annotated[
    str | None,
    typer.Option(help="Address of a Ray cluster instead (`auto`); needs the extra `cluster`."),
]
DryOption = Annotated[
    bool, typer.Option("--dry-run", help="Count the cost, and how to cut it; do nothing.")
]
RetryOption = Annotated[
    bool, typer.Option("--retry", help="Do again what a method refused before.")
]
RecordOption = Annotated[
    Path | None,
    typer.Option(
        help="Write the compact record (`results/leaderboard/world.json`); cells that it holds already are taken over."
    ),
]
PageOption = Annotated[
    Path | None,
    typer.Option(
        help="Write the leaderboard as PAGE.md, .html, .json and .svg: `docs/leaderboard`."
    ),
]
BatchOption = Annotated[
    int, typer.Option(min=1, help="Outputs at a time; halve it when memory runs out.")
]


def sweep(
    model: ModelOption, out: OutOption, concepts: ConceptsOption, erasers: ErasersOption = "all",
    attacks: AttacksOption = "all", seeds: SeedsOption = "0", budget: BudgetOption = "world", n: NOption = 100,
    kept_n: KeptNOption = 20, attack_n: AttackNOption = 10, split: SplitOption = "test", jobs: JobsOption = 1,
    ray: RayOption = None, dry_run: DryOption = False, retry: RetryOption = False, record: RecordOption = None,
    page: PageOption = None, batch: BatchOption = 64, device: DeviceOption = "cpu", dtype: DtypeOption = None,
) -> None:  # fmt: skip
    """Run erasers against attacks on the same concepts, seeds and prompts; the same command resumes."""
    from ..errors import SettingError
    from ..run.sweep.options import Options

    options = Options(
        model, erasers, attacks, tuple(_parts(",".join(concepts))), _numbers(seeds), budget, n, kept_n, attack_n,
        split=split, batch=batch, device=device, dtype=dtype,
    )  # fmt: skip
    if ray is not None and jobs > 1:
        raise SettingError("--jobs is for this machine and --ray for a cluster; give one of them")
    opened = common.load(model, device, dtype)
    from ..run.sweep.bench import Bench
    from ..run.sweep.plan import planned
    from ..run.sweep.store import Store

    with common.quietly():
        bench = Bench(options, opened)
        plan = planned(bench)
        _take_over(record, plan, Store(out))
        if dry_run:
            from ..run.sweep import forecast

            found = forecast.forecast(bench, plan, Store(out))
            print("\n".join(forecast.lines(found, plan, bench, forecast.speed(bench), jobs)))
            return
        status = _run(bench, plan, out, jobs, ray, retry)
    if record is not None or page is not None:
        from ..run.sweep import record as records

        gathered = records.gather(bench, plan, Store(out))
        if record is not None:
            records.write(gathered, record)
            print(f"record: {record}")
        if page is not None:
            _pages(gathered, page)
    if status:
        raise typer.Exit(status)


def _take_over(record: Path | None, plan: Any, store: Any) -> None:
    """Cells that an earlier record holds need no work; without this a new folder would make the record smaller."""
    if record is None or not record.exists():
        return
    from ..run.sweep import record as records

    taken = records.restore(records.read(record), plan, store)
    if taken:
        print(f"{taken} cells taken over from {record}")


def _run(bench: Any, plan: Any, out: Path, jobs: int, ray: str | None, retry: bool) -> int:
    """Do the work and say how it went; 1 where cells failed."""
    from ..run.sweep import forecast
    from ..run.sweep.engine import execute
    from ..run.sweep.store import Store

    expected = forecast.forecast(bench, plan, Store(out))
    with Teller(plan, expected) as teller:
        done = execute(bench, plan, out, jobs=jobs, ray=ray, retry=retry, tell=teller)
    refused = f", {done.refused} of them refused by their method" if done.refused else ""
    print(f"{done.finished} of {done.total} cells finished{refused}: {out}")
    for note in done.notes:
        print(note, file=sys.stderr)
    for failure in list(done.failures.values())[:10]:
        words = failure["error"].strip().splitlines()
        print(
            f"failed: {failure['title']}: {words[-1] if words else 'no reason given'}",
            file=sys.stderr,
        )
    if done.failures:
        print(
            f"{len(done.failures)} cells failed; the same command tries them again", file=sys.stderr
        )
    return 1 if done.finished < done.total else 0


def leaderboard(
    record: Annotated[
        Path, typer.Argument(help="A compact record that `expunge sweep --record` wrote.")
    ],
    page: Annotated[Path, typer.Option(help="Writes PAGE.md, PAGE.html, PAGE.json and PAGE.svg.")],
) -> None:
    """Make the leaderboard's pages again from a record; no model is opened."""
    from ..run.sweep.record import read

    _pages(read(record), page)


def _pages(gathered: Any, page: Path) -> None:
    from ..run.sweep.board import board
    from ..run.sweep.page import stability, write

    found = board(gathered)
    for path in write(found, page).values():
        print(path)
    print(stability(found))


class Teller:
    """A progress line in rows with rate and remaining time; where nobody looks at a terminal, a line a cell."""

    def __init__(self, plan: Any, expected: Any) -> None:
        from ..core.progress import Progress

        known = [rows for rows in expected.rows.values() if rows]
        # A cell of unknown cost counts as an average one.
        self._usual = max(1, round(sum(known) / len(known))) if known else 1
        self._rows = {
            key: max(1, round(rows or self._usual)) for key, rows in expected.rows.items()
        }
        self._total, self._count = sum(self._rows.values()), len(self._rows)
        self._bar = Progress("sweep", self._total, unit="row")
        self._quiet = not sys.stderr.isatty()
        self._done, self._spent, self._start = 0, 0, time.monotonic()

    def __enter__(self) -> Teller:
        self._bar.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self._bar.__exit__(*raised)

    def __call__(self, cell: Any, status: str) -> None:
        rows = self._rows.get(cell.key, 0)
        if status == "found" and not rows:
            return
        self._done, self._spent = self._done + 1, self._spent + rows
        self._bar.advance(f"{self._done} of {self._count} cells; {cell.title}", rows)
        if self._quiet:
            word = "" if status in ("done", "found") else f" {status}"
            print(
                f"[{self._done}/{self._count}] {cell.title}{word}{self._rate()}",
                file=sys.stderr,
                flush=True,
            )

    def _rate(self) -> str:
        spent = time.monotonic() - self._start
        rate = self._spent / max(spent, 1e-9)
        left = (self._total - self._spent) / max(rate, 1e-9)
        return (
            f"; {rate:,.0f} rows/s, {_clock(left)} left"
            if self._done < self._count
            else f"; {_clock(spent)} in all"
        )


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str) -> tuple[int, ...]:
    from ..errors import SettingError

    parts = _parts(text)
    if not all(part.isdigit() for part in parts):
        raise SettingError(f"--seeds {text!r}: whole numbers joined by commas are needed")
    return tuple(int(part) for part in parts)
