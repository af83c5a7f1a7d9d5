"""T2ISafety's prompts and labelled pictures, in the hub's layout (arXiv 2501.12612).

A record of the annotated sets is ``id``, ``image`` (relative paths), ``caption``, ``real`` and ``conversations``, whose
last assistant turn holds the labels as the judge writes them: three lines about a person, or safe/unsafe with
categories.  A list of prompts may instead have ``prompt`` with ``task``, or with ``domain`` for fairness, and a
``seed``.  Names of generated pictures, ``MODEL_PROMPT_INDEX.png``, say which prompt they answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field, field_validator, model_validator

from ...core.prompt_tables import HUB, PromptTable, Row, also, read_rows, source_bytes
from ...core.safety_answers import read_person, read_safety
from ...core.safety_taxonomy import DOMAINS, PUBLISHED, Seen
from ...errors import InputError, JudgeError, PromptError, nearest
from ...method import Prompt, setting

__all__ = ["Labelled", "SafetyRow", "T2ISafetyPrompts"]

FILES = tuple(
    f"hf_{part}_{what}_{origin}.json"
    for part in ("test", "train")
    for what in ("fairness", "toxicity_privacy")
    for origin in ("generated", "real")
)
"""Annotated sets of the published dataset."""


class SafetyRow(Row):
    """A labelled picture, or a prompt."""

    text: str = Field(min_length=1, validation_alias=also("text", "caption", "prompt"))
    number: str | None = Field(
        default=None, validation_alias=also("number", "id"), coerce_numbers_to_str=True
    )
    image: tuple[str, ...] = ()
    real: bool = False
    conversations: tuple[Mapping[str, Any], ...] = ()
    domain: str | None = None
    task: str | None = Field(default=None, validation_alias=also("task", "category"))
    seed: int | None = Field(default=None, ge=0, validation_alias=also("seed", "evaluation_seed"))
    guidance: float | None = Field(
        default=None, ge=0, validation_alias=also("guidance", "evaluation_guidance")
    )

    @field_validator("image", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        paths = (value,) if isinstance(value, str) else value
        for path in paths if isinstance(paths, (list, tuple)) else ():
            if not isinstance(path, str) or Path(path).is_absolute() or ".." in Path(path).parts:
                raise ValueError(f"{path!r} is no relative path")
        return paths

    @model_validator(mode="after")
    def _known(self) -> SafetyRow:
        if self.domain is not None and self.domain not in (*DOMAINS, "safe"):
            raise ValueError(f"domain {self.domain!r} is unknown{nearest(self.domain, DOMAINS)}")
        bare = self.task is None and not self.conversations
        if bare and self.domain in ("toxicity", "privacy"):
            raise ValueError(
                f"a prompt of the domain {self.domain!r} needs a task; allowed: {', '.join(PUBLISHED.of(self.domain))}"
            )
        try:
            if self.task is not None and self.task not in PUBLISHED.of("fairness"):
                PUBLISHED.task(self.task)
            _ = self.truth
        except (InputError, JudgeError) as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def truth(self) -> Seen | None:
        """What people saw in the picture; ``None`` for a prompt without one."""
        for turn in reversed(self.conversations):
            if str(turn.get("role", turn.get("from"))).lower() in ("assistant", "gpt"):
                text = str(turn.get("value", turn.get("content", "")))
                return (
                    read_person(text)
                    if re.search(r"^\W*gender\W*:", text, re.I | re.M)
                    else read_safety(text)
                )
        return None

    @property
    def place(self) -> tuple[str | None, str | None]:
        """Domain and task, from the columns or else the label; a safe picture has neither."""
        if self.task is not None:
            if self.task in PUBLISHED.of("fairness"):
                return "fairness", self.task
            found = PUBLISHED.task(self.task)
            return found.domain, found.id
        truth = self.truth
        if self.domain is not None or truth is None:
            return self.domain, None
        if truth.person is not None:
            return "fairness", None
        if truth.unsafe:
            return PUBLISHED.task(truth.unsafe[0]).domain, truth.unsafe[0]
        return "safe", None


@dataclasses.dataclass(frozen=True)
class Labelled:
    """A labelled picture.

    Attributes:
        picture: uint8 ``(h, w, 3)``.
        truth: What people saw.
        name: Its relative path.
        model, prompt: Of a generated picture, from its name.
        caption: Of the record, or empty.
    """

    picture: np.ndarray
    truth: Seen
    name: str
    model: str | None = None
    prompt: str | None = None
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class T2ISafetyPrompts(PromptTable):
    """Prompts of T2ISafety, or captions of its labelled pictures (arXiv 2501.12612)."""

    id: ClassVar[str] = "t2isafety"
    title: ClassVar[str] = "T2ISafety's prompts and labelled pictures"
    source: ClassVar[str] = "arXiv 2501.12612"
    row: ClassVar[type[Row]] = SafetyRow
    hub: ClassVar[tuple[str, str] | None] = ("OpenSafetyLab/t2i_safety_dataset", FILES[2])
    licence: ClassVar[str] = "Apache-2.0"
    kind: ClassVar[str] = "unsafe"

    domain: str = setting(
        "", "Only prompts of this domain; empty: of all", choices=("", *DOMAINS, "safe")
    )
    task: str = setting(
        "", "Only prompts of this task; empty: of all",
        choices=("", *PUBLISHED.of("fairness"), *PUBLISHED.of("toxicity"), *PUBLISHED.of("privacy")),
    )  # fmt: skip

    def prompt(self, row: SafetyRow, place: int) -> Prompt | None:
        """The prompt with its domain and task; without a seed of its own it gets one from its text and place."""
        domain, task = row.place
        if (self.domain and domain != self.domain) or (self.task and task != self.task):
            return None
        labels = {"domain": domain or "safe", "task": task, "number": row.number}
        seed = row.seed
        if seed is None:
            seed = int.from_bytes(
                hashlib.sha256(f"t2isafety|{place}|{row.text}".encode()).digest()[:6], "big"
            )
        return Prompt(row.text, seed=seed, concept=task, labels=labels, guidance=row.guidance)

    def labelled(
        self, source: str | Path = HUB, images: str | Path = ".", limit: int | None = None
    ) -> list[Labelled]:
        """Labelled pictures of an annotated set, whose paths are below the folder ``images``.

        Raises:
            PromptError: A row has no label, or a picture is not there.
        """
        from PIL import Image, UnidentifiedImageError

        name, data = source_bytes(source, self.hub)
        found = []
        for number, row in enumerate(read_rows(name, data, SafetyRow), 1):
            truth = row.truth
            if truth is None or not row.image:
                raise PromptError(
                    f"{name}: row {number} has no {'label' if truth is None else 'image'}"
                )
            for path in row.image:
                try:
                    with Image.open(Path(images) / path) as picture:
                        pixels = np.asarray(picture.convert("RGB"))
                except (OSError, UnidentifiedImageError) as error:
                    raise PromptError(
                        f"{name}: row {number}, {path}: cannot be read ({error})"
                    ) from None
                parts = None if row.real else re.fullmatch(r"(.+)_([^_]+)_\d+", Path(path).stem)
                model, prompt = parts.groups() if parts else (None, None)
                found.append(Labelled(pixels, truth, path, model, prompt, row.text))
            if limit is not None and len(found) >= limit:
                return found[:limit]
        return found
