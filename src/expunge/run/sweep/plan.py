"""The cells of a sweep in the order of work, each with everything that can change its answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from ... import catalogue
from ...errors import ExpungeError
from ..choices import Choice, key, plain
from . import RESULTS
from .bench import Bench, Case
from .options import configured

__all__ = ["CONTROLS", "Cell", "Plan", "planned"]

CONTROLS = ("original", "never")
"""Arms without an edit, the two ends of every scale; they do not depend on erasers and are measured once."""

Kind = Literal["fit", "measures", "attack"]
KINDS = ("measures", "fit", "attack")

QUICK = ("closed-form", "inference-time", "control")
"""Tags of methods that are worked on first, until something is known of what each costs."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One piece of work.

    Attributes:
        kind: ``fit`` (an eraser), ``measures`` (pictures of an arm), or ``attack``.
        arm: ``original``, ``never``, or the label of an eraser.
        case: Concept, seed and prompts.
        request: Everything that can change the answer; :attr:`key` is its hash.
        needs: Keys of the cells that must be finished before.
        eraser, attack: The configured methods.
    """

    kind: Kind
    arm: str
    case: Case
    request: Mapping[str, Any]
    needs: tuple[str, ...] = ()
    eraser: Any = None
    attack: Any = None
    label: str = ""

    @property
    def key(self) -> str:
        """The name of the cell's folder."""
        return key(self.request)

    @property
    def title(self) -> str:
        """A line for the terminal."""
        what = self.label if self.kind == "attack" else self.kind
        return f"{self.case.concept.name}, {self.arm}, {what}, seed {self.case.seed}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """All cells in the order of work.

    Attributes:
        cells: By key, first the cheap ones; a cell stands after those it needs.
        without: Concept -> why it has no never model.
        erasers, attacks: Labels, in the order asked for.
    """

    cells: Mapping[str, Cell]
    without: Mapping[str, str]
    erasers: tuple[str, ...]
    attacks: tuple[str, ...]


def planned(bench: Bench) -> Plan:
    """The cells of a sweep.

    Raises:
        ExpungeError: Something that was asked for does not exist, before any work is done.
    """
    options, family = bench.options, bench.model.family
    erasers = options.chosen("erase", family)
    attacks = options.chosen("attack", family)
    cells: dict[str, Cell] = {}
    without: dict[str, str] = {}
    for name in options.concepts:
        reason = bench.lacks(bench.concept(name))
        if reason is not None:
            without[name] = reason
        for seed in options.seeds:
            for cell in _of_case(bench, bench.case(name, seed), erasers, attacks, reason is None):
                cells[cell.key] = cell
    ordered = sorted(cells.items(), key=lambda item: _order(item[1]))
    return Plan(
        dict(ordered), without, tuple(c.label for c in erasers), tuple(c.label for c in attacks)
    )


def _of_case(
    bench: Bench, case: Case, erasers: Sequence[Choice], attacks: Sequence[Choice], never: bool
) -> Iterator[Cell]:
    options, family = bench.options, bench.model.family
    kind = case.concept.kind
    searches = [(c.label, *configured(c, "attack", family, kind, options.budget)) for c in attacks]
    arms: list[tuple[str, Any, Cell | None]] = [("original", "original", None)]
    arms += [("never", {"never": bench.never.state.key}, None)] if never else []
    for choice in erasers:
        made, named = configured(choice, "erase", family, kind, "world")
        request = {"eraser": named, "keep": list(case.keep)} | case.asked()
        fit = Cell("fit", choice.label, case, _request(bench, "fit", request), eraser=made)
        yield fit
        arms.append((choice.label, {"fit": fit.request["eraser"], "fit_key": fit.key}, fit))
    reference = None
    for arm, named_arm, below in arms:
        needs = () if below is None else (below.key,)
        request = {"arm": named_arm} | case.asked("measured")
        measures = Cell(
            "measures", arm, case, _request(bench, "measures", request),
            needs if reference is None else (*needs, reference),
        )  # fmt: skip
        reference = (
            reference or measures.key
        )  # distances are taken to the original, which comes first
        yield measures
        for label, search, told in searches:
            request = {
                "arm": named_arm, "attack": told, "budget": dataclasses.asdict(options.allowance),
                **case.asked("attacked"),
            }  # fmt: skip
            yield Cell(
                "attack", arm, case, _request(bench, "attack", request), needs, attack=search, label=label
            )  # fmt: skip


def _request(bench: Bench, kind: str, more: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = plain({"kind": kind, "results": RESULTS, **bench.named(), **more})
    return found


def _order(cell: Cell) -> tuple[Any, ...]:
    """Controls before erasers, quick methods before slow ones, pictures before attacks; seed by seed."""
    return (
        cell.case.seed,
        0 if cell.arm in CONTROLS else 1,
        0 if cell.kind != "attack" or _quick(cell.label) else 1,
        0 if cell.arm in CONTROLS or _quick(cell.arm) else 1,
        KINDS.index(cell.kind) if cell.arm in CONTROLS else ("fit", "measures", "attack").index(cell.kind),
    )  # fmt: skip


def _quick(label: str) -> bool:
    try:
        tags = catalogue.system(Choice.parse(label).id).tags
    except ExpungeError:
        return False
    # A closed form with a second, trained stage is no quick one.
    return (
        any(tag in QUICK for tag in tags) and "finetune" not in tags and "prompt-search" not in tags
    )
