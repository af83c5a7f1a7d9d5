"""Runs that are killed: the check that a resumed run equals an uninterrupted one."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from ..edit import Edit
from ..method import Method
from . import bench as on

__all__ = ["Killed", "a_killed_run_resumes_to_the_same_edit", "short_run", "writing"]

STEPS = 4
"""Of a short run: room between the first step and the last."""


class Killed(BaseException):
    """Stands for a kill: nothing that catches errors catches it."""


def _raises() -> NoReturn:
    raise Killed


@contextlib.contextmanager
def writing(kill_at: int | None = None, kill: Callable[[], Any] = _raises) -> Iterator[list[int]]:
    """Loops write a checkpoint after every step; after the ``kill_at``-th one the process "dies".

    Args:
        kill_at: Checkpoint after which ``kill`` is called; ``None``: never.
        kill: What ends the run; by default :class:`Killed` is raised.

    Yields:
        The steps whose checkpoints were written so far.
    """
    from ..core.checkpoints import Checkpoint, CheckpointFile
    from ..core.training import Session

    written: list[int] = []
    write, due = CheckpointFile.write, Session._due

    def counting(self: CheckpointFile, checkpoint: Checkpoint) -> None:
        write(self, checkpoint)
        written.append(checkpoint.step)
        if len(written) == kill_at:
            kill()

    CheckpointFile.write = counting  # type: ignore[method-assign]
    Session._due = lambda self: self.file is not None  # type: ignore[method-assign]
    try:
        yield written
    finally:
        CheckpointFile.write, Session._due = write, due  # type: ignore[method-assign]


def short_run(method: type[Method], run: Path | None, steps: int = STEPS) -> Edit:
    """The edit of an eraser's short run on a small fresh model: so many steps, or epochs where it has none."""
    from ..core.sampling import SHARED

    bench = on.bench(method)
    assert bench is not None
    SHARED.clear()  # a fresh process remembers nothing
    made: Any = on.quick(method)
    own = {field.name for field in dataclasses.fields(made)}
    if own & {"steps", "epochs"}:
        made = dataclasses.replace(made, **{"steps" if "steps" in own else "epochs": steps})
    edit: Edit = made.erase(
        bench.opens(), bench.concept, keep=bench.keep, data=bench.data, judge=bench.judge(False),
        seed=1, run=run,
    )  # fmt: skip
    return edit


def a_killed_run_resumes_to_the_same_edit(method: type[Method]) -> None:
    """Killed after one of its checkpoints and resumed by a fresh model: the same edit, bit for bit.

    The control is the uninterrupted run, which must itself have written them; methods that write none pass.
    """
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        with writing() as written:
            wanted = short_run(method, whole)
        if not written:
            return
        with writing(kill_at=max(1, len(written) // 2)) as before:
            try:
                short_run(method, killed)
            except Killed:
                pass
            else:
                raise AssertionError("the kill was swallowed")
        with writing() as after:
            resumed = short_run(method, killed)
        # Each run writes its last step once more at its end.
        assert len(after) < len(written), "the resumed run began again from the start"
        assert len(before) + len(after) <= len(written) + 1, "steps were taken twice"
        assert resumed.digest == wanted.digest, "the resumed run gave another edit"
