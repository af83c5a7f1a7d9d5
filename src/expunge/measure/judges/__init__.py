"""Judges by id: who says what a picture shows, opened when they are needed.

    open_judge("nudenet:threshold=0.6")
    open_judge("classifier:model=./resnet,top=3,labels=imagenette")
    open_judge("nudenet+q16:prompts=q16.safetensors")      # either of two

A specification is an id, then a colon and settings ``name=value`` joined by commas; a piece without ``=``
belongs to the value before it.  Nothing heavy is imported until a judge is opened.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

from ...errors import SettingError, nearest
from ...method import Judge
from ...method.settings import convert

__all__ = ["JUDGES", "Known", "described", "known_ids", "open_judge", "register"]


@dataclasses.dataclass(frozen=True)
class Known:
    """A judge that can be opened by id.

    Attributes:
        opener: ``package.module:function``, or the function: called with the model (or ``None``) and settings.
        help: What it says, in one line.
        extra: The extra it needs, or empty.
    """

    opener: str | Callable[..., Judge]
    help: str
    extra: str = ""

    def load(self) -> Callable[..., Judge]:
        """The function that opens it."""
        if callable(self.opener):
            return self.opener
        module, _, name = self.opener.partition(":")
        return typing.cast(
            "Callable[..., Judge]", getattr(importlib.import_module(module, __package__), name)
        )


JUDGES: Mapping[str, Known] = {
    "clip-zero-shot": Known(
        "expunge.measure.clip_score:open_zero_shot", "a CLIP prefers the concept's name among labels"
    ),
    "classifier": Known(
        ".classifier:open_classifier", "an image classifier of transformers ranks the concept's class first"
    ),
    "nudenet": Known(".nudenet:open_nudenet", "a detector sees an exposed part of a body", "nsfw"),
    "q16": Known(".q16:open_q16", "a CLIP prefers 'inappropriate' of two learned prompt vectors"),
    "vision-language": Known(
        ".vision_language:open_vision_language", "a chat model that sees pictures says so", "judge"
    ),
    "imageguard": Known(
        ".imageguard:open_imageguard", "a safety judge names the violated category", "judge"
    ),
    "trained-guard": Known(
        ".trained_guard:open_trained_guard", "a small guard trained on labelled pictures names it"
    ),
}  # fmt: skip

_registered: dict[str, Known] = {}


def register(id: str, opener: Callable[..., Judge], help: str = "") -> None:
    """Make a judge of your own known: ``opener(model, *, setting=...) -> Judge``, settings with types.

    Raises:
        SettingError: The id is taken, or is not lower-case words joined by '-'.
    """
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", id):
        raise SettingError(f"judge {id!r}: an id is lower-case words joined by '-'")
    if id in JUDGES or (id in _registered and _registered[id].opener is not opener):
        raise SettingError(f"judge {id!r} is registered already")
    _registered[id] = Known(opener, help)


def known_ids(model: Any = None) -> tuple[str, ...]:
    """Ids that can be opened, the model's own judge first."""
    own = _own(model)
    return tuple(dict.fromkeys([*([own.id] if own is not None else []), *JUDGES, *_registered]))


def open_judge(specification: str, model: Any = None) -> Judge:
    """The judge of a specification.

    Args:
        specification: See the module's text.
        model: The model it will judge: its companions' judge goes by its id, or by ``own``; other judges may
            use what stands beside the model (a CLIP).

    Raises:
        SettingError: No judge of that id, no such setting, or a value of the wrong type.
        MissingExtra: The judge needs a library that is not installed.
    """
    parts = _parts(specification, known_ids(model))
    if len(parts) == 1:
        return _one(parts[0], model)
    from .either import Either

    return Either([_one(part, model) for part in parts])


def described(id: str) -> list[dict[str, Any]]:
    """One row a setting of a judge: name, type, default."""
    entry = _registered.get(id) or JUDGES[id]
    opener = entry.load()
    hints = typing.get_type_hints(opener)
    return [
        {"name": name, "type": str(getattr(hints.get(name, str), "__name__", hints.get(name, str))), "default": default}
        for name, default in _settings(opener).items()
    ]  # fmt: skip


def _parts(specification: str, ids: tuple[str, ...]) -> list[str]:
    """The specifications that are joined by '+'; a '+' within a setting stays."""
    names = "|".join(map(re.escape, ids))
    return re.split(rf"\+(?=(?:{names})(?:[:+]|$))", specification.strip())


def _one(specification: str, model: Any) -> Judge:
    id, _, rest = specification.partition(":")
    id = id.strip()
    own = _own(model)
    if own is not None and id in ("own", own.id):
        if rest:
            raise SettingError(f"judge {id!r} has no settings, got {rest!r}")
        return own
    entry = _registered.get(id) or JUDGES.get(id)
    if entry is None and id in ("own", "world-oracle"):
        name = getattr(model, "name", "this model")
        raise SettingError(
            f"judge {id!r} comes with a world, and {name} has no judge beside it; allowed: "
            f"{', '.join(known_ids(model))}"
        )
    if entry is None:
        raise SettingError(f"judge {id!r} is unknown{nearest(id, known_ids(model))}")
    opener = entry.load()
    given = _given(id, rest)
    allowed, hints = _settings(opener), typing.get_type_hints(opener)
    for name in given:
        if name not in allowed:
            raise SettingError(f"judge {id}: setting {name!r} is unknown{nearest(name, allowed)}")
    missing = [
        n for n, default in allowed.items() if default is inspect.Parameter.empty and n not in given
    ]
    if missing:
        raise SettingError(
            f"judge {id} needs {' and '.join(missing)}: write {id}:{','.join(f'{n}=...' for n in missing)}"
        )
    values = {
        name: convert(f"judge {id}", name, text, hints.get(name, str))
        for name, text in given.items()
    }
    return opener(model, **values)


def _given(id: str, text: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for piece in re.split(r",(?=\s*[a-z][\w-]*=)", text) if text.strip() else ():
        name, equals, value = piece.partition("=")
        name = name.strip().replace("-", "_")
        if not equals:
            raise SettingError(f"judge {id}: {piece!r} is not of the form setting=value")
        if name in found:
            raise SettingError(f"judge {id}: {name} is given twice")
        found[name] = value.strip()
    return found


def _settings(opener: Callable[..., Judge]) -> dict[str, Any]:
    kinds = inspect.signature(opener).parameters.values()
    return {p.name: p.default for p in kinds if p.kind is inspect.Parameter.KEYWORD_ONLY}


def _own(model: Any) -> Judge | None:
    companions = getattr(model, "companions", None)
    make = getattr(companions, "judge", None)
    return make() if make is not None else None
