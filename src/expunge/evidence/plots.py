"""Plots as inline SVG: what happened to kept concepts, what each attack brought back, how training went.

Text stays text, so that it can be read aloud, searched and enlarged.  What is black in a figure
becomes ``currentColor``, so that one picture is legible on light and on dark pages.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping
from typing import Any

from .schema import ARMS, ConceptFields

__all__ = [
    "AS_GIVEN",
    "COLOURS",
    "INK",
    "STYLE",
    "attack_plot",
    "curve_plot",
    "inline",
    "kept_plot",
    "loss_plot",
    "short",
]

COLOURS = {"original": "#3b7dd8", "erased": "#d9622b", "never": "#3f9b62"}
AS_GIVEN = "as given"
"""What a model is called that nothing is known to have been erased from: there is no original."""
MARKERS = {"original": "o", "erased": "D", "never": "^"}
INK = "#010203"
"""Stands for the page's own text colour until the SVG is written."""

STYLE = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "text.color": INK,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
}  # fmt: skip


def kept_plot(fields: ConceptFields, limit: int = 40) -> str | None:
    """Kept concepts, the most damaged first: hit rates of the arms, interval of the erased model."""
    assert fields.models is not None
    erased, original = fields.models.erased, fields.models.original
    if not erased.kept:
        return None

    def damage(name: str) -> float:
        return erased.kept[name] - (original.kept.get(name, 0.0) if original else 0.0)

    rows = []
    for name in sorted(erased.kept, key=lambda n: (damage(n), n))[:limit]:
        points = {
            arm: record.kept.get(name)
            for arm in ARMS
            if (record := getattr(fields.models, arm)) is not None
        }
        rows.append((name, points, {"erased": fields.intervals.get(f"models.erased.kept.{name}")}))
    return _rates(rows, "kept", "share of prompts that show the kept concept", _names(fields))


def attack_plot(fields: ConceptFields) -> str | None:
    """Hit rates before any attack and after each one, on the arms, with intervals."""
    assert fields.models is not None
    if not fields.attacks:
        return None
    rows = [("no attack", {a: r.target_hit for a in ARMS if (r := getattr(fields.models, a)) is not None},
             {a: fields.intervals.get(f"models.{a}.target_hit") for a in ARMS})]  # fmt: skip
    for attack in fields.attacks:
        if attack.status == "not-run":
            continue
        points = {arm: getattr(attack, f"hit_{arm}") for arm in ARMS}
        rows.append(
            (
                attack.id,
                points,
                {a: fields.intervals.get(f"attacks.{attack.id}.hit_{a}") for a in ARMS},
            )
        )
    return _rates(
        rows, "attacks", "share of attacked prompts that show the concept", _names(fields)
    )


def curve_plot(fields: ConceptFields) -> str | None:
    """Hit rates of the arms along the budget of each attack that keeps a curve; ``None`` where none does."""
    kept = [attack for attack in fields.attacks if len(attack.curve) > 1]
    if not kept:
        return None
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    names = _names(fields)
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "curves"}):
        figure = Figure(figsize=(4.9, 0.5 + 1.35 * len(kept)), layout="constrained")
        FigureCanvasSVG(figure)
        for axes, attack in zip(figure.subplots(len(kept), squeeze=False)[:, 0], kept, strict=True):
            for arm in ARMS:
                points = [
                    (point.at, rate)
                    for point in attack.curve
                    if (rate := getattr(point, f"hit_{arm}")) is not None
                ]
                if points:
                    axes.plot(
                        *zip(*points, strict=True), marker=MARKERS[arm], color=COLOURS[arm], markersize=4.5,
                        linewidth=1.4, label=names[arm],
                    )  # fmt: skip
            axes.set_title(short(attack.id), loc="left", fontsize=9).set_parse_math(False)
            axes.set_xlabel(short(attack.curve_of or "budget")).set_parse_math(False)
            axes.set_ylim(-0.05, 1.05)
            axes.set_yticks([0, 0.5, 1], ["0 %", "50 %", "100 %"])
            axes.grid(axis="y", color=INK, linewidth=0.4, alpha=0.18)
        figure.legend(
            *axes.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False,
            handletextpad=0.3, columnspacing=1.2,
        )  # fmt: skip
        return _written(figure)


