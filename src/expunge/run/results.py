"""Recorded claims: one JSON file a claim under ``results/``, appended to by every run.

A record says what was claimed, what was measured, whether the claim held (``None``: waiting for its other
arm), on how many items and seeds, and with which code and machine.  Nothing is overwritten.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..concept import safe_name
from ..edit.files import atomic_write
from ..errors import RunError

__all__ = ["folder", "load", "provenance", "read", "record"]


def folder() -> Path:
    """``$EXPUNGE_RESULTS``, or ``results`` in the working folder."""
    return Path(os.environ.get("EXPUNGE_RESULTS", "results"))


def record(
    claim: str,
    method: str,
    version: int,
    values: Mapping[str, Any],
    holds: bool | None,
    n: int,
    seeds: Sequence[int],
    *,
    interval: Mapping[str, Any] | Sequence[float] | None = None,
    preset: str | None = None,
    note: str = "",
) -> Path:
    """Append one run of a claim; returns the file.

    Args:
        claim: Short name, also the file's name.
        method: Catalogue id the claim is about.
        version: The method's version.
        values: The measured numbers by name.
        holds: Whether the claim held; ``None`` while an arm does not exist yet.
        n: Items behind each number.
        seeds: Seeds that were run.
        interval: 95 % intervals of the numbers.
        preset: Preset of the method.
        note: Why a claim failed or waits.
    """
    file = folder() / safe_name(method, "method") / f"{safe_name(claim, 'claim')}.json"
    entry = {
        "claim": claim,
        "method": method,
        "version": version,
        "preset": preset,
        "holds": holds,
        "values": dict(values),
        "interval": interval,
        "n": n,
        "seeds": list(seeds),
        "note": note,
        **provenance(),
    }
    atomic_write(file, (json.dumps([*read(file), entry], indent=1, default=float) + "\n").encode())
    return file


def read(file: Path) -> list[dict[str, Any]]:
    """All runs recorded in a file, oldest first; empty when there is none."""
    if not file.exists():
        return []
    found: list[dict[str, Any]] = load(file, list, "recorded claims", "a list of recorded runs")
    return found


def load(file: Path, kind: type, of: str, holds: str) -> Any:
    """The content of a results file, a ``kind``; ``of`` and ``holds`` say in errors what it should be.

    Raises:
        RunError: It is not JSON, or holds something else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RunError(f"{file.name}: is not a file of {of} ({error})") from None
    if not isinstance(found, kind):
        raise RunError(f"{file.name}: must hold {holds}")
    return found


def provenance() -> dict[str, Any]:
    """When, from which commit, on which machine and with which libraries something is recorded."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "libraries": {
            name: importlib.metadata.version(name)
            for name in ("torch", "diffusers", "transformers")
        },
    }


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except OSError:
        return None
    return done.stdout.strip() or None
