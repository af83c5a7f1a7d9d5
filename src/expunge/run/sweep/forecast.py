"""What a sweep will cost, counted before it runs: rows by kind of cell, hours on this machine, how to cut it.

A cell's rows are those that the same work took before, scaled by its prompts: in this sweep's folder, in recorded
leaderboards, or in the comparison.  An attack that nothing is known of counts with the whole of its budget, an
eraser that nothing is known of is named and counted as unknown.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ...core.trials import picture_rows
from ...errors import ExpungeError
from ...method import Prompt
from .. import results
from ..choices import Choice
from .bench import Bench
from .plan import Cell, Plan
from .record import main_rows, read
from .store import Store

__all__ = ["Forecast", "forecast", "lines", "speed"]

LEADERBOARD = "leaderboard"
PROBE = 16
"""Pictures of the measurement of speed."""


@dataclasses.dataclass(frozen=True)
class Forecast:
    """Counted cost of the cells that are not finished.

    Attributes:
        rows: Key -> rows; ``None`` where nothing is known.
        seconds: Key -> seconds where the cost is not one of rows alone (fits).
        bound: Keys of attacks that count with their whole budget, because nothing is known of them.
        finished: Cells that are there already.
    """

    rows: Mapping[str, float | None]
    seconds: Mapping[str, float]
    bound: frozenset[str]
    finished: int


class _Known:
    """Rows and seconds that methods took before: by label, of one fit or one attacked prompt."""

    def __init__(self) -> None:
        self.fits: dict[str, list[tuple[float, float]]] = {}
        self.attacks: dict[tuple[str, str], list[float]] = {}

    def fit(self, label: str, rows: float, seconds: float) -> None:
        self.fits.setdefault(label, []).append((rows, seconds))

    def attack(self, label: str, arm: str, rows: float, prompts: int) -> None:
        if prompts:
            for name in {arm, "" if arm not in ("original", "never") else arm}:
                self.attacks.setdefault((label, name), []).append(rows / prompts)

    def read(self, bench: Bench, plan: Plan, store: Store) -> None:
        """Everything that can be found; what cannot be read is left out, a forecast must not fail over it."""
        for key in store.keys():
            try:
                self._cell(store.read(key))
            except (ExpungeError, KeyError, TypeError):
                continue
        for file in sorted((results.folder() / LEADERBOARD).glob("*.json")):
            try:
                record = read(file)
            except ExpungeError:
                continue
            for row in record.rows:
                if row.refused is not None or record.options.get("budget") != bench.options.budget:
                    continue
                if row.kind == "fit":
                    self.fit(row.arm, row.rows, row.seconds)
                elif row.kind == "attack" and row.attack and row.hit:
                    self.attack(row.attack, row.arm, row.rows, len(row.hit.hits))
        for entry in _compared():
            self._compared(entry, bench.options.budget)

    def _cell(self, found: Mapping[str, Any]) -> None:
        request, result = found["request"], found["result"]
        if "refused" in result:
            return
        if request["kind"] == "fit":
            self.fit(request["eraser"]["label"], main_rows(result["cost"]), result["fit_seconds"])
        elif request["kind"] == "attack":
            arm = request["arm"]
            name = (
                arm["fit"]["label"]
                if isinstance(arm, dict) and "fit" in arm
                else "never"
                if isinstance(arm, dict)
                else arm
            )
            self.attack(
                request["attack"]["label"],
                name,
                main_rows(result["cost"]),
                len(result["hit"]["hits"]),
            )

    def _compared(self, entry: Mapping[str, Any], budget: str) -> None:
        request, result = entry["request"], entry["result"]
        if request["what"] == "pictures" and result.get("edit") and request.get("number") == 1:
            label = Choice(request["arm"]["id"], tuple(request["arm"]["changes"].items())).label
            self.fit(label, main_rows(result["edit"]["cost"]), result["edit"]["seconds"])
        elif (
            request["what"] == "attack"
            and result.get("budget") == budget
            and main_rows(result["cost"])
        ):
            told = request["attack"]
            label = Choice(told["id"], tuple(told["changes"].items())).label
            self.attack(label, request["arm"]["id"], main_rows(result["cost"]), result["hit"]["n"])


def _compared() -> Iterator[Mapping[str, Any]]:
    folder = results.folder() / "comparison"
    for file in sorted(folder.glob("*.json")) if folder.is_dir() else ():
        try:
            yield results.load(file, dict, "a comparison", "one recorded cell")
        except ExpungeError:
            continue


def forecast(bench: Bench, plan: Plan, store: Store) -> Forecast:
    """Count what is not finished."""
    known = _Known()
    known.read(bench, plan, store)
    rows: dict[str, float | None] = {}
    seconds: dict[str, float] = {}
    bound = set()
    limit = bench.options.allowance.denoiser_rows
    for key, cell in plan.cells.items():
        if store.finished(key):
            continue
        if cell.kind == "fit":
            found = known.fits.get(cell.arm)
            rows[key] = None if not found else float(np.mean([one for one, _ in found]))
            if found:
                seconds[key] = float(np.mean([spent for _, spent in found]))
        elif cell.kind == "measures":
            rows[key] = float(
                sum(_price(bench, prompts) for _, _, prompts in cell.case.sets.parts())
            )
        else:
            arm = cell.arm if cell.arm in ("original", "never") else ""
            each = known.attacks.get((cell.label, arm)) or known.attacks.get((cell.label, ""))
            count = len(cell.case.attacked)
            rows[key] = (
                float(np.mean(each)) * count
                if each
                else None
                if limit is None
                else float(limit * count)
            )
            if not each:
                bound.add(key)
    return Forecast(rows, seconds, frozenset(bound), len(plan.cells) - len(rows))


def _price(bench: Bench, prompts: list[Prompt]) -> int:
    """Rows of the outputs of prompts; a text counts one."""
    model = bench.model
    if not prompts or not hasattr(model, "timesteps"):
        return len(prompts)
    return len(prompts) * picture_rows(model, prompts, model.steps, model.guidance)


def speed(bench: Bench) -> float:
    """Rows that a core makes in a second, measured now on some of the prompts.

    Processor seconds count, so that a busy machine does not spoil it; on an accelerator the clock does.
    """
    clock = time.process_time if bench.options.device == "cpu" else time.perf_counter
    case = next(iter(bench.cases.values()))
    prompts = case.sets.target[:PROBE]
    bench.model.generate(
        prompts[:1], seeds=[p.seed for p in prompts[:1]]
    )  # libraries load on first use
    before, start = bench.model.cost.snapshot(), clock()
    bench.model.generate(prompts, seeds=[p.seed for p in prompts])
    spent = clock() - start
    return main_rows(bench.model.cost.since(before)) / max(spent, 1e-9)


# -- in words --------------------------------------------------------------------------------------


def lines(found: Forecast, plan: Plan, bench: Bench, rate: float, jobs: int = 1) -> list[str]:
    """The forecast as lines for a terminal: by kind of cell, in all, and how to cut it."""
    left = {key: plan.cells[key] for key in found.rows}
    told = [f"{len(left)} of {len(plan.cells)} cells to do, {found.finished} finished"]
    for kind in ("fit", "measures", "attack"):
        own = {key: cell for key, cell in left.items() if cell.kind == kind}
        if not own:
            continue
        known = [found.rows[key] or 0.0 for key in own]
        text = f"  {kind:9}{len(own):6} cells {sum(known):14,.0f} rows {_hours(found, own, rate):8.2f} h"
        bound = sum(key in found.bound for key in own)
        told.append(text + (f"  ({bound} with their whole budget: at most)" if bound else ""))
    unknown = sorted(
        {
            left[key].arm
            for key, rows in found.rows.items()
            if rows is None and left[key].kind == "fit"
        }
    )
    hours = _hours(found, left, rate)
    told.append(
        f"about {hours:.1f} core-hours at {rate:,.0f} rows a second"
        + (f", {hours / jobs:.1f} h with {jobs} jobs" if jobs > 1 else "")
    )
    if unknown:
        told.append(
            f"not counted, because never fitted here: {', '.join(unknown)} (a run with --attacks none tells)"
        )
    if any(rows is None for key, rows in found.rows.items() if left[key].kind == "attack"):
        told.append("not counted: attacks under a budget without limit")
    return told + _cuts(found, left, bench, rate)


def _hours(found: Forecast, cells: Mapping[str, Cell], rate: float) -> float:
    return sum(found.seconds.get(key, (found.rows[key] or 0.0) / rate) for key in cells) / 3600


def _cuts(found: Forecast, left: Mapping[str, Cell], bench: Bench, rate: float) -> list[str]:
    """What each way of cutting saves, and what it costs in certainty."""
    options = bench.options
    attacks = {key: cell for key, cell in left.items() if cell.kind == "attack"}
    if not attacks:
        return []
    told = ["to cut it:"]
    spent = _hours(found, attacks, rate)
    seeds = len(options.seeds)
    for name, share in (("--attack-n", options.attack_n), ("seeds", seeds)):
        if share < 2:
            continue
        fewer = share // 2 if name == "--attack-n" else share - 1
        prompts = fewer * seeds if name == "--attack-n" else options.attack_n * fewer
        saved = (spent if name == "--attack-n" else _hours(found, left, rate)) * (1 - fewer / share)
        what = f"--attack-n {fewer}" if name == "--attack-n" else f"{fewer} of {seeds} seeds"
        half, now = 100 * _half(prompts), 100 * _half(options.attack_n * seeds)
        told.append(
            f"  {what}: {saved:.1f} h less; a rate of 0.5 is then known to \u00b1{half:.0f} points a concept, "
            f"now \u00b1{now:.0f}"
        )
    for name, of in (("attack", lambda cell: cell.label), ("eraser", lambda cell: cell.arm)):
        groups: dict[str, dict[str, Cell]] = {}
        for key, cell in (attacks if name == "attack" else left).items():
            if name == "attack" or cell.arm not in ("original", "never"):
                groups.setdefault(of(cell), {})[key] = cell
        if len(groups) > 1:
            dear = sorted(groups, key=lambda label: -_hours(found, groups[label], rate))[:3]
            told.append(
                f"  without an {name}: "
                + ", ".join(f"{d} {_hours(found, groups[d], rate):.1f} h" for d in dear)
            )
    if options.budget != "quick" and found.bound:
        told.append(
            "  --budget quick: a fifth of the rows of what counts with its whole budget, and weaker attacks"
        )
    return told


def _half(prompts: int) -> float:
    """Half a 95 % interval of a rate of one half from independent prompts."""
    return float(1.96 * np.sqrt(0.25 / max(1, prompts)))
