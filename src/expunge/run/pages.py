"""Writes the derived parts of the documentation: settings, recorded claims, benchmarks, the index.

A page is written by hand except for what stands between two markers, as in

    <!-- settings: begin (made by `make docs`) -->
    <!-- settings: end -->

Settings and presets come from the methods' classes, claims from ``results/`` (:mod:`.results`), the
benchmarks from ``results/benchmarks``, the comparison from ``results/comparison``, the table of metrics from
``core/protocols.toml``.
``python -m expunge.run.status`` rewrites all of it; a test compares the committed pages with
:func:`render`, so a stale page is noticed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import catalogue
from ..core import protocols
from ..edit.files import atomic_write
from ..errors import RunError
from ..method import BUDGETS
from . import results

__all__ = [
    "NOTHING", "benchmarks", "between", "cell", "every_claim", "filled", "index", "measured", "number",
    "render", "settings", "systems", "table", "write",
]  # fmt: skip

NOTHING = "No claim recorded at this version yet."
BENCHMARKS = "benchmarks"
COMPARISON = "comparison"
LEADERBOARD = "leaderboard"
KINDS = {
    "int": "whole number",
    "float": "number",
    "bool": "`true`, `false`",
    "str": "text",
    "tuple": "list",
}
"""Words for the types of settings."""


# -- markers ---------------------------------------------------------------------------------------


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin (made by `make docs`) -->", f"<!-- {name}: end -->"


def _parts(text: str, name: str, where: str) -> tuple[str, str, str]:
    """What stands before, between and after two markers, the markers with the outer parts."""
    begin, end = _markers(name)
    head, first, rest = text.partition(begin)
    body, second, tail = rest.partition(end)
    if not first or not second:
        raise RunError(f"{where}: lacks the lines {begin!r} and {end!r}, in this order")
    return head + begin, body, end + tail


def between(text: str, name: str, where: str = "page") -> str:
    """What stands between the markers of ``name``.

    Raises:
        RunError: A marker is missing; the message names ``where``.
    """
    return _parts(text, name, where)[1].strip("\n")


def filled(text: str, name: str, body: str, where: str = "page") -> str:
    """The text with ``body`` between the markers of ``name``; see :func:`between`."""
    head, _, tail = _parts(text, name, where)
    return f"{head}\n{body}\n{tail}"


# -- how things are written ------------------------------------------------------------------------


def number(value: Any) -> str:
    """A measured value: at most three decimals, fewer for large numbers, a power for tiny ones."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if not isinstance(value, float):
        return cell(value)
    size = abs(value)
    if not math.isfinite(value):
        return str(value)
    if 0 < size < 0.0005:
        return f"{value:.1e}"
    return f"{value:,.{3 if size < 10 else 1 if size < 100 else 0}f}"


def cell(text: Any) -> str:
    """A text inside a table: one line, no column ends early, nothing is taken for HTML."""
    plain = " ".join(str(text).split())
    return plain.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _typed(value: Any) -> str:
    """A setting's value as ``--set`` takes it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return ",".join(_typed(entry) for entry in value)
    return str(value)


def _code(value: Any) -> str:
    typed = _typed(value)
    return f"`{typed}`" if typed else "empty"


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """A table of cells that are written already; see :func:`cell` and :func:`number`."""
    return "\n".join([_row(head), f"|{'---|' * len(head)}", *map(_row, rows)])


# -- settings --------------------------------------------------------------------------------------


def settings(cls: type[Any]) -> str:
    """Tables of a method's hyperparameters and presets, from ``describe()`` and ``presets``."""
    rows = [
        (f"`{row['name']}`", _code(row["default"]), _allowed(row), cell(row.get("help", "")))
        for row in cls.describe()
    ]
    parts = [table(("setting", "default", "allowed", "meaning"), rows)]
    if cls.presets:
        changes = [
            (f"`{name}`", ", ".join(f"`{k}={_typed(v)}`" for k, v in preset.items()) or "nothing")
            for name, preset in cls.presets.items()
        ]
        parts.append(table(("preset", "changes"), changes))
    parts.append(_how_to_set(cls))
    return "\n\n".join(parts)


def _allowed(row: Mapping[str, Any]) -> str:
    kind, _, rest = str(row["type"]).partition(" | ")
    words = KINDS.get(kind, cell(kind))
    if "choices" in row:
        words = ", ".join(_code(choice) for choice in row["choices"])
    low, high = row.get("minimum"), row.get("maximum")
    if low is not None or high is not None:
        bounds = f"{low} to {high}" if high is not None and low is not None else f"at least {low}"
        if low is None:
            bounds = f"at most {high}"
        words += f"{' of numbers' if kind == 'tuple' else ''}, {bounds}"
    return f"{words}, or `none`" if rest == "None" else words


