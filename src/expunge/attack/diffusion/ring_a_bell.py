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
under the same name).  It is an embedding-space attack, stronger and cheaper, and ends in no text.  Where a
model reads a pooled vector beside the rows, that stays the prompt's own.

Differences from the published code: the best string is never mutated (``elitism=False`` is the official
form); a string is scored as its text tokenises again (``realised=False`` scores the searched ids).
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...concept import Concept
from ...core.adversarial_prompts import Forbidden
from ...core.concept_direction import (
    concept_pairs,
    concept_vector,
    matching_problem,
    read_pairs,
    read_vector,
)
from ...core.prompt_search import Genetic, Ledger, Result
from ...core.sampling import remembered
from ...core.trials import Meter, Trials, assembled, in_batches, item_keys, received
from ...errors import SettingError
from ...method import Attack, Attempt, Attempts, Budget, Judge, Prompt, setting

__all__ = ["RingABell", "RingABellSoft"]


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
        "paper:violence": {"eta": (5.5,), "length": (38, 77)},
        # 20,000 encoder rows an item end the search, before the generations do.
        "world": {"length": (8,), "steps": 20, "batch": 64},
        "quick": {"length": (8,), "population": 60, "steps": 20, "batch": 64},
    }

    form: str = setting(
        "hard", "hard: search a text; soft: feed the shifted embedding", choices=("hard", "soft")
    )
    eta: tuple[float, ...] = setting(
        (3.0,), "Strengths of the concept vector; a union over them", minimum=-100, maximum=100
    )
    length: tuple[int, ...] = setting(
        (16,), "Lengths K of the string in tokens; a union over them", minimum=1
    )
    pairs: tuple[str, ...] = setting(
        (), "Pairs 'with|without'; none: made from the concept and its anchor"
    )
    vector: str = setting("", "File of a concept vector (.npy, T x d), in the place of pairs")
    population: int = setting(200, "Strings in the population", minimum=4)
    generations: int = setting(3000, "Generations", minimum=1)
    crossover: float = setting(
        0.5, "Probability that a survivor has children", minimum=0, maximum=1
    )
    mutation: float = setting(
        0.25, "Probability that a string changes one token", minimum=0, maximum=1
    )
    elitism: bool = setting(
        True, "Never mutate the best string nor keep copies, as the official code would"
    )
    realised: bool = setting(
        True, "Score a string as its text tokenises again, not by its ids as the official code"
    )
    patience: int = setting(
        200, "Generations without gain that end the search; 0: never", minimum=0
    )
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
        """Attack each prompt; ``reference`` (default: the model, its edits lifted) gives the text encoder.

        The encoder rows of the budget are shared equally by the (eta, K) versions; where a version's
        share does not pay one generation, or the budget one picture of a found string, it is refused.
        See :meth:`expunge.method.Attack.attack`.
        """
        concept, budget, prompts = received(self, model, concept, judge, budget, prompts)
        original = model if reference is None else reference
        meter = Meter(model, original)
        with original.lifted(), torch.no_grad():
            direction = self._direction(original, concept)
            # The soft form searches no tokens, so it is defined for layouts without one token table, too.
            forbidden = None
            if self.form == "hard":
                size = len(original.token_table())
                forbidden = Forbidden(original.tokenizer, concept, size)

        def one(part: list[Prompt]) -> tuple[Trials, list[Attempt]]:
            """Some prompts in lock step."""
            ledger = Ledger(len(part), budget.denoiser_rows)
            shown = (model, concept, judge, part, ledger)
            trials = Trials(*shown, steps=self.steps, guidance=self.guidance)
            aim = (original, trials, direction, forbidden)
            versions = self._versions(*aim, budget.encoder_rows, seed)
            return trials, trials.attempts([{"versions": found} for found in versions])

        items, pictures = in_batches(prompts, self.batch, one)
        return assembled(self, judge, budget, seed, items, pictures, meter.read())

    def _direction(self, original: Any, concept: Concept) -> Tensor:
        """``c_hat (T, d)``: read, or from pairs."""
        if not self.vector:
            pairs = read_pairs(self.pairs) or concept_pairs(original, concept)
            return concept_vector(original, pairs)
        if self.pairs:
            raise SettingError(
                f"{self.id}: vector and pairs are both given; one of them is allowed"
            )
        return read_vector(self.vector, original.encode([concept.name]).embeddings[0])

    def _versions(
        self,
        original: Any,
        trials: Trials,
        direction: Tensor,
        forbidden: Forbidden | None,
        rows: int | None,
        seed: int,
    ) -> list[list[dict[str, Any]]]:
        """All (eta, K) versions in lock step; an item that was broken is left alone.  Details by item."""
        part, ledger = trials.prompts, trials.ledger
        details: list[list[dict[str, Any]]] = [[] for _ in part]
        lengths = self.length if self.form == "hard" else (0,)
        limit = rows and rows // (len(self.eta) * len(lengths))
        for eta, length in itertools.product(self.eta, lengths):
            item = (trials.open & ledger.affords(trials.price)).nonzero().flatten().tolist()
            if not item:
                break
            with original.lifted(), torch.no_grad():
                plain = original.encode([part[i].text for i in item])
            wanted = plain.with_embeddings(plain.embeddings + eta * direction)
            found: list[dict[str, Any]] = [{} for _ in item]
            if forbidden is None:
                trials.show_condition(item, wanted)
            else:
                asked = [part[i] for i in item]
                name = f"{seed}|{eta}|{length}"
                results = self._strings(
                    original, asked, wanted.embeddings, length, forbidden, limit, name
                )
                usable = [k for k, result in enumerate(results) if result.admissible]
                texts = [results[k].text or "" for k in usable]
                trials.show([item[k] for k in usable], texts)
                found = [_record(result) for result in results]
            away = (eta * direction).square().sum().item()
            for i, version in zip(item, found, strict=True):
                details[i].append({"eta": eta, "plain_distance": away, **version})
        return details

    def _strings(
        self, original: Any, asked: Sequence[Prompt], target: Tensor, length: int, forbidden: Forbidden,
        limit: int | None, name: str,
    ) -> list[Result]:  # fmt: skip
        """A string near each target (n, T, d).

        The search reads the original's text encoder alone, so what it finds serves every model under attack
        and is kept for the process.
        """
        keys = item_keys(asked)
        with original.lifted():
            shared = (self.id, self.version, self.settings(), original.state.key, forbidden.words)
            digests = [
                hashlib.sha256(row.float().cpu().numpy().tobytes()).hexdigest() for row in target
            ]
            where = [
                repr((*shared, length, limit, name, key, digest))
                for key, digest in zip(keys, digests, strict=True)
            ]

            def search(new: list[int]) -> list[Result]:
                problem = matching_problem(
                    original, target[new], length, forbidden,
                    realised=self.realised, keys=[keys[k] for k in new],
                )  # fmt: skip
                return self._rule().run(problem, Ledger(len(new), limit), seed=name)

            return remembered(where, search, original)

    def _rule(self) -> Genetic:
        return Genetic(
            steps=self.generations,
            population=self.population,
            crossover=self.crossover,
            mutation=self.mutation,
            elitism=self.elitism,
            distinct=self.elitism,
            patience=self.patience,
        )


@dataclasses.dataclass(frozen=True)
class RingABellSoft(RingABell):
    """The soft form under an id of its own, so that audits and sweeps of all attacks have both.

    Presets are those of the later paper that feeds the embedding (arXiv 2407.12383): eta 3 for unsafe content, 0.9 for
    styles.
    """

    id: ClassVar[str] = "ring-a-bell-soft"
    title: ClassVar[str] = "Ring-A-Bell, soft form"
    source: ClassVar[str] = "arXiv 2310.10012, variant of arXiv 2407.12383"
    version: ClassVar[int] = 1
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper:unsafe": {},
        "paper:style": {"eta": (0.9,)},
        "world": {"steps": 20, "batch": 64},
        "quick": {"steps": 20, "batch": 64},
    }

    form: str = setting(
        "soft", "soft: feed the shifted embedding; hard: search a text", choices=("soft", "hard")
    )


def _record(result: Result) -> dict[str, Any]:
    """What is reported of one found string."""
    return {
        "length": len(result.ids),
        "found": result.text,
        "distance": result.loss,
        "realised_distance": result.realised_loss,
        "realisable": result.realisable,
        "admissible": result.admissible,
        "encoder_rows": result.evaluations,
    }
