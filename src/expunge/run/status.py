"""Derives what works: runs the contract battery, counts recorded claims, writes status.json, README table and pages.

python -m expunge.run.status            # from the project's root
python -m expunge.run.status --no-battery   # only recount claims and rewrite the tables
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .. import catalogue
from ..edit.files import atomic_write
from . import pages, results

__all__ = ["claims", "derive", "main", "table"]

STATUS = Path(catalogue.__file__).with_name("status.json")


def claims(id: str, version: int | None) -> dict[str, int]:
    """Recorded claims of a method at a version: ``held``, ``failed`` and ``waiting``, latest run of each."""
    count = {"held": 0, "failed": 0, "waiting": 0}
    folder = results.folder() / id
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        runs = [run for run in results.read(file) if run.get("version") == version]
        if runs:
            holds = runs[-1].get("holds")
            count["waiting" if holds is None else "held" if holds else "failed"] += 1
    return count


def battery(id: str) -> tuple[bool, str]:
    """Whether every check of the contract battery passes, and the first that does not."""
    from ..testing import checks_for

    for name, check in checks_for(catalogue.resolve(id)):
        try:
            check()
        except Exception as error:  # any failure means "not green"; the reason is reported
            return False, f"{name}: {error}"
    return True, ""


def derive(
    ids: Iterable[str], run_battery: bool = True, before: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Status records by id; without running it, the battery's last verdict at the same version stays.

    ``battery`` is ``None`` where it was not run at this version.
    """
    found: dict[str, Any] = {}
    for id in ids:
        version = catalogue.version(id)
        green: bool | None
        if run_battery:
            green, reason = battery(id)
            if not green:
                print(f"{id}: {reason}")
        else:
            last = (before or {}).get(id, {})
            green = last.get("battery") if last.get("version") == version else None
        counted = claims(id, version)
        found[id] = {
            "version": version,
            "battery": green,
            # Waiting claims have measured nothing yet.
            "claims": counted["held"] + counted["failed"],
            **counted,
        }
    return found


def table(status: dict[str, Any]) -> str:
    """The README's table: implemented systems with what was recorded, then the count of planned ones."""
    lines = [
        "| system | verb | family | battery | claims held | failed | waiting |",
        "|---|---|---|---|---|---|---|",
    ]
    for system in catalogue.systems():
        record = status.get(system.id)
        if record is None:
            continue
        mark = {True: "green", False: "red"}.get(record["battery"], "not run")
        counts = " | ".join(str(record[key]) for key in ("held", "failed", "waiting"))
        lines.append(f"| `{system.id}` | {system.verb} | {system.family} | {mark} | {counts} |")
    planned = sum(system.id not in status for system in catalogue.systems())
    lines.append(f"\n{planned} more systems are in the catalogue as planned: `expunge methods`.")
    return "\n".join(lines)


def main() -> None:
    """Write status.json, the table between the markers of README.md, and the derived parts of docs/."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--battery", action=argparse.BooleanOptionalAction, default=True, help="run the battery"
    )
    options = parser.parse_args()
    ids = [system.id for system in catalogue.systems() if system.class_path is not None]
    before = json.loads(STATUS.read_text(encoding="utf-8")) if STATUS.exists() else {}
    status = derive(ids, options.battery, before)
    atomic_write(STATUS, (json.dumps(status, indent=1) + "\n").encode())
    readme, docs = Path("README.md"), Path("docs")
    if readme.exists():
        text = pages.filled(
            readme.read_text(encoding="utf-8"), "status", table(status), readme.name
        )
        atomic_write(readme, text.encode())
    if docs.is_dir():
        pages.write(docs)
    print(json.dumps({id: record["battery"] for id, record in status.items()}))


if __name__ == "__main__":
    main()