def _how_to_set(cls: type[Any]) -> str:
    """Where presets and settings are given; attacks take theirs from the budget."""
    python = f'`{cls.__name__}.configured("NAME", setting=value)`'
    kinds = any(name.startswith("paper:") for name in cls.presets)
    if catalogue.system(cls.id).verb == "erase":
        own = ["a world's model takes `world`"] if "world" in cls.presets else []
        own += [f"{'another' if own else 'a model'} `paper:KIND` of the concept"] if kinds else []
        otherwise = f"; unless told otherwise {', '.join(own)}" if own else ""
        return f"Command line: `--preset NAME --set setting=value`{otherwise}. Python: {python}."
    named = [f"`--budget {name}`" for name in BUDGETS if name in cls.presets]
    if not named:
        return f"Command line: the defaults. Python: `{cls.__name__}(setting=value)`."
    kind = ", else `paper:KIND` of the concept" if kinds else ""
    taken = f"An audit takes the preset named like the budget{kind}, unless it is given an attack with settings"
    return f"Command line: {' or '.join(named)} takes the preset of that name. Python: {python}.\n{taken} of its own."


# -- claims ----------------------------------------------------------------------------------------


def measured(id: str, version: int | None) -> str:
    """A method's claims at a version, the latest run of each; a sentence where there is none."""
    runs = []
    for file in _files(results.folder() / id):
        found = [run for run in results.read(file) if run.get("version") == version]
        runs += found[-1:]
    if not runs:
        return NOTHING
    return f"Version {version}; {_counts(runs)}.\n\n{_claims(runs)}"


def every_claim() -> str:
    """All recorded claims, the latest run of each, one table a method."""
    root = results.folder()
    parts, everything = [], []
    for folder in sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else ():
        if folder.name in (BENCHMARKS, COMPARISON, LEADERBOARD):
            continue
        runs = [run for file in _files(folder) for run in results.read(file)[-1:]]
        if runs:
            everything += runs
            parts.append(f"## `{folder.name}`\n\n{_claims(runs, _present(folder.name))}")
    if not parts:
        return "No claim recorded yet."
    return "\n\n".join([f"Claims: {_counts(everything)}.", *parts])


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.json")) if folder.is_dir() else []


def _present(id: str) -> str:
    """The version a method or shared machinery has now, as a text; ``none`` of what is no longer there."""
    from ..core.sparse_autoencoder import SparseAutoencoderConfig

    if id == SparseAutoencoderConfig.id:
        return number(SparseAutoencoderConfig.version)
    known = {system.id for system in catalogue.systems()}
    return number(catalogue.version(id) if id in known else None)


def _counts(runs: Sequence[Mapping[str, Any]]) -> str:
    words = [_word(run) for run in runs]
    return ", ".join(f"{words.count(word)} {word}" for word in ("held", "failed", "waiting"))


def _word(run: Mapping[str, Any]) -> str:
    holds = run.get("holds")
    return "waiting" if holds is None else "held" if holds else "failed"


def _result(run: Mapping[str, Any]) -> str:
    """Held, failed or waiting, with the note of the run; what failed stands out."""
    word = _word(run)
    shown = f"**{word}**" if word == "failed" else word
    return f"{shown}: {cell(run['note'])}" if run.get("note") else shown


def _claims(runs: Sequence[Mapping[str, Any]], present: str | None = None) -> str:
    """One row a claim; with the method's present version also the version each run was made with."""
    head = ["claim", "result", "measured (95 % interval)", "n", "seeds", "preset", "date"]
    rows = []
    for run in runs:
        seeds = run.get("seeds") or []
        row = [
            cell(run.get("claim", "")),
            _result(run),
            "<br>".join(_values(run)) or "nothing",
            number(run.get("n")),
            ", ".join(map(str, seeds)) if len(seeds) <= 6 else f"{len(seeds)} seeds",
            _code(run["preset"]) if run.get("preset") else "none",
            cell(str(run.get("date", ""))[:10]),
        ]
        if present is not None:
            version = number(run.get("version"))
            row.append(version if version == present else f"{version} (now {present})")
        rows.append(row)
    return table(head if present is None else [*head, "version"], rows)


