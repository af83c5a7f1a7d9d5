"""Trials of an attack: pictures shown to the judge, paid for, and counted before and after the attack.

Attacks that end in a picture of a text or of an embedding share this bookkeeping, so that a success
means the same for all of them.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..concept import Concept
from ..errors import ConceptError, PromptError, SettingError
from ..method import Attack, Attempt, Attempts, Budget, Judge, Prompt
from ..method import budget as named_budget
from ..models.types import Condition
from .guided_steps import GuidedSteps
from .prompt_search import Ledger
from .sampling import SEED_STEP, SHARED, as_prompts, outputs

__all__ = [
    "Meter", "Trials", "assembled", "in_batches", "item_keys", "picture_rows", "received", "shot",
]  # fmt: skip


def received(
    attack: Attack, model: Any, concept: Any, judge: Any, budget: str | Budget, prompts: Any
) -> tuple[Concept, Budget, list[Prompt]]:
    """What an attack was given, checked before any work.

    Args:
        attack: Named in errors.
        model: Of a family the attack is for.
        concept: Or its bare name: then the world's concept of that name, where there is one.
        judge: Must be there: no attack decides by itself what a picture shows.
        budget: Or its name.
        prompts: Or bare texts, which get their positions as seeds; the empty text is one, too.

    Raises:
        UnsupportedModel: The attack is for other families.
        ConceptError: The concept is neither a concept nor a name.
        SettingError: There is no judge, or no budget of that name.
        PromptError: There is no prompt, or one that is no text.
    """
    model.check_family(attack)
    if isinstance(concept, str):
        companions = model.companions
        known = companions.concept(concept) if companions is not None else None
        concept = known if known is not None else Concept(concept)
    if not isinstance(concept, Concept):
        raise ConceptError(
            f"{attack.id}: the concept is {concept!r}; a concept or a name is needed"
        )
    if isinstance(judge, type) or not callable(getattr(judge, "judge", None)):
        raise SettingError(
            f"{attack.id}: the judge is {judge!r}; a Judge is needed to say what an output shows, as "
            "expunge.measure.judges.open_judge opens one"
        )
    return concept, named_budget(budget), as_prompts(prompts, empty=True)


def shot(prompt: Prompt, number: int) -> Prompt:
    """The prompt with the seed of its ``number``-th picture; 0: its own."""
    if number == 0:
        return prompt
    return dataclasses.replace(prompt, seed=(prompt.seed + number * SEED_STEP) % 2**62)


def picture_rows(model: Any, prompts: Sequence[Prompt], steps: int, guidance: float) -> int:
    """Denoiser rows of one picture of the prompts: of two branches if any of them is guided by one.

    Branches that controls on the model ask for count as well, at every step.
    """
    one = not model.two_branches or all(prompt.guided(guidance) == 1.0 for prompt in prompts)
    rows = 1 if one else 2
    if not one and any("branches" in control.hooks() for control in model.acting):
        strongest = max(prompt.guided(guidance) for prompt in prompts)
        rows = GuidedSteps(model, guidance=strongest, steps=steps).branches()
    return len(model.timesteps(steps)) * rows


class Trials:
    """Pictures shown to the judge for each item, paid for, made once, counted before and after the attack.

    Args:
        pictures, rows: The least that tries anything: pictures of an item, the plain ones among them,
            and further denoiser rows.  A smaller budget is refused, because an attack that tried
            nothing would look like one that failed.
        shots: Plain pictures of each item, the first with the prompt's own seed; one that shows the
            concept is enough.

    Attributes:
        price: Denoiser rows of one picture; see :func:`picture_rows`.
        plain: bool ``(n, shots)``: what the plain pictures show.
        pre, hit: bool ``(n,)``: shown by a plain picture; shown before or after the attack.
        best: The picture of each item with the highest score so far, plain ones among them.
        top: Its score.
        skipped: Item -> why it is not attacked; see :meth:`skip`.
        text: What was fed in for the picture kept of each item: the first success, or else the
            adversarial picture with the highest score.
        tried: Adversarial pictures made for each item.
    """

    def __init__(
        self, model: Any, concept: Concept, judge: Judge, prompts: Sequence[Prompt], ledger: Ledger,
        *, steps: int, guidance: float | None, pictures: int = 2, rows: int = 0, shots: int = 1,
    ) -> None:  # fmt: skip
        self.model, self.concept, self.judge = model, concept, judge
        self.prompts, self.ledger = list(prompts), ledger
        self.options: dict[str, Any] = {
            "steps": steps,
            "guidance": model.guidance if guidance is None else guidance,
        }
        self.price = picture_rows(model, self.prompts, steps, self.options["guidance"])
        least = pictures * self.price + rows
        if ledger.limit is not None and ledger.limit < least:
            search = f" and {rows} rows of search" if rows else ""
            raise SettingError(
                f"the budget allows {ledger.limit} denoiser rows an item, but the least that can be tried, "
                f"{pictures} pictures of {steps} steps{search}, costs {least}; lower steps or choose a larger budget"
            )
        count = len(self.prompts)
        asked = [shot(prompt, k) for prompt in self.prompts for k in range(shots)]
        made = outputs(model, asked, cache=SHARED, **self.options)
        ledger.spend(range(count), self.price * shots)
        verdicts = judge.judge(made, concept, asked)
        self.plain = np.asarray(verdicts.hit, bool).reshape(count, shots).copy()
        scores = np.asarray(verdicts.score, float).reshape(count, shots)
        self.pre: np.ndarray = np.asarray(self.plain.any(1))
        self.hit = self.pre.copy()
        # The first success, else the first picture: what a reader would be shown.
        first = self.plain.argmax(1) + np.arange(count) * shots
        self.pictures = [made[i] for i in first]
        self.score = scores.reshape(-1)[first].copy()
        self.best = [made[i] for i in scores.argmax(1) + np.arange(count) * shots]
        self.top = scores.max(1)
        self.text: list[str | None] = [None] * count
        self.tried = [0] * count
        self.skipped: dict[int, str] = {}
        self._seen: list[dict[tuple[str, int], bool]] = [
            {(prompt.text, k): bool(hit) for k, hit in enumerate(hits)}
            for prompt, hits in zip(self.prompts, self.plain, strict=True)
        ]
        self._looked: list[dict[tuple[str, int], Any]] = [{} for _ in self.prompts]

    def price_on(self, model: Any) -> int:
        """What a picture of the same prompts costs on another model, as it is now; no controls may act there."""
        return picture_rows(model, self.prompts, self.options["steps"], self.options["guidance"])

    @property
    def open(self) -> Tensor:
        """bool ``(n,)``: still to be attacked: the concept was not shown yet, and nothing stands against it."""
        left = torch.from_numpy(~self.hit)
        left[list(self.skipped)] = False
        return left

    def skip(self, reasons: Mapping[str, str]) -> None:
        """Leave out prompts that cannot be attacked (text -> why), unless the plain picture was a success."""
        for i, prompt in enumerate(self.prompts):
            if prompt.text in reasons and not self.pre[i]:
                self.skipped[i] = reasons[prompt.text]

    def show(self, item: Sequence[int], texts: Sequence[str], shots: int = 1) -> Tensor:
        """Pictures of texts with the items' own seeds; bool ``(len(item),)``: one of ``shots`` shows the concept.

        A picture judged before is free, one that was :meth:`look`-ed at is judged and not made again.
        """
        pairs = [(i, text, k) for i, text in zip(item, texts, strict=True) for k in range(shots)]
        fresh = [(i, text, k) for i, text, k in pairs if (text, k) not in self._seen[i]]
        if fresh:
            self._take([i for i, *_ in fresh], self._drawn(fresh), [(t, k) for _, t, k in fresh])
        return torch.tensor(
            [any(self.shown(i, text)[:shots]) for i, text in zip(item, texts, strict=True)],
            dtype=torch.bool,
        )

    def shown(self, i: int, text: str) -> list[bool]:
        """What the judged pictures of an item's text show, by the number of the shot."""
        own = sorted((k, hit) for (t, k), hit in self._seen[i].items() if t == text)
        return [hit for _, hit in own]

    def look(
        self, item: Sequence[int], texts: Sequence[str], shots: Sequence[int] | None = None
    ) -> Any:
        """Pictures ``(len(item), h, w, 3)`` that nobody judges, paid for once; ``shots``: with which seeds."""
        numbers = [0] * len(texts) if shots is None else shots
        wanted = list(zip(item, texts, numbers, strict=True))
        found = self._drawn(wanted)
        for (i, text, k), picture in zip(wanted, found, strict=True):
            self._looked[i][text, k] = picture
        return np.stack(found)

    def _drawn(self, wanted: Sequence[tuple[int, str, int]]) -> list[Any]:
        """The pictures of (item, text, shot); those not looked at before are made and paid for."""
        new = [(i, t, k) for i, t, k in dict.fromkeys(wanted) if (t, k) not in self._looked[i]]
        made: dict[tuple[int, str, int], Any] = {}
        if new:
            asked = [dataclasses.replace(shot(self.prompts[i], k), text=t) for i, t, k in new]
            drawn = outputs(self.model, asked, **self.options)
            self.ledger.spend([i for i, *_ in new], self.price)
            made = dict(zip(new, drawn, strict=True))
        return [self._looked[i].get((t, k), made.get((i, t, k))) for i, t, k in wanted]

    def show_condition(self, item: Sequence[int], condition: Condition) -> None:
        """Pictures of embeddings, which have no text."""
        prompts = [dataclasses.replace(self.prompts[i], text="") for i in item]
        made = self.model.generate(prompts, condition=condition, **self.options)
        self.ledger.spend(item, self.price)
        self._take(list(item), made, [None] * len(prompts))

    def redraw(self, item: Sequence[int], seeds: Sequence[int]) -> Tensor:
        """Whether the plain prompts show the concept with other seeds, bool ``(len(item),)``: a control.

        The pictures are paid for, but count for no item.
        """
        if not len(item):
            return torch.zeros(0, dtype=torch.bool)
        prompts = [
            dataclasses.replace(self.prompts[i], seed=seed)
            for i, seed in zip(item, seeds, strict=True)
        ]
        made = outputs(self.model, prompts, cache=SHARED, **self.options)
        self.ledger.spend(item, self.price)
        verdicts = self.judge.judge(made, self.concept, prompts)
        return torch.as_tensor(np.asarray(verdicts.hit, bool))

    def _take(
        self, item: list[int], made: Sequence[Any], texts: Sequence[tuple[str, int] | None]
    ) -> None:
        asked = [self.prompts[i] for i in item]
        verdicts = self.judge.judge(np.stack(list(made)), self.concept, asked)
        for row, (i, entry) in enumerate(zip(item, texts, strict=True)):
            hit, score = bool(verdicts.hit[row]), float(verdicts.score[row])
            text = None
            if entry is not None:
                text = entry[0]
                self._seen[i][entry] = hit
            if score > self.top[i]:
                self.top[i], self.best[i] = score, made[row]
            self.tried[i] += 1
            better = (hit, score) > (bool(self.hit[i]), self.score[i]) or self.tried[i] == 1
            if better and not self.hit[i]:
                self.pictures[i], self.score[i], self.text[i] = made[row], score, text
            self.hit[i] |= hit

    def attempts(self, details: Sequence[Mapping[str, Any]]) -> list[Attempt]:
        """One record an item, with ``details`` of the search."""
        return [
            Attempt(
                prompt,
                bool(self.pre[i]),
                bool(self.hit[i]),
                float(self.score[i]),
                self.text[i],
                {
                    "pictures": self.tried[i],
                    "rows": int(self.ledger.spent[i]),
                    **({"skipped": self.skipped[i]} if i in self.skipped else {}),
                    **details[i],
                },
            )
            for i, prompt in enumerate(self.prompts)
        ]


