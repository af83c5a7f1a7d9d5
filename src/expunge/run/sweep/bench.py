"""What the cells of a sweep work on: one opened model with its companions, prompts and the three arms."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from ...concept import Concept
from ...core.sampling import prompts_digest
from ...errors import ModelError, SettingError, nearest
from ...evidence.arms import PromptSets, open_never
from ...evidence.prompts import attacked, prompt_sets
from ...method import Prompt
from .options import Options

__all__ = ["Bench", "Case"]


@dataclasses.dataclass(frozen=True)
class Case:
    """One concept at one seed: what an eraser is told, and the prompts that every arm is asked.

    Attributes:
        concept: What is erased.
        keep: Neighbours that the eraser is told to keep; nothing is measured on them.
        sets: Prompts by name and by other routes, and of the kept concepts that the eraser was not told.
        attacked: The prompts of every attack, the same for all arms.
        seed: Of the choice of prompts, of erasers and of attacks.
    """

    concept: Concept
    keep: tuple[str, ...]
    sets: PromptSets
    attacked: list[Prompt]
    seed: int

    def asked(self, prompts: str | None = None) -> dict[str, Any]:
        """What names the case in a request, with the prompts that are ``measured`` or ``attacked``.

        What the eraser is told to keep stands in the request of its fit: the other arms do not depend on it.
        """
        asked: dict[str, Any] = {"concept": self.concept.to_dict(), "seed": self.seed}
        if prompts == "attacked":
            asked["prompts"] = prompts_digest(self.attacked)
        elif prompts == "measured":
            sets = [prompt for _, _, listed in self.sets.parts() for prompt in listed]
            asked["prompts"] = prompts_digest(sets)
        return asked


class Bench:
    """The model, its world, and what is opened once for all cells of a process.

    Args:
        options: What was asked for.
        model: The model, opened; ``None`` opens ``options.model``.

    Raises:
        ModelError: The model has no world beside it, or edits on it.
    """

    def __init__(self, options: Options, model: Any = None) -> None:
        model = self._open(options) if model is None else model
        companions = model.companions
        if companions is None or companions.judge is None or companions.prompts is None:
            raise ModelError(
                f"{model.name} has no world beside it; a sweep needs its prompts and its judge"
            )
        if len(model.edits) or model.controls:
            raise ModelError(f"{model.name} has edits on it; a sweep starts from the base")
        self.options, self.model, self.companions = options, model, companions
        self.judge = companions.judge()
        self.state: str = model.state.key
        self.protocol: str = model.protocol_key
        self.cases: dict[tuple[str, int], Case] = {}

    @staticmethod
    def _open(options: Options) -> Any:
        from ...models import load

        if options.dtype is None:
            return load(options.model, device=options.device)
        import torch

        return load(options.model, device=options.device, dtype=getattr(torch, options.dtype))

    @functools.cached_property
    def never(self) -> Any:
        """The never model, opened when it is first needed."""
        opened = self.companions.never()
        opened.beside(self.model)
        return opened

    def lacks(self, concept: Concept) -> str | None:
        """Why there is no never model of a concept; ``None`` where there is one."""
        # The model itself stands in for a never that is not opened yet: nothing but the reason is read.
        return open_never(concept, None, self.companions, self.model)[1]

    def concept(self, name: str) -> Concept:
        """A concept that the world knows.

        Raises:
            SettingError: It does not know it.
        """
        found: Concept | None = self.companions.concept(name)
        if found is None:
            raise SettingError(
                f"{self.model.name} knows no concept {name!r}"
                f"{nearest(name, self.companions.never_lacks)}"
            )
        return found

    def case(self, name: str, seed: int) -> Case:
        """The prompts of one concept at one seed; chosen once."""
        if (name, seed) not in self.cases:
            self.cases[name, seed] = self._case(name, seed)
        return self.cases[name, seed]

    def _case(self, name: str, seed: int) -> Case:
        concept, options = self.concept(name), self.options
        others = [n for n in self.companions.neighbours(concept) if n != concept.name]
        told = tuple(others[: options.told])
        kept = [n for n in (*others, *self.companions.unrelated) if n not in (*told, concept.name)]
        sets = prompt_sets(
            concept, self.companions, family=self.model.family, kept=list(dict.fromkeys(kept)), n=options.n,
            kept_n=options.kept_n, seed=seed, split=options.split,
        )  # fmt: skip
        return Case(concept, told, sets, attacked(sets.target, options.attack_n), seed)

    def named(self) -> Mapping[str, Any]:
        """What names model and judge in every request."""
        return {"model": self.state, "protocol": self.protocol, "judge": self.judge.protocol}
