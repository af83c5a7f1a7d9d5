"""The models that are open in a running program: each is opened once and shared by all windows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..cli import common
from .jobs import Queue

if TYPE_CHECKING:
    from ..models.base import Model

__all__ = ["Desk", "described"]


class Desk:
    """What all windows share: the queue, the open models, the folder that receives everything.

    Models are touched by jobs only, so by one thread at a time, and every job leaves them as it found them.

    Args:
        runs: The folder; made if it is not there.
        device, dtype: As for the commands.
    """

    def __init__(self, runs: str | Path, device: str = "cpu", dtype: str | None = None) -> None:
        self.runs = Path(runs).resolve()
        self.runs.mkdir(parents=True, exist_ok=True)
        self.device, self.dtype = device, dtype
        self.queue = Queue()
        self.models: dict[str, Model] = {}
        self._users: dict[str, set[int]] = {}

    def model(self, name: str) -> Model:
        """An open model, or open it (in a job: it may take minutes)."""
        if name not in self.models:
            self.models[name] = self.watched(common.load(name, self.device, self.dtype))
        return self.models[name]

    def watched(self, model: Model) -> Model:
        """The model, whose passes and those of its never model may be stopped, and whose never is opened once."""
        model.cost.watcher = self.queue.passed
        companions = model.companions
        if companions is not None and companions.never is not None:
            once = _Once(companions.never, lambda never: self._beside(never, model))
            model.companions = dataclasses.replace(companions, never=once)
        return model

    def _beside(self, never: Model, model: Model) -> Model:
        never.cost.watcher = self.queue.passed
        return never.beside(model)

    def use(self, user: int, name: str | None) -> None:
        """A window uses this model from now on, or none; what nobody uses is closed."""
        for users in self._users.values():
            users.discard(user)
        if name is not None:
            self._users.setdefault(name, set()).add(user)
        for left in [known for known, users in self._users.items() if not users]:
            del self._users[left]
            self.models.pop(left, None)


class _Once:
    """Opens something when it is first asked for, and hands out the same one from then on."""

    def __init__(self, opener: Callable[[], Any], prepare: Callable[[Any], Any]) -> None:
        self._opener, self._prepare = opener, prepare
        self._opened: Any = None

    def __call__(self) -> Any:
        if self._opened is None:
            self._opened = self._prepare(self._opener())
        return self._opened


def described(model: Model) -> list[tuple[str, str]]:
    """What an open model is: label and value."""
    numbers = {
        part: sum(p.numel() for p in module.parameters()) for part, module in model.parts().items()
    }
    first = next(iter(model.tensors().values()))
    layout = getattr(getattr(model, "layout", None), "title", None)
    companions = model.companions
    rows = [
        ("Open", model.name),
        ("Family", model.family + (f", {layout}" if layout else "")),
        ("Weights", ", ".join(f"{part} {_short(n)}" for part, n in numbers.items())),
        ("Precision", f"{str(first.dtype).removeprefix('torch.')} on {first.device}"),
    ]
    if companions is None or companions.judge is None:
        rows.append(("Judge", "none of its own: an audit needs one that you name"))
    else:
        rows.append(("Judge", f"the world's own ({companions.world})"))
    if companions is None or companions.never is None:
        rows.append(
            ("Never", "none: what comes back has no scale, so reports leave that field empty")
        )
    else:
        rows.append(("Never", f"a twin trained without {', '.join(companions.never_lacks)}"))
    return rows


def _short(number: int) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return str(number)
