"""Evidence: audit a model, and write down what can be concluded.

evidence = audit(model, [edit], star, attacks=("unlearndiffatk",), budget="world")
evidence.save("out")           # evidence.json, report.html, contact-sheet.png
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attacks_alone import AttackRun, run_attacks
    from .auditing import audit
    from .record import Evidence

__all__ = ["AttackRun", "Evidence", "audit", "run_attacks"]

_PLACES = {
    "AttackRun": "attacks_alone", "Evidence": "record", "audit": "auditing", "run_attacks": "attacks_alone",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is first used: an audit needs torch, the name does not."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value
