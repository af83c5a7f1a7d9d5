"""I2P, inappropriate image prompts: 4,703 prompts from a log that tend to give unsafe pictures.

Schramowski et al., arXiv 2211.05105.  Seven categories that overlap; for each prompt how many of its pictures (SD v1.4)
were judged inappropriate, nude, or stopped by the safety checker, in percent.  "Hard" prompts are inappropriate in at
least half of theirs.  The published number is the mean probability of an inappropriate picture and the expected
maximum over 25 prompts, ten pictures a prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import Field, field_validator

from ...core.inappropriate import inappropriate
from ...core.prompt_tables import Outcome, PromptTable, Row, also
from ...errors import nearest
from ...method import Measurement, Prompt, setting

__all__ = ["CATEGORIES", "I2P", "I2PRow"]

CATEGORIES = (
    "harassment", "hate", "illegal activity", "self-harm", "sexual", "shocking", "violence",
)  # fmt: skip


class I2PRow(Row):
    """A row: the hub's names of columns, or those of the copies in erasure repositories."""

    prompt: str = ""  # one row of the older copies has none; it is left out
    categories: tuple[str, ...]
    hard: bool
    inappropriate_percentage: float = Field(ge=0, le=100)
    nudity_percentage: float = Field(ge=0, le=100)
    q16_percentage: float | None = Field(default=None, ge=0, le=100)
    sd_safety_percentage: float | None = Field(default=None, ge=0, le=100)
    prompt_toxicity: float | None = None
    seed: int = Field(ge=0, validation_alias=also("sd_seed", "seed", "evaluation_seed"))
    guidance: float = Field(
        ge=0, validation_alias=also("sd_guidance_scale", "guidance", "evaluation_guidance")
    )
    width: int | None = Field(default=None, validation_alias=also("sd_image_width", "width"))
    height: int | None = Field(default=None, validation_alias=also("sd_image_height", "height"))

    @field_validator("categories", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
        for part in parts if isinstance(parts, (list, tuple)) else ():
            if part not in CATEGORIES:
                raise ValueError(f"{part!r} is no category{nearest(str(part), CATEGORIES)}")
        return parts


@dataclasses.dataclass(frozen=True)
class I2P(PromptTable):
    """I2P, whole or in part (arXiv 2211.05105)."""

    id: ClassVar[str] = "i2p"
    title: ClassVar[str] = "I2P: inappropriate image prompts"
    source: ClassVar[str] = "arXiv 2211.05105"
    row: ClassVar[type[Row]] = I2PRow
    hub: ClassVar[tuple[str, str] | None] = ("AIML-TUDA/i2p", "i2p_benchmark.csv")
    published: ClassVar[int | None] = 4703
    licence: ClassVar[str] = "MIT"
    kind: ClassVar[str] = "unsafe"

    category: str = setting(
        "", "Only prompts of this category; empty: of all", choices=("", *CATEGORIES)
    )
    nudity_from: float = setting(
        0.0, "Only prompts of at least this nudity percentage", minimum=0, maximum=100
    )
    nudity_above: float | None = setting(
        None, "Only prompts above this nudity percentage; none: all", minimum=0, maximum=100
    )
    hard: bool = setting(False, "Only hard prompts")

    def prompt(self, row: I2PRow, place: int) -> Prompt | None:
        """The prompt with its own seed and guidance, if it is of the chosen part."""
        if not row.prompt or (self.category and self.category not in row.categories):
            return None
        if row.nudity_percentage < self.nudity_from or (self.hard and not row.hard):
            return None
        if self.nudity_above is not None and not row.nudity_percentage > self.nudity_above:
            return None
        labels = {
            "categories": row.categories, "hard": row.hard, "nudity_percentage": row.nudity_percentage,
            "inappropriate_percentage": row.inappropriate_percentage, "place": place,
        }  # fmt: skip
        return Prompt(row.prompt, seed=row.seed, labels=labels, guidance=row.guidance)

    def summary(self, outcomes: Sequence[Outcome], judge: str = "") -> dict[str, Measurement]:
        """Probability of an inappropriate picture, and the expected maximum over 25 prompts where there are as many.

        The published judge is Q16 or NudeNet; whoever it was stands in the ids.
        """
        shown = [one.hit for one in outcomes]
        prompts = [one.prompt.text for one in outcomes]
        probability, maximum = inappropriate(shown, prompts, judge or "unknown")
        made = {"probability": probability}
        return made if maximum.value is None else {**made, "expected_maximum": maximum}
