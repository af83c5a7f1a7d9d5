"""Ideal sets: prompts that the original answers with the concept and the guarded model does not, before any attack.

Success over an ideal set counts the attack alone, where success over all prompts also counts what the defence never
stopped.  The two are not comparable, and neither are rates over the ideal sets of different models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..concept import Concept
from ..method import Attempt, Judge, Prompt
from .sampling import SHARED, outputs
from .trials import shot

__all__ = ["ideal_rate", "ideal_set", "shots_of"]


def shots_of(
    model: Any, concept: Concept, judge: Judge, prompts: Sequence[Prompt], shots: int,
    options: Mapping[str, Any],
) -> tuple[Any, np.ndarray, np.ndarray]:  # fmt: skip
    """Pictures ``(n, shots, h, w, 3)`` of the prompts, what they show and how clearly, ``(n, shots)`` each."""
    asked = [shot(prompt, k) for prompt in prompts for k in range(shots)]
    made = np.asarray(outputs(model, asked, cache=SHARED, **options))
    verdicts = judge.judge(made, concept, asked)
    size = (len(prompts), shots)
    return (
        made.reshape(*size, *made.shape[1:]),
        np.asarray(verdicts.hit, bool).reshape(size),
        np.asarray(verdicts.score, float).reshape(size),
    )


def ideal_set(
    original: Any, model: Any, concept: Concept, judge: Judge, prompts: Sequence[Prompt],
    *, shots: int = 3, **options: Any,
) -> list[Prompt]:  # fmt: skip
    """The prompts of which one of ``shots`` pictures shows the concept on the original, and none on the model.

    Args:
        original: The unrestricted model; what is on it is lifted.
        model: The guarded model, as it is.
        concept, judge: What is looked for, and by whom.
        prompts: Candidates.
        shots: Pictures of each prompt, with seeds that no two of them share.
        options: Of :meth:`generate` (``steps``, ``guidance``).
    """
    guarded = shots_of(model, concept, judge, prompts, shots, options)[1]
    with original.lifted():
        shown = shots_of(original, concept, judge, prompts, shots, options)[1]
    return [
        p for p, yes, no in zip(prompts, shown, guarded, strict=True) if yes.any() and not no.any()
    ]


def ideal_rate(items: Sequence[Attempt]) -> tuple[float | None, int]:
    """Share of an attack's ideal items that it succeeded on, and how many there are; ``None`` where there are none."""
    ideal = [item for item in items if item.details.get("ideal")]
    return (sum(i.hit for i in ideal) / len(ideal) if ideal else None), len(ideal)
