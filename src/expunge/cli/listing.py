"""`expunge methods`: the catalogue, and one system in full."""

from __future__ import annotations

import json
from typing import Annotated

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
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """List the catalogue: all published systems and baselines, and which of them work."""
    if id is not None:
        _show_method(id, as_json)
        return
    found = catalogue.systems(verb=verb, family=family, tag=tag)
    if as_json:
        print(json.dumps([system.to_dict() for system in found], indent=1, ensure_ascii=False))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False, expand=True)
    rows = [
        system.to_dict() | {"#": "" if system.number is None else system.number} for system in found
    ]
    for name in ("#", "id", "verb", "family", "status"):
        # Only the title may be cut: an id that is cut cannot be typed.
        widest = max((len(str(row[name])) for row in rows), default=0)
        table.add_column(name, no_wrap=True, min_width=widest)
    table.add_column("title", no_wrap=True, overflow="ellipsis", ratio=1)
    for row in rows:
        cells = [str(row[name]) for name in ("#", "id", "verb", "family", "status", "title")]
        table.add_row(*cells, style=None if row["status"] == "works" else "dim")
    Console().print(table)


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
        f"{entry.verb}, {entry.family}; {entry.paper or 'no paper'}; {shown['status']}", style="dim"
    )
    if "settings" not in shown:
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("setting", "default", "meaning"):
        table.add_column(name)
    for row in shown["settings"]:
        allowed = f" ({', '.join(map(str, row['choices']))})" if "choices" in row else ""
        table.add_row(row["name"], str(row["default"]), row.get("help", "") + allowed)
    console.print(table)
    for name, changes in shown["presets"].items():
        listed = ", ".join(f"{k}={v}" for k, v in changes.items()) or "the defaults"
        console.print(f"[bold]--preset {name}[/]  {listed}", highlight=False)
