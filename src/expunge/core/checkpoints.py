"""Checkpoints of the training loop: one safetensors file with JSON in its header, written atomically.

Weights, optimiser moments, losses and the method's own state are tensors; the step and the settings
of the run stand in the header.  One file, so that its parts can never disagree.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors

from ..edit.files import atomic_write
from ..errors import ResumeMismatch, RunError

__all__ = ["Checkpoint", "CheckpointFile", "difference"]

KEY = "expunge.checkpoint"
FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The state of a run after ``step`` optimiser steps.

    Attributes:
        step: Optimiser steps done.
        seconds: Wall time spent so far.
        stopped: Training ended early.
        tensors: Everything else, by name.
    """

    step: int
    seconds: float
    stopped: bool
    tensors: Mapping[str, torch.Tensor]


def difference(recorded: Any, wanted: Any, where: str = "") -> str:
    """Where two plain JSON values differ first: ``"settings.lr: recorded 0.1, wanted 0.2"``, or ``""``."""
    if isinstance(recorded, dict) and isinstance(wanted, dict):
        for key in sorted({*recorded, *wanted}):
            inner = f"{where}.{key}" if where else str(key)
            if key not in recorded or key not in wanted:
                side = "recorded run" if key not in recorded else "request"
                return f"{inner}: is missing in the {side}"
            found = difference(recorded[key], wanted[key], inner)
            if found:
                return found
        return ""
    if recorded == wanted and type(recorded) is type(wanted):
        return ""
    short = [
        text if len(text) < 80 else text[:77] + "..." for text in (repr(recorded), repr(wanted))
    ]
    return f"{where}: the recorded run has {short[0]}, the request {short[1]}"


class CheckpointFile:
    """``training.safetensors`` in a run folder.

    Args:
        folder: The run folder; it is made when the first checkpoint is written.
        settings: Everything that can change the result, as plain values.
    """

    NAME = "training.safetensors"

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.path = Path(folder) / self.NAME
        self.settings = json.loads(json.dumps(dict(settings), default=list, sort_keys=True))

    def write(self, checkpoint: Checkpoint) -> None:
        """Write aside and rename: a kill leaves the previous checkpoint or this one."""
        header = {
            "format": FORMAT, "step": checkpoint.step, "seconds": checkpoint.seconds,
            "stopped": checkpoint.stopped, "settings": self.settings,
        }  # fmt: skip
        tensors = {
            name: t.detach().to("cpu").contiguous() for name, t in checkpoint.tensors.items()
        }
        try:
            atomic_write(self.path, safetensors.save(tensors, metadata={KEY: json.dumps(header)}))
        except OSError as error:
            raise RunError(
                f"{self.path}: the checkpoint cannot be written ({error.strerror})"
            ) from None

    def read(self) -> Checkpoint | None:
        """The checkpoint in the folder, or ``None`` if there is none.

        Raises:
            ResumeMismatch: It was made with other settings; the first differing field is named.
            RunError: The file is damaged or was not written by this loop.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                header = json.loads((file.metadata() or {})[KEY])
            if header["format"] != FORMAT:
                raise RunError(
                    f"{self.path}: has checkpoint format {header['format']}; this version reads {FORMAT}"
                )
            step, seconds, stopped = (
                int(header["step"]),
                float(header["seconds"]),
                bool(header["stopped"]),
            )
            found = difference(header["settings"], self.settings)
            tensors = {} if found else safetensors.load_file(self.path)
        except KeyError:
            raise RunError(f"{self.path}: is not a checkpoint of the training loop") from None
        except (SafetensorError, OSError, ValueError, TypeError) as error:
            raise RunError(f"{self.path}: the checkpoint is damaged ({error})") from None
        if found:
            raise ResumeMismatch(f"{self.path}: {found}")
        return Checkpoint(step, seconds, stopped, tensors)
