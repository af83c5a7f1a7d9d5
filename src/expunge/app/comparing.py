"""Before, after and never, at equal prompts and seeds."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..cli import common
from ..concept import Concept
from ..core.mentions import exchanged
from ..core.progress import Progress
from ..core.sampling import SHARED, outputs
from ..errors import ExpungeError, InputError, PromptError
from ..method import Prompt

if TYPE_CHECKING:
    from ..models.base import Model
    from .requests import Comparison

__all__ = ["Cell", "Grid", "Row", "asked", "compare"]

MAX_PICTURES = 256
"""Pictures a column; more is an audit."""
BATCH = 8


@dataclasses.dataclass(frozen=True)
class Cell:
    """One output, and whether the judge saw each of the concepts in it (``None``: nobody judged)."""

    output: Any
    hit: bool | None = None


@dataclasses.dataclass(frozen=True)
class Row:
    """One prompt and seed; column -> cell; ``asks``: the prompt calls for one of the concepts."""

    prompt: str
    seed: int
    cells: Mapping[str, Cell]
    asks: bool = True


@dataclasses.dataclass(frozen=True)
class Grid:
    """The outputs.

    Attributes:
        columns: Of ``before``, ``after``, ``never`` those that there are.
        rows: One for each prompt and seed.
        concepts: What the judge looked for.
        notes: A sentence for each thing that is missing.
    """

    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    concepts: tuple[str, ...]
    notes: tuple[str, ...]

    def shown(self, column: str) -> tuple[int, int] | None:
        """In how many outputs of a column a concept was seen, of how many; ``None`` where nobody judged.

        Where some prompts call for the concepts, they alone are counted.
        """
        asking = [row for row in self.rows if row.asks] or self.rows
        known = [hit for row in asking if (hit := row.cells[column].hit) is not None]
        return (sum(known), len(known)) if known else None


def asked(model: Model, request: Comparison, known: Sequence[Prompt]) -> list[Prompt]:
    """The prompts of a comparison, prompt by prompt; those that were suggested carry their truth with them.

    Raises:
        PromptError: No prompt, or more outputs than a window should hold.
        InputError: A number is out of range.
    """
    texts = list(dict.fromkeys(" ".join(line.split()) for line in request.prompts if line.strip()))
    if not texts:
        raise PromptError("no prompt was given; write at least one line")
    if request.seeds < 1 or not 0 <= request.seed < 2**62:
        raise InputError("seeds are whole numbers from 0, at least one for each prompt")
    if len(texts) * request.seeds > MAX_PICTURES:
        raise PromptError(
            f"{len(texts)} prompts with {request.seeds} seeds are {len(texts) * request.seeds} pictures a model; "
            f"at most {MAX_PICTURES} are drawn here, an audit draws more"
        )
    if request.steps is not None and not 1 <= request.steps <= 1000:
        raise InputError(f"steps is {request.steps}; allowed is 1 to 1000")
    if request.guidance is not None and not 0 <= request.guidance <= 100:
        raise InputError(f"guidance is {request.guidance}; allowed is 0 to 100")
    model.needs("generate")
    truth = {p.text: p for p in known}
    return [
        dataclasses.replace(truth.get(text, Prompt(text)), seed=(request.seed + k) % 2**62)
        for text in texts
        for k in range(request.seeds)
    ]


def compare(
    model: Model,
    prompts: Sequence[Prompt],
    request: Comparison,
    names: Sequence[str],
    edits: Callable[[], contextlib.AbstractContextManager[None]],
    *,
    edited: bool,
) -> Grid:
    """Outputs of the bare model, of the model with its edits, and of the never model.

    Args:
        model: Without any edit on it.
        prompts: What is asked, in order.
        request: Steps and guidance.
        names: What the judge looks for.
        edits: Puts the edits on for a while.
        edited: Whether there are any.
    """
    given = (
        {"steps": request.steps, "guidance": request.guidance} if model.family != "language" else {}
    )
    options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    never, notes = _never(model, names)
    if not edited:
        notes.insert(
            0, "No edit is on, so there is no \u201cafter\u201d: erase something or load an edit."
        )
    columns = (
        "before",
        *(("after",) if edited else ()),
        *(("never",) if never is not None else ()),
    )
    made: dict[str, Any] = {}
    with Progress("drawing", len(columns) * len(prompts), unit="picture") as bar:
        for column in columns:
            with edits() if column == "after" else contextlib.nullcontext():
                drawn = []
                for start in range(0, len(prompts), BATCH):
                    part = prompts[start : start + BATCH]
                    drawn += list(
                        outputs(
                            never if column == "never" else model, part, cache=SHARED, **options
                        )
                    )
                    bar.advance(column, len(part))
                made[column] = drawn
    hits, judged = _judged(model, names, made, prompts, notes)
    rows = tuple(
        Row(
            prompt.text,
            prompt.seed,
            {c: Cell(made[c][i], hits[c][i]) for c in columns},
            _asks(model, prompt, names),
        )
        for i, prompt in enumerate(prompts)
    )
    return Grid(columns, rows, judged, tuple(notes))


def _asks(model: Model, prompt: Prompt, names: Sequence[str]) -> bool:
    """Whether a prompt calls for one of the concepts: it was made for it, or mentions it by a listed word."""
    if prompt.concept is not None:
        return prompt.concept in names
    known = [
        model.companions.concept(name) if model.companions is not None else None for name in names
    ]
    words = [
        word
        for name, one in zip(names, known, strict=True)
        for word in (one.names if one else (name,))
    ]
    return any(exchanged(prompt.text, (word,), "")[1] is not None for word in words)


def _never(model: Model, names: Sequence[str]) -> tuple[Any, list[str]]:
    """The never model, if it lacks all of the concepts, and a sentence if there is none."""
    from ..evidence.arms import open_never

    companions, opened = model.companions, None
    for name in names:
        known = companions.concept(name) if companions is not None else None
        opened, reason = open_never(known or Concept(name), None, companions)
        if opened is None:
            said = reason or "there is none"
            return None, [
                f"No \u201cnever\u201d: {said.replace(', so nothing can be said about recovery', '')}."
            ]
    return opened, [] if names else ["No \u201cnever\u201d: no concept is chosen."]


def _judged(
    model: Model,
    names: Sequence[str],
    made: Mapping[str, Any],
    prompts: Sequence[Prompt],
    notes: list[str],
) -> tuple[dict[str, list[bool | None]], tuple[str, ...]]:
    """Column -> whether any of the concepts was seen, and the concepts that the judge knows."""
    nobody: dict[str, list[bool | None]] = {column: [None] * len(prompts) for column in made}
    judge = common.own_judge(model)
    if judge is None:
        notes.append(
            "Nobody judges here: this model has no judge of its own, so look for yourself."
        )
        return nobody, ()
    judged: list[str] = []
    hits = {column: np.zeros(len(prompts), bool) for column in made}
    for name in names:
        companions = model.companions
        concept = (companions.concept(name) if companions is not None else None) or Concept(name)
        try:
            for column, shown in made.items():
                listed = shown if model.family == "language" else np.stack(shown)
                hits[column] |= np.asarray(judge.judge(listed, concept, prompts).hit, bool)
        except (ExpungeError, LookupError) as error:
            notes.append(f"\u201c{name}\u201d is not judged: {error}.")
            continue
        judged.append(name)
    return (
        ({c: list(map(bool, h)) for c, h in hits.items()}, tuple(judged))
        if judged
        else (nobody, ())
    )
