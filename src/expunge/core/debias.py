"""UCE's debiasing: pictures of a concept show each of several attributes in wished shares.

What ``technique="debias"`` of the eraser UCE does.  A text that says nothing of an attribute ("a nurse")
leaves it to the model, which has learned some shares of it (women, men).  Rounds of measuring and solving
lead to others; no name is erased, and texts that say an attribute themselves are not to change.

Source: arXiv 2308.14761 (WACV 2024).  For a concept's rows ``c`` and attributes with rows ``attr_k``, from
``s = 0`` on, in every round:

    r_k   share of the concept's pictures that show attribute k, the likeliest one a picture
    s_k   += wanted_k - r_k     (a concept with all differences below the tolerance rests this round)
    v*    = W_old (c + sum_k s_k attr_k)

and every matrix is solved again from ``W_old``, with ``v*`` as the wished values of ``c``.  As ``v*`` is
``W_old g`` with ``g = c + sum_k s_k attr_k``, this is the solve of :mod:`closed_form` with the shift

    S = a sum_k s_k sum attr_k c^T                                                   (d, d)

so no row is encoded twice: a round costs its pictures and one solve.  It ends when no concept moves, or
after ``rounds``.

Ours: ``attr_k`` stands where the concept stood, in templates and prompts of a world too; a row without a
counterpart among the attribute's (by the token policy) gets nothing of it; a world's prompts that say an
attribute keep their values; pictures the judge cannot recognise are not counted.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from ..concept import Concept
from ..edit import Edit
from ..errors import NumericalError, SettingError
from ..method import Judge, Prompt
from .closed_form import Moments, Solution
from .mentions import exchanged
from .projections import Projections, edited_texts, kept_texts, shared_edit
from .sampling import SEED_STEP, prompts_digest, validation_prompts
from .token_policy import Pair, accumulate

__all__ = ["Debias"]

POOL = 64
"""Development prompts of a world that are asked for, before those that say an attribute are left out."""


@dataclasses.dataclass(frozen=True)
class _Group:
    """What one group of projections needs of the texts.

    Attributes:
        projections: The group.
        moments: Concepts' rows and kept rows.
        crosses: ``sum a attr_k c^T``, by concept and attribute.
    """

    projections: Projections
    moments: Moments
    crosses: list[list[torch.Tensor]]

    def solve(self, steps: np.ndarray, ridge: float) -> Solution:
        """The edit for the sums ``s`` ``(concepts, attributes)``."""
        shift = torch.zeros(self.moments.width, self.moments.width, dtype=torch.float64)
        for row, crosses in zip(steps, self.crosses, strict=True):
            for step, cross in zip(row, crosses, strict=True):
                shift += float(step) * cross
        return self.moments.solve(ridge, shift)


class Debias:
    """One run of the loop.

    Args:
        method: UCE with its settings.
        model: The model; left as it was.
        concepts: Whose pictures are biased.
        judge: Scores every picture for every attribute; the highest score counts.
        keep: Concepts or prompts to preserve.
        data: Prompts of the concepts that leave the attribute open; default: a world's development
            prompts, else the concept's name.
        seed: Of the pictures' noise.

    Raises:
        SettingError: No judge, fewer than two attributes, or ratios that do not fit them.
    """

    def __init__(
        self,
        method: Any,
        model: Any,
        concepts: Sequence[Concept],
        judge: Judge | None,
        *,
        keep: Sequence[Any],
        data: Any,
        seed: int,
    ) -> None:
        if judge is None:
            raise SettingError(
                f"{method.id}: technique='debias' needs a judge that tells the attributes apart; pass judge="
            )
        self.method, self.model, self.concepts, self.judge = method, model, concepts, judge
        self.keep, self.seed = keep, seed
        self.wanted = _wanted(method)
        found = model.companions.concept if model.companions is not None else lambda name: None
        self.attributes = [found(name) or Concept(name) for name in method.attributes]
        self.words = [word for attribute in self.attributes for word in attribute.names]
        self.began, self.before = time.perf_counter(), model.cost.snapshot()
        self.prompts = [self._prompts(concept, data) for concept in concepts]
        self.pairs = [self._pairs(concept) for concept in concepts]
        _, general = edited_texts(method, model, concepts, keep)
        self.kept, self.weight = method.preserved(general)
        self.groups = [self._group(group) for group in Projections.groups(model)]

    def run(self) -> Edit:
        """Measure and solve until all shares are met, or ``rounds`` solves are made."""
        method, s = self.method, np.zeros((len(self.concepts), len(self.wanted)))
        history: list[dict[str, Any]] = []
        shares = self._measured(0)
        while True:
            steps = self.wanted - shares
            steps[(np.abs(steps) < method.tolerance).all(axis=1)] = 0.0
            met = not steps.any()
            last = met or len(history) == method.rounds
            history.append(
                {
                    concept.name: {"shares": shares[i].tolist(), "s": s[i].tolist()}
                    for i, concept in enumerate(self.concepts)
                }
            )
            if last:
                return self._edit(s, history, met)
            s = s + steps
            with self._edit(s, history, met).on(self.model, rebase=True):
                shares = self._measured(len(history))

    def _says(self, text: str) -> bool:
        """Whether a text says an attribute itself."""
        return exchanged(text, self.words, "")[1] is not None

    def _prompts(self, concept: Concept, data: Any) -> list[Prompt]:
        """Prompts whose pictures are measured."""
        listed = validation_prompts(self.model, concept, data, POOL, self.seed)
        listed = [prompt for prompt in listed if not self._says(prompt.text)]
        return listed or [Prompt(concept.name, seed=self.seed, concept=concept.name)]

    def _pairs(self, concept: Concept) -> list[list[Pair]]:
        """For every attribute the concept's texts with the attribute in its place."""
        if {word.lower() for word in self.words} & {name.lower() for name in concept.names}:
            raise self._nothing_open(concept)
        found = []
        for attribute in self.attributes:
            named = dataclasses.replace(self.method, guide=attribute.name, general_prompts=0)
            found.append(edited_texts(named, self.model, [concept], ())[0])
        if all(self._says(pair.erased) for pair in found[0]):
            raise self._nothing_open(concept)
        return found

    def _nothing_open(self, concept: Concept) -> SettingError:
        return SettingError(
            f"{self.method.id}: every text of {concept.name!r} says one of the attributes "
            f"{', '.join(self.method.attributes)} itself, so there is no share to change"
        )

    def _group(self, projections: Projections) -> _Group:
        text, method = projections.text, self.method
        own = [pair._replace(replacing=pair.erased) for pairs in self.pairs for pair in pairs[0]]
        moments = accumulate(
            text, own, self.kept, method.tokens, erase=method.erase_scale, keep=self.weight
        )
        crosses = [
            [
                accumulate(
                    text, [pair for pair in part if not self._says(pair.erased)], (), method.tokens,
                    erase=method.erase_scale, keep=0.0,
                ).cross
                for part in pairs
            ]
            for pairs in self.pairs
        ]  # fmt: skip
        return _Group(projections, moments, crosses)

    def _measured(self, number: int) -> np.ndarray:
        """Shares ``(concepts, attributes)`` over new pictures of each round."""
        return np.stack([self._shares(i, number) for i in range(len(self.concepts))])

    def _shares(self, index: int, number: int) -> np.ndarray:
        """Share of one concept's recognisable pictures that shows each attribute."""
        count, own = self.method.pictures, self.prompts[index]
        places = [divmod(number * count + i, len(own)) for i in range(count)]
        prompts = [
            dataclasses.replace(own[i], seed=(own[i].seed + turn * SEED_STEP) % 2**62)
            for turn, i in places
        ]
        pictures = self.model.generate(prompts, steps=self.method.sampling_steps)
        verdicts = [self.judge.judge(pictures, attr, prompts) for attr in self.attributes]
        seen = np.logical_and.reduce([verdict.recognisable for verdict in verdicts])
        if not seen.any():
            raise NumericalError(
                f"{self.method.id}: in round {number} no picture of {self.concepts[index].name!r} is recognisable "
                "any more; raise ridge or preserve_scale"
            )
        shown = np.stack([verdict.score for verdict in verdicts])[:, seen].argmax(axis=0)
        return np.bincount(shown, minlength=len(self.wanted)) / len(shown)

    def _edit(self, s: np.ndarray, history: list[dict[str, Any]], met: bool) -> Edit:
        method, model = self.method, self.model
        report = {
            "token_policy": method.tokens,
            "preserve_scale": self.weight,
            "pairs": sum(len(pairs[0]) for pairs in self.pairs),
            "kept": len(self.kept),
            "erase_rows": sum(group.moments.erase_rows for group in self.groups),
            "keep_rows": sum(group.moments.keep_rows for group in self.groups),
            "attributes": list(method.attributes),
            "wanted": self.wanted.tolist(),
            "rounds": history,
            "met": met,
        }
        return shared_edit(
            method, model, self.concepts, [(g.projections, g.solve(s, method.ridge)) for g in self.groups],
            keep=kept_texts(self.keep), seed=self.seed, report=report,
            data_digest=prompts_digest([prompt for own in self.prompts for prompt in own]),
            cost=model.cost.since(self.before), seconds=time.perf_counter() - self.began,
        )  # fmt: skip


def _wanted(method: Any) -> np.ndarray:
    """Wished shares of the attributes."""
    names, ratios = method.attributes, method.ratios
    if len(names) < 2 or len({name.lower() for name in names}) < len(names):
        raise SettingError(
            f"{method.id}: attributes is {names!r}; technique='debias' needs at least two different ones"
        )
    if not ratios:
        return np.full(len(names), 1.0 / len(names))
    if len(ratios) != len(names) or abs(sum(ratios) - 1.0) > 1e-6:
        raise SettingError(
            f"{method.id}: ratios is {ratios!r}; allowed is one share for each of the {len(names)} attributes, "
            "together 1"
        )
    return np.array(ratios, dtype=float)
