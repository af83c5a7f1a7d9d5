"""What was asked for: plain values that are checked once and travel to other processes as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ... import catalogue
from ...errors import RunError, SettingError, nearest
from ...method import Attack, Budget, Eraser
from ...method import budget as named_budget
from ..choices import Choice

__all__ = ["Options"]

SPLITS = ("test", "development")


@dataclasses.dataclass(frozen=True)
class Options:
    """Everything that decides which cells a sweep has; how they are run is no part of it.

    Attributes:
        model: What ``load`` is given.
        erasers, attacks: ``all``, ``none`` (attacks only), or ids with settings joined by commas:
            ``uce,trce:stage2=false``.
        concepts: Names of the world's concepts.
        seeds: Each seeds erasers, attacks, and the choice of prompts.
        budget: Name of the allowance for each attacked prompt.
        n, kept_n, attack_n: Prompts for the concept, for each kept concept and route, and attacked.
        told: Of the concept's neighbours, how many the eraser is told to keep; these are not measured.
        split: ``test``, or ``development``.
        batch: Outputs at a time; halve it when memory runs out.
        device, dtype: Where and in which precision to compute.
    """

    model: str = "world"
    erasers: str = "all"
    attacks: str = "all"
    concepts: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    budget: str = "world"
    n: int = 100
    kept_n: int = 20
    attack_n: int = 10
    told: int = 3
    split: str = "test"
    batch: int = 64
    device: str = "cpu"
    dtype: str | None = None

    def __post_init__(self) -> None:
        for name in ("n", "kept_n", "attack_n", "batch"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}; at least 1 is needed")
        if self.told < 0:
            raise SettingError(f"told is {self.told}; 0 or more neighbours can be kept")
        for name, values in (("concepts", self.concepts), ("seeds", self.seeds)):
            if not values:
                raise SettingError(f"{name} is empty; at least one is needed")
            if len(set(values)) < len(values):
                raise SettingError(f"{name}: one stands twice in {', '.join(map(str, values))}")
        if self.split not in SPLITS:
            raise SettingError(f"split {self.split!r} is unknown{nearest(self.split, SPLITS)}")
        named_budget(self.budget)

    @property
    def allowance(self) -> Budget:
        """The budget by its name."""
        return named_budget(self.budget)

    def text(self) -> str:
        """This as JSON, for another process."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def read(cls, text: str, where: str = "options") -> Options:
        """What :meth:`text` wrote.

        Raises:
            RunError: It is not what this version writes.
        """
        try:
            found = json.loads(text)
            lists = {name: tuple(found[name]) for name in ("concepts", "seeds")}
            return cls(**{**found, **lists})
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{where}: is not the options of a sweep ({error})") from None

    # -- methods -----------------------------------------------------------------------------------

    def chosen(self, verb: str, family: str) -> list[Choice]:
        """The erasers (``erase``) or attacks (``attack``) asked for, for models of a family.

        Raises:
            CatalogueError: An id that nobody registered, or that is only planned.
            SettingError: One of another verb or family, twice the same, or none at all.
        """
        named = (self.erasers if verb == "erase" else self.attacks).strip()
        if named == "none":
            found: list[Choice] = []
        elif named == "all":
            found = [Choice(entry.id) for entry in catalogue.implemented(verb, family)]
        else:
            found = [Choice.parse(part) for part in named.split(",") if part.strip()]
        labels = [choice.label for choice in found]
        for choice in found:
            kind = Eraser if verb == "erase" else Attack
            if not issubclass(choice.found(verb, family), kind):
                raise SettingError(f"{choice.id} is no {kind.__name__.lower()} that can be run")
            if choice.n is not None:
                raise SettingError(
                    f"{choice.label}@{choice.n}: a sweep attacks the same prompts with every attack; use --attack-n"
                )
            if labels.count(choice.label) > 1:
                raise SettingError(f"{choice.label} was given twice")
        if verb == "erase" and not found:
            raise SettingError("no eraser is left, so there is nothing to sweep")
        return found


def configured(
    choice: Choice, verb: str, family: str, kind: str, first: str | None
) -> tuple[Any, Mapping[str, Any]]:
    """A method under the preset named ``first``, else the paper's for a kind of concept; and what names it."""
    cls = choice.found(verb, family)
    made = cls.configured(cls.preset_for(kind, first), **dict(choice.changes))
    described = {
        "id": choice.id, "label": choice.label, "version": made.version, "preset": made.preset,
        "settings": made.settings(),
    }  # fmt: skip
    return made, described


def folder_of(path: str | Path) -> Path:
    """A folder for results; a file in its place is refused in words."""
    place = Path(path)
    if place.exists() and not place.is_dir():
        raise RunError(f"{place}: is not a folder; a sweep keeps its runs in one")
    return place
