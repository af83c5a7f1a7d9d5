"""The compact record of a sweep: hits one by one, costs and refusals, small enough to be kept with the project."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ... import catalogue
from ...edit.files import atomic_write
from ...errors import RunError
from .bench import Bench
from .plan import Plan
from .store import Store

__all__ = ["Bits", "Record", "Row", "gather", "read", "restore", "write"]


class Strict(BaseModel):
    """No unknown keys and no NaN."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class Bits(Strict):
    """Hits of outputs in their order, a digit each, and which prompt each belongs to."""

    hits: str = Field(pattern=r"^[01]*$")
    units: tuple[int, ...] | None = None

    @model_validator(mode="after")
    def _fits(self) -> Bits:
        if self.units is not None and len(self.units) != len(self.hits):
            raise ValueError(f"{len(self.hits)} hits but {len(self.units)} units")
        return self

    def values(self) -> list[bool]:
        """Hits."""
        return [digit == "1" for digit in self.hits]

    def prompts(self) -> list[int]:
        """The prompt of each hit."""
        return list(range(len(self.hits)) if self.units is None else self.units)


class Row(Strict):
    """One finished cell; what a kind does not have is left out."""

    kind: Literal["fit", "measures", "attack"]
    concept: str
    seed: int
    arm: str
    key: str | None = Field(default=None, description="The cell's name in a sweep's folder.")
    attack: str | None = None
    refused: str | None = None
    target: Bits | None = None
    routes: dict[str, Bits] = Field(default_factory=dict)
    kept: dict[str, Bits] = Field(default_factory=dict)
    lost: tuple[int, int] | None = Field(
        default=None, description="Unrecognisable kept outputs, of how many."
    )
    mistaken: tuple[int, int] | None = Field(
        default=None, description="Kept outputs taken for the concept."
    )
    frechet: float | None = None
    pre: Bits | None = None
    hit: Bits | None = None
    skipped: int = 0
    teaches: bool | None = None
    typed: bool = Field(default=False, description="It fed in a text, which anybody can type.")
    curve: dict[str, str] | None = Field(default=None, description="Point of the budget -> hits.")
    curve_of: str | None = Field(
        default=None, description="What the points count; older cells do not say."
    )
    bytes: int | None = None
    cost: dict[str, int] = Field(default_factory=dict)
    seconds: float = 0.0

    @property
    def rows(self) -> int:
        """Rows through the denoiser or the language model."""
        return main_rows(self.cost)


class Told(Strict):
    """A method as it ran."""

    id: str
    label: str
    version: int
    preset: str | None = None
    settings: dict[str, Any] = Field(default_factory=dict)
    concepts: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()


class Record(Strict):
    """Everything a leaderboard is made of."""

    schema_version: Literal[1] = 1
    model: str
    judge: str
    options: dict[str, Any]
    without: dict[str, str] = Field(
        default_factory=dict, description="Concept -> why it has no never."
    )
    erasers: tuple[str, ...]
    attacks: tuple[str, ...]
    methods: tuple[Told, ...] = ()
    made: dict[str, Any] = Field(default_factory=dict)
    cells: int = Field(description="Cells of the whole sweep.")
    rows: tuple[Row, ...]

    @field_validator("rows")
    @classmethod
    def _once(cls, value: tuple[Row, ...]) -> tuple[Row, ...]:
        seen = set()
        for row in value:
            name = (row.kind, row.concept, row.seed, row.arm, row.attack)
            if name in seen:
                raise ValueError(f"the cell {name} stands twice")
            seen.add(name)
        return value

    @property
    def concepts(self) -> tuple[str, ...]:
        """In the order asked for."""
        return tuple(self.options.get("concepts", ()))

    @property
    def seeds(self) -> tuple[int, ...]:
        """In the order asked for."""
        return tuple(self.options.get("seeds", ()))


def main_rows(cost: Mapping[str, int]) -> int:
    """Rows through the largest part: the one unit in which budgets and costs are told."""
    return sum(v for k, v in cost.items() if k.split(".")[0] in ("denoiser", "language"))


