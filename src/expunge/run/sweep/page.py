"""The leaderboard's pages, from the board alone: Markdown, one self-contained HTML file, and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from ...edit.files import atomic_write
from .. import pages
from .drawing import scatter

__all__ = ["markdown", "page", "write"]

NONE = "\u2013"
NOTES = (
    "Robustness is 1 minus the recovered share of the prompts that any search for a text hits, "
    "(erased \u2212 never) / (original \u2212 never): 1 is never, 0 is the original. Hits after an attack count hits "
    "before it, so what was never erased counts as not robust. Against embeddings too: the same with attacks that feed "
    "in embeddings, which nobody can type.",
    "Kept is what is left of the original's hits on kept concepts that the eraser was not told of. The score is the "
    "harmonic mean of both, each clipped to 0 to 1.",
    "The ranges behind or below the numbers are 95 % intervals of a bootstrap that draws seeds, and prompts within "
    "them, for all arms together; with one seed only prompts. A mean over concepts weighs each concept the same.",
    "Where all hits on an erased model are alike (none of 4, or 4 of 4) so are all resamples; the range reaches as far "
    "as Wilson's bounds then: none of n prompts still allows a share of up to about 4 / (n + 4), at 95 %.",
)
UNFINISHED = (
    "Numbers will change. What some attacks are still to be run on looks more robust than it is, so it has no rank and "
    "is not in the plot."
)
HEAD = (
    "eraser", "score", "robustness", "against embeddings too", "kept", "shown by name", "shown otherwise",
    "strongest attack", "advantage of teaching attacks", "attacks", "fit",
)  # fmt: skip

ALONE = (
    ("robustness", "robustness"),
    ("deep", "embeddings too"),
    ("kept", "kept"),
    ("plain", "by name"),
)
TITLES = ((False, "Recovered share"), (True, "Advantage over never of attacks that teach"))


def write(board: Mapping[str, Any], stem: Path) -> dict[str, Path]:
    """Write ``STEM.md``, ``STEM.html``, ``STEM.json`` and the plot ``STEM.svg``; returns suffix -> path."""
    plot = scatter(board["erasers"], page=False)
    content = {
        "md": markdown(board, f"{stem.name}.svg" if plot else None), "html": page(board),
        "json": json.dumps(board, indent=1, ensure_ascii=False) + "\n",
    }  # fmt: skip
    if plot:
        content["svg"] = plot
    written = {}
    for suffix, text in content.items():
        written[suffix] = stem.with_name(f"{stem.name}.{suffix}")
        atomic_write(written[suffix], text.encode())
    return written


# -- what both pages say ---------------------------------------------------------------------------


def number(found: Mapping[str, Any] | None) -> str:
    """``0.61``."""
    return NONE if found is None else _signed(found["value"])


def span(found: Mapping[str, Any] | None) -> str:
    """``0.50 to 0.70``, or nothing."""
    if found is None or found["interval"] is None:
        return ""
    return " to ".join(map(_signed, found["interval"]))


def head(board: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the head table: for each column a text and a small text."""
    rows: list[dict[str, Any]] = []
    scores = [r["score"]["value"] for r in board["erasers"] if r["score"] and not r["pending"]]
    for row in board["erasers"]:
        cells = [
            (number(row[k]), span(row[k]))
            for k in ("score", "robustness", "deep", "kept", "plain", "routes")
        ]
        cells.append((row["strongest"] or NONE, _worded(row["strongest_recovered"])))
        cells.append((number(row["taught"]), span(row["taught"])))
        some = len(row["concepts"]) < len(board["options"].get("concepts", ()))
        only = f"on {', '.join(row['concepts'])} only" if some and row["concepts"] else ""
        if row["pending"]:
            only = f"{len(row['pending'])} to be run"
        cells.append((f"{row['attacks_run']} of {row['attacks_counted']}", only))
        fit = NONE if row["fit_seconds"] is None else f"{row['fit_seconds']:,.0f} s"
        cells.append((fit, "" if row["fit_rows"] is None else f"{row['fit_rows']:,} rows"))
        ranked = row["score"] is not None and not row["pending"]
        # Equal scores share a place.
        place = f"{1 + sum(s > row['score']['value'] for s in scores)}." if ranked else NONE
        rows.append(
            {"label": row["label"], "place": place, "cells": cells, "refused": row["refused"]}
        )
    return rows


