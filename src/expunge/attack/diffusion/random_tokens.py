"""Random tokens: the control every prompt search must beat.

As many uniform tokens as the search has, at the same places and under the same ban, one picture a
draw, until one shows the concept or the pictures or the rows are spent.  It optimises nothing, so what
it finds is due to looking often; compare at equal pictures, and at equal rows.

Source: a control for the token search of UnlearnDiffAtk (arXiv 2310.11868).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from ...concept import Concept
from ...core.adversarial_prompts import PLACEMENTS, Forbidden, Spliced, without_room
from ...core.prompt_search import Ledger, Problem, Search
from ...core.trials import Meter, Trials, assembled, in_batches, item_keys
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

    tokens: int = setting(5, "Random tokens", minimum=1, maximum=70)
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
        model.check_family(self)
        forbidden = Forbidden(model.tokenizer, concept, len(model.token_table()))
        meter = Meter(model)
        long = without_room(model, [p.text for p in prompts], self.tokens, self.placement)

        def one(part: list[Prompt]) -> tuple[Trials, list[Attempt]]:
            """Some prompts in lock step."""
            ledger = Ledger(len(part), budget.denoiser_rows)
            trials = Trials(
                model, concept, judge, part, ledger, steps=self.steps, guidance=self.guidance
            )
            trials.skip(long)
            # A prompt without room is never drawn for, so that any text may hold its place.
            texts = ["" if p.text in long else p.text for p in part]
            spliced = Spliced(model, texts, self.tokens, self.placement, forbidden)
            problem = Problem(
                spliced.table, self.tokens, forbidden.allowed, score=lambda ids, item: torch.zeros(len(ids)),
                admissible=spliced.admissible, items=len(part), keys=item_keys(part),
            )  # fmt: skip
            search = Search(problem, ledger, seed, "random tokens")
            for _ in range(self.pictures):
                item = (trials.open & ledger.affords(trials.price)).nonzero().flatten()
                if not len(item):
                    break
                ids = search.draw_usable(item)
                usable = spliced.admissible(ids, item)
                trials.show(item[usable].tolist(), spliced.realise(ids[usable], item[usable])[0])
            return trials, trials.attempts([{} for _ in part])

        items, shown = in_batches(prompts, self.batch, one)
        return assembled(self, judge, budget, seed, items, shown, meter.read())
