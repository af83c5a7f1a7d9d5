"""Attacks that were run before, kept between audits and processes beside the outputs of :class:`.OutputCache`.

What an attack does to the original and to never does not depend on the edit under audit.  One safetensors file
an attack, pictures as a tensor and everything else as JSON in its header, written atomically; a file that is
damaged or of another form is as good as none.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ..edit.files import atomic_write
from ..method import Attempt, Attempts, Prompt
from .sampling import OutputCache

__all__ = ["keep", "plain", "recall"]

KEY = "expunge.attempts"
FORMAT = 1


def recall(cache: OutputCache, key: str) -> Attempts | None:
    """What an attack did when it was run under this key, or ``None``."""
    found: Attempts | None = cache.results.get(key)
    if found is None and cache.folder is not None:
        found = _read(_file(cache.folder, key), key)
        if found is not None:
            cache.results[key] = found
    return found


def keep(cache: OutputCache, key: str, attempts: Attempts) -> None:
    """Keep what an attack did; ``key`` names everything that can change it."""
    cache.results[key] = attempts
    if cache.folder is not None:
        atomic_write(_file(cache.folder, key), _written(key, attempts))


def _file(folder: Path, key: str) -> Path:
    name = hashlib.sha256(key.encode()).hexdigest()
    return folder / "attacks" / f"{name}.safetensors"


def _written(key: str, attempts: Attempts) -> bytes:
    pictures = isinstance(attempts.outputs, np.ndarray)
    fields = {f.name: getattr(attempts, f.name) for f in dataclasses.fields(attempts)}
    items = [dataclasses.asdict(item) for item in fields.pop("items")]
    outputs = fields.pop("outputs")
    header = {
        "format": FORMAT, "key": key, "fields": fields, "items": items,
        "texts": None if pictures else [str(text) for text in outputs],
    }  # fmt: skip
    tensors = (
        {"outputs": np.ascontiguousarray(outputs)} if pictures else {"none": np.zeros(0, np.uint8)}
    )
    return save(tensors, metadata={KEY: json.dumps(header, default=plain)})


def plain(value: Any) -> Any:
    """Numbers and arrays of numpy and torch, sets and tuples, as JSON has them."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return str(value)


def _read(file: Path, key: str) -> Attempts | None:
    try:
        with safe_open(file, framework="np") as opened:
            header = json.loads((opened.metadata() or {})[KEY])
            if header["format"] != FORMAT or header["key"] != key:
                return None
            texts = header["texts"]
            outputs = opened.get_tensor("outputs") if texts is None else texts
        items = [
            Attempt(**{**item, "prompt": Prompt(**item["prompt"])}) for item in header["items"]
        ]
        return Attempts(**header["fields"], items=tuple(items), outputs=outputs)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
