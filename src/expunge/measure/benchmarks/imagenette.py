"""Prompts for Imagenette's ten classes, which ESD and others erase one by one.

A published file has a hundred rows ("Image of church", ten seeds a class; arXiv 2303.07345), and papers draw 500
pictures a class from it.  The accuracy of the erased class shall fall and the mean of the other nine stay.  Without a
file the same prompts are made here, with seeds of our own (:meth:`Imagenette.made`).
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import ClassVar

from pydantic import Field

from ...core.prompt_tables import PromptTable, Row, Table, also
from ...errors import SettingError, nearest
from ...method import Prompt, setting

__all__ = ["CLASSES", "Imagenette", "ImagenetteRow"]

CLASSES = (
    "cassette player", "chain saw", "church", "english springer", "french horn", "garbage truck", "gas pump",
    "golf ball", "parachute", "tench",
)  # fmt: skip


class ImagenetteRow(Row):
    """A prompt with its class."""

    prompt: str = Field(min_length=1)
    seed: int = Field(ge=0, validation_alias=also("seed", "evaluation_seed"))
    label: str = Field(validation_alias=also("label", "classes", "class"))
    guidance: float | None = Field(
        default=None, ge=0, validation_alias=also("guidance", "evaluation_guidance")
    )


@dataclasses.dataclass(frozen=True)
class Imagenette(PromptTable):
    """Prompts of Imagenette's classes, or of any classes a file in this schema names (arXiv 2303.07345)."""

    id: ClassVar[str] = "imagenette"
    title: ClassVar[str] = "Imagenette's ten classes"
    source: ClassVar[str] = "arXiv 2303.07345"
    row: ClassVar[type[Row]] = ImagenetteRow
    published: ClassVar[int | None] = 100

    only: str = setting("", "Only prompts of this class; empty: of all")

    def prompt(self, row: ImagenetteRow, place: int) -> Prompt | None:
        """The prompt, which is about its class, if it is of the chosen part."""
        label = row.label.lower()
        if self.only and label != self.only.lower():
            return None
        return Prompt(
            row.prompt, seed=row.seed, concept=label, labels={"class": label}, guidance=row.guidance
        )

    def made(self, each: int = 500, template: str = "Image of {}", seed: int = 0) -> Table:
        """``each`` prompts of every class with seeds of their own, without any file.

        Raises:
            SettingError: ``only`` is none of the classes.
        """
        if self.only and self.only.lower() not in CLASSES:
            raise SettingError(
                f"{self.only!r} is none of Imagenette's classes{nearest(self.only, CLASSES)}"
            )
        prompts = []
        for name in CLASSES if not self.only else (self.only.lower(),):
            for index in range(each):
                digest = hashlib.sha256(f"imagenette|{seed}|{name}|{index}".encode()).digest()
                number = int.from_bytes(digest[:6], "big")
                prompts.append(Prompt(template.replace("{}", name), number, name, {"class": name}))
        protocol = (
            f"{self.id}/{self.version}:{self._chosen() or 'all'}/made={each},{template},{seed}"
        )
        return Table(self.id, tuple(prompts), protocol, "made here", len(prompts))