def _worded(found: Mapping[str, Any] | None) -> str:
    return "" if found is None else f"{number(found)} ({span(found)})"


def matrix(board: Mapping[str, Any], teaches: bool) -> dict[str, Any]:
    """One of the two matrices: recovered shares of searches, or the advantages of what teaches."""
    columns = [a["label"] for a in board["attacks"] if a["teaches"] == teaches]
    cells = {(c["eraser"], c["attack"]): c for c in board["matrix"]}
    rows = []
    for eraser in (row["label"] for row in board["erasers"]):
        line = []
        for attack in columns:
            cell = cells[eraser, attack]
            value = None if cell["number"] is None else cell["number"]["value"]
            line.append(
                {
                    "text": number(cell["number"]) if value is not None else "refused" if cell.get("refused") else NONE,
                    "span": span(cell["number"]), "reason": cell["reason"],
                    "shade": 0 if value is None else round(100 * min(1.0, max(0.0, value))),
                }
            )  # fmt: skip
        rows.append({"label": eraser, "cells": line})
    return {"columns": columns, "rows": rows}


def concepts(board: Mapping[str, Any]) -> dict[str, Any]:
    """Every eraser on each concept alone, in the order of the head table; no columns where there is one."""
    alone = {
        concept: {row["label"]: row for row in one["erasers"]}
        for concept, one in board["by_concept"].items()
    }
    rows = []
    for label in (row["label"] for row in board["erasers"]):
        cells = []
        for one in alone.values():
            row = one[label]
            for name, _ in ALONE:
                # What is not attacked to the end looks more robust than it is.
                if row["pending"] and name in ("robustness", "deep"):
                    cells.append((NONE, f"{len(row['pending'])} to be run"))
                else:
                    cells.append((number(row[name]), span(row[name])))
        rows.append({"label": label, "cells": cells})
    return {"groups": list(alone), "columns": [title for _, title in ALONE], "rows": rows}


def order(board: Mapping[str, Any]) -> str:
    """The order of the searching attacks in one sentence: ``>`` is a clear lead, ``\u2248`` is none."""
    if not board["order"]:
        return "No searching attack counts, so there is no order of attacks."
    text = ""
    for one in board["order"]:
        text += f"{one['label']} {number(one['recovered'])}"
        if one["lead"] is not None:
            text += " > " if one["clear"] else " \u2248 "
    return (
        f"Searching attacks by the share they recover, mean over erasers and concepts: {text}. "
        "\u201c>\u201d stands where the 95 % interval of the difference, eraser by eraser, leaves out 0; "
        "\u201c\u2248\u201d where it does not."
    )


def stability(board: Mapping[str, Any]) -> str:
    """How far the order of the erasers depends on prompts, seeds and concepts."""
    found = board["stability"]
    if "reason" in found:
        return f"Rank stability: {found['reason']}."
    share = f"{100 * found['first_in_resamples']:.0f} % of the resamples"
    parts = [f"{found['first']} is first in {share}."]
    if len(found["seeds"]["scores"]) < 2:
        parts.append("One seed says nothing about how ranks depend on seeds.")
    parts += [
        _agreed(found["first"], found[part], part)
        for part in ("seeds", "concepts")
        if len(found[part]["scores"]) > 1
    ]
    return " ".join(parts)


def _agreed(first: str, found: Mapping[str, Any], what: str) -> str:
    kept, among = found["first_in"]
    pairs = ", ".join(
        f"{' and '.join(one['of'])}: {NONE if one['tau'] is None else _signed(one['tau'])}"
        for one in found["tau"]
    )
    average = NONE if found["mean_tau"] is None else _signed(found["mean_tau"])
    return (
        f"{first} is first in {kept} of {among} {what}; Kendall's tau of the order between {what}: "
        f"mean {average} ({pairs})."
    )


