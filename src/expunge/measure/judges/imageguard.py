"""T2ISafety's evaluator as a judge: a chat model names the violated categories, or a person's attributes.

arXiv 2501.12612.  The published evaluator is ImageGuard, a vision-language model of 7 billion parameters that needs
remote code to open, so it is asked behind an endpoint that serves it; any chat model that sees pictures can be asked
the same questions.  ``expunge.core.safety_answers`` has the questions and reads the answers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

from ...core.endpoints import Endpoint, question_key
from ...core.safety_answers import people_question, read_person, read_safety, safety_question
from ...core.safety_judges import SafetyJudge
from ...core.safety_taxonomy import PUBLISHED, Seen, Taxonomy
from ...errors import JudgeError, SettingError
from ...method import Outputs

__all__ = ["ImageGuard", "open_imageguard"]


class ImageGuard(SafetyJudge):
    """Says whether a picture violates a category, and what kind of person it shows.

    Args:
        ask: Asks the model about one picture: question, uint8 ``(h, w, 3)`` -> text; greedy decoding.
        name: Name of the model, part of the protocol.
        taxonomy: What is asked about.
        tries: Times a picture is asked about until the answer can be read.
    """

    id = "imageguard"

    def __init__(
        self,
        ask: Callable[[str, np.ndarray], str],
        name: str,
        *,
        taxonomy: Taxonomy = PUBLISHED,
        tries: int = 2,
    ) -> None:
        if tries < 1:
            raise SettingError(f"{self.id}: tries is {tries}; at least 1 is needed")
        self.ask, self.taxonomy, self.tries = ask, taxonomy, tries
        self.questions = {"safety": safety_question(taxonomy), "people": people_question(taxonomy)}
        digest = hashlib.sha256("\n".join(self.questions.values()).encode()).hexdigest()[:8]
        self.protocol = f"imageguard/1/{name}:{taxonomy.name}/questions={digest}"
        self._answers: dict[str, Seen] = {}

    def look(self, outputs: Outputs, question: str) -> list[Seen]:
        """What is seen in each of ``n`` pictures; ``question`` is ``safety`` or ``people``."""
        read = {"safety": read_safety, "people": read_person}[question]
        found = []
        for picture in map(np.asarray, outputs):
            key = question_key(question, picture)
            if key not in self._answers:
                self._answers[key] = self._one(self.questions[question], read, picture)
            found.append(self._answers[key])
        return found

    def _one(self, question: str, read: Callable[..., Seen], picture: np.ndarray) -> Seen:
        for tried in range(self.tries):
            try:
                return read(self.ask(question, picture), self.taxonomy)
            except JudgeError as error:
                if tried == self.tries - 1:
                    raise JudgeError(f"{self.protocol}: {error}") from None
        raise AssertionError("unreachable")


def open_imageguard(
    beside: Any = None,
    *,
    url: str,
    model: str,
    key_variable: str = "OPENAI_API_KEY",
    timeout: float = 120.0,
    retries: int = 4,
) -> ImageGuard:
    """The judge behind an endpoint; see :class:`~expunge.core.endpoints.Endpoint`."""
    endpoint = Endpoint(url, model, key_variable, timeout, retries)
    return ImageGuard(endpoint.ask, model)
