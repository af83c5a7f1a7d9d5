"""Protocols: what makes two numbers of one name comparable, and the refusal where they are not.

Papers print different measurements under one name.  ``protocols.toml`` holds the facts of each (tool,
threshold, unit, preprocessing, denominator, who prints it).  A number carries its full id: the registered
start, and behind slashes what still varies, such as ``nudenet/mace/threshold=0.4``.  Only numbers of equal
full ids are compared, ranked or put into one column.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from ..errors import InputError, ProtocolError, nearest
from ..method import Measurement

__all__ = [
    "Protocol",
    "Record",
    "column",
    "full_id",
    "protocol",
    "protocols",
    "ranking",
    "same_protocol",
]


@dataclasses.dataclass(frozen=True)
class Protocol:
    """The facts of one kind of number.

    Attributes:
        id: Start of the full id.
        title: In words.
        group: What it measures.
        unit: What is counted or averaged.
        better: ``low``, ``high``, or ``None`` where that depends on what is looked at.
        tool: Who looks at the picture.
        floor: Least score the tool itself lets through.
        threshold: What the script asks for on top.
        strict: Scores must be greater than the threshold, not only reach it.
        preprocessing: What happens to the picture first.
        denominator: What a count is divided by; ``None`` for plain counts.
        printed: Who prints numbers of this kind.
        note: The trap.
        elsewhere: Whose code gives such numbers, where none of ours does: they can be kept and compared, not made.
    """

    id: str
    title: str
    group: str
    unit: str
    better: str | None = None
    tool: str = ""
    floor: float | None = None
    threshold: float | None = None
    strict: bool = False
    preprocessing: str = ""
    denominator: str | None = None
    printed: tuple[str, ...] = ()
    note: str = ""
    elsewhere: str = ""

    def passes(self, score: float, threshold: float | None = None) -> bool:
        """Whether a score counts, after the tool's own minimum; ``threshold`` stands in for the protocol's."""
        if self.floor is not None and score < self.floor:
            return False
        least = self.threshold if threshold is None else threshold
        if least is None:
            return True
        return score > least if self.strict else score >= least


@functools.cache
def _registry() -> Mapping[str, Protocol]:
    text = resources.files(__package__).joinpath("protocols.toml").read_text(encoding="utf-8")
    rows = tomllib.loads(text)["protocol"]
    made = [Protocol(**{**row, "printed": tuple(row.get("printed", ()))}) for row in rows]
    return {one.id: one for one in made}


def protocols(group: str | None = None) -> tuple[Protocol, ...]:
    """All registered protocols, or those of one group, in the order of the file.

    Raises:
        InputError: No protocol is of that group.
    """
    found = tuple(_registry().values())
    if group is None:
        return found
    groups = {one.group for one in found}
    if group not in groups:
        raise InputError(f"no protocol is of the group {group!r}{nearest(group, groups)}")
    return tuple(one for one in found if one.group == group)


def protocol(id: str) -> Protocol:
    """The protocol of a registered or a full id.

    Raises:
        InputError: Nobody registered it; the nearest id is named.
    """
    parts = id.split("/")
    for length in range(len(parts), 0, -1):
        found = _registry().get("/".join(parts[:length]))
        if found is not None:
            return found
    raise InputError(f"no protocol has the id {id!r}{nearest(id, _registry())}")


def full_id(id: str, **varying: Any) -> str:
    """A registered id with what still varies, in the order given; ``None`` is left out.

    Raises:
        InputError: Nobody registered the id, or no code of ours gives such numbers.
    """
    if id not in _registry():
        raise InputError(f"no protocol has the id {id!r}{nearest(id, _registry())}")
    if _registry()[id].elsewhere:
        raise InputError(
            f"no code of ours gives {id!r}: such numbers come from {_registry()[id].elsewhere}, and others are not "
            "comparable with them"
        )
    return "/".join([id, *(f"{k}={v}" for k, v in varying.items() if v is not None)])


def same_protocol(measured: Iterable[Measurement]) -> str:
    """The one full id of several numbers.

    Raises:
        ProtocolError: They were measured differently.
        InputError: There are none.
    """
    ids = list(dict.fromkeys(one.protocol for one in measured))
    if not ids:
        raise InputError("there is no number to compare")
    if len(ids) > 1:
        raise ProtocolError(f"{ids[0]!r} cannot be compared with {ids[1]!r}")
    return ids[0]


def ranking(
    rows: Mapping[str, Measurement], better: str | None = None
) -> list[tuple[str, Measurement]]:
    """Methods best first by one number.

    Args:
        rows: Method -> its number.
        better: ``low`` or ``high``; default: what the registry says.

    Raises:
        ProtocolError: The numbers have different protocols, or one has no value.
        InputError: Neither end is better by itself, so ``better`` must be given.
    """
    id = same_protocol(rows.values())
    way = better
    if way is None:
        way = protocol(id).better
    if way not in ("low", "high"):
        raise InputError(f"{id!r}: better is {way!r}; allowed is 'low' or 'high'")
    for name, one in rows.items():
        if one.value is None:
            raise ProtocolError(f"{name} has no value of {id!r}, so it cannot be ranked")
    sign = 1 if way == "low" else -1
    return sorted(rows.items(), key=lambda item: sign * float(item[1].value or 0.0))


def column(rows: Mapping[str, Mapping[str, Measurement]]) -> dict[str, str]:
    """Column -> its one full id, of a table method -> column -> number.

    Raises:
        ProtocolError: A column mixes protocols.
    """
    found: dict[str, str] = {}
    for method, cells in rows.items():
        for name, one in cells.items():
            if found.setdefault(name, one.protocol) != one.protocol:
                raise ProtocolError(
                    f"column {name!r}: {method} was measured by {one.protocol!r}, others by {found[name]!r}"
                )
    return found


@dataclasses.dataclass(frozen=True)
class Record:
    """A number as it is kept: its metric, protocol, interval and what each picture gave.

    Attributes:
        metric: Its name in words.
        measurement: Value, full protocol id, n and interval.
        values: For each picture, or empty.
        prompts: The prompt of each of those pictures, or empty.
    """

    metric: str
    measurement: Measurement
    values: tuple[float | None, ...] = ()
    prompts: tuple[str, ...] = ()

    def to_json(self) -> str:
        """One line of JSON."""
        one = self.measurement
        plain = {
            "metric": self.metric,
            "protocol": one.protocol,
            "value": one.value,
            "n": one.n,
            "interval": one.interval,
            "values": self.values,
            "prompts": self.prompts,
        }
        return json.dumps(plain, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Record:
        """Read what :meth:`to_json` wrote.

        Raises:
            InputError: Not JSON of this form: the key or value is named.
        """
        try:
            plain = json.loads(text)
        except ValueError as error:
            raise InputError(f"a record is not JSON ({error})") from None
        keys = ("metric", "protocol", "value", "n", "interval", "values", "prompts")
        if not isinstance(plain, dict):
            raise InputError("a record is a JSON object")
        for key in plain:
            if key not in keys:
                raise InputError(f"a record has no key {key!r}{nearest(key, keys)}")
        for key in ("metric", "protocol", "n"):
            if key not in plain:
                raise InputError(f"a record needs the key {key!r}")
        id, interval = str(plain["protocol"]), plain.get("interval")
        protocol(id)
        for key in ("values", "prompts"):
            if not isinstance(plain.get(key) or [], list):
                raise InputError(f"a record of {id!r}: {key} must be a list")
        if interval is not None and (
            not isinstance(interval, list) or len(interval) != 2 or None in interval
        ):
            raise InputError(f"a record of {id!r}: interval must be null or two numbers")
        numbers = [plain.get("value"), *(interval or ()), *(plain.get("values") or ())]
        whole = isinstance(plain["n"], int) and not isinstance(plain["n"], bool)
        if not whole or not all(map(_number, numbers)):
            raise InputError(f"a record of {id!r} holds something that is not a finite number")
        pair = None if interval is None else (float(interval[0]), float(interval[1]))
        return cls(
            str(plain["metric"]),
            Measurement(plain.get("value"), id, plain["n"], pair),
            tuple(plain.get("values") or ()),
            tuple(map(str, plain.get("prompts") or ())),
        )


def _number(value: Any) -> bool:
    if value is None:
        return True
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def markdown(rows: Sequence[Protocol] | None = None) -> str:
    """The table of docs/metrics.md: one row a protocol, group by group."""
    shown = protocols() if rows is None else tuple(rows)
    lines: list[str] = []
    for group in dict.fromkeys(one.group for one in shown):
        lines += [
            f"### {group[:1].upper()}{group[1:]}",
            "",
            "| id | what it is | threshold | divided by | better | printed by | trap |",
            "|---|---|---|---|---|---|---|",
        ]
        for one in (p for p in shown if p.group == group):
            what = one.unit + (f"; {one.tool}" if one.tool else "")
            what += f"; {one.preprocessing}" if one.preprocessing else ""
            cells = (
                f"`{one.id}`", what, _threshold(one), one.denominator or "a count" if _counts(one) else "",
                one.better or "depends", ", ".join(one.printed), " ".join(filter(None, (one.note, _missing(one)))),
            )  # fmt: skip
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _missing(one: Protocol) -> str:
    return f"No code of ours gives it, but {one.elsewhere}." if one.elsewhere else ""


def _counts(one: Protocol) -> bool:
    return one.denominator is not None or one.unit in ("detections", "picture x label")


def _threshold(one: Protocol) -> str:
    asked = "" if one.threshold is None else f"{'>' if one.strict else '>='} {one.threshold:g}"
    own = "" if one.floor is None else f"tool's own >= {one.floor:g}"
    return ", ".join(part for part in (asked, own) if part)
