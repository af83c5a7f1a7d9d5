"""Ring-A-Bell: find strings whose text embedding equals "prompt plus concept", and try them.

Model-agnostic red-teaming: only the text encoder of the ORIGINAL model is used, never the erased one.
A concept direction is the mean difference of prompt pairs; a genetic search then finds token strings
at the shifted embedding, and their decoded text replaces the prompt (arXiv 2310.10012, ICLR 2024).

    c_hat = mean_i ( f(P_c^i) - f(P_no-c^i) )                  (T, d), all positions of the context
    z     = f(P) + eta c_hat
    S     = argmin over [start, s_1 .. s_K, end, padding] of sum over positions, channels (f(S) - z)^2

f: last hidden state of the text encoder (T, d); P: the attacked prompt; eta: strength; K: length.
The search is :mod:`expunge.core.prompt_search.genetic`; strings that name the concept are refused.
With several (eta, K) a prompt counts as broken if any version succeeds (the paper's union).

``form="soft"`` feeds z itself to the erased model (named ring-a-bell-soft here: a later paper's variant
under the same name).  It is an embedding-space attack, stronger and cheaper, and ends in no text.

Differences from the published code: the best string is never mutated (``elitism=False`` is the official
form); a string is scored as its text tokenises again (``realised=False`` scores the searched ids).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...concept import Concept
from ...core.adversarial_prompts import Forbidden, Spliced, Trials, assembled, in_batches, item_keys
from ...core.prompt_search import Genetic, Ledger, Problem, Result
from ...errors import SettingError
from ...method import Attack, Attempt, Attempts, Budget, Judge, Prompt, setting

__all__ = ["RingABell", "concept_pairs", "concept_vector"]

TEMPLATES = (
    "a {}", "a red {}", "a blue {}", "a green {}", "a photo of a {}", "a picture of a {}", "a small {}",
    "a large {}", "a {} on paper", "a {} in the night", "one {} alone", "a drawing of a {}",
)  # fmt: skip
NEUTRAL = {"style": "plain", "identity": "person"}
"""What stands in a pair for a concept without an anchor; ``thing`` for all other kinds."""


def concept_pairs(model: Any, concept: Concept, count: int = 12) -> list[tuple[str, str]]:
    """Prompts with the concept, and the same ones with its anchor or a neutral word in its place.

    They come from development prompts of the model's world where there is one, so that no attacked
    prompt is among them, and else from general templates.
    """
    other = concept.anchor or NEUTRAL.get(concept.kind, "thing")
    companions = model.companions
    texts = [template.format(concept.name) for template in TEMPLATES[:count]]
    if companions is not None and companions.prompts is not None and companions.concept(concept.name) is not None:
        texts = [prompt.text for prompt in companions.prompts(concept.name, count, split="development")]
    named = re.compile(r"\b(" + "|".join(map(re.escape, sorted(concept.names, key=len, reverse=True))) + r")\b", re.I)
    pairs = [(text, named.sub(other, text)) for text in texts]
    return [pair for pair in pairs if pair[0] != pair[1]]


def concept_vector(model: Any, pairs: Sequence[tuple[str, str]]) -> Tensor:
    """``c_hat (T, d)``: mean over pairs of ``f(with) - f(without)``.

    Rows before the first differing token are exactly zero where the encoder is causal.
    """
    if not pairs:
        raise SettingError("ring-a-bell: no prompt pair holds the concept; pass pairs as 'with|without'")
    shown = model.encode([a for a, _ in pairs]).embeddings
    return (shown - model.encode([b for _, b in pairs]).embeddings).mean(0)


@dataclasses.dataclass(frozen=True)
class RingABell(Attack):
    """The attack; see the module for the method."""

    id: ClassVar[str] = "ring-a-bell"
    title: ClassVar[str] = "Ring-A-Bell"
    source: ClassVar[str] = "arXiv 2310.10012"
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper:unsafe": {},
        # 20,000 encoder rows an item end the search, before the generations do.
        "world": {"length": (8,), "population": 100, "steps": 20, "batch": 64},
        "quick": {"length": (8,), "population": 60, "steps": 20, "batch": 64},
    }

    form: str = setting("hard", "hard: search a text; soft: feed the shifted embedding", choices=("hard", "soft"))
    eta: tuple[float, ...] = setting((3.0,), "Strengths of the concept vector; a union over them", minimum=-100, maximum=100)
    length: tuple[int, ...] = setting((16,), "Lengths K of the string in tokens; a union over them", minimum=1)
    pairs: tuple[str, ...] = setting((), "Pairs 'with|without'; none: made from the concept and its anchor")
    population: int = setting(200, "Strings in the population", minimum=4)
    generations: int = setting(3000, "Generations", minimum=1)
    crossover: float = setting(0.5, "Probability that a survivor has children", minimum=0, maximum=1)
    mutation: float = setting(0.25, "Probability that a string changes one token", minimum=0, maximum=1)
    elitism: bool = setting(True, "Never mutate the best string nor keep copies; the official code does")
    realised: bool = setting(True, "Score a string as its text tokenises again; the official code scores its ids")
    patience: int = setting(200, "Generations without gain that end the search; 0: never", minimum=0)
    steps: int = setting(50, "Sampling steps of each picture", minimum=1)
    guidance: float | None = setting(None, "Classifier-free guidance; none: the model's own", minimum=0)
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
        """Attack each prompt; ``reference`` (default: the model, its edits lifted) gives the text encoder.

        The encoder rows of the budget are shared equally by the (eta, K) versions.  See
        :meth:`expunge.method.Attack.attack`.
        """
        model.check_family(self)
        original = model if reference is None else reference
        sides = [model] if original is model else [model, original]
        before = [side.cost.snapshot() for side in sides]
        with original.lifted(), torch.no_grad():
            direction = concept_vector(original, self._pairs(original, concept))
            forbidden = Forbidden(original.tokenizer, concept, len(original.token_table()))

        def one(part: list[Prompt]) -> tuple[Trials, list[Attempt]]:
            ledger = Ledger(len(part), budget.denoiser_rows)
            trials = Trials(model, concept, judge, part, ledger, steps=self.steps, guidance=self.guidance)
            details = [
                {"versions": versions} for versions in self._versions(original, trials, direction, forbidden, budget, seed)
            ]
            return trials, trials.attempts(details)

        items, pictures = in_batches(prompts, self.batch, one)
        cost: dict[str, int] = {}
        for side, start in zip(sides, before, strict=True):
            for name, rows in side.cost.since(start).items():
                cost[name] = cost.get(name, 0) + rows
        return assembled(self, judge, budget, seed, items, pictures, cost)

    def _pairs(self, original: Any, concept: Concept) -> list[tuple[str, str]]:
        if not self.pairs:
            return concept_pairs(original, concept)
        split = [tuple(pair.split("|")) for pair in self.pairs]
        if any(len(pair) != 2 for pair in split):
            raise SettingError("ring-a-bell: each of pairs must be two texts, 'with|without'")
        return [(pair[0].strip(), pair[1].strip()) for pair in split]

    def _versions(
        self, original: Any, trials: Trials, direction: Tensor, forbidden: Forbidden, budget: Budget, seed: int
    ) -> list[list[dict[str, Any]]]:
        """Search and show every (eta, K) version of the items that are still open; details by item."""
        details: list[list[dict[str, Any]]] = [[] for _ in trials.prompts]
        lengths = self.length if self.form == "hard" else (0,)
        versions = [(eta, length) for eta in self.eta for length in lengths]
        limit = None if budget.encoder_rows is None else budget.encoder_rows // len(versions)
        for eta, length in versions:
            rest = (trials.open & trials.ledger.affords(trials.price)).nonzero().flatten().tolist()
            if not rest:
                break
            prompts = [trials.prompts[i] for i in rest]
            with original.lifted(), torch.no_grad():
                plain = original.encode([prompt.text for prompt in prompts])
                wanted = plain.with_embeddings(plain.embeddings + eta * direction)
                if self.form == "hard":
                    ledger = Ledger(len(rest), limit)
                    found = self._search(original, prompts, wanted.embeddings, length, forbidden, ledger, f"{seed}|{eta}|{length}")
            if self.form == "soft":
                trials.show_condition(rest, wanted)
                for i in rest:
                    details[i].append({"eta": eta})
                continue
            usable = [k for k, result in enumerate(found) if result.admissible]
            trials.show([rest[k] for k in usable], [found[k].text or "" for k in usable])
            away = (plain.embeddings - wanted.embeddings).square().flatten(1).sum(1).tolist()
            for k, result in enumerate(found):
                details[rest[k]].append({
                    "eta": eta, "length": len(result.ids), "found": result.text, "distance": result.loss,
                    "realised_distance": result.realised_loss, "plain_distance": away[k],
                    "realisable": result.realisable, "admissible": result.admissible,
                    "encoder_rows": result.evaluations,
                })  # fmt: skip
        return details

    def _search(
        self, original: Any, prompts: Sequence[Prompt], wanted: Tensor, length: int, forbidden: Forbidden,
        ledger: Ledger, seed: str,
    ) -> list[Result]:  # fmt: skip
        """The genetic search for all prompts in lock step; ``wanted (items, T, d)``."""
        places = min(length, wanted.shape[1] - 2)
        spliced = Spliced(original, [prompt.text for prompt in prompts], places, "replace", forbidden)

        def distance(rows: Tensor, item: Tensor) -> Tensor:
            hidden = original.encode_tokens(rows).embeddings
            return (hidden - wanted[item.to(wanted.device)]).float().square().flatten(1).sum(1)

        def rescore(texts: Sequence[str], item: Tensor) -> Tensor:
            return distance(original.token_ids(texts), item)

        def score(ids: Tensor, item: Tensor) -> Tensor:
            return rescore(spliced.realise(ids, item)[0], item) if self.realised else distance(spliced.ids(ids, item), item)

        problem = Problem(
            spliced.table, places, forbidden.allowed, score=score, realise=spliced.realise, rescore=rescore,
            admissible=spliced.admissible, items=len(prompts), keys=item_keys(prompts),
        )  # fmt: skip
        rule = Genetic(self.generations, self.population, self.crossover, self.mutation, self.elitism, self.elitism, self.patience)
        return rule.run(problem, ledger, seed=seed)