def loss_plot(report: Mapping[str, Any]) -> str | None:
    """The losses of a training, group by group, as an edit's manifest reports them; ``None`` without any.

    Each step as a faint line, their running mean (a twentieth of the steps) as a strong one.
    """
    curves = _losses(report.get("losses"))
    if not curves:
        return None
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    every = report.get("losses_every")
    every = every if isinstance(every, int) and every > 0 else 1
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": "losses"}):
        figure = Figure(figsize=(4.9, 0.4 + 1.15 * len(curves)), layout="constrained")
        FigureCanvasSVG(figure)
        for axes, (group, points) in zip(
            figure.subplots(len(curves), squeeze=False, sharex=True)[:, 0],
            curves.items(),
            strict=True,
        ):
            steps = [1 + every * index for index, _ in points]
            values = [value for _, value in points]
            axes.plot(steps, values, color=COLOURS["original"], linewidth=0.7, alpha=0.4)
            axes.plot(steps, _smooth(values), color=COLOURS["original"], linewidth=1.6)
            axes.set_title(short(group), loc="left", fontsize=9).set_parse_math(False)
            if min(values) > 0 and max(values) > 30 * min(values):
                axes.set_yscale("log")
            axes.spines["left"].set_visible(True)
        axes.set_xlabel("step")
        return _written(figure)


def _losses(found: Any, most: int = 4) -> dict[str, list[tuple[int, float]]]:
    """Group -> (place, loss) of the steps in which it had one; a file's own text is not trusted."""
    if not isinstance(found, Mapping):
        return {}
    curves = {
        str(group): [
            (index, float(value))
            for index, value in enumerate(values[:5000])
            if isinstance(value, (int, float)) and math.isfinite(value)
        ]
        for group, values in list(found.items())[:most]
        if isinstance(values, list)
    }
    return {group: points for group, points in curves.items() if len(points) > 1}


def _smooth(values: list[float]) -> list[float]:
    width = max(1, len(values) // 20)
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - width] if index >= width else 0.0)
        means.append(total / min(index + 1, width))
    return means


def _names(fields: ConceptFields) -> dict[str, str]:
    """What the legend calls the arms; without an original nothing is known to have been erased."""
    assert fields.models is not None
    bare = fields.models.original is None
    return {arm: AS_GIVEN if bare and arm == "erased" else arm for arm in ARMS}


def _rates(
    rows: list[tuple[str, dict[str, Any], dict[str, Any]]],
    salt: str,
    label: str,
    names: Mapping[str, str],
) -> str:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    offsets = {"original": -0.2, "erased": 0.0, "never": 0.2}
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": salt}):
        figure = Figure(figsize=(4.9, 0.62 + 0.27 * len(rows) + 0.25), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for arm in ARMS:
            spots = [
                (i, points[arm], spans.get(arm))
                for i, (_, points, spans) in enumerate(rows)
                if points.get(arm) is not None
            ]
            if not spots:
                continue
            heights = [i + offsets[arm] for i, _, _ in spots]
            for height, (_, _, span) in zip(heights, spots, strict=True):
                if span is not None:
                    axes.plot(
                        span,
                        [height, height],
                        color=COLOURS[arm],
                        linewidth=1.6,
                        alpha=0.55,
                        solid_capstyle="round",
                    )
            axes.plot(
                [v for _, v, _ in spots],
                heights,
                MARKERS[arm],
                color=COLOURS[arm],
                markersize=5,
                label=names[arm],
            )
        for i in range(len(rows)):
            axes.axhline(i, color=INK, linewidth=0.4, alpha=0.18, zorder=0)
        axes.set_yticks(range(len(rows)))
        # Names are a user's texts: no mathematics in them.
        for tick, (_name, _, _) in zip(
            axes.set_yticklabels([short(n) for n, _, _ in rows]), rows, strict=True
        ):
            tick.set_parse_math(False)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(-0.02, 1.02)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel(label)
        figure.legend(
            loc="outside upper center", ncols=3, frameon=False, handletextpad=0.3, columnspacing=1.2
        )
        return _written(figure)


def _written(figure: Any) -> str:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return inline(stream.getvalue())


def short(name: str, length: int = 22) -> str:
    """A name cut to fit a label."""
    clean = " ".join(name.split())
    return clean if len(clean) <= length else clean[: length - 1] + "\u2026"


def inline(svg: str) -> str:
    """The ``<svg>`` element alone, without metadata, sized by the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg [^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(
        r' xmlns:xlink="[^"]*"', ' xmlns:xlink="http://www.w3.org/1999/xlink"', svg, count=1
    )
    # All figures of a page share one name space of ids; matplotlib's group ids repeat in each figure.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    return svg.replace(INK, "currentColor").replace(
        "<svg ", '<svg aria-hidden="true" focusable="false" ', 1
    )
