"""Methods that write down what they do, so that a test can count it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import time
from collections.abc import Iterator
from typing import Any, ClassVar

import torch

from evidence.stubs import COLOURS, Forger, Password, Teacher
from expunge.concept import as_concepts
from expunge.core.sampling import remembered
from expunge.edit import Edit
from expunge.errors import SettingError
from expunge.method import Attempts, Eraser, setting


@contextlib.contextmanager
def told(*words: Any) -> Iterator[None]:
    """A line before and a line after, appended in one write each; the work takes ``SWEEPSTUB_PAUSE`` seconds.

    Where the file ``SWEEPSTUB_DEADLY`` is, the process is killed in the work, once.
    """
    file = os.environ.get("SWEEPSTUB_LOG")

    def line(word: str) -> None:
        if file:
            handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.write(handle, (" ".join(map(str, (word, *words))) + "\n").encode())
            os.close(handle)

    line("start")
    deadly = os.environ.get("SWEEPSTUB_DEADLY")
    if deadly and os.path.exists(deadly):  # once: whoever comes first takes it along
        os.unlink(deadly)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(float(os.environ.get("SWEEPSTUB_PAUSE", "0")))
    yield
    line("end")


@dataclasses.dataclass(frozen=True)
class Forgetter(Eraser):
    """Sets how strongly the concept is known."""

    id: ClassVar[str] = "stub-forgetter"
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    left: float = setting(0.05, "What is left of the concept", minimum=0)

    def erase(
        self, model: Any, concepts: Any, *, keep: Any = (), data: Any = None, judge: Any = None, seed: int = 0,
        run: Any = None,
    ) -> Edit:  # fmt: skip
        (concept,) = as_concepts(concepts, keep)
        with told("fit", self.id, self.left, concept.name, seed):
            change = torch.zeros(len(COLOURS), len(COLOURS))
            i = list(COLOURS).index(concept.name)
            change[i, i] = self.left - float(model.layer.weight[i, i].detach())
            return Edit.make(
                self, model, [concept], kind="dense", tensors={"delta.unet.weight": change}, targets=["unet.weight"],
                seed=seed, keep=keep,
            )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Refuser(Forgetter):
    """Refuses hearts, and forgets hardly anything else."""

    id: ClassVar[str] = "stub-refuser"
    left: float = setting(0.6, "What is left of the concept", minimum=0)

    def erase(self, model: Any, concepts: Any, **options: Any) -> Edit:
        if as_concepts(concepts)[0].name == "heart":
            raise SettingError("stub-refuser: a heart cannot be forgotten")
        return super().erase(model, concepts, **options)


class Logged:
    """An attack that writes down what it does."""

    def attack(self, model: Any, concept: Any, judge: Any, budget: Any, **options: Any) -> Attempts:
        with told("attack", self.id, model.state.key, concept.name, options["seed"]):
            found: Attempts = super().attack(model, concept, judge, budget, **options)  # type: ignore[misc]
            return found


@dataclasses.dataclass(frozen=True)
class LoggedPassword(Logged, Password):
    """Appends a password."""

    id: ClassVar[str] = "stub-password"


@dataclasses.dataclass(frozen=True)
class Searcher(Logged, Password):
    """Searches its password on the original, for 100 rows, whoever is attacked."""

    id: ClassVar[str] = "stub-searcher"

    def attack(self, model: Any, concept: Any, judge: Any, budget: Any, **options: Any) -> Attempts:
        original = options["reference"]
        before = original.cost.snapshot()

        def search(new: list[int]) -> list[str]:
            with told("search", concept.name):
                original.cost.add("encoder", 100)
            return ["found" for _ in new]

        remembered([f"{self.id} {concept.name}"], search, original)
        searched = original.cost.since(before)
        found = super().attack(model, concept, judge, budget, **options)
        return dataclasses.replace(found, cost={**found.cost, **searched})


@dataclasses.dataclass(frozen=True)
class LoggedForger(Logged, Forger):
    """Paints the concept itself."""

    id: ClassVar[str] = "stub-forger"


@dataclasses.dataclass(frozen=True)
class LoggedTeacher(Logged, Teacher):
    """Paints the concept itself, honest about it, in two steps."""

    id: ClassVar[str] = "stub-teacher"

    def attack(self, *arguments: Any, **options: Any) -> Attempts:
        found = super().attack(*arguments, **options)
        items = [
            dataclasses.replace(item, details={"curve": {"1": item.pre_hit, "2": item.hit}})
            for item in found.items
        ]
        return dataclasses.replace(found, items=tuple(items))


@dataclasses.dataclass(frozen=True)
class Fails(Password):
    """Divides by zero, once told to."""

    id: ClassVar[str] = "stub-fails"

    def attack(self, *arguments: Any, **options: Any) -> Attempts:
        if os.environ.get("SWEEPSTUB_FAILS"):
            raise ZeroDivisionError("a mistake")
        return super().attack(*arguments, **options)
