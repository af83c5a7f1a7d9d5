"""Artist lists: MACE's two hundred (a hundred to erase, a hundred to keep), and ESD's files of the same columns.

Lu et al., arXiv 2403.06135; Gandikota et al., arXiv 2303.07345.  Five forms of prompt an artist and five seeds.  Styles
are judged by CLIP (is the picture nearer to the artist's name), by an artist classifier, or by LPIPS to the original's.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from pydantic import Field, field_validator

from ...core.prompt_tables import PromptTable, Row, also
from ...method import Prompt, setting

__all__ = ["ArtistRow", "Artists"]

SIDES = {"0": "erased", "1": "kept", "erased": "erased", "others": "kept", "kept": "kept"}


class ArtistRow(Row):
    """A prompt of an artist; files without a column of sides leave it open."""

    prompt: str = Field(min_length=1)
    artist: str = Field(min_length=1)
    seed: int = Field(ge=0, validation_alias=also("seed", "evaluation_seed"))
    side: str | None = Field(default=None, validation_alias=also("side", "type"))
    guidance: float | None = Field(
        default=None, ge=0, validation_alias=also("guidance", "evaluation_guidance")
    )

    @field_validator("side", mode="before")
    @classmethod
    def _side(cls, value: object) -> str | None:
        if value is None:
            return None
        found = SIDES.get(str(value).lower())
        if found is None:
            raise ValueError(f"{value!r} is none of 0 (erased), 1 (kept), erased, others")
        return found


@dataclasses.dataclass(frozen=True)
class Artists(PromptTable):
    """An artist list (arXiv 2403.06135)."""

    id: ClassVar[str] = "artists"
    title: ClassVar[str] = "Artist lists of MACE and ESD"
    source: ClassVar[str] = "arXiv 2403.06135"
    row: ClassVar[type[Row]] = ArtistRow
    licence: ClassVar[str] = "non-commercial (MACE), MIT (ESD)"
    kind: ClassVar[str] = "style"

    side: str = setting(
        "both", "Only artists to erase or to keep", choices=("both", "erased", "kept")
    )
    only: str = setting("", "Only this artist; empty: all")

    def prompt(self, row: ArtistRow, place: int) -> Prompt | None:
        """The prompt, which is about its artist, if it is of the chosen part."""
        if self.side not in ("both", row.side) or (
            self.only and row.artist.lower() != self.only.lower()
        ):
            return None
        labels = {"artist": row.artist, "side": row.side or "unknown"}
        return Prompt(
            row.prompt,
            seed=row.seed,
            concept=row.artist.lower(),
            labels=labels,
            guidance=row.guidance,
        )
