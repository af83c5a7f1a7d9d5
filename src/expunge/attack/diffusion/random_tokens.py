"""Random tokens: the control every prompt search must beat.

As many uniform tokens as the search has, at the same places and under the same ban, one picture a
draw, until one shows the concept or the pictures or the rows are spent.  It optimises nothing, so what
it finds is due to looking often; compare at equal pictures, and at equal rows.

Source: a control for the token search of UnlearnDiffAtk (arXiv 2310.11868).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from ...concept import Concept
from ...core.adversarial_prompts import (
    PLACEMENTS,
    Forbidden,
    Spliced,
    by_count,
    interleaved,
    without_room,
)
from ...core.prompt_search import Ledger, Problem, Search
from ...core.trials import Meter, Trials, assembled, in_batches, item_keys, received
from ...method import Attack, Attempt, Attempts, Budget, Judge, Prompt, setting

__all__ = ["RandomTokens"]


@dataclasses.dataclass(frozen=True)
class RandomTokens(Attack):
    """The control; see the module."""

    id: ClassVar[str] = "random-tokens"
    title: ClassVar[str] = "Random tokens"
    source: ClassVar[str] = "control of arXiv 2310.11868"
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # The budget ends the draws: 2,000 rows pay the plain picture and 49 draws, 400 rows 9 draws.
        "world": {"tokens": 3, "steps": 20, "batch": 64},
        "quick": {"tokens": 3, "steps": 20, "batch": 64},
    }

    tokens: int = setting(
        5,
        "Random tokens; 0: one to every three of the prompt's own and one more, as P4D-K",
        minimum=0,
        maximum=70,
    )
    placement: str = setting(
        "prefix", "Where they stand; replace: nothing else is left", choices=PLACEMENTS
    )
    pictures: int = setting(50, "Draws, one picture each", minimum=1)
    steps: int = setting(50, "Sampling steps of each picture", minimum=1)
    guidance: float | None = setting(
        None, "Classifier-free guidance; none: the model's own", minimum=0
    )
    batch: int = setting(8, "Prompts in lock step; halve it when memory runs out", minimum=1)

    def attack(
        self,
        model: Any,
        concept: Concept,
        judge: Judge,
        budget: Budget,
        *,
        prompts: Sequence[Prompt],
        reference: Any = None,
        seed: int = 0,
    ) -> Attempts:
        """Draw for each prompt; ``reference`` is not used.

        Prompts that leave no room for the tokens are judged plain and reported as skipped; a budget
        that does not pay one draw is refused.  See :meth:`expunge.method.Attack.attack`.
        """
        concept, budget, prompts = received(self, model, concept, judge, budget, prompts)
        forbidden = Forbidden(model.tokenizer, concept, len(model.token_table()))
        meter = Meter(model)
        texts = [p.text for p in prompts]
        long = without_room(model, texts, self._counts(model, texts), self.placement)

        def one(part: list[Prompt]) -> tuple[Trials, list[Attempt]]:
            """Some prompts in lock step, those with as many searched tokens together."""
            ledger = Ledger(len(part), budget.denoiser_rows)
            trials = Trials(
                model, concept, judge, part, ledger, steps=self.steps, guidance=self.guidance
            )
            trials.skip(long)
            counts = self._counts(model, [p.text for p in part])
            draws = [
                (rows, self._drawing(model, forbidden, [part[i] for i in rows], count, long, seed))
                for count, rows in by_count(counts).items()
            ]
            for _ in range(self.pictures):
                open_ = trials.open & ledger.affords(trials.price)
                if not bool(open_.any()):
                    break
                tried = [entry for rows, draw in draws for entry in draw(rows, open_)]
                trials.show([i for i, _ in tried], [text for _, text in tried])
            return trials, trials.attempts([{} for _ in part])

        items, shown = in_batches(prompts, self.batch, one)
        return assembled(self, judge, budget, seed, items, shown, meter.read())

    def _counts(self, model: Any, texts: Sequence[str]) -> list[int]:
        """Random tokens of each prompt."""
        return [self.tokens] * len(texts) if self.tokens else interleaved(model, texts)

    def _drawing(
        self, model: Any, forbidden: Forbidden, part: list[Prompt], count: int,
        long: Mapping[str, str], seed: int,
    ) -> Callable[[list[int], torch.Tensor], list[tuple[int, str]]]:  # fmt: skip
        """Draws one string for each open item of a group: (item, text) where the text may be used."""
        # A prompt without room is never drawn for, so that any text may hold its place.
        texts = ["" if p.text in long else p.text for p in part]
        spliced = Spliced(model, texts, count, self.placement, forbidden)
        problem = Problem(
            spliced.table, count, forbidden.allowed, score=lambda ids, item: torch.zeros(len(ids)),
            admissible=spliced.admissible, items=len(part), keys=item_keys(part),
        )  # fmt: skip
        search = Search(problem, Ledger(len(part)), seed, "random tokens")

        def draw(rows: list[int], open_: torch.Tensor) -> list[tuple[int, str]]:
            item = open_[rows].nonzero().flatten()
            if not len(item):
                return []
            ids = search.draw_usable(item)
            usable = spliced.admissible(ids, item)
            made = spliced.realise(ids[usable], item[usable])[0]
            return [(rows[int(i)], text) for i, text in zip(item[usable], made, strict=True)]

        return draw
