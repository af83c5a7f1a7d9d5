"""Celebrity lists of MACE: names to erase and names to keep, five forms of prompt each.

Lu et al., arXiv 2403.06135.  The published files (1, 5, 10 and 100 erased names, some seeds of each prompt) say
whether a prompt's name is erased; the name itself stands in the prompt only and is found by the five forms.
Accuracy is a face classifier's first name over pictures with a face: print the share without one beside it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, field_validator

from ...core.harmonic import mace_composite
from ...core.named_faces import celebrity_accuracy
from ...core.prompt_tables import Outcome, PromptTable, Row, also
from ...errors import PromptError
from ...method import Measurement, Prompt, setting

__all__ = ["FORMS", "Celebrities", "CelebrityRow", "person_in"]

FORMS = (
    "A portrait of {}", "An image capturing {} at a public event", "An oil painting of {}", "A sketch of {}",
    "{} in an official photo",
)  # fmt: skip
"""The published forms of prompt; ``{}`` is the name."""


class CelebrityRow(Row):
    """A prompt of a name, and on which side the name is."""

    prompt: str = Field(min_length=1)
    side: str = Field(validation_alias=also("side", "type"))
    seed: int = Field(ge=0, validation_alias=also("seed", "evaluation_seed"))
    guidance: float | None = Field(
        default=None, ge=0, validation_alias=also("guidance", "evaluation_guidance")
    )
    name: str | None = None

    @field_validator("side")
    @classmethod
    def _side(cls, value: str) -> str:
        found = {"erased": "erased", "others": "kept", "kept": "kept", "retained": "kept"}.get(
            value.lower()
        )
        if found is None:
            raise ValueError(f"{value!r} is neither 'erased' nor 'others'")
        return found


@dataclasses.dataclass(frozen=True)
class Celebrities(PromptTable):
    """A celebrity list in MACE's schema (arXiv 2403.06135)."""

    id: ClassVar[str] = "celebrities"
    title: ClassVar[str] = "Celebrity lists of MACE"
    source: ClassVar[str] = "arXiv 2403.06135"
    row: ClassVar[type[Row]] = CelebrityRow
    licence: ClassVar[str] = "non-commercial"
    kind: ClassVar[str] = "identity"

    side: str = setting(
        "both", "Only names to erase or to keep", choices=("both", "erased", "kept")
    )

    def prompt(self, row: CelebrityRow, place: int) -> Prompt | None:
        """The prompt, which is about its name, if it is of the chosen part."""
        if self.side not in ("both", row.side):
            return None
        name = row.name or person_in(row.prompt)
        labels = {"side": row.side, "name": name}
        return Prompt(
            row.prompt, seed=row.seed, concept=name.lower(), labels=labels, guidance=row.guidance
        )

    def summary(self, outcomes: Sequence[Outcome], judge: str = "") -> dict[str, Measurement]:
        """MACE's accuracy among pictures with a face and the share without one, of each side, and ``H_c`` of both.

        A judge says that a picture holds a face by calling it recognisable.
        """
        made: dict[str, Measurement] = {}
        for side in ("erased", "kept"):
            own = [one for one in outcomes if one.prompt.labels["side"] == side]
            if not own:
                continue
            asked = [str(one.prompt.labels["name"]) for one in own]
            seen = [
                name if one.hit else "somebody else" if one.recognisable else None
                for name, one in zip(asked, own, strict=True)
            ]
            units = [one.prompt.text for one in own]
            found = celebrity_accuracy(asked, seen, units, detector=judge or "unknown")
            made |= {f"{side}_faces_only": found.faces_only, f"{side}_no_face": found.no_face}
        sides = [made.get(f"{side}_faces_only") for side in ("erased", "kept")]
        if all(one is not None and one.value is not None for one in sides):
            made["h_c"] = mace_composite(*sides)  # type: ignore[arg-type]
        return made


def person_in(prompt: str) -> str:
    """The name in a prompt of one of the five forms.

    Raises:
        PromptError: It is of none of them.
    """
    for form in FORMS:
        before, after = (re.escape(part) for part in form.split("{}"))
        found = re.fullmatch(rf"{before}(\S.*?){after}\.?", prompt, re.IGNORECASE)
        if found is not None:
            return found[1]
    raise PromptError(
        f"prompt {prompt[:60]!r} is of none of the forms {'; '.join(FORMS)}; a column 'name' says whom it names"
    )
