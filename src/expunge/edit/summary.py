"""An edit on a terminal: where it comes from, what it changes, how trustworthy the solve was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import adapters, deltas

if TYPE_CHECKING:
    from . import Edit

__all__ = ["print_summary", "rows"]


def rows(edit: Edit) -> list[dict[str, Any]]:
    """One row a changed tensor, or one with an adapter: name, shape, rank (``None`` for full), stored numbers."""
    found = []
    for name, shape in adapters.layers(edit).items():
        up, down = edit.tensors[deltas.UP + name], edit.tensors[deltas.DOWN + name]
        stored = up.numel() + down.numel()
        found.append({"name": name, "shape": shape, "rank": up.shape[1], "stored": stored})
    for target in edit.manifest.targets:
        if edit.kind == "shared-low-rank":
            rank, stored = edit.tensors[deltas.LEFT].shape[1], 0
        elif edit.kind == "low-rank":
            up, down = (
                edit.tensors[deltas.UP + target.name],
                edit.tensors[deltas.DOWN + target.name],
            )
            rank, stored = up.shape[1], up.numel() + down.numel()
        else:
            rank, stored = None, edit.tensors[deltas.DENSE + target.name].numel()
        found.append(
            {"name": target.name, "shape": tuple(target.shape), "rank": rank, "stored": stored}
        )
    return found


def print_summary(edit: Edit) -> None:
    """Print provenance, tensors and the method's own report."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console, manifest = Console(), edit.manifest
    stored = sum(t.numel() * t.element_size() for t in edit.tensors.values())
    preset = f", preset {manifest.preset}" if manifest.preset else ""
    head = {
        "method": f"{manifest.method} version {manifest.version}{preset}",
        "concepts": ", ".join(concept["name"] for concept in manifest.concepts),
        "kind": f"{manifest.kind}, {_count(edit)}, {stored / 1024:.1f} KiB",
        **({"acts": "while the model runs"} if manifest.acts else {}),
        **{f"{name} +": _listed(texts) for name, texts in manifest.tokens.items()},
        "base": str(manifest.base["id"]),
        "fitted on": ", ".join(d[:12] for d in manifest.fitted_on) or "the bare base",
        "keep": ", ".join(manifest.keep) or "nothing named",
        "seed": str(manifest.seed),
        "digest": edit.digest,
        "cost": ", ".join(f"{k} {v}" for k, v in manifest.cost.items()) or "no rows",
    }
    for key, value in head.items():
        console.print(f"[bold]{escape(key):>9}[/]  {escape(value)}", highlight=False)
    plain = {k: v for k, v in manifest.report.items() if isinstance(v, (int, float, str))}
    for key, item in plain.items():
        number = f"{item:.4g}" if isinstance(item, float) else str(item)
        console.print(f"[bold]{escape(key):>9}[/]  {escape(number)}", highlight=False)
    listed = rows(edit)
    if not manifest.targets:
        console.print("no weights change", highlight=False)
    if not listed:
        return
    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("tensor", "shape", "rank", "stored numbers"):
        table.add_column(name, no_wrap=name != "tensor", overflow="fold")
    for row in listed:
        rank = "full" if row["rank"] is None else str(row["rank"])
        table.add_row(
            escape(row["name"]),
            str(row["shape"]),
            rank,
            str(row["stored"]) if row["stored"] else "shared",
        )
    console.print(table)


def _count(edit: Edit) -> str:
    beside = adapters.layers(edit)
    return f"{len(beside)} adapters" if beside else f"{len(edit.manifest.targets)} tensors"


def _listed(texts: list[str], most: int = 12) -> str:
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return " ".join(texts[:most]) + more
