"""Hyperparameters: declared once, validated once, stored unchanged.

:mod:`expunge.method` re-exports everything here; methods import it from there.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from ..errors import SettingError, nearest

__all__ = ["Method", "convert", "setting"]


def setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Sequence[Any] | None = None,
) -> Any:
    """A hyperparameter: its default, what it means (with unit), and what is allowed."""
    meta = {"help": help, "minimum": minimum, "maximum": maximum, "choices": choices}
    return dataclasses.field(default=default, metadata=meta)


@dataclasses.dataclass(frozen=True)
class Method:
    """Base of all methods: hyperparameters that are validated once and stored unchanged.

    Class attributes:
        id: The catalogue id.
        title: The published name.
        source: arXiv id or venue of the paper.
        version: Raised whenever results of the method may change.
        families: Model families it is defined for.
        presets: Named changes of the defaults, for example ``paper:style`` or ``world``.
    """

    id: ClassVar[str] = ""
    title: ClassVar[str] = ""
    source: ClassVar[str] = ""
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ()
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    def __post_init__(self) -> None:
        own: Any = type(self)
        kinds = _kinds(own)
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.metadata and field.name in kinds:
                options = _options(kinds[field.name])
                if isinstance(value, list) and any(typing.get_origin(o) is tuple for o in options):
                    value = tuple(value)  # files have lists
                    object.__setattr__(self, field.name, value)
                _check_kind(self.id, field.name, value, options)
            _check(self.id, field, value)

    @classmethod
    def configured(cls, preset: str | None = None, /, **settings: Any) -> typing.Self:
        """Build from a preset and changes; texts (from a command line) are converted.

        Raises:
            SettingError: An unknown preset or setting (with the nearest valid name), or a value of
                the wrong type or out of range.
        """
        if preset is not None and preset not in cls.presets and preset != "paper":
            raise SettingError(
                f"{cls.id}: preset {preset!r} is unknown{nearest(preset, ['paper', *cls.presets])}"
            )
        fields = {field.name: field for field in dataclasses.fields(cls)}
        for name in settings:
            if name not in fields:
                raise SettingError(f"{cls.id}: setting {name!r} is unknown{nearest(name, fields)}")
        hints = typing.get_type_hints(cls)
        converted = {
            name: convert(cls.id, name, value, hints[name]) if isinstance(value, str) else value
            for name, value in settings.items()
        }
        made = cls(**{**cls.presets.get(preset or "", {}), **converted})
        # No field: two methods with equal settings are equal, whatever their settings are called.
        object.__setattr__(made, "_preset", preset)
        return made

    @property
    def preset(self) -> str | None:
        """The preset it was :meth:`configured` from; further settings may have been changed since."""
        return getattr(self, "_preset", None)

    @classmethod
    def preset_for(cls, kind: str | None = None, first: str | None = None) -> str | None:
        """The preset to take where none is asked for: ``first``, else ``paper:KIND``, where the method has it.

        Args:
            kind: The kind of the concept, or the common kind of several.
            first: What comes first: ``world`` for erasers of a world's model, an attack's budget.
        """
        wanted = (first, None if kind is None else f"paper:{kind}")
        return next((name for name in wanted if name is not None and name in cls.presets), None)

    def settings(self) -> dict[str, Any]:
        """All hyperparameters as plain values, as recorded with every result."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def describe(cls) -> list[dict[str, Any]]:
        """One row a hyperparameter: name, type, default, help, allowed values."""
        hints = typing.get_type_hints(cls)
        return [
            {
                "name": field.name,
                "type": getattr(hints[field.name], "__name__", str(hints[field.name])),
                "default": field.default,
                **{k: v for k, v in field.metadata.items() if v is not None},
            }
            for field in dataclasses.fields(cls)
        ]


def convert(method: str, name: str, text: str, kind: Any) -> Any:
    """A text of a command line as a value of a type; lists are joined by commas.

    Args:
        method: Whose setting it is, for the error.
        name: The setting.
        text: What was typed.
        kind: Its type: int, float, bool, str, a tuple of one of them, or one of them or ``None``.

    Raises:
        SettingError: The text is no such value.
    """
    options = typing.get_args(kind) or (kind,)
    if typing.get_origin(kind) is tuple:
        parts = (part.strip() for part in text.split(","))
        return tuple(convert(method, name, part, options[0]) for part in parts if part)
    if type(None) in options and text.lower() in ("none", "null"):
        return None
    for option in options:
        if option is bool and text.lower() in ("true", "false", "yes", "no", "1", "0"):
            return text.lower() in ("true", "yes", "1")
        if option in (int, float):
            try:
                return option(text)
            except ValueError:
                continue
        if option is str:
            return text
    wanted = " or ".join(getattr(option, "__name__", str(option)) for option in options)
    raise SettingError(f"{method}: setting {name!r} needs {wanted}, got {text!r}")


@functools.cache
def _kinds(method: type[Method]) -> Mapping[str, Any]:
    """Name of each setting -> its type; empty where annotations cannot be read from here (a class of a function)."""
    try:
        return typing.get_type_hints(method)
    except NameError:
        return {}


def _check_kind(method: str, name: str, value: Any, options: Sequence[Any]) -> None:
    """Refuse a value of none of the setting's types, before a loop far inside stumbles over it."""
    if not any(_is_of(value, option) for option in options):
        wanted = " or ".join(_spoken(option) for option in options)
        raise SettingError(f"{method}: {name} is {value!r}; allowed is {wanted}")


def _options(kind: Any) -> tuple[Any, ...]:
    union = typing.get_origin(kind) in (typing.Union, types.UnionType)
    return typing.get_args(kind) if union else (kind,)


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is of a type; NaN is no number."""
    if kind is type(None):
        return value is None
    if typing.get_origin(kind) is tuple:
        entry, *more = typing.get_args(kind)
        fits = isinstance(value, tuple) and (more == [...] or len(value) == 1 + len(more))
        return fits and all(_is_of(v, entry) for v in value)
    if kind is bool or kind is str:
        return isinstance(value, kind)
    if kind is int or kind is float:
        number = int if kind is int else (int, float)
        return isinstance(value, number) and not isinstance(value, bool) and value == value
    return True


def _spoken(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        entry, *more = typing.get_args(kind)
        return f"a tuple{'' if more == [...] else f' of {1 + len(more)}'}, {_spoken(entry)} each"
    words = {bool: "True or False", int: "a whole number", float: "a number", str: "a text"}
    return "None" if kind is type(None) else words.get(kind, getattr(kind, "__name__", str(kind)))


def _check(method: str, field: dataclasses.Field[Any], value: Any) -> None:
    meta = field.metadata
    if value is None or not meta:
        return
    choices = meta.get("choices")
    # Several values are held to the choices one by one.
    several = isinstance(value, tuple) and choices is not None and value not in choices
    for entry in value if several else (value,):
        if choices is not None and entry not in choices:
            raise SettingError(
                f"{method}: {field.name} is {entry!r}{nearest(str(entry), [str(c) for c in choices])}"
            )
    low, high = meta.get("minimum"), meta.get("maximum")
    if low is None and high is None:
        return
    for number in value if isinstance(value, tuple) else (value,):
        inside = (
            isinstance(number, (int, float)) and not isinstance(number, bool) and number == number
        )
        if inside and (low is None or number >= low) and (high is None or number <= high):
            continue
        bounds = (
            f"from {low if low is not None else '-inf'} to {high if high is not None else 'inf'}"
        )
        raise SettingError(f"{method}: {field.name} is {number!r}; allowed is a number {bounds}")
