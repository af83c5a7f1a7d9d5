"""`expunge ui`: erase, look and audit in a browser, on this machine only.

    jobs      one job at a time, with progress and a clean stop
    shelf     the models that are open
    requests  what is asked for, and the folders named after it
    choices   what can be chosen
    session   what one window has open and can do
    comparing before, after and never at equal seeds
    views     HTML; every text of a user is escaped there
    windows, layout, tab_erase, tab_compare, tab_audit   the page, with Gradio (extra `ui`)
    server    the program: loopback only

Nothing heavy is imported before :func:`launch` is called.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .server import launch
    from .session import Session
    from .shelf import Desk

__all__ = ["Desk", "Session", "launch"]

_WHERE = {"Desk": "shelf", "Session": "session", "launch": "server"}


def __getattr__(name: str) -> Any:
    """What is asked for, imported when it is first used."""
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
