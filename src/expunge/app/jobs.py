"""Long work for a window: one job at a time, in the order asked for, with progress and a clean stop.

A job runs in the one worker thread of a :class:`Queue`.  Whoever asked looks at it from time to time; nothing
is called back.  A stop is an interrupt at the next step of a :class:`~expunge.core.progress.Progress` or
before the next pass of a model, where methods can bear one: training writes its checkpoint first.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..errors import ExpungeError, ResumeMismatch, WrongBase, WrongState

if TYPE_CHECKING:
    from ..core.progress import Report

__all__ = ["Job", "Queue", "Stopped", "sentence"]


class Stopped(KeyboardInterrupt):
    """The user asked for a stop; no ``except Exception`` on the way may swallow it."""


class Job:
    """Some work, and how far it is.

    Attributes:
        label: What is done, in words.
        state: ``waiting``, ``running``, ``done``, ``stopped`` or ``failed``.
        report: The last step told of, or ``None``.
        result: What the work returned, once done.
        error: One sentence, once failed.
        passes: Passes of models since the start.
    """

    def __init__(self, label: str, work: Callable[[], Any]) -> None:
        self.label, self.state = label, "waiting"
        self.report: Report | None = None
        self.result: Any = None
        self.error = ""
        self.passes = 0
        self._work = work
        self._stop = threading.Event()
        self._over = threading.Event()
        self._started = self._first = self._ended = 0.0
        self._before = 0

    def stop(self) -> None:
        """Ask for a stop; a job that waits is never begun."""
        self._stop.set()

    @property
    def stopping(self) -> bool:
        """A stop was asked for and has not been obeyed yet."""
        return self._stop.is_set() and not self._over.is_set()

    @property
    def over(self) -> bool:
        """Whether it is done, stopped or failed."""
        return self._over.is_set()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until it is over, at most ``seconds``."""
        return self._over.wait(seconds)

    def check(self) -> None:
        """Raise :class:`Stopped` if a stop was asked for: once, so that what cleans up is left alone."""
        if self._stop.is_set():
            self._stop.clear()
            raise Stopped

    def passed(self) -> None:
        """Before a pass of a model: count it, and :meth:`check`."""
        self.passes += 1
        self.check()

    def take(self, report: Report) -> None:
        """A step of a progress line: keep it, and :meth:`check`."""
        last = self.report
        if last is None or (last.label, last.total) != (report.label, report.total):
            self._first, self._before = time.monotonic(), report.done
        self.report = report
        self.check()

    @property
    def seconds(self) -> float:
        """Since it was begun, until it was over."""
        if not self._started:
            return 0.0
        return (self._ended or time.monotonic()) - self._started

    @property
    def rate(self) -> float | None:
        """Units a second of what is being done now; ``None`` before the first unit."""
        if self.report is None:
            return None
        took, done = time.monotonic() - self._first, self.report.done - self._before
        return done / took if done > 0 and took > 0 else None

    @property
    def left(self) -> float | None:
        """Seconds to the end of what is being done now, as far as known."""
        rate = self.rate
        return (
            None
            if rate is None or self.report is None
            else (self.report.total - self.report.done) / rate
        )

    def run(self) -> None:
        """Do the work in this thread; every end is written down, none is raised."""
        from ..core.progress import watching

        try:
            self.check()
            self.state, self._started = "running", time.monotonic()
            with watching(self.take):
                self.result = self._work()
            self.state = "done"
        except KeyboardInterrupt:
            self.state = "stopped"
        except BaseException as error:
            self.state, self.error = "failed", sentence(error)
        finally:
            self._ended = time.monotonic()
            self._over.set()


class Queue:
    """Jobs in the order in which they were asked for, one at a time."""

    def __init__(self) -> None:
        self._jobs: list[Job] = []
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self.running: Job | None = None

    def submit(self, label: str, work: Callable[[], Any]) -> Job:
        """Line up some work; the worker thread is started with the first."""
        job = Job(label, work)
        with self._changed:
            self._jobs.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="expunge jobs", daemon=True)
                self._thread.start()
            self._changed.notify()
        return job

    def before(self, job: Job) -> int:
        """How many jobs must end before this one begins."""
        with self._changed:
            waiting = self._jobs.index(job) if job in self._jobs else 0
            return waiting + (self.running is not None and self.running is not job)

    def passed(self) -> None:
        """What watches the passes of the models: the running job is told."""
        job = self.running
        if job is not None:
            job.passed()

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._jobs:
                    self._changed.wait()
                self.running = self._jobs.pop(0)
            self.running.run()
            with self._changed:
                self.running = None


LEAVE = {
    WrongState: "Leave can be given under \u201cWhat stacking allows\u201d: edits on another stack.",
    WrongBase: "Leave can be given under \u201cWhat stacking allows\u201d: other weights of the same structure.",
    ResumeMismatch: "Its folder is of another version; delete that folder, or change a setting.",
}
"""What a window can do about an error; the general cures speak of commands."""


def sentence(error: BaseException) -> str:
    """One sentence for a person: what was wrong, where, what is allowed.

    What nobody foresaw is printed with its traceback on the terminal, where the program was started.
    """
    if isinstance(error, ExpungeError):
        said = f"{str(error).rstrip('.')}."
        if said.split(" ")[0].isalpha():  # names of files and settings stay as they are
            said = said[:1].upper() + said[1:]
        return f"{said} {LEAVE.get(type(error), '')}".strip()
    if isinstance(error, OSError):
        return f"{error.filename or 'A file'}: {error.strerror or error}."
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return "Memory ran out. Ask for fewer pictures at a time, or open the model in float16."
    traceback.print_exception(error)
    text = " ".join(str(error).split())[:200] or "no message"
    return f"Something went wrong that nobody foresaw ({type(error).__name__}: {text}); the terminal has the details."
