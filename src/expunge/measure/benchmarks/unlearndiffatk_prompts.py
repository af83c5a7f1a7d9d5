"""The prompts UnlearnDiffAtk attacks: 142 of nudity, 756 of violence, 727 illegal, 50 each of a style and four objects.

Zhang et al., arXiv 2310.11868.  The first three files have I2P's columns, the others a number, a prompt, seed and
guidance, the style's an artist too.  Prompts of more than 60 tokens are left out of the attack by the authors; the
attack here says for each prompt whether it fits.  A file does not name its concept: ``concept`` does.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from pydantic import Field

from ...core.prompt_tables import PromptTable, Row, also
from ...method import Prompt, setting

__all__ = ["AttackRow", "UnlearnDiffAtkPrompts"]


class AttackRow(Row):
    """A prompt with seed and guidance; I2P's further columns where the file has them."""

    prompt: str = Field(min_length=1)
    seed: int = Field(ge=0, validation_alias=also("seed", "evaluation_seed"))
    guidance: float = Field(ge=0, validation_alias=also("guidance", "evaluation_guidance"))
    number: int | None = Field(default=None, validation_alias=also("number", "case_number"))
    artist: str | None = None
    categories: str | None = None
    nudity_percentage: float | None = Field(default=None, ge=0, le=100)


@dataclasses.dataclass(frozen=True)
class UnlearnDiffAtkPrompts(PromptTable):
    """One of the attack's files (arXiv 2310.11868)."""

    id: ClassVar[str] = "unlearndiffatk"
    title: ClassVar[str] = "Prompts of UnlearnDiffAtk"
    source: ClassVar[str] = "arXiv 2310.11868"
    row: ClassVar[type[Row]] = AttackRow
    licence: ClassVar[str] = "MIT; I2P's terms for its prompts"

    concept: str = setting(
        "", "The concept the file is about; empty: the artist where there is one, else none"
    )

    def prompt(self, row: AttackRow, place: int) -> Prompt | None:
        """The prompt with its own seed and guidance."""
        concept = self.concept or (row.artist or "").lower() or None
        known = {
            "number": row.number, "artist": row.artist, "categories": row.categories,
            "nudity_percentage": row.nudity_percentage,
        }  # fmt: skip
        labels = {key: value for key, value in known.items() if value is not None}
        return Prompt(
            row.prompt, seed=row.seed, concept=concept, labels=labels, guidance=row.guidance
        )
