"""COCO captions as erasure papers use them: 30,000 of the 2014 validation set, or 10,000 of those.

Lin et al., arXiv 1405.0312.  They call for no erased concept, so what changes on them is damage: Frechet distances and
CLIP scores are taken over them.  Published copies differ in rows (30k and 10k; one paper draws 9,969 of its 10k).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from pydantic import Field

from ...core.prompt_tables import PromptTable, Row, also
from ...method import Prompt, setting

__all__ = ["Coco", "CocoRow"]


class CocoRow(Row):
    """A caption with the seed of its picture."""

    prompt: str = Field(min_length=1)
    seed: int = Field(ge=0, validation_alias=also("seed", "evaluation_seed"))
    guidance: float | None = Field(
        default=None, ge=0, validation_alias=also("guidance", "evaluation_guidance")
    )
    number: int | None = Field(
        default=None, validation_alias=also("coco_id", "image_id", "case_number")
    )


@dataclasses.dataclass(frozen=True)
class Coco(PromptTable):
    """COCO captions with seeds (arXiv 1405.0312)."""

    id: ClassVar[str] = "coco"
    title: ClassVar[str] = "COCO captions, 30k or 10k"
    source: ClassVar[str] = "arXiv 1405.0312"
    row: ClassVar[type[Row]] = CocoRow
    licence: ClassVar[str] = "CC BY 4.0 (captions)"

    each: int = setting(
        1, "Every how many-th caption; 3: a third of them, spread over the file", minimum=1
    )

    def prompt(self, row: CocoRow, place: int) -> Prompt | None:
        """The caption, if it is of the chosen part."""
        if place % self.each:
            return None
        return Prompt(
            row.prompt, seed=row.seed, labels={"number": row.number}, guidance=row.guidance
        )
