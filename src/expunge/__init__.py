"""expunge: erase a concept from a trained model, try to bring it back, and show the evidence.

    from expunge import Concept, Edit, audit, load

The public names are imported when they are first used, so that ``import expunge`` is quick and loads
neither torch nor diffusers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import errors
    from .concept import Concept
    from .edit import Edit
    from .evidence import audit
    from .method import Attack, Budget, Control, Eraser, Judge, Metric, Prompt
    from .models import load

__version__ = "0.1.0"

__all__ = [
    "Attack",
    "Budget",
    "Concept",
    "Control",
    "Edit",
    "Eraser",
    "Judge",
    "Metric",
    "Prompt",
    "__version__",
    "audit",
    "errors",
    "load",
]

_HOME = {
    "Attack": "method",
    "Budget": "method",
    "Concept": "concept",
    "Control": "method",
    "Edit": "edit",
    "Eraser": "method",
    "Judge": "method",
    "Metric": "method",
    "Prompt": "method",
    "audit": "evidence",
    "load": "models",
}
"""Public name -> the module it lives in."""


def __getattr__(name: str) -> Any:
    if name == "errors":
        return importlib.import_module(".errors", __name__)
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value  # the next access does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*__all__, *globals()})
