"""Runs a plan: in this process, in several, or as tasks of a Ray cluster; all of them call :func:`.cells.attempt`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ...errors import MissingExtra, SettingError
from . import store as stores
from .bench import Bench
from .cells import attempt
from .options import Options
from .plan import Cell, Plan, planned
from .store import Store

__all__ = ["Outcome", "execute", "opened", "task", "work"]

PAUSE = 0.2
"""Seconds between looks at what other processes have finished."""
GRACE = 5.0
"""Seconds that a worker is given to end by itself."""

Tell = Callable[[Cell, str], None]
"""Called with each cell and ``found``, ``done``, ``refused`` or ``failed``."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a sweep stands: cells finished, of these refused by their method, and why others are not."""

    finished: int
    refused: int
    total: int
    failures: Mapping[str, Mapping[str, str]]
    notes: tuple[str, ...] = ()


def execute(
    bench: Bench, plan: Plan, folder: Path, *, jobs: int = 1, ray: str | None = None, retry: bool = False,
    tell: Tell = lambda cell, status: None,
) -> Outcome:  # fmt: skip
    """Do what is not finished yet.

    Args:
        bench, plan: The work.
        folder: Where the cells are kept.
        jobs: Processes; above 1 each opens the model itself and takes its share of the processors.
        ray: Address of a Ray cluster (``auto`` or ``local`` too); its nodes must see ``folder``.
        retry: Do what a method refused again.
        tell: Hears of every cell.

    Raises:
        SettingError: More processes than can be kept apart.
        MissingExtra: Ray is not installed.
    """
    if jobs < 1:
        raise SettingError(f"--jobs is {jobs}; at least 1 is needed")
    if jobs > 1 and stores.fcntl is None:
        raise SettingError("this system has no file locks, so only --jobs 1 is possible")
    store = Store(folder)
    store.sweep_up()
    store.pardon(plan.cells)
    if retry:
        for key in plan.cells:
            if store.finished(key) and "refused" in store.read(key)["result"]:
                store.forget(key)
    notes: tuple[str, ...] = ()
    if ray is not None:
        from . import cluster

        cluster.execute(bench, plan, store, ray, tell)
    elif jobs == 1:
        work(bench, plan, store, tell)
    else:
        notes = _spread(bench.options, plan, store, jobs, tell)
    return outcome(plan, store, notes)


def outcome(plan: Plan, store: Store, notes: tuple[str, ...] = ()) -> Outcome:
    """How the cells of a plan stand."""
    done = [key for key in plan.cells if store.finished(key)]
    refused = sum("refused" in store.read(key)["result"] for key in done)
    return Outcome(len(done), refused, len(plan.cells), store.failures(plan.cells), notes)


def work(
    bench: Bench, plan: Plan, store: Store, tell: Tell, stop: Callable[[], bool] = lambda: False
) -> None:
    """Go over the plan until nothing is left, here or elsewhere.

    Args:
        stop: Asked before each cell; true ends the work early.
    """
    left = dict(plan.cells)
    while left:
        moved = False
        for key, cell in list(left.items()):
            if stop():
                return
            status = attempt(cell, bench, store)
            if status in ("busy", "waits"):
                continue
            moved = True
            del left[key]
            tell(cell, status)
        if left and not moved:  # all that is left is in work elsewhere, or waits for that
            time.sleep(PAUSE)


# -- several processes -----------------------------------------------------------------------------


def opened(text: str) -> tuple[Bench, Plan]:
    """Bench and plan of options that came as text."""
    bench = Bench(Options.read(text))
    return bench, planned(bench)


def threads(jobs: int) -> dict[str, str]:
    """The environment of one of several processes: processors are shared, not fought for."""
    each = str(max(1, (os.cpu_count() or 1) // jobs))
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return {
        **dict.fromkeys(names, each),
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
    }


def _spread(options: Options, plan: Plan, store: Store, jobs: int, tell: Tell) -> tuple[str, ...]:
    """Workers that share the plan through the folder; this process only looks on."""
    logs = store.folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", __package__, str(store.folder), options.text()]
    environment = {**os.environ, **threads(jobs)}
    running = {}
    with contextlib.ExitStack() as stack:
        for number in range(1, jobs + 1):
            log = stack.enter_context((logs / f"worker-{number}.txt").open("wb"))
            running[number] = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        stack.enter_context(_ended(running))
        for cell, status in _news(
            plan, store, lambda: any(p.poll() is None for p in running.values())
        ):
            tell(cell, status)
    return tuple(
        f"worker {number} {_end(process.returncode)}; its last words are in {logs / f'worker-{number}.txt'}"
        for number, process in running.items()
        # One that was slow to end after the last cell is ended here, which is nothing to speak of.
        if process.returncode not in (0, -signal.SIGTERM)
    )


@contextlib.contextmanager
def _ended(running: Mapping[int, subprocess.Popen[bytes]]) -> Iterator[None]:
    """However the block ends, no worker is left; one that is about to end by itself is let."""
    try:
        yield
        _waited(running)
    finally:
        for process in running.values():
            if process.poll() is None:
                process.terminate()
        _waited(running)
        for process in running.values():
            if process.poll() is None:
                process.kill()
                process.wait()


def _waited(running: Mapping[int, subprocess.Popen[bytes]]) -> None:
    for process in running.values():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)


def _news(plan: Plan, store: Store, alive: Callable[[], bool]) -> Iterator[tuple[Cell, str]]:
    """Each cell once it is finished or failed, until all are or no worker is alive."""
    left = dict(plan.cells)
    first = True
    while left:
        going = alive()  # asked before the look, so that the last cells of a worker are seen
        there = store.keys()
        for key, cell in list(left.items()):
            failed = key not in there and store.failed(key)
            if key not in there and not failed:
                continue
            del left[key]
            refused = key in there and not first and "refused" in store.read(key)["result"]
            yield (
                cell,
                "failed" if failed else "found" if first else "refused" if refused else "done",
            )
        first = False
        if not going:
            return
        time.sleep(PAUSE)


def _end(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        memory = (
            ", perhaps because memory ran out (fewer --jobs need less)" if name == "SIGKILL" else ""
        )
        return f"was ended by {name}{memory}"
    return f"ended with status {code}"


# -- what runs elsewhere ---------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)
def _kept(text: str) -> tuple[Bench, Plan]:
    return opened(text)


def task(text: str, folder: str, key: str) -> str:
    """One cell of a sweep in whatever process this is; the model is opened once a process."""
    bench, plan = _kept(text)
    return attempt(plan.cells[key], bench, Store(folder))


def main(arguments: list[str]) -> int:
    """A worker: ``python -m expunge.run.sweep FOLDER OPTIONS``; started by :func:`execute`."""
    folder, text = arguments
    parent = os.getppid()
    try:
        bench, plan = opened(text)
        # Whoever started it may be killed; then it ends after the cell in hand.
        work(bench, plan, Store(folder), lambda cell, status: None, lambda: os.getppid() != parent)
    except KeyboardInterrupt:
        return 130
    except MissingExtra as error:
        print(error, file=sys.stderr)
        return 1
    return 0