def gather(bench: Bench, plan: Plan, store: Store) -> Record:
    """The record of the finished cells of a plan."""
    rows: list[Row] = []
    methods: dict[str, dict[str, Any]] = {}
    made: dict[str, set[str]] = {}
    dates = []
    for key, cell in plan.cells.items():
        if not store.finished(key):
            continue
        found = store.read(key)
        dates += _dates(found)
        for name, value in _provenance(found):
            made.setdefault(name, set()).add(value)
        asked = found["request"].get("eraser" if cell.kind == "fit" else "attack")
        if asked is not None:
            name = json.dumps(asked, sort_keys=True)
            told = methods.setdefault(name, {**asked, "concepts": [], "tags": _tags(asked["id"])})
            if cell.case.concept.name not in told["concepts"]:
                told["concepts"].append(cell.case.concept.name)
        result = {
            k: v
            for k, v in found["result"].items()
            if v is not None and k not in ("digest", "fit_seconds")
        }
        rows.append(
            Row(
                kind=cell.kind, concept=cell.case.concept.name, seed=cell.case.seed, arm=cell.arm,
                key=key, attack=cell.label or None,
                seconds=found["result"].get("fit_seconds", found["seconds"]), **result,
            )
        )  # fmt: skip
    when = {"first": min(dates)[:10], "last": max(dates)[:10]} if dates else {}
    return Record(
        model=bench.model.name, judge=bench.judge.protocol, options=json.loads(bench.options.text()),
        without=dict(plan.without), erasers=plan.erasers, attacks=plan.attacks,
        methods=tuple(Told(**told) for told in methods.values()),
        made={**when, **{name: sorted(values) for name, values in sorted(made.items())}},
        cells=len(plan.cells), rows=tuple(rows),
    )  # fmt: skip


NOT_RESULT = {"kind", "concept", "seed", "arm", "key", "attack", "seconds"}
"""What a row says of its cell; the rest is the cell's answer."""


def restore(record: Record, plan: Plan, store: Store) -> int:
    """Finish the cells of a plan whose answers a record holds, so that a sweep can go on without its old folder.

    A record has no edits and no features, so a cell that an unfinished one needs is left to be done again.

    Returns:
        How many cells were taken over.
    """
    held = {str(row.key): row for row in record.rows if row.key is not None}
    rows = {key: held[key] for key in plan.cells if key in held and not store.finished(key)}
    while True:
        needed = {
            need
            for key, cell in plan.cells.items()
            if key not in rows and not store.finished(key)
            for need in cell.needs
        }
        if not needed & rows.keys():
            break
        for key in needed & rows.keys():
            del rows[key]
    for key, row in rows.items():
        result = row.model_dump(mode="json", exclude=NOT_RESULT, exclude_defaults=True)
        if row.bytes is not None:  # a fit knows its own time
            result["fit_seconds"] = row.seconds
        store.publish(
            plan.cells[key].request, key, result, row.seconds, made={"made": dict(record.made)}
        )  # fmt: skip
    return len(rows)


def _dates(found: Mapping[str, Any]) -> list[str]:
    own = found.get("made") or {}
    return [own["first"], own["last"]] if "last" in own else [str(found.get("date", ""))]


def _provenance(found: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, values in (found.get("made") or {}).items():
        if not isinstance(values, str):  # dates are told apart
            yield from ((name, value) for value in values)
    for name in ("commit", "machine"):
        if found.get(name):
            yield name, str(found[name])
    for name, version in (found.get("libraries") or {}).items():
        yield "libraries", f"{name} {version}"


def _tags(id: str) -> list[str]:
    return list(catalogue.system(id).tags)


def write(record: Record, file: Path) -> None:
    """Write a record, a cell a line."""
    head = record.model_dump(mode="json", exclude={"rows"})
    lines = [
        json.dumps(row.model_dump(mode="json", exclude_defaults=True), separators=(",", ":"))
        for row in record.rows
    ]
    text = json.dumps(head, indent=1, ensure_ascii=False).rstrip("\n}")
    body = ",\n".join(lines)
    atomic_write(file, f'{text},\n "rows": [\n{body}\n]}}\n'.encode())


def read(file: Path) -> Record:
    """Read a record.

    Raises:
        RunError: It cannot be read, or is not one.
    """
    try:
        return Record.model_validate_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"{file}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise RunError(f"{file.name}: byte {error.start} is not UTF-8") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "document"
        raise RunError(
            f"{file.name}: is no record of a sweep ({where}: {first['msg']}); `expunge sweep --record` writes one"
        ) from None
