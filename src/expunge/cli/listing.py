"""`expunge methods`: the catalogue, and one system in full."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from .. import catalogue

__all__ = ["methods"]


def methods(
    id: Annotated[
        str | None, typer.Argument(help="Show one system: settings, defaults, presets, source.")
    ] = None,
    verb: Annotated[str | None, typer.Option(help=f"One of {', '.join(catalogue.VERBS)}.")] = None,
    family: Annotated[
        str | None, typer.Option(help="A model family, for example diffusion or language.")
    ] = None,
    tag: Annotated[str | None, typer.Option(help="A tag, for example closed-form.")] = None,
    runs: Annotated[
        bool, typer.Option("--runs", help="Only those that can be run: all but the planned ones.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """List the catalogue: all published systems and baselines, and which of them work.

    `works`: its checks pass and claims are recorded. `unproven`: it runs, without that evidence so far. `planned`: not
    written yet.
    """
    if id is not None:
        _show_method(id, as_json)
        return
    found = catalogue.systems(verb=verb, family=family, tag=tag)
    if runs:
        found = tuple(system for system in found if system.class_path is not None)
    if as_json:
        print(json.dumps([system.to_dict() for system in found], indent=1, ensure_ascii=False))
        return
    rows = [
        system.to_dict()
        | {"#": "" if system.number is None else system.number, "status": _word(system)}
        for system in found
    ]
    _print_table(rows)


COLUMNS = ("#", "id", "verb", "family", "status", "title")
SPARED = ("title", "family", "#", "verb")
"""What a narrow terminal can do without, the first first: an id that is cut cannot be typed."""
SHORTEST_TITLE = 8


def _print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """The listing; only the title may be cut, and only where a terminal or COLUMNS says how wide a line is."""
    from rich.console import Console
    from rich.table import Table

    widest = {name: max((len(name), *(len(str(row[name])) for row in rows))) for name in COLUMNS}
    whole = sum(widest.values()) + 2 * len(COLUMNS)
    told = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if told else whole)
    needed = {**widest, "title": min(SHORTEST_TITLE, widest["title"])}
    shown = list(COLUMNS)
    for name in SPARED:
        if sum(needed[one] + 2 for one in shown) - 2 > console.width:
            shown.remove(name)
    table = Table(box=None, header_style="bold", pad_edge=False, expand="title" in shown)
    for name in shown:
        if name == "title":
            table.add_column(name, no_wrap=True, overflow="ellipsis", ratio=1)
        else:
            table.add_column(name, no_wrap=True, min_width=widest[name])
    for row in rows:
        cells = [str(row[name]) for name in shown]
        table.add_row(*cells, style="dim" if row["status"] == "planned" else None)
    console.print(table)
    if len(shown) < len(COLUMNS):
        gone = ", ".join(name for name in COLUMNS if name not in shown)
        print(f"left out, the terminal is too narrow: {gone}", file=sys.stderr)


def _word(system: catalogue.System) -> str:
    """The status for people: ``planned`` of the catalogue parts into what can be run without evidence and the rest."""
    status = catalogue.status(system.id)
    return "unproven" if status == "planned" and system.class_path is not None else status


def _show_method(id: str, as_json: bool) -> None:
    entry = catalogue.system(id)
    shown = entry.to_dict()
    if entry.class_path is not None:
        cls = catalogue.resolve(id)
        shown |= {"settings": cls.describe(), "presets": {k: dict(v) for k, v in cls.presets.items()},
                  "families": list(cls.families), "version": cls.version}  # fmt: skip
    if as_json:
        print(json.dumps(shown, indent=1, default=list, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(f"[bold]{entry.id}[/]  {entry.title}", highlight=False)
    console.print(
        f"{entry.verb}, {entry.family}; {entry.paper or 'no paper'}; {_word(entry)}", style="dim"
    )
    if "settings" not in shown:
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    widest = max((len(row["name"]) for row in shown["settings"]), default=0)
    # A name that is cut cannot be typed; a default may be broken over lines.
    table.add_column("setting", no_wrap=True, min_width=widest)
    table.add_column("default", overflow="fold", max_width=40)
    table.add_column("meaning", overflow="fold")
    for row in shown["settings"]:
        allowed = f" ({', '.join(map(str, row['choices']))})" if "choices" in row else ""
        table.add_row(row["name"], str(row["default"]), row.get("help", "") + allowed)
    console.print(table)
    for name, changes in shown["presets"].items():
        listed = ", ".join(f"{k}={v}" for k, v in changes.items()) or "the defaults"
        console.print(f"[bold]--preset {name}[/]  {listed}", highlight=False)
