"""For people who test methods: the contract battery and tiny models of real library classes.

from expunge.testing import check_method, tiny_diffusion
"""

from __future__ import annotations

import importlib
from typing import Any

_WHERE = {
    "TINY_LAYOUTS": "layouts",
    "check_method": "battery",
    "checks_for": "battery",
    "tiny_diffusion": "diffusion",
    "tiny_language": "models",
    "tiny_layout": "layouts",
    "tiny_tokenizer": "diffusion",
}

__all__ = sorted(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"{__name__}.{_WHERE[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