class Meter:
    """Rows that an attack spends on one or two models, counted once where they are the same."""

    def __init__(self, *models: Any) -> None:
        self._models = list({id(model): model for model in models}.values())
        self._before = [model.cost.snapshot() for model in self._models]

    def read(self) -> dict[str, int]:
        """Rows by component since the meter was made."""
        total: Counter[str] = Counter()
        for model, before in zip(self._models, self._before, strict=True):
            total.update(model.cost.since(before))
        return dict(sorted(total.items()))


def item_keys(prompts: Sequence[Prompt]) -> list[str]:
    """Names of items for their private randomness: text and seed, so that batches do not matter."""
    return [f"{prompt.text}|{prompt.seed}" for prompt in prompts]


def in_batches(
    prompts: Sequence[Prompt],
    size: int,
    one: Callable[[list[Prompt]], tuple[Trials, list[Attempt]]],
) -> tuple[list[Attempt], Any]:
    """Attempts and pictures of all prompts, ``size`` of them in lock step at a time."""
    items: list[Attempt] = []
    pictures: list[Any] = []
    for first in range(0, len(prompts), size):
        trials, attempts = one(list(prompts[first : first + size]))
        items += attempts
        pictures += trials.pictures
    if not items:
        raise PromptError("an attack was given no prompt; at least one is needed")
    return items, np.stack(pictures)


def assembled(
    attack: Attack,
    judge: Judge,
    budget: Budget,
    seed: int,
    items: Sequence[Attempt],
    pictures: Any,
    cost: Mapping[str, int],
    summary: Mapping[str, Any] | None = None,
) -> Attempts:
    """The record of an attack, with everything that makes it comparable."""
    return Attempts(
        attack.id, attack.version, attack.settings(), attack.teaches, budget.name, judge.id, judge.threshold,
        seed, tuple(items), pictures, dict(cost), dict(summary or {}),
    )  # fmt: skip
