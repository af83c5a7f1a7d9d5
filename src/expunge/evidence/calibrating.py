"""How often the judge of an audit errs, on outputs whose truth is known."""

from __future__ import annotations

from typing import Any

from ..concept import Concept
from ..errors import ExpungeError
from ..method import Judge
from .measuring import Notes
from .schema import Flag, JudgeRecord

__all__ = ["calibration_flags", "judge_record"]

LABELLED = 48
"""Pictures with and as many without the concept on which a world's own judge is calibrated."""

MISTAKEN = 0.05
MISSED = 0.20
"""False positives, and misses, from which on a reader is warned."""


def judge_record(
    judge: Judge, concept: Concept, companions: Any, count: int | None, notes: Notes
) -> JudgeRecord | None:
    """The judge's calibration for a concept: the one it carries, or one on the world's labelled pictures.

    Args:
        judge: Keeps what is made here.
        concept: What it is asked about.
        companions: What a world registered beside the model, or ``None``.
        count: Labelled pictures with and without the concept; ``None``: some for the world's own judge, none for
            another one, whose verdicts may cost money.
        notes: Receives the reason where there is none.
    """
    made = judge.calibrations.get(concept.name)
    if made is None:
        own = companions is not None and companions.judge is not None
        asked = (
            (LABELLED if own and companions.judge().protocol == judge.protocol else 0)
            if count is None
            else count
        )
        make = getattr(companions, "labelled", None)
        if not asked or make is None:
            notes.null(
                "calibration",
                "the judge was not calibrated on labelled outputs: how often it errs is unknown",
            )
            return None
        try:
            labelled = make(concept.name, asked, split="development")
        except (ExpungeError, ValueError) as error:
            notes.null("calibration", f"there are no labelled pictures of the concept: {error}")
            return None
        source = f"{companions.world}, rendered development pictures, {asked} with and {asked} without the concept"
        made = judge.calibrate(labelled.pictures, list(labelled.shown), concept, source=source)
    return JudgeRecord.model_validate(made.to_dict())


def calibration_flags(record: JudgeRecord | None) -> list[Flag]:
    """A warning where the judge errs so often that rates must be read with that in mind."""
    if record is None:
        return []
    found = []
    for value, limit, words in (
        (record.false_positive_rate, MISTAKEN, "sees the concept in {} of labelled outputs that lack it"),
        (None if record.true_positive_rate is None else 1 - record.true_positive_rate, MISSED,
         "misses it in {} of labelled outputs that show it"),
    ):  # fmt: skip
        if value is not None and value > limit - 1e-9:  # 1 - 0.8 is a little below 0.2
            found.append(words.format(f"{100 * value:.0f}\u00a0%"))
    if not found:
        return []
    return [Flag(code="judge-errs", message=f"The judge {' and '.join(found)} (n = {record.n}).")]
