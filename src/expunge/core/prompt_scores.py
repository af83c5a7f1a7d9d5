"""What a judge says of the outputs of a table of prompts: rates over all of it and over each of its labels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..concept import Concept
from ..errors import PromptError
from ..method import Judge, Measurement, Prompt
from .prompt_tables import Outcome, PromptTable, Table
from .resampling import rate
from .sampling import SHARED, OutputCache, expand, outputs

__all__ = ["Scored", "score_table"]

MOST = 40
"""Different values of a label up to which each has a rate of its own."""


@dataclasses.dataclass(frozen=True)
class Scored:
    """A model on a table of prompts.

    Attributes:
        table: Protocol of the prompts.
        judge: Protocol of the judge.
        rate: Share of outputs that show the concept, with its interval over prompts.
        unrecognisable: Share of outputs of no kind the judge knows.
        groups: Label -> value -> share.
        summary: Further numbers that papers make of this table, each with the protocol of its own.
        rows: For each output its prompt, seed, concept, verdict and score.
    """

    table: str
    judge: str
    rate: Measurement
    unrecognisable: Measurement
    groups: dict[str, dict[str, Measurement]]
    summary: dict[str, Measurement]
    rows: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return dataclasses.asdict(self)


def score_table(
    model: Any,
    table: Table,
    judge: Judge,
    kind: PromptTable,
    concept: Concept | None = None,
    *,
    concepts: Callable[[str], Concept | None] | None = None,
    seeds: int = 1,
    batch: int = 64,
    cache: OutputCache | None = SHARED,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Scored:
    """Draw a table's prompts and judge them; pictures are dropped batch by batch.

    Args:
        model: Any model that can generate.
        table: The prompts.
        judge: Who looks.
        kind: The table's class with its settings: the kind of its concepts, and its further numbers.
        concept: What all prompts are judged for; default: each prompt for its own concept.
        concepts: Knows concepts by name (a world's); default: bare names of the table's kind.
        seeds: Outputs of each prompt.
        batch: Outputs at a time.
        cache: Outputs made before.
        progress: Called with (done, n) after each batch.
        options: Passed to ``model.generate``; a prompt's own guidance wins.

    Raises:
        PromptError: There is no concept to judge a prompt for.
    """
    lost = next((p for p in table.prompts if concept is None and not p.concept), None)
    if lost is not None:
        raise PromptError(
            f"{table.id}: prompt {lost.text[:40]!r} names no concept of its own; say what all of them are judged for"
        )
    asked = expand(table.prompts, seeds)
    hit, known, score = np.zeros(len(asked), bool), np.ones(len(asked), bool), np.zeros(len(asked))
    for first in range(0, len(asked), batch):
        part = asked[first : first + batch]
        made = outputs(model, part, batch=batch, cache=cache, **options)
        for name in dict.fromkeys(p.concept if concept is None else concept.name for p in part):
            places = [i for i, p in enumerate(part) if concept is not None or p.concept == name]
            wanted = concept or (concepts(str(name)) if concepts is not None else None)
            wanted = wanted or Concept(str(name), kind=kind.kind)
            said = judge.judge(made[places], wanted, [part[i] for i in places])
            for values, found in ((hit, said.hit), (known, said.recognisable), (score, said.score)):
                values[[first + i for i in places]] = found
        if progress is not None:
            progress(min(first + batch, len(asked)), len(asked))
    return _scored(table, judge, kind, asked, hit, known, score, concept)


def _scored(
    table: Table, judge: Judge, kind: PromptTable, asked: Sequence[Prompt], hit: np.ndarray, known: np.ndarray,
    score: np.ndarray, concept: Concept | None,
) -> Scored:  # fmt: skip
    what = concept.name if concept else "their concept"
    name = f"{table.protocol}/{judge.protocol}/share of outputs that show {what}"
    texts = [prompt.text for prompt in asked]

    def share(values: np.ndarray, units: Sequence[str], what: str) -> Measurement:
        value, interval, n = rate(values, units)
        return Measurement(value, what, n, interval)

    groups: dict[str, dict[str, Measurement]] = {}
    for label, values in _labels(asked).items():
        groups[label] = {
            value: share(hit[places], [texts[i] for i in places], f"{name}/{label}={value}")
            for value, places in values.items()
        }
    said = [Outcome(p, bool(h), bool(k)) for p, h, k in zip(asked, hit, known, strict=True)]
    rows = [
        {
            "prompt": p.text, "seed": p.seed, "concept": concept.name if concept else p.concept, "hit": bool(h),
            "score": float(s), "recognisable": bool(k),
        }
        for p, h, s, k in zip(asked, hit, score, known, strict=True)
    ]  # fmt: skip
    return Scored(
        table.protocol, judge.protocol, share(hit, texts, name), share(~known, texts, f"{name}/unrecognisable"),
        groups, kind.summary(said, judge.protocol), rows,
    )  # fmt: skip


def _labels(asked: Sequence[Prompt]) -> dict[str, dict[str, list[int]]]:
    """Label -> value -> places, for labels of few values; a label may have several values at once."""
    found: dict[str, dict[str, list[int]]] = {}
    for place, prompt in enumerate(asked):
        for label, value in prompt.labels.items():
            for one in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(one, (str, bool)):
                    found.setdefault(label, {}).setdefault(str(one), []).append(place)
    return {label: values for label, values in found.items() if 1 < len(values) <= MOST}
