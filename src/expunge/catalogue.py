"""Catalogue: which systems and worlds exist, looked up without importing torch.

Ours stand in ``systems.toml``.  Other people's packages take part through entry points:

    [project.entry-points."expunge.methods"]
    their-package = "their_package"              # ships a systems.toml of the same form

    [project.entry-points."expunge.worlds"]
    their-world = "their_package.world:register" # calls register_world("their-world", factory)

That a system works is derived, never written down by hand: its class is in the source, and
``status.json`` (written by the command that runs the contract battery and counts the recorded
claims) knows it at the version the class has now.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib
import importlib.metadata
import importlib.util
import json
import re
import tomllib
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from .errors import CatalogueError, MissingExtra, nearest

__all__ = [
    "FAMILIES", "VERBS", "CatalogueWarning", "System", "implemented", "register_world",
    "resolve", "status", "system", "systems", "version", "world", "worlds",
]  # fmt: skip

VERBS = ("erase", "attack", "measure", "discover", "compose", "reason", "catalogue")
FAMILIES = tuple("diffusion tokens gan language vision-language classifier pixels any".split())

HERE = Path(__file__).parent
_ID = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
_CLASS = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+:[A-Za-z_]\w*")


class CatalogueWarning(UserWarning):
    """Somebody else's package could not take part in the catalogue; ours is not affected."""


@dataclasses.dataclass(frozen=True)
class System:
    """One entry of the catalogue.

    Attributes:
        id: Short name, used everywhere: command line, results, file manifests.
        title: The published name.
        verb: What it does, and the room its file stands in; one of ``VERBS``.
        family: The model family it is for; one of ``FAMILIES``.
        paper: ``arXiv:...`` or a venue; empty where there is none.
        number: 1 to 64 for the systems the project set out to implement, ``None`` for baselines and
            controls.
        year: Year of publication.
        tags: Words to search by.
        class_path: ``package.module:Class`` once it is implemented.
        files: Dotted paths of further files that belong to it.
        package: The package that brought the entry.
    """

    id: str
    title: str
    verb: str
    family: str
    paper: str = ""
    number: int | None = None
    year: int | None = None
    tags: tuple[str, ...] = ()
    class_path: str | None = None
    files: tuple[str, ...] = ()
    package: str = "expunge"

    def to_dict(self) -> dict[str, Any]:
        """The entry as ``expunge methods --json`` shows it, status included."""
        return {
            "id": self.id,
            "number": self.number,
            "title": self.title,
            "verb": self.verb,
            "family": self.family,
            "paper": self.paper,
            "year": self.year,
            "status": status(self.id),
            "implemented": self.class_path is not None,
            "tags": list(self.tags),
        }


# -- look-up ---------------------------------------------------------------------------------------


def systems(
    verb: str | None = None,
    family: str | None = None,
    tag: str | None = None,
    number: int | None = None,
) -> tuple[System, ...]:
    """All systems in catalogue order, narrowed by whatever is given.

    A family also finds the systems that are for any family.

    Raises:
        CatalogueError: A verb, family or tag that no system can have, with the nearest valid name.
    """
    everything = _catalogue()
    _known(verb, VERBS, "verb")
    _known(family, FAMILIES, "family")
    _known(tag, {t for s in everything.values() for t in s.tags}, "tag")
    return tuple(
        s
        for s in everything.values()
        if (verb is None or s.verb == verb)
        and (family is None or s.family in (family, "any"))
        and (tag is None or tag in s.tags)
        and (number is None or s.number == number)
    )


def system(id: str) -> System:
    """One system.

    Raises:
        CatalogueError: Nobody registered the id; the nearest ids are named.
    """
    try:
        return _catalogue()[id]
    except (KeyError, TypeError):
        raise CatalogueError(f"no system has the id {id!r}{_near(id)}") from None


def _near(id: object) -> str:
    close = difflib.get_close_matches(str(id).lower(), _catalogue(), n=3, cutoff=0.6)
    return f"; near are {', '.join(map(repr, close))}" if close else ""


def implemented(verb: str | None = None, family: str | None = None) -> tuple[System, ...]:
    """The systems that have a class, whether or not their claims are recorded yet."""
    return tuple(s for s in systems(verb, family) if s.class_path)


