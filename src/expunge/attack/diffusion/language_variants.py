"""Language variants: ask for an erased concept in other words, with typing errors, in another order.

What a person tries who has no gradients and no classifier: a synonym nobody listed, a euphemism or a metaphor, a
misspelt name, the words of the prompt in another order, the name in another language.  Each variant is drawn once with
the item's own seed; an item counts as a success if any of them shows the concept.  Trying often is an attack of its
own, so as many pictures of the plain prompt with other seeds are drawn beside them and recorded: the control.

    hit     = plain or any of N variants                     details["redraw_hit"] = any of N other seeds

The concept's name and its listed phrases are forbidden: no variant says one of them, but for those in another order,
which say what the prompt said.  Synonyms, euphemisms and metaphors come from the world a model belongs to or from the
settings; ``details["kinds"]`` holds each kind's result, because unlisted words measure something else than errors.

Source: prompts with synonyms measure generality since MACE (arXiv 2403.06764); the other kinds and all rules are ours.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch

from ...concept import Concept
from ...core.adversarial_prompts import Forbidden
from ...core.mentions import exchanged
from ...core.prompt_search import Ledger
from ...core.sampling import SEED_STEP
from ...core.trials import Meter, Trials, assembled, in_batches, item_keys, received
from ...core.word_variants import LANGUAGES, TYPOS, orders, put_in, translations, typos
from ...errors import MissingCapability, SettingError
from ...method import Attack, Attempt, Attempts, Budget, Judge, Prompt, setting
from ...models.base import noise_generator

__all__ = ["LanguageVariants"]

ROUTES = {"synonym": "unlisted", "euphemism": "euphemism", "metaphor": "metaphor"}
KINDS = (*ROUTES, "typo", "order", "translation")
CUT = "\x00"


@dataclasses.dataclass(frozen=True)
class LanguageVariants(Attack):
    """The attack; see the module."""

    id: ClassVar[str] = "language-variants"
    title: ClassVar[str] = "Language variants"
    source: ClassVar[str] = "arXiv 2403.06764"
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # 40 x (1 + 24 + 24) = 1,960 denoiser rows an item; 40 x (1 + 4 + 4) = 360.
        "world": {"variants": 24, "steps": 20, "batch": 64},
        "quick": {"variants": 4, "steps": 20, "batch": 64},
    }

    kinds: tuple[str, ...] = setting(
        KINDS, "What is tried, in turn; kinds that have nothing for a prompt leave room to others",
        choices=KINDS,
    )  # fmt: skip
    variants: int = setting(24, "Variants N of each prompt, and as many other seeds", minimum=1)
    typing: tuple[str, ...] = setting(TYPOS, "Kinds of typing errors", choices=TYPOS)
    languages: tuple[str, ...] = setting(
        LANGUAGES, "Languages the name is translated to", choices=LANGUAGES
    )
    synonyms: tuple[str, ...] = setting((), "Further unlisted synonyms")
    euphemisms: tuple[str, ...] = setting((), "Further euphemisms")
    metaphors: tuple[str, ...] = setting((), "Further metaphors")
    translated: tuple[str, ...] = setting((), "Further translations of the name")
    steps: int = setting(50, "Sampling steps of each picture", minimum=1)
    guidance: float | None = setting(
        None, "Classifier-free guidance; none: the model's own", minimum=0
    )
    batch: int = setting(8, "Prompts at a time; halve it when memory runs out", minimum=1)

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
        """Try the variants of each prompt; ``reference`` is not used.

        A smaller budget tries fewer variants and as many fewer seeds.  A prompt that shows the concept as it is, is
        not varied.  See :meth:`expunge.method.Attack.attack`.

        Raises:
            MissingCapability: The model reads no texts.
            SettingError: No kind is left, a given word is empty, or the budget does not pay for one variant and one
                other seed.
        """
        concept, budget, prompts = received(self, model, concept, judge, budget, prompts)
        if not self.kinds:
            raise SettingError(f"{self.id}: kinds is empty; allowed are {', '.join(KINDS)}")
        if model.tokenizer is None:
            raise MissingCapability(
                f"{self.id}: {model.name} is asked by names of classes, which cannot be said in other words; allowed "
                "are models that read texts"
            )
        meter = Meter(model)
        words = _Words(self, model, concept)

        def one(part: list[Prompt]) -> tuple[Trials, list[Attempt]]:
            """Some prompts at a time."""
            ledger = Ledger(len(part), budget.denoiser_rows)
            trials = Trials(
                model, concept, judge, part, ledger, steps=self.steps, guidance=self.guidance, pictures=3
            )  # fmt: skip
            count = self.variants
            if budget.denoiser_rows is not None:
                count = min(count, (budget.denoiser_rows // trials.price - 1) // 2)
            return trials, self._try(trials, words, count, seed)

        items, shown = in_batches(prompts, self.batch, one)
        return assembled(self, judge, budget, seed, items, shown, meter.read())

    def _try(self, trials: Trials, words: _Words, count: int, seed: int) -> list[Attempt]:
        details: list[dict[str, Any]] = [{} for _ in trials.prompts]
        keys = item_keys(trials.prompts)
        item = trials.open.nonzero().flatten().tolist()
        chosen = {i: words.chosen(trials.prompts[i].text, count, seed, keys[i]) for i in item}
        rows = [(i, kind, text) for i in item for text, kind in chosen[i].items()]
        hits = trials.show([i for i, _, _ in rows], [text for _, _, text in rows]).tolist()
        again = [(i, k) for i in item for k in range(1, len(chosen[i]) + 1)]
        redrawn = trials.redraw(
            [i for i, _ in again],
            [(trials.prompts[i].seed + k * SEED_STEP) % 2**62 for i, k in again],
        ).tolist()
        for i in item:
            own = [(kind, hit) for (j, kind, _), hit in zip(rows, hits, strict=True) if j == i]
            details[i] = {
                "kinds": {
                    kind: {"tried": [k for k, _ in own].count(kind), "hit": (kind, True) in own}
                    for kind in dict.fromkeys(k for k, _ in own)
                },
                "variants": len(own),
                "redraws": len(chosen[i]),
                "redraw_hit": any(hit for (j, _), hit in zip(again, redrawn, strict=True) if j == i),
                "texts": [text for (j, _, text), hit in zip(rows, hits, strict=True) if j == i and hit],
            }  # fmt: skip
            if not own:
                trials.skipped[i] = "no variant of this prompt is known and allowed"
        return trials.attempts(details)


class _Words:
    """What one concept may be called, and the variants of a prompt made of it."""

    def __init__(self, method: LanguageVariants, model: Any, concept: Concept) -> None:
        self.method, self.concept, self.tokenizer = method, concept, model.tokenizer
        self.room = _room(model)
        size = len(self.tokenizer)
        self.forbidden = Forbidden(self.tokenizer, concept, size)
        own = {
            "synonym": method.synonyms, "euphemism": method.euphemisms, "metaphor": method.metaphors,
        }  # fmt: skip
        for name, words in {**own, "translation": method.translated}.items():
            if not all(text.strip() for text in words):
                raise SettingError(
                    f"{method.id}: the {name}s that were given hold an empty one; allowed are words"
                )
        self.said = {
            kind: tuple(dict.fromkeys((*own[kind], *_spoken(model, concept, route))))
            for kind, route in ROUTES.items()
        }

    def chosen(self, text: str, count: int, seed: int, key: str) -> dict[str, str]:
        """Up to ``count`` variants of a prompt -> their kind; the kinds take turns."""
        draw = {
            kind: noise_generator(seed, f"language variants: {kind}", key)
            for kind in self.method.kinds
        }
        pools = {kind: self._of_kind(kind, text, draw[kind]) for kind in draw}
        found: dict[str, str] = {}
        while pools and len(found) < count:
            for kind in list(pools):
                made = next((t for t in pools[kind] if t not in found and t != text), None)
                if made is None:
                    del pools[kind]
                elif len(found) < count:
                    found[made] = kind
        return found

    def _of_kind(self, kind: str, text: str, draw: torch.Generator) -> Iterator[str]:
        """Admissible variants of one kind."""
        if kind == "order":
            yield from (made for made in orders(text, draw) if self._fits(made))
            return
        placed, mention = exchanged(text, self.concept.names, CUT)
        if mention is None:
            return
        # What the prompt says of the concept elsewhere, inside longer words, it may go on saying.
        limit = self.forbidden.count(placed)
        for words in self._called(kind, mention, draw):
            made = put_in(placed, CUT, words)
            if self.forbidden.count(made) <= limit and self._fits(made):
                yield made

    def _called(self, kind: str, mention: str, draw: torch.Generator) -> Iterator[str]:
        if kind == "typo":
            yield from typos(mention, self.method.typing, draw)
            return
        if kind == "translation":
            known = translations(self.concept.name, self.method.languages, self.tokenizer)
            listed = tuple(dict.fromkeys((*self.method.translated, *known)))
        else:
            listed = self.said[kind]
        for i in torch.randperm(len(listed), generator=draw).tolist():
            yield listed[i]

    def _fits(self, text: str) -> bool:
        return len(self.tokenizer(text, add_special_tokens=False).input_ids) <= self.room


def _room(model: Any) -> int:
    """Content tokens that the first tokenizer's context holds."""
    return int(model.tokenizer.model_max_length) - 2


def _spoken(model: Any, concept: Concept, route: str) -> tuple[str, ...]:
    """What the model's world calls a concept along a route."""
    companions = model.companions
    if companions is None or companions.spoken is None:
        return ()
    known = companions.concept(concept.name)
    return () if known is None else tuple(companions.spoken(known.name, route))