def _signed(value: float) -> str:
    # Adding 0 turns the -0.0 that rounding makes into 0.0.
    return f"{round(value, 2) + 0.0:.2f}".replace("-", "\u2212")


def status(board: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the attacks' table."""
    rows = []
    for attack in board["attacks"]:
        kind = (
            "teaches"
            if attack["teaches"]
            else "control"
            if attack["control"]
            else "searches texts"
            if attack["typed"]
            else "searches embeddings"
        )
        found = attack["advantage"] if attack["teaches"] else attack["recovered"]
        reasons = [attack["reason"]] if attack["reason"] else []
        if attack["status"] == "valid":
            reasons += [
                f"{name}: {one['status']}, {one['reason']}"
                for name, one in attack["concepts"].items() if one["status"] != "valid"
            ]  # fmt: skip
        weak = f"{len(attack['weak'])} of {len(board['erasers'])}"
        reasons += [f"refused: {words}" for words in attack["refused"][:2]]
        if len(attack["refused"]) > 2:
            reasons.append(f"and {len(attack['refused']) - 2} more refusals")
        rows.append(
            {
                "label": attack["label"], "kind": kind, "status": attack["status"], "value": number(found),
                "span": span(found), "weak": weak, "over": number(attack["over_control"]),
                "over_span": span(attack["over_control"]), "rows": attack["rows_per_prompt"],
                "seconds": attack["seconds_per_prompt"], "reason": "; ".join(reasons),
            }
        )  # fmt: skip
    return rows


def curves(board: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Teaching attacks that recorded their advantage along the budget."""
    return [
        {
            "label": attack["label"],
            "of": attack["curve_of"] or "point of the budget",
            "points": [
                (one["point"], number(one["advantage"]), span(one["advantage"]))
                for one in attack["curve"]
            ],
        }
        for attack in board["attacks"]
        if attack["curve"]
    ]


def made(board: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How it was made."""
    options, when = board["options"], board["made"]
    cost = "; ".join(
        f"{name}: {one['cells']} cells, {one['rows']:,} rows, {one['core_hours']:.2f} h"
        for name, one in board["cost"].items()
    )
    rows = [
        ("model", board["model"]), ("judge", board["judge"]), ("concepts", ", ".join(options.get("concepts", ()))),
        ("seeds", ", ".join(map(str, options.get("seeds", ())))), ("budget", str(options.get("budget", ""))),
        ("prompts", f"{options.get('n')} by name, {options.get('kept_n')} of each kept concept and route, "
         f"{options.get('attack_n')} attacked, a seed and concept; {options.get('split')} split"),
        ("finished", f"{board['finished']} of {board['cells']} cells"), ("cost", cost),
        ("recorded", f"{when['first']} to {when['last']}" if "first" in when else ""),
        ("libraries", ", ".join(when.get("libraries", ()))), ("machines", "; ".join(when.get("machine", ()))),
    ]  # fmt: skip
    rows += [(f"no never for {name}", why) for name, why in board["without_never"].items()]
    return [(name, value) for name, value in rows if value]


# -- Markdown --------------------------------------------------------------------------------------


def markdown(board: Mapping[str, Any], plot: str | None) -> str:
    """The page as Markdown; ``plot`` is the file of the scatter plot."""
    parts = ["# Leaderboard", "Made by `expunge sweep`; [sweep.md](sweep.md) says how to read it."]
    if board["finished"] < board["cells"]:
        parts.append(f"**Unfinished: {board['finished']} of {board['cells']} cells.** {UNFINISHED}")
    parts += [*NOTES, stability(board)]
    if plot:
        parts.append(f"![Robustness against kept utility]({plot})")
    rows = [
        [
            row["place"].rstrip("."),
            f"`{pages.cell(row['label'])}`",
            *(_both(*cell) for cell in row["cells"]),
        ]
        for row in head(board)
    ]
    parts.append(pages.table(["", *HEAD], rows))
    refused = [
        f"- `{pages.cell(row['label'])}`: {pages.cell(said)}"
        for row in head(board)
        for said in row["refused"]
    ]
    if refused:
        parts += ["Erasers that refused a concept:", "\n".join(refused)]
    parts += ["## Attacks", order(board), _status_table(board)]
    parts += _matrices(board, "##")
    for curve in curves(board):
        points = [list(point) for point in curve["points"]]
        parts += [f"### `{pages.cell(curve['label'])}` along its budget", "Mean advantage over never of all erasers.",
                  pages.table([pages.cell(curve["of"]), "advantage", "95 % interval"], points)]  # fmt: skip
    overview = concepts(board)
    if overview["groups"]:
        titles = [f"{g}: {c}" for g in overview["groups"] for c in overview["columns"]]
        lines = [
            [f"`{pages.cell(row['label'])}`", *(_both(*cell) for cell in row["cells"])]
            for row in overview["rows"]
        ]
        parts += ["## Each concept alone", pages.table(["eraser", *map(pages.cell, titles)], lines)]
    for concept, alone in board["by_concept"].items():
        parts += [f"### {pages.cell(concept)}", order(alone), *_matrices(alone, "####")]
    parts += [
        "## How it was made",
        pages.table(["", ""], [[k, pages.cell(v)] for k, v in made(board)]),
    ]
    return "\n\n".join(parts) + "\n"


def _matrices(board: Mapping[str, Any], level: str) -> list[str]:
    parts = []
    for teaches, title in TITLES:
        found = matrix(board, teaches)
        if found["columns"]:
            lines = [
                [
                    f"`{pages.cell(row['label'])}`",
                    *(_both(c["text"], c["span"]) for c in row["cells"]),
                ]
                for row in found["rows"]
            ]
            parts += [
                f"{level} {title}",
                pages.table(["eraser", *(f"`{pages.cell(c)}`" for c in found["columns"])], lines),
            ]
    return parts


def _both(text: str, small: str) -> str:
    return pages.cell(
        f"{text} ({small})" if small and not small.endswith(")") else f"{text} {small}".strip()
    )


def _status_table(board: Mapping[str, Any]) -> str:
    rows = []
    for one in status(board):
        cost = (("rows", ",.0f"), ("seconds", ".1f"))
        spent = [NONE if one[name] is None else format(one[name], form) for name, form in cost]
        value = _both(one["value"], one["span"])
        rows.append(
            [f"`{pages.cell(one['label'])}`", one["kind"], one["status"], value,
             _both(one["over"], one["over_span"]), one["weak"], *spent,
             pages.cell(one["reason"])]
        )  # fmt: skip
    titles = ("attack", "kind", "status", "recovered (advantage, if it teaches)", "more than the control",
              "brings back from", "rows a prompt",
              "seconds a prompt", "why")  # fmt: skip
    return pages.table(list(titles), rows)


# -- HTML ------------------------------------------------------------------------------------------


def page(board: Mapping[str, Any]) -> str:
    """The page as one self-contained HTML file; every text is escaped."""
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    source = (resources.files(__package__) / "leaderboard.html.j2").read_text(encoding="utf-8")
    plot = scatter(board["erasers"])
    best: Sequence[Any] = board["erasers"][:5]
    alt = "; ".join(
        f"{r['label']}: kept {number(r['kept'])}, robustness {number(r['robustness'])}"
        for r in best
    )
    return environment.from_string(source).render(
        title=f"Leaderboard: erasers of {board['model']}", plot=Markup(plot) if plot else None,
        alt=f"Robustness against kept utility, the best first: {alt}", titles=HEAD[1:],
        rows=head(board), notes=NOTES, stability=stability(board), order=order(board), status=status(board),
        matrices=[(title, matrix(board, teaches)) for teaches, title in TITLES], overview=concepts(board),
        alone=[(concept, order(one), [(title, matrix(one, teaches)) for teaches, title in TITLES])
               for concept, one in board["by_concept"].items()],
        curves=curves(board), made=made(board), finished=board["finished"], cells=board["cells"], unfinished=UNFINISHED,
    )  # fmt: skip