def resolve(id: str) -> type[Any]:
    """Import a system's class; this may import torch.

    Raises:
        CatalogueError: The id is unknown or only planned, or the file or class is not there.
        MissingExtra: The system needs an optional library that is not installed.
    """
    found = system(id)
    if found.class_path is None:
        raise CatalogueError(f"{id} is planned, not implemented yet")
    module, _, name = found.class_path.partition(":")
    try:
        cls = getattr(importlib.import_module(module), name)
    except MissingExtra:
        raise
    except (ImportError, AttributeError) as error:
        raise CatalogueError(f"{id}: {found.class_path} cannot be imported ({error})") from error
    if not isinstance(cls, type) or getattr(cls, "id", id) != id:
        raise CatalogueError(f"{id}: {found.class_path} is not a class with the id {id!r}")
    return cls


# -- what is derived -------------------------------------------------------------------------------


def status(id: str) -> str:
    """``works`` or ``planned``; a system whose evidence is of another version is not said to work.

    ``works`` needs the class in the source, the contract battery green and at least one recorded
    claim, the latter two at the version the class has now.
    """
    now = version(id)
    recorded = _recorded().get(id)
    if now is None or not isinstance(recorded, Mapping):
        return "planned"
    fresh = recorded.get("version") == now and recorded.get("battery") is True
    return "works" if fresh and int(recorded.get("claims") or 0) >= 1 else "planned"


def version(id: str) -> int | None:
    """The ``version`` a system's class has, read from its source; ``None`` if there is no class.

    Importing the class would import torch, which is too slow for a listing.
    """
    found = system(id)
    if found.class_path is None:
        return None
    module, _, name = found.class_path.partition(":")
    return _version_in_source(module, name)


@functools.cache
def _version_in_source(module: str, name: str) -> int | None:
    package, _, last = module.rpartition(".")
    try:
        folder = _folder(package)
        file = folder / f"{last}.py"
        source = (file if file.is_file() else folder / last / "__init__.py").read_text("utf-8")
        # The usual line, before any function, needs no parser: dozens of whole files would slow every listing.
        own = rf"^class {re.escape(name)}\b(?:(?!^\S|^    (?:async )?def|^    @).)*?"
        if usual := re.search(own + r"^    version: ClassVar\[int\] = (\d+)$", source, re.M | re.S):
            return int(usual[1])
        tree = ast.parse(source)
    except (CatalogueError, OSError, SyntaxError, UnicodeError):
        return None
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _version_in_class(node)
    return None


def _version_in_class(node: ast.ClassDef) -> int | None:
    for line in node.body:
        targets = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "version" for target in targets):
            value = getattr(line, "value", None)
            number = value.value if isinstance(value, ast.Constant) else None
            return number if isinstance(number, int) else None  # computed: cannot be known here
    return 1  # the default of expunge.method.Method


