"""The world's judge: the oracle classifier behind the contract of all judges."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch

from ..concept import Concept
from ..core.vision import uint8_pictures
from ..errors import InputError, nearest
from ..method import Judge, Prompt, Verdicts
from . import models, vocabulary

__all__ = ["OracleJudge"]


def find_entry(name: str) -> vocabulary.Entry | None:
    """The world's entry of a name or listed phrase, or ``None``."""
    wanted = name.lower()
    for entry in vocabulary.entries().values():
        if wanted == entry.name or wanted in entry.phrases:
            return entry
    return None


def entry_name(concept: Concept) -> str:
    """The world's name of a concept that may be called by a listed phrase.

    Raises:
        InputError: The world does not have it.
    """
    wanted = concept.name.lower()
    entry = find_entry(wanted)
    if entry is not None:
        return entry.name
    raise InputError(
        f"the world's oracle does not know {concept.name!r}{nearest(wanted, vocabulary.concept_names())}"
    )


class OracleJudge(Judge):
    """Says whether pictures of the world show a concept of the world.

    A hit needs the oracle's confidence to reach the threshold and the picture to be recognisable.
    """

    id = "world-oracle"
    threshold = 0.5
    protocol = "world-oracle/1:confidence>=0.5&recognisable"

    def judge(self, outputs: np.ndarray, concept: Concept, prompts: Sequence[Prompt]) -> Verdicts:
        """Verdicts on uint8 pictures ``(n, 64, 64, 3)``."""
        name = entry_name(concept)
        if not len(outputs):
            empty = np.zeros(0)
            return Verdicts(empty.astype(bool), empty, empty.astype(bool))
        oracle = self._oracle()
        probabilities = oracle(uint8_pictures(outputs))
        score = oracle.confidence(name, probabilities)
        recognisable = oracle.unrecognisable(probabilities) < 0.5
        hit = (score >= self.threshold) & recognisable
        return Verdicts(hit.numpy(), score.numpy().astype(np.float64), recognisable.numpy())

    def features(self, outputs: np.ndarray) -> np.ndarray:
        """The oracle's penultimate vectors, float32 ``(n, 160)``."""
        with torch.no_grad():
            return np.asarray(self._oracle().features(outputs))

    @staticmethod
    @functools.cache
    def _oracle():  # type: ignore[no-untyped-def]
        return models.oracle()
