"""Plots of erased and kept against the number of concepts erased at once, from the recorded cells."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...edit.files import atomic_write
from ...evidence.plots import STYLE
from .page import PLOTTED, Page, frechet, of_set, pooled

__all__ = ["draw"]


def _series(page: Page, part: str) -> dict[str, dict[str, list[Any]]]:
    """Arm -> panel -> points (number, value, low, high)."""
    found: dict[str, dict[str, list[Any]]] = {}
    for arm in ("original", *page.arms):
        lines: dict[str, list[Any]] = {
            "target": [],
            "neighbours": [],
            "unrelated": [],
            "frechet": [],
        }
        for number in page.numbers(part):
            own = page.cell(part, "pictures", arm, number=number)
            for group in ("target", "neighbours", "unrelated"):
                point = pooled(of_set(own, group))
                if point is not None:
                    lines[group].append((number, point[0], *point[1]))
            distance = frechet(own, "unrelated")
            if distance is not None:
                lines["frechet"].append((number, distance, distance, distance))
        if any(lines.values()):
            found[arm] = lines
    return found


def draw(docs: Path, page: Page | None = None) -> None:
    """Draw the plots whose numbers have changed; a plot carries a digest of its numbers.

    Drawing anew would change the file with every version of the plotting library.
    """
    from PIL import Image

    page = page or Page()
    for part, name in PLOTTED.items():
        series, file = _series(page, part), docs / name
        if not series:
            continue
        digest = hashlib.sha256(json.dumps(series).encode()).hexdigest()[:16]
        if file.is_file():
            with Image.open(file) as picture:
                if picture.info.get("Description") == digest:
                    continue
        _draw(series, part, file, digest)


def _draw(series: Mapping[str, Mapping[str, Any]], part: str, file: Path, digest: str) -> None:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = (
        (("target",), "erased ones shown"), (("neighbours", "unrelated"), f"kept: other {part} (dashed), others"),
        (("frechet",), "Frechet distance to the original, others"),
    )  # fmt: skip
    widest = max(point[0] for one in series.values() for point in one["target"])
    white = {name: "white" for name in STYLE if name.endswith("facecolor")}
    with matplotlib.rc_context({**STYLE, **white}):
        figure = Figure(figsize=(10, 3.4), layout="constrained")
        FigureCanvasAgg(figure)
        for axis, (groups, label) in zip(figure.subplots(1, 3), panels, strict=True):
            for index, (arm, lines) in enumerate(series.items()):
                colour = "0.5" if arm == "original" else f"C{index - 1}"
                for group in groups:
                    if not lines[group]:
                        continue
                    x, y, low, high = (
                        np.array(values) for values in zip(*lines[group], strict=True)
                    )
                    # Equal values would hide each other.
                    x = x + (index - len(series) / 2) * 0.006 * widest
                    style = "--" if group == "neighbours" else "-"
                    named = arm if group in ("target", "unrelated", "frechet") else None
                    axis.errorbar(
                        x, y, yerr=[y - low, high - y], color=colour, linestyle=style, marker="o", markersize=3,
                        linewidth=1.2, elinewidth=0.8, label=named,
                    )  # fmt: skip
            axis.set_xlabel(f"{part} erased at once")
            axis.set_title(label, fontsize=9)
            axis.set_xticks(
                sorted({point[0] for one in series.values() for point in one["target"]})
            )
            axis.set_ylim(*((0, None) if groups == ("frechet",) else (-0.03, 1.03)))
            axis.grid(alpha=0.25)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=8, frameon=False)
        stream = io.BytesIO()
        figure.savefig(
            stream, format="png", dpi=150, metadata={"Software": None, "Description": digest}
        )
    atomic_write(file, stream.getvalue())