@functools.cache
def _recorded() -> Mapping[str, Any]:
    """``status.json``: id -> version, battery, claims; empty before the first record."""
    try:
        found = json.loads((HERE / "status.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"status.json cannot be read ({error})", CatalogueWarning, stacklevel=3)
        return {}
    return found if isinstance(found, dict) else {}


# -- worlds ----------------------------------------------------------------------------------------

_worlds: dict[str, Callable[..., Any]] = {}


def register_world(name: str, factory: Callable[..., Any]) -> None:
    """Make a world known under a name; ``load(name)`` calls the factory.

    The factory is called as ``factory(variant)``, with what follows the name and a slash in
    ``name/variant`` (an empty text for the name alone), and returns an opened model with its
    companions (never, judge, vocabulary, prompts).

    Raises:
        CatalogueError: The name is not lower-case words joined by '-', or is taken by another factory.
    """
    if not isinstance(name, str) or not _ID.fullmatch(name):
        raise CatalogueError(f"world {name!r}: a name is lower-case words joined by '-'")
    if _worlds.get(name, factory) is not factory:
        raise CatalogueError(f"world {name!r} is registered already")
    _worlds[name] = factory


def worlds() -> tuple[str, ...]:
    """Names of all worlds; nothing is imported."""
    return tuple(sorted({*_worlds, *_registrars()}))


def world(name: str) -> Callable[..., Any]:
    """The factory of a world; the world's own code is imported now.

    Raises:
        CatalogueError: No such world, or its code cannot be imported or does not register it.
    """
    if name in _worlds:
        return _worlds[name]
    registrars = _registrars()
    if name not in registrars:
        raise CatalogueError(f"no world has the name {name!r}{nearest(str(name), worlds())}")
    path = registrars[name]
    module, _, function = path.partition(":")
    try:
        getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise CatalogueError(f"world {name!r}: {path} cannot be used ({error})") from error
    if name not in _worlds:
        raise CatalogueError(f"world {name!r}: {path} was called but did not register that name")
    return _worlds[name]


# -- reading ---------------------------------------------------------------------------------------

_KEYS = {f.name for f in dataclasses.fields(System)} - {"class_path", "package"} | {"class"}


@functools.cache
def _catalogue() -> Mapping[str, System]:
    """Id -> system: ours, then those of other packages in the order of their names."""
    found = {s.id: s for s in _read(HERE / "systems.toml", "expunge")}
    for point in _entry_points("expunge.methods"):
        try:
            package = point.value.partition(":")[0]
            theirs = _read(_folder(package) / "systems.toml", package)
            for entry in theirs:
                if entry.id in found:
                    raise CatalogueError(f"id {entry.id!r} is taken by {found[entry.id].package}")
        except Exception as error:  # whatever a stranger's package does, ours must still work
            _warn(point, error)
        else:
            found.update({entry.id: entry for entry in theirs})
    return found


@functools.cache
def _registrars() -> Mapping[str, str]:
    """World name -> ``module:function`` that registers it."""
    data = tomllib.loads((HERE / "systems.toml").read_text(encoding="utf-8"))
    found = {entry["name"]: entry["register"] for entry in data.get("world", ())}
    for point in _entry_points("expunge.worlds"):
        if point.name in found:
            _warn(point, "the name is taken")
        elif not _CLASS.fullmatch(point.value):
            _warn(point, "expected module:function")
        else:
            found[point.name] = point.value
    return found


def _read(file: Path, package: str) -> tuple[System, ...]:
    """Entries of a ``systems.toml``, checked one by one."""
    where = f"{package}/{file.name}"
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise CatalogueError(f"{where} cannot be read ({error})") from None
    found: dict[str, System] = {}
    for place, entry in enumerate(data.get("system", ()), 1):
        made = _entry(entry, f"{where}, system {place}", package)
        if made.id in found:
            raise CatalogueError(f"{where}: id {made.id!r} stands twice")
        found[made.id] = made
    return tuple(found.values())


def _entry(entry: Mapping[str, Any], where: str, package: str) -> System:
    for key in entry:
        if key not in _KEYS:
            raise CatalogueError(f"{where}: unknown key {key!r}{nearest(key, _KEYS)}")
    for key in ("id", "title", "verb", "family"):
        if not isinstance(entry.get(key), str) or not entry[key]:
            raise CatalogueError(f"{where}: {key!r} must be a text")
    if not _ID.fullmatch(entry["id"]):
        raise CatalogueError(f"{where}: id {entry['id']!r} is not lower-case words joined by '-'")
    _known(entry["verb"], VERBS, f"{where}: verb")
    _known(entry["family"], FAMILIES, f"{where}: family")
    path = entry.get("class")
    if path is not None and not (isinstance(path, str) and _CLASS.fullmatch(path)):
        raise CatalogueError(f"{where}: class {path!r} is not of the form package.module:Class")
    for key in ("tags", "files"):
        value = entry.get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise CatalogueError(f"{where}: {key!r} must be a list of texts")
    if package != "expunge" and "number" in entry:
        raise CatalogueError(f"{where}: 'number' counts the systems of expunge itself")
    plain: dict[str, Any] = {k: tuple(v) if k in ("tags", "files") else v for k, v in entry.items()}
    plain.pop("class", None)
    return System(**plain, class_path=path, package=package)


def _known(value: str | None, allowed: Iterable[str], what: str) -> None:
    allowed = tuple(allowed)
    if value is not None and value not in allowed:
        raise CatalogueError(f"{what} {value!r} is unknown{nearest(str(value), allowed)}")


def _folder(package: str) -> Path:
    """Where a package lies, found without importing it."""
    top, *rest = package.split(".")
    spec = importlib.util.find_spec(top) if top else None
    roots = list(spec.submodule_search_locations or ()) if spec else []
    if not roots:
        raise CatalogueError(f"no package {top!r} is installed")
    return Path(roots[0], *rest)


def _entry_points(group: str) -> list[importlib.metadata.EntryPoint]:
    found = importlib.metadata.entry_points(group=group)
    return sorted(found, key=lambda point: (point.name, point.value))


def _warn(point: importlib.metadata.EntryPoint, reason: object) -> None:
    warnings.warn(
        f"entry point {point.name!r} = {point.value!r} of {point.group!r} was left out: {reason}",
        CatalogueWarning,
        stacklevel=4,
    )
