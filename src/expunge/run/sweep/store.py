"""Run folders: named by the hash of a request, there from one moment to the next, claimed while in work.

    FOLDER/runs/KEY/run.json           a finished cell: request, result, provenance; its files beside it
    FOLDER/runs/.KEY.RANDOM/           one that is being written; it becomes KEY by one rename
    FOLDER/locks/KEY.lock              held (flock) by the process that works on KEY
    FOLDER/work/KEY/                   what a training needs to go on after a kill
    FOLDER/failed/KEY.json             why the last try of an unfinished cell failed

The system gives a lock back when its process ends, however it ends, so no lock outlives a kill.  Should a
file system grant a lock twice, two processes do the same work and the first rename wins.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...edit.files import atomic_write
from ...errors import RunError
from .. import results
from .options import folder_of

try:
    import fcntl
except ImportError:  # Windows has no flock; there one process is allowed, see engine
    fcntl = None  # type: ignore[assignment]

__all__ = ["RUN", "Store"]

RUN = "run.json"


class Store:
    """The run folders of sweeps; several sweeps and processes may share one.

    Args:
        folder: Where everything is kept.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = folder_of(Path(folder))

    def place(self, key: str) -> Path:
        """The folder of a finished cell."""
        return self.folder / "runs" / key

    def scratch(self, key: str) -> Path:
        """Where a cell in work keeps what it needs to go on after a kill."""
        return self.folder / "work" / key

    def finished(self, key: str) -> bool:
        """Whether the cell was done."""
        return (self.place(key) / RUN).is_file()

    def keys(self) -> set[str]:
        """All finished cells, of this sweep and others."""
        runs = self.folder / "runs"
        try:
            with os.scandir(runs) as entries:
                return {entry.name for entry in entries if not entry.name.startswith(".")}
        except FileNotFoundError:
            return set()

    def read(self, key: str) -> dict[str, Any]:
        """A finished cell: ``request``, ``result``, ``seconds`` and provenance.

        Raises:
            RunError: It is not there, or not readable.
        """
        file = self.place(key) / RUN
        try:
            found: dict[str, Any] = results.load(file, dict, "a sweep", "one finished cell")
        except OSError as error:
            raise RunError(f"{file}: cannot be read ({error.strerror})") from None
        return found

    # -- claims ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def claim(self, key: str) -> Iterator[bool]:
        """Whether this process may work on a cell inside the block; never waits."""
        if fcntl is None:
            yield True
            return
        path = self.folder / "locks" / f"{key}.lock"
        handle = _locked(path)
        if handle is None:
            yield False
            return
        try:
            yield True
        finally:
            # Removed while held; who opened it before sees that the name leads elsewhere and tries again.
            path.unlink(missing_ok=True)
            os.close(handle)

    # -- writing -----------------------------------------------------------------------------------

    def publish(
        self, request: Mapping[str, Any], key: str, result: Mapping[str, Any], seconds: float,
        files: Mapping[str, bytes] | None = None, made: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        """Write a cell's folder aside, then give it its name in one step.

        Args:
            request, key: What was asked, and its name.
            result: The answer, plain values.
            seconds: Wall time of the work.
            files: Further files by name.
            made: When and with what it was made; default: now and here.
        """
        runs = self.folder / "runs"
        runs.mkdir(parents=True, exist_ok=True)
        entry = {
            "request": request,
            "result": result,
            "seconds": round(seconds, 2),
            **(results.provenance() if made is None else made),
        }
        content = {
            **(files or {}),
            RUN: (json.dumps(entry, indent=1, default=float) + "\n").encode(),
        }
        aside = Path(tempfile.mkdtemp(prefix=f".{key}.", dir=runs))
        try:
            for name, data in content.items():
                atomic_write(aside / name, data)
            os.chmod(aside, 0o777 & ~_umask())
            _sync(aside)
            try:
                os.rename(aside, self.place(key))
            except OSError:
                if not self.finished(key):  # somebody else was first, which is as good
                    raise
            _sync(runs)
        finally:
            shutil.rmtree(aside, ignore_errors=True)
        (self.folder / "failed" / f"{key}.json").unlink(missing_ok=True)
        shutil.rmtree(self.scratch(key), ignore_errors=True)

    def fail(self, key: str, title: str, error: str) -> None:
        """Say why a cell is not finished; the next run tries it again."""
        entry = {"title": title, "error": error}
        atomic_write(self.folder / "failed" / f"{key}.json", json.dumps(entry, indent=1).encode())

    def failed(self, key: str) -> bool:
        """Whether the last try of an unfinished cell failed."""
        return (self.folder / "failed" / f"{key}.json").is_file()

    def pardon(self, keys: Iterable[str]) -> None:
        """Let cells that failed be tried again."""
        for key in keys:
            (self.folder / "failed" / f"{key}.json").unlink(missing_ok=True)

    def failures(self, keys: Mapping[str, Any]) -> dict[str, dict[str, str]]:
        """Key -> title and error of the cells of a sweep that failed when they were last tried."""
        folder = self.folder / "failed"
        found = {}
        for file in sorted(folder.glob("*.json")) if folder.is_dir() else ():
            if file.stem in keys and not self.finished(file.stem):
                found[file.stem] = results.load(file, dict, "a sweep", "one failure")
        return found

    def forget(self, key: str) -> None:
        """Take a finished cell away, so that it is done again."""
        place = self.place(key)
        aside = place.with_name(f".{key}.old")
        with contextlib.suppress(FileNotFoundError):
            os.rename(place, aside)
        shutil.rmtree(aside, ignore_errors=True)

    def sweep_up(self) -> None:
        """Remove half-written folders of processes that were killed; what is in work stays."""
        runs = self.folder / "runs"
        for aside in sorted(runs.glob(".*")) if runs.is_dir() else ():
            with self.claim(aside.name.split(".")[1]) as free:
                if free:
                    shutil.rmtree(aside, ignore_errors=True)


def _locked(path: Path) -> int | None:
    """The open, locked file, or ``None`` where another process holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        except OSError:
            pass  # this file system has no locks: at worst work is done twice
        try:
            if os.fstat(handle).st_ino == os.stat(path).st_ino:
                return handle
        except FileNotFoundError:
            pass
        os.close(handle)  # its holder removed the file in between: the lock is on nothing


def _sync(folder: Path) -> None:
    """Make what was renamed in a folder survive a power cut, where the system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
