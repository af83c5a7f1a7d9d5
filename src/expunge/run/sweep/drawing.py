"""The scatter plot of the leaderboard: robustness against kept utility, an eraser a point, as SVG."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...evidence.plots import INK, STYLE, inline, short

__all__ = ["scatter"]

POINT = "#3b7dd8"
FIRST = "#d9622b"
BEYOND = 0.1
"""Of a share, what is shown below 0 and above 1."""
LINE = 0.066
"""Height of a label in the names' column, in shares of the axes' height."""


def scatter(erasers: Sequence[Mapping[str, Any]], *, page: bool = True) -> str | None:
    """The plot, or ``None`` where no eraser that was attacked to the end has both numbers.

    Args:
        erasers: Rows of the board, the best first; it is drawn in another colour.
        page: Inline SVG in the page's own ink; otherwise a file of its own on white.
    """
    known = [r for r in erasers if r["robustness"] and r["kept"] and not r["pending"]]
    if not known:
        return None
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    height = max(3.6, 0.235 * len(known) + 1.0)
    white = {} if page else {name: "white" for name in STYLE if name.endswith("facecolor")}
    with matplotlib.rc_context({**STYLE, **white, "svg.hashsalt": "leaderboard"}):
        figure = Figure(figsize=(6.6, height))
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0.14, 0.52 / height, 0.555, 1 - 0.64 / height))
        _limits(axes, known)
        for place, row in enumerate(known):
            _point(axes, row, FIRST if place == 0 else POINT)
        _names(axes, known)
        axes.set_xlabel("kept utility: share of the original's hits on kept concepts")
        axes.set_ylabel("robustness: share that no\nsearch for a text brings back")
        axes.spines["left"].set_visible(True)
        axes.grid(alpha=0.18, color=INK, linewidth=0.5)
        axes.set_axisbelow(True)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return inline(stream.getvalue()) if page else stream.getvalue().replace(INK, "#222222")


def _limits(axes: Any, known: Sequence[Mapping[str, Any]]) -> None:
    """Robustness from 0 to 1; utility from a round share below the lowest; a little beyond where an interval is.

    Where original and never nearly meet, the ends of an interval of a ratio are far away: they are cut, points never.
    """
    for name, floor, setter in (("kept", 0.8, axes.set_xlim), ("robustness", 0.0, axes.set_ylim)):
        ends = [
            bound for row in known for bound in (row[name]["interval"] or (row[name]["value"],))
        ]
        values = [row[name]["value"] for row in known]
        low = min(*values, max(-BEYOND, min(floor, math.floor(10 * min(ends)) / 10)))
        high = max(*values, min(1 + BEYOND, max(1.0, *ends)))
        margin = 0.04 * (high - low)
        setter(low - margin, high + margin)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")


def _point(axes: Any, row: Mapping[str, Any], colour: str) -> None:
    x, y = row["kept"]["value"], row["robustness"]["value"]
    if row["kept"]["interval"]:
        axes.plot(row["kept"]["interval"], (y, y), color=colour, linewidth=1.1, alpha=0.4)
    if row["robustness"]["interval"]:
        axes.plot((x, x), row["robustness"]["interval"], color=colour, linewidth=1.1, alpha=0.4)
    axes.plot([x], [y], "o", color=colour, markersize=5.5)


def _names(axes: Any, known: Sequence[Mapping[str, Any]]) -> None:
    """Names in a column beside the plot, in the order of height, each with a thin line to its point."""
    low, high = axes.get_ylim()
    ordered = sorted(known, key=lambda row: row["robustness"]["value"])
    step = min(LINE, 1.0 / len(ordered))
    places = [(row["robustness"]["value"] - low) / (high - low) for row in ordered]
    for i in range(1, len(places)):  # upwards, so that none overlaps the one below
        places[i] = max(places[i], places[i - 1] + step)
    over = places[-1] - 0.985
    if over > 0:  # and back down from the top
        places[-1] -= over
        for i in range(len(places) - 2, -1, -1):
            places[i] = min(places[i], places[i + 1] - step)
    for row, place in zip(ordered, places, strict=True):
        told = axes.annotate(
            short(row["label"], 26), (row["kept"]["value"], row["robustness"]["value"]), xycoords="data",
            xytext=(1.03, place), textcoords="axes fraction", va="center", fontsize=8.5, annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": INK, "alpha": 0.25, "linewidth": 0.6, "relpos": (0, 0.5),
                        "shrinkA": 1, "shrinkB": 3},
        )  # fmt: skip
        told.set_parse_math(False)
