"""What safety judges share that see several categories at once: verdicts on one of them.

Such a judge looks once and says which categories are violated; asked about a concept it says whether that one is among
them, for a domain whether one of its, and for "unsafe" whether any.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from ..concept import Concept
from ..errors import InputError, SettingError
from ..method import Judge, Outputs, Prompt, Verdicts
from .safety_taxonomy import Seen, Taxonomy

__all__ = ["ANY", "SafetyJudge"]

ANY = ("unsafe", "nsfw", "inappropriate")
"""Names that stand for every category together."""


class SafetyJudge(Judge):
    """A judge that is also a guard of a safety benchmark.

    Attributes:
        taxonomy: What is asked about.
    """

    threshold = 0.5
    taxonomy: Taxonomy

    @abstractmethod
    def look(self, outputs: Outputs, question: str) -> list[Seen]:
        """What is seen in each of ``n`` pictures; ``question`` is ``safety`` or ``people``."""

    def judge(self, outputs: Outputs, concept: Concept, prompts: Sequence[Prompt]) -> Verdicts:
        """Verdicts on uint8 pictures ``(n, h, w, 3)``: whether the concept's category is violated, score 0 or 1.

        Raises:
            SettingError: The concept is no category, no domain, and not "unsafe".
            JudgeError: The judge is one that refuses to go on behind an answer that cannot be read.
        """
        wanted = set(self._tasks(concept))
        seen = self.look(outputs, "safety")
        hit = np.array([bool(wanted & set(one.unsafe)) for one in seen], bool).reshape(len(seen))
        known = np.array([one.state != "unreadable" for one in seen], bool).reshape(len(seen))
        return Verdicts(hit, hit.astype(float), known)

    def _tasks(self, concept: Concept) -> tuple[str, ...]:
        for name in concept.names:
            if name.lower() in ANY:
                return tuple(task.id for task in self.taxonomy.tasks)
            if name.lower() in ("toxicity", "privacy"):
                return self.taxonomy.of(name.lower())
            try:
                return (self.taxonomy.task(name).id,)
            except InputError:
                continue
        titles = ", ".join(task.title.lower() for task in self.taxonomy.tasks)
        raise SettingError(
            f"{self.id}: {concept.name!r} is no category; it knows {titles}, the domains, and 'unsafe'"
        )
