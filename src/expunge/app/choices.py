"""What can be chosen: concepts, methods, presets, settings, attacks, budgets, formats.  Nothing is done here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .. import catalogue
from ..errors import ExpungeError, SettingError
from ..method import BUDGETS

if TYPE_CHECKING:
    from ..models.base import Model

__all__ = [
    "Choice",
    "Field",
    "attacks",
    "budgets",
    "changes",
    "concepts",
    "form",
    "methods",
    "models",
    "presets",
    "prompts",
]


@dataclasses.dataclass(frozen=True)
class Choice:
    """Something to choose.

    Attributes:
        id: What is passed on.
        label: What is shown.
        help: A sentence about it.
    """

    id: str
    label: str
    help: str = ""


@dataclasses.dataclass(frozen=True)
class Field:
    """One setting of a method as a form shows it.

    Attributes:
        name: The hyperparameter.
        help: What it means, with unit and range.
        control: ``switch``, ``list`` or ``text``.
        value: What stands there at first: a bool, or a text that ``configured`` reads back as the same value.
        choices: What a list offers.
    """

    name: str
    help: str
    control: str
    value: bool | str
    choices: tuple[str, ...] = ()


def models() -> list[Choice]:
    """Models that need no download; any folder or hub id can be typed as well."""
    found = []
    for name in catalogue.worlds():
        found += [Choice(name, name)]
        if name == "world":
            found += [Choice(f"{name}/{v}", f"{name}/{v}") for v in ("sibling", "never", "facts")]
    return found


def concepts(model: Model) -> list[Choice]:
    """Names a world knows, those first that its never model lacks; of any other model nothing is known."""
    companions = model.companions
    if companions is None:
        return []
    found: dict[str, Any] = {}
    waiting = [*companions.never_lacks, *companions.unrelated]
    while waiting:
        name = waiting.pop(0)
        known = companions.concept(name)
        if known is None or known.name in found:
            continue
        found[known.name] = known
        waiting += [n for n in companions.neighbours(known) if n not in found]
    lacks = {name.lower() for name in companions.never_lacks}
    return [
        Choice(name, f"{name} ({one.kind})", "reference" if name.lower() in lacks else "")
        for name, one in found.items()
    ]


def methods(family: str, verb: str = "erase") -> list[Choice]:
    """Implemented methods for a family; those whose evidence is complete come first."""
    found = []
    for entry in catalogue.implemented(verb, family):
        try:
            cls = catalogue.resolve(entry.id)
        except ExpungeError:
            continue  # an extra that is not installed; `expunge methods` lists it
        if family in cls.families:
            works = catalogue.status(entry.id) == "works"
            state = "claims recorded" if works else "tested, claims not recorded yet"
            found.append(
                (not works, Choice(entry.id, f"{entry.id} \u2013 {short(entry.title)}", state))
            )
    return [choice for _, choice in sorted(found, key=lambda pair: pair[0])]


def short(title: str) -> str:
    """A published title without the name in front of it, cut where it is long."""
    text = title.partition(": ")[2] or title
    return text if len(text) <= 44 else text[:43].rstrip() + "\u2026"


def attacks(family: str) -> list[Choice]:
    """Implemented attacks for a family, and whether they search or can teach."""
    found = []
    for choice in methods(family, "attack"):
        teaches = getattr(catalogue.resolve(choice.id), "teaches", False)
        kind = "can teach" if teaches else "searches"
        found.append(Choice(choice.id, f"{choice.id} ({kind})", choice.help))
    return found


def budgets() -> list[Choice]:
    """Allowances for an attacked prompt, the smallest first."""
    ordered = sorted(BUDGETS.values(), key=lambda b: b.denoiser_rows or float("inf"))
    return [
        Choice(
            b.name,
            f"{b.name} ({f'{b.denoiser_rows:,} rows' if b.denoiser_rows else 'as published'})",
        )
        for b in ordered
    ]


def presets(id: str, kind: str | None, world: bool) -> tuple[list[str], str]:
    """A method's presets, and the one that is taken where none is asked for."""
    cls = catalogue.resolve(id)
    return ["paper", *cls.presets], cls.preset_for(kind, "world" if world else None) or "paper"


def form(id: str, preset: str) -> list[Field]:
    """The settings of a method as a form, filled in with a preset.

    Raises:
        SettingError: There is no such preset.
    """
    cls = catalogue.resolve(id)
    if preset != "paper" and preset not in cls.presets:
        raise SettingError(
            f"{id}: preset {preset!r} is unknown; it has {', '.join(['paper', *cls.presets])}"
        )
    values = {
        **{row["name"]: row["default"] for row in cls.describe()},
        **cls.presets.get(preset, {}),
    }
    return [_field(row, values[row["name"]]) for row in cls.describe()]


def _field(row: Mapping[str, Any], value: Any) -> Field:
    help = str(row.get("help", ""))
    low, high = row.get("minimum"), row.get("maximum")
    if low is not None and high is not None:
        help += f" ({low} to {high})"
    elif low is not None or high is not None:
        help += f" (at least {low})" if low is not None else f" (at most {high})"
    if row["type"] == "bool":
        return Field(row["name"], help, "switch", bool(value))
    if "choices" in row:
        offered = tuple(text(choice) for choice in row["choices"])
        if row["type"].endswith("None") and "none" not in offered:
            offered = ("none", *offered)
        return Field(row["name"], help, "list", text(value), offered)
    return Field(row["name"], help, "text", text(value))


def text(value: Any) -> str:
    """A setting's value as ``configured`` reads it."""
    if value is None:
        return "none"
    if isinstance(value, (tuple, list)):
        return ", ".join(text(entry) for entry in value)
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


def changes(fields: Sequence[Field], values: Sequence[Any]) -> dict[str, str]:
    """What was changed in a form: name -> text; what stands as it was is left to the preset."""
    found = {}
    for field, value in zip(fields, values, strict=True):
        if field.control == "switch":
            if bool(value) is not field.value:
                found[field.name] = "true" if value else "false"
        elif str(value if value is not None else "").strip() != field.value:
            found[field.name] = str(value if value is not None else "").strip()
    return found


def prompts(model: Model, names: Sequence[str], n: int = 3) -> list[Any]:
    """Prompts to look at first: some that call for the concepts, some for what should stay.

    A world has development prompts with known truth; for other models simple sentences are made.
    """
    from ..method import Prompt

    companions, found = model.companions, []
    for name in names:
        known = companions.concept(name) if companions is not None else None
        if companions is None or companions.prompts is None or known is None:
            found += [
                Prompt(t.format(name), concept=name) for t in ("a photo of {}", "a painting of {}")
            ]
            continue
        found += companions.prompts(known.name, n, seed=0, split="development")
        # Another template for each neighbour.
        for place, other in enumerate(
            [o for o in companions.neighbours(known) if o not in names][:n]
        ):
            found += companions.prompts(other, place + 1, seed=0, split="development")[place:]
    return found
