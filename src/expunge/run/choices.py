"""Methods as they are named on a command line, and the names of requests: what sweeps and comparisons share."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from .. import catalogue
from ..errors import SettingError, nearest
from ..method import Method

__all__ = ["Choice", "key", "packed", "plain", "unpacked"]


@dataclasses.dataclass(frozen=True)
class Choice:
    """A method as it is named on the command line: ``id``, ``id:setting=value``, ``id@prompts``."""

    id: str
    changes: tuple[tuple[str, str], ...] = ()
    n: int | None = None

    @classmethod
    def parse(cls, text: str) -> Choice:
        """Read ``id:setting=value:setting=value@n``.

        Raises:
            SettingError: It is not of this form.
        """
        head, at, count = text.strip().partition("@")
        id, *pairs = head.split(":")
        if not id or any("=" not in pair for pair in pairs) or (at and not count.isdigit()):
            raise SettingError(f"{text!r} is not of the form id:setting=value@prompts")
        changes = tuple((k.strip(), v.strip()) for k, _, v in (p.partition("=") for p in pairs))
        return cls(id.strip(), changes, int(count) if at else None)

    @property
    def label(self) -> str:
        """The id and what was changed, without the number of prompts."""
        return ":".join([self.id, *(f"{name}={value}" for name, value in self.changes)])

    def found(self, verb: str, family: str = "diffusion") -> type[Any]:
        """The method's class.

        Raises:
            CatalogueError: The id is unknown, or only planned.
            SettingError: It is no method of this verb for the family.
        """
        entry = catalogue.system(self.id)
        if entry.verb != verb or entry.family not in (family, "any"):
            ids = [system.id for system in catalogue.implemented(verb, family)]
            # In the words of the families that have outputs to look at.
            of = "pictures" if family == "diffusion" else f"{family} models"
            raise SettingError(
                f"{self.id} is for {entry.verb} of {entry.family} models, not for {verb} of {of}"
                f"{nearest(self.id, ids)}"
            )
        return catalogue.resolve(self.id)

    def method(self, verb: str) -> Method:
        """The method under its preset for the world, where it has one, with the changes.

        Raises:
            CatalogueError, SettingError: As :meth:`found`, or a setting is wrong.
        """
        found = self.found(verb)
        made: Method = found.configured(
            "world" if "world" in found.presets else None, **dict(self.changes)
        )
        return made

    def described(self, verb: str) -> dict[str, Any]:
        """What names the method in a request: id, changes, version and all settings."""
        method = self.method(verb)
        return plain(
            {
                "id": self.id,
                "changes": dict(self.changes),
                "version": method.version,
                "settings": method.settings(),
            }
        )


def plain(value: Any) -> Any:
    """A value as JSON gives it back, so that requests compare equal after reading."""
    return json.loads(json.dumps(value, default=list))


def key(request: Mapping[str, Any]) -> str:
    """The name of a request: a hash of everything in it."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]


def packed(hits: Sequence[bool], texts: Sequence[Hashable]) -> dict[str, Any]:
    """Hits one by one, a digit each; ``units`` says which share a prompt text, left out where none do."""
    place: dict[Hashable, int] = {}
    units = [place.setdefault(text, len(place)) for text in texts]
    shared = {"units": units} if len(place) < len(units) else {}
    return {"hits": "".join("1" if hit else "0" for hit in hits), **shared}


def unpacked(record: Mapping[str, Any]) -> tuple[list[bool], list[int]]:
    """What :func:`packed` wrote: hits, and the prompt each belongs to."""
    hits = [digit == "1" for digit in record["hits"]]
    return hits, list(record.get("units", range(len(hits))))
