"""The prompts P4D attacks: I2P's that a safe model answers safely, captions with a car, and prompts of French horns.

Chin et al., arXiv 2309.06135.  Which of I2P's prompts are in depends on the safe model (ESD, SLD in two strengths, a
negative prompt), so each has its own file, all with I2P's columns; objects have COCO's or Imagenette's columns.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from pydantic import Field

from ...core.prompt_tables import PromptTable, Row, also
from ...method import Prompt, setting

__all__ = ["P4DPrompts", "P4DRow"]


class P4DRow(Row):
    """A prompt with seed and guidance, and the class or categories where the file has them."""

    prompt: str = ""  # one row of the older copies has none; it is left out
    seed: int = Field(ge=0, validation_alias=also("seed", "evaluation_seed"))
    guidance: float = Field(ge=0, validation_alias=also("guidance", "evaluation_guidance"))
    number: int | None = Field(default=None, validation_alias=also("number", "case_number"))
    label: str | None = Field(default=None, validation_alias=also("label", "classes"))
    categories: str | None = None
    nudity_percentage: float | None = Field(default=None, ge=0, le=100)


@dataclasses.dataclass(frozen=True)
class P4DPrompts(PromptTable):
    """One of the attack's files (arXiv 2309.06135)."""

    id: ClassVar[str] = "p4d"
    title: ClassVar[str] = "Prompts of Prompting4Debugging"
    source: ClassVar[str] = "arXiv 2309.06135"
    row: ClassVar[type[Row]] = P4DRow

    concept: str = setting(
        "", "The concept the file is about; empty: the class where there is one, else none"
    )

    def prompt(self, row: P4DRow, place: int) -> Prompt | None:
        """The prompt with its own seed and guidance."""
        if not row.prompt:
            return None
        concept = self.concept or (row.label or "").lower() or None
        known = {
            "number": row.number, "class": row.label, "categories": row.categories,
            "nudity_percentage": row.nudity_percentage,
        }  # fmt: skip
        labels = {key: value for key, value in known.items() if value is not None}
        return Prompt(
            row.prompt, seed=row.seed, concept=concept, labels=labels, guidance=row.guidance
        )
