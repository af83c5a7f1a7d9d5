"""The quality table of the world: rates with intervals, their targets, what they depend on."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..core.resampling import wilson
from . import models
from . import vocabulary as v

GUIDANCE = 4.0
STEPS = 20
THRESHOLD = 0.5
TARGETS = {
    "oracle": 0.98,
    "reconstructions": 0.95,
    "clip.retrieval": 0.90,
    "generated.object": 0.95,
    "generated.colour": 0.95,
    "generated.style": 0.90,
    "generated.person": 0.85,
    "generated.hazard": 0.95,
    "never.margin": 0.03,
    "never.mean_gap": 0.03,
}


def rate(hits: Iterable[bool] | np.ndarray, target: float | None = None) -> dict[str, Any]:
    """A share with its number of trials, interval, target and whether it was met."""
    values = np.asarray(list(hits), bool)
    found: dict[str, Any] = {
        "value": round(float(values.mean()), 4) if len(values) else None,
        "n": len(values),
        "interval": [round(x, 4) for x in wilson(int(values.sum()), len(values))],
    }
    if target is not None:
        found |= {"target": target, "met": bool(len(values)) and float(values.mean()) >= target}
    return found


def described() -> dict[str, Any]:
    """What the numbers depend on."""
    libraries = ("torch", "diffusers", "transformers", "tokenizers")
    trained = {}
    for variant in models.VARIANTS:
        file = models.weights() / "unet" / variant / "training.json"
        if file.exists():
            trained[variant] = json.loads(file.read_text("utf-8"))
    return {
        "world": v.VERSION,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "guidance": GUIDANCE,
        "steps": STEPS,
        "threshold": THRESHOLD,
        "seeds": "test range, held-out templates",
        "trained": trained,
        "libraries": {name: importlib.metadata.version(name) for name in libraries},
    }


def misses(table: dict[str, Any], path: str = "") -> dict[str, float]:
    """Every target of a quality table that was not met: path -> measured value."""
    found: dict[str, float] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            here = f"{path}.{key}" if path else key
            if value.get("met") is False:
                measured = value.get("value", value.get("gap", value.get("never")))
                number = measured["value"] if isinstance(measured, dict) else measured
                found[here] = float("nan") if number is None else float(number)
            found |= misses(value, here)
    return found
