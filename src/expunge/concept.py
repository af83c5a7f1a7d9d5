"""Concept: what a model is to forget, and how files describe it.

A concept has a name, a kind, other phrasings (``phrases``) and optionally an ``anchor``:
what may take its place.  Files are YAML or JSON, one mapping or a list of mappings.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from .errors import ConceptError, NameRefused, nearest

__all__ = [
    "Concept",
    "KINDS",
    "as_concepts",
    "common_kind",
    "listed",
    "names_of",
    "read_concepts",
    "safe_name",
]

Kind = Literal["object", "style", "identity", "unsafe", "mark", "class", "fact"]
KINDS: tuple[str, ...] = get_args(Kind)

MAX_NAME = 200
"""Characters; longer names are mistakes (a pasted prompt) more often than concepts."""

# Windows refuses these as file names whatever their ending, so a run folder copied there breaks.
RESERVED = {"con", "prn", "aux", "nul", *(f"{d}{i}" for d in ("com", "lpt") for i in range(1, 10))}


@dataclasses.dataclass(frozen=True)
class Concept:
    """Something to erase or to keep.

    Attributes:
        name: The plain name, as a user would write it in a prompt.
        kind: One of ``KINDS``; it selects presets (``paper:KIND``, where a method has it) and neighbours.
        phrases: Other phrasings that mean the same; searching attacks may not use them.
        anchor: What may take the concept's place; ``None`` leaves the choice to the method.
        images: Paths of example pictures, for methods that learn from pictures.
        texts: Example texts, for methods that learn from texts (facts).

    Raises:
        ConceptError: An empty or unprintable name, an unknown kind, or an anchor or phrase equal
            to the name.
    """

    name: str
    kind: str = "object"
    phrases: tuple[str, ...] = ()
    anchor: str | None = None
    images: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", _text(self.name, "name"))
        if self.kind not in KINDS:
            raise ConceptError(
                f"concept {self.name!r}: kind {self.kind!r} is unknown{nearest(self.kind, KINDS)}"
            )
        for field in ("phrases", "images", "texts"):
            value = getattr(self, field)
            if isinstance(value, str) or not isinstance(value, Iterable):
                raise ConceptError(f"concept {self.name!r}: {field} must be a list of texts")
            entries = tuple(
                _text(entry, f"{field} of {self.name!r}", long=field == "texts") for entry in value
            )
            object.__setattr__(self, field, entries)
        lowered = self.name.lower()
        if lowered in (phrase.lower() for phrase in self.phrases):
            raise ConceptError(f"concept {self.name!r}: phrases repeats the name")
        if self.anchor is not None and self.anchor != "":
            object.__setattr__(self, "anchor", _text(self.anchor, f"anchor of {self.name!r}"))
            if self.anchor.lower() in (lowered, *(p.lower() for p in self.phrases)):
                raise ConceptError(
                    f"concept {self.name!r}: the anchor {self.anchor!r} is the concept itself; "
                    "choose what may take its place"
                )

    @property
    def names(self) -> tuple[str, ...]:
        """The name followed by the listed phrases."""
        return (self.name, *self.phrases)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, empty fields left out."""
        raw = dataclasses.asdict(self)
        return {
            k: list(v) if isinstance(v, tuple) else v for k, v in raw.items() if v not in (None, ())
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str = "concept") -> Concept:
        """Build from a mapping; unknown keys are refused with the nearest valid key."""
        if not isinstance(data, Mapping):
            raise ConceptError(
                f"{where}: expected a mapping with a key 'name', got {type(data).__name__}"
            )
        allowed = [field.name for field in dataclasses.fields(cls)]
        for key in data:
            if key not in allowed:
                raise ConceptError(f"{where}: unknown key {key!r}{nearest(str(key), allowed)}")
        if "name" not in data:
            raise ConceptError(f"{where}: the key 'name' is missing")
        try:
            return cls(**data)
        except ConceptError as error:
            raise ConceptError(f"{where}: {error}") from None


def _text(value: Any, what: str, long: bool = False) -> str:
    if not isinstance(value, str):
        raise ConceptError(f"{what} must be a text, got {value!r}")
    value = unicodedata.normalize("NFC", value).strip()
    if not value:
        raise ConceptError(f"{what} is empty")
    if any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" * long for c in value):
        raise ConceptError(f"{what} holds control characters")
    if not long and len(value) > MAX_NAME:
        raise ConceptError(f"{what} has {len(value)} characters; at most {MAX_NAME} are allowed")
    return value


