"""The built-in world: a small universe with known truth, and real models trained on it.

Nothing heavy is imported here; `expunge.world.models` loads the models, `expunge.world.scenes` draws pictures.
"""

from __future__ import annotations

import importlib
from types import ModuleType

_PARTS = ("captions", "models", "people", "quality", "render", "scenes", "vocabulary")

__all__ = list(_PARTS)


def __getattr__(name: str) -> ModuleType:
    """Import a part of the world when it is first used."""
    if name in _PARTS:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Make the world known to the catalogue; called when ``load("world")`` is first used."""
    from .. import catalogue
    from .adapter import open_world

    catalogue.register_world("world", open_world)