def _values(run: Mapping[str, Any]) -> list[str]:
    """The measured numbers by name, each with its interval where it has one."""
    values, given = dict(run.get("values") or {}), run.get("interval")
    intervals = dict(given) if isinstance(given, Mapping) else {}
    if given is not None and not isinstance(given, Mapping):
        # An interval without a name belongs to the only number, or else stands by itself.
        intervals[next(iter(values)) if len(values) == 1 else "interval"] = given
    lines = [
        f"{cell(name)}: {_number_with(value, intervals.get(name))}"
        for name, value in _flat(values).items()
    ]
    alone = [name for name in intervals if name not in values]
    return lines + [f"{cell(name)}: {_bounds(intervals[name])}" for name in alone]


def _number_with(value: Any, interval: Any) -> str:
    return number(value) + (f" ({_bounds(interval)})" if interval else "")


def _bounds(interval: Any) -> str:
    if isinstance(interval, (list, tuple)):
        return " to ".join(number(bound) for bound in interval)
    return number(interval)


def _flat(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Nested numbers as one mapping, their names joined; lists become texts."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{before}{name}, ")
        else:
            listed = isinstance(value, (list, tuple))
            found[f"{before}{name}"] = (
                ", ".join(number(entry) for entry in value) if listed else value
            )
    return found


# -- benchmarks and the index ----------------------------------------------------------------------


def benchmarks() -> str:
    """The ratios of every benchmark, with its setting and machine; the arms stay in the JSON files."""
    rows = []
    for file in _files(results.folder() / BENCHMARKS):
        found = results.load(file, dict, "a benchmark", "one mapping")
        setting = _flat(found.get("setting") or {})
        machine = setting.pop("machine", found.get("machine"))
        ratios = {
            name.replace("_", " "): value
            for name, value in _flat({k: v for k, v in found.items() if k != "arms"}).items()
            if isinstance(value, (bool, int, float))
            and not name.startswith("setting, ")
            # What has a unit is a measured quantity or a limit, not a ratio.
            and not name.endswith(("_bytes", "_seconds"))
        }
        rows.append(
            (
                cell(found.get("benchmark", file.stem)),
                "<br>".join(f"{cell(k)}: {number(v)}" for k, v in ratios.items()) or "nothing",
                ", ".join(f"{cell(k.replace('_', ' '))} {number(v)}" for k, v in setting.items()),
                cell(machine or "not recorded"),
            )
        )
    head = ("benchmark", "ratios", "setting", "machine")
    return table(head, rows) if rows else "No benchmark recorded yet."


def systems() -> tuple[catalogue.System, ...]:
    """The systems that need a page: ours that have a class."""
    return tuple(s for s in catalogue.implemented() if s.package == "expunge")


def index() -> str:
    """The list of method pages."""
    rows = [(f"[`{s.id}`](methods/{s.id}.md)", cell(s.title), s.verb, s.family) for s in systems()]
    return table(("page", "method", "verb", "family"), rows)


# -- all pages -------------------------------------------------------------------------------------


def render(docs: Path) -> dict[Path, str]:
    """The pages of a docs folder as they should be now: path to whole text.

    Raises:
        RunError: A method has no page, or a page lacks its markers.
    """
    from .comparison import page as comparison

    derived: dict[Path, dict[str, str]] = {
        docs / "README.md": {"index": index()},
        docs / "results.md": {"results": every_claim(), "benchmarks": benchmarks()},
        docs / "comparison.md": comparison.parts(),
        docs / "metrics.md": {"protocols": protocols.markdown()},
    }
    for system in systems():
        cls = catalogue.resolve(system.id)
        derived[docs / "methods" / f"{system.id}.md"] = {
            "settings": settings(cls),
            "claims": measured(system.id, cls.version),
        }
    rendered = {}
    for path, parts in derived.items():
        where = path.relative_to(docs.parent).as_posix()
        if not path.is_file():
            raise RunError(f"{where}: is missing; CONTRIBUTING.md says what a page holds")
        text = path.read_text(encoding="utf-8")
        for name, body in parts.items():
            text = filled(text, name, body, where)
        rendered[path] = text
    return rendered


def write(docs: Path) -> None:
    """Bring all pages of a docs folder, and the plots of the comparison, up to date; see :func:`render`."""
    from .comparison import plots

    for path, text in render(docs).items():
        if path.read_text(encoding="utf-8") != text:
            atomic_write(path, text.encode())
    plots.draw(docs)