def as_concepts(
    concepts: Concept | str | Iterable[Concept | str], keep: Any = ()
) -> tuple[Concept, ...]:
    """One or several concepts or bare names as a non-empty tuple of distinct concepts.

    Args:
        concepts: To be erased.
        keep: What is to be kept at the same time: an eraser told to do both with one name would do half of each.

    Raises:
        ConceptError: None was given, or one twice, or one whose name or phrase is to be kept.
    """
    found = tuple(c if isinstance(c, Concept) else Concept(c) for c in listed(concepts))
    if not found:
        raise ConceptError("no concept was given; at least one is needed")
    names = [c.name.lower() for c in found]
    for name in names:
        if names.count(name) > 1:
            raise ConceptError(f"concept {name!r} was given twice")
    kept = {name.strip().lower() for name in names_of(keep)}
    for concept in found:
        for name in concept.names:
            if name.lower() in kept:
                raise ConceptError(
                    f"{name!r} is to be kept, but also erased, with {concept.name!r}; ask for one of the two"
                )
    return found


def names_of(entries: Concept | str | Iterable[Any] | None) -> list[str]:
    """Names of concepts, and texts and prompts as they are: what a record says was to be kept.

    Raises:
        ConceptError: An entry is none of these.
    """
    return [_called(entry) for entry in listed(entries)]


def _called(entry: Any) -> str:
    # A prompt is known by its text here: the contracts stand on a higher floor.
    for called in (entry, getattr(entry, "name", None), getattr(entry, "text", None)):
        if isinstance(called, str):
            return called
    raise ConceptError(
        f"a {type(entry).__name__} is neither a concept nor a text; allowed are concepts, names and prompts"
    )


def listed(entries: Concept | str | Iterable[Any] | None) -> list[Any]:
    """One concept or text, or several; a bare text is one entry, not its letters, and ``None`` is nothing.

    Raises:
        ConceptError: Something else.
    """
    if entries is None or isinstance(entries, (Concept, str)):
        return [] if entries is None else [entries]
    if not isinstance(entries, Iterable):
        raise ConceptError(
            f"a {type(entries).__name__} is no concept; allowed are concepts, names, or a list of them"
        )
    return list(entries)


def common_kind(concepts: Iterable[Concept]) -> str | None:
    """The kind that all of them have, or ``None`` where they differ."""
    kinds = {concept.kind for concept in concepts}
    return kinds.pop() if len(kinds) == 1 else None


def read_concepts(path: str | os.PathLike[str]) -> tuple[Concept, ...]:
    """Concepts from a YAML or JSON file: a mapping, a list, or ``concepts: [...]``.

    Raises:
        ConceptError: One sentence naming the file and the entry that is wrong.
    """
    import yaml

    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConceptError(f"{file.name}: byte {error.start} is not UTF-8") from None
    except OSError as error:
        raise ConceptError(f"{file.name}: cannot be read ({error.strerror})") from None
    try:
        if any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text)):
            # An alias can expand to a document of any size.
            raise ConceptError(f"{file.name}: YAML aliases are not allowed in a concept file")
        data = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, json.JSONDecodeError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConceptError(f"{file.name}: is not valid YAML or JSON ({reason})") from None
    if isinstance(data, Mapping) and set(data) == {"concepts"}:
        data = data["concepts"]
    entries = data if isinstance(data, list) else [data]
    if not entries:
        raise ConceptError(f"{file.name}: holds no concept")
    return as_concepts(
        [
            Concept.from_dict(entry, f"{file.name}, concept {i}")
            for i, entry in enumerate(entries, 1)
        ]
    )


def safe_name(name: str, what: str = "name") -> str:
    """The name itself if it may become one part of a path, else an error.

    Refuses separators of every system, relative and absolute parts, drive letters, control
    characters, trailing dots or spaces, reserved device names and more than 100 UTF-8 bytes.
    """
    bad = (
        not isinstance(name, str)
        or not re.fullmatch(r"[\w][\w .+=@-]*", name)
        or ".." in name
        or name != name.strip()
        or name.endswith(".")
        or name.split(".")[0].strip().lower() in RESERVED
        or len(name.encode("utf-8", "replace")) > 100
    )
    if bad:
        raise NameRefused(
            f"{what} {str(name)[:60]!r} may not become a file name; use letters, digits, spaces, "
            "'.', '_' and '-', no relative, absolute or reserved part, at most 100 bytes"
        )
    return name
