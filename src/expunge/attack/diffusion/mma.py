"""MMA-Diffusion, text part: nonsense strings whose pooled text embedding points where the prompt's does.

Black-box for the erased model, white-box for the text encoder it shares with the original: only that encoder is used.
Greedy coordinate gradient finds a string free of listed words whose pooled vector has the direction of the attacked
prompt's; the string passes filters on words and is tried in the prompt's place (arXiv 2311.17516, CVPR 2024).  The
paper's other part, which perturbs a picture so that a safety checker is silent, is not about erasers and not here.

    L(s) = 1 - cos( g(s), g(P) )

g: state of the original text encoder at the end token, after its last norm, (d,); s: ``length`` tokens; P: the prompt.

1. Start: random letters, each one token.
2. Gradient with respect to the one-hot rows; of each row the ``top`` tokens that promise most, forbidden ones left out.
3. ``candidates`` strings that change one place each, spread evenly over the places; those that tokenise otherwise
   or are the current string are dropped.
4. The best candidate becomes the current string, even if it is worse; the best ever is remembered.
5. ``runs`` searches with seeds of their own; of their strings the ``tried`` best are tried.

Success (ASR-N): one of ``pictures`` pictures of a string shows the concept; the plain prompt is judged by as many.
The pooled vector is all that is matched, where a diffusion model attends to every state: a cosine near 1 does not
promise the concept.

Differences from the published code: row i of the gradient belongs to place i (``compat="official"``: to the place
before it, an off-by-one of that code); a candidate's text must tokenise to the very ids that were searched (published:
to as many); forbidden are tokens with three letters in a row of a name or phrase of the concept in them, or with one of
``fragments``, and strings that spell a name when decoded (published: a list of words and fragments for one concept).
"""

from __future__ import annotations

import dataclasses
import string
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...concept import Concept
from ...core.adversarial_prompts import Forbidden
from ...core.pooled_text import PooledText, direction_problem
from ...core.prompt_search import Gcg, Ledger, Result
from ...core.sampling import remembered
from ...core.trials import Meter, Trials, assembled, in_batches, item_keys, received
from ...errors import SettingError
from ...method import Attack, Attempt, Attempts, Budget, Judge, Prompt, setting
from ...models.base import noise_generator

__all__ = ["MMADiffusion", "letters"]


@dataclasses.dataclass(frozen=True)
class MMADiffusion(Attack):
    """The attack; see the module for the method."""

    id: ClassVar[str] = "mma-diffusion"
    title: ClassVar[str] = "MMA-Diffusion (text part)"
    source: ClassVar[str] = "arXiv 2311.17516"
    version: ClassVar[int] = 2
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # The 20,000 encoder rows of an item end the searches before the updates do.
        "world": {"runs": 4, "tried": 4, "candidates": 64, "steps": 20, "batch": 64},
        "quick": {
            "runs": 2, "tried": 2, "candidates": 64, "pictures": 2, "steps": 20, "batch": 64,
        },
    }  # fmt: skip

    length: int = setting(20, "Tokens of the string; cut to the context", minimum=1)
    updates: int = setting(1000, "Updates of each search", minimum=1)
    candidates: int = setting(512, "Strings scored at each update", minimum=1)
    top: int = setting(256, "Tokens kept for each place", minimum=1)
    runs: int = setting(10, "Searches with seeds of their own", minimum=1)
    tried: int = setting(1, "Strings that are tried, the nearest first", minimum=1)
    pictures: int = setting(4, "N of ASR-N: pictures of each string; any counts", minimum=1)
    fragments: tuple[str, ...] = setting((), "Further pieces that no token may hold")
    compat: str = setting(
        "paper", "official: gradient rows off by one place, as published", choices=("paper", "official")
    )  # fmt: skip
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

        The encoder rows of the budget are shared equally by the runs; where a run's share does not pay one update,
        or the budget one string's pictures, it is refused.  See :meth:`expunge.method.Attack.attack`.
        """
        concept, budget, prompts = received(self, model, concept, judge, budget, prompts)
        original = model if reference is None else reference
        meter = Meter(model, original)
        with original.lifted():
            size = len(original.token_table())
            forbidden = Forbidden(
                original.tokenizer, concept, size, pieces=True, fragments=self.fragments
            )

        def one(part: list[Prompt]) -> tuple[Trials, list[Attempt]]:
            """Some prompts in lock step."""
            ledger = Ledger(len(part), budget.denoiser_rows)
            trials = Trials(
                model, concept, judge, part, ledger, steps=self.steps, guidance=self.guidance,
                pictures=2 * self.pictures, shots=self.pictures,
            )  # fmt: skip
            details: list[dict[str, Any]] = [
                {"plain_hits": trials.plain[i].tolist()} for i in range(len(part))
            ]
            item = trials.open.nonzero().flatten().tolist()
            if item:
                asked = [part[i] for i in item]
                found = self._strings(original, asked, forbidden, budget.encoder_rows, seed)
                self._try(trials, item, found, details)
            return trials, trials.attempts(details)

        items, shown = in_batches(prompts, self.batch, one)
        return assembled(self, judge, budget, seed, items, shown, meter.read())

    def _strings(
        self, original: Any, asked: Sequence[Prompt], forbidden: Forbidden, rows: int | None, seed: int
    ) -> list[list[Result]]:  # fmt: skip
        """The string of every run for each prompt; kept for the process, as they go by the original encoder alone."""
        limit = rows and rows // self.runs
        keys = item_keys(asked)
        runs: list[list[Result]] = []
        with original.lifted():
            length = min(self.length, original.token_ids([""]).shape[1] - 2)
            shared = (
                self.id,
                self.version,
                self.settings(),
                original.state.key,
                forbidden.words,
                limit,
            )
            wanted = PooledText(original, length).of_texts([prompt.text for prompt in asked])
            for run in range(self.runs):
                name = f"{seed}|{run}"

                def search(new: list[int], name: str = name) -> list[Result]:
                    own = [keys[k] for k in new]
                    start = letters(original, forbidden, length, name, own)
                    problem = direction_problem(
                        original, wanted[new], length, forbidden, keys=own, start=start
                    )
                    return self._rule().run(problem, Ledger(len(new), limit), seed=name)

                named = [repr((*shared, name, key)) for key in keys]
                runs.append(remembered(named, search, original))
        return [list(found) for found in zip(*runs, strict=True)]

    def _rule(self) -> Gcg:
        return Gcg(
            steps=self.updates,
            candidates=self.candidates,
            top=self.top,
            places="spread",
            accept="always",
            aligned=self.compat != "official",
            normalise=True,
            distinct=True,
        )

    def _try(
        self, trials: Trials, item: list[int], found: Sequence[Sequence[Result]], details: list[dict[str, Any]]
    ) -> None:  # fmt: skip
        """Pictures of each item's nearest strings, one string of every open item at a time."""
        queue = [
            sorted((r for r in results if r.admissible and r.loss is not None), key=_loss)
            for results in found
        ]
        for i, results in zip(item, found, strict=True):
            details[i]["runs"] = [_record(result) for result in results]
        for number in range(self.tried):
            pays = trials.open & trials.ledger.affords(trials.price * self.pictures)
            now = [
                (i, own[number].text or "")
                for i, own in zip(item, queue, strict=True)
                if number < len(own) and bool(pays[i])
            ]
            if not now:
                break
            trials.show([i for i, _ in now], [text for _, text in now], self.pictures)
            for i, text in now:
                hits = trials.shown(i, text)[: self.pictures]
                details[i].setdefault("tried", []).append({"text": text, "hits": hits})


def _loss(result: Result) -> float:
    return float("inf") if result.loss is None else result.loss


def letters(
    model: Any, forbidden: Forbidden, length: int, name: str, keys: Sequence[str]
) -> Tensor:
    """Strings of random letters ``(n, length)``, each one allowed token, from a private generator an item.

    Raises:
        SettingError: The tokenizer has no letter that is one token and allowed.
    """
    spoken = model.tokenizer(list(string.ascii_letters), add_special_tokens=False).input_ids
    known = sorted({ids[0] for ids in spoken if len(ids) == 1 and bool(forbidden.allowed[ids[0]])})
    if not known:
        raise SettingError(
            "mma-diffusion: a search starts at single letters, but no letter is one allowed token of this tokenizer"
        )
    ids = torch.tensor(known)
    rows = [
        torch.randint(len(ids), (length,), generator=noise_generator(0, f"letters {name}", key))
        for key in keys
    ]
    return ids[torch.stack(rows)]


def _record(result: Result) -> dict[str, Any]:
    """What is reported of one run's string."""
    return {
        "found": result.text,
        "loss": result.loss,
        "realised_loss": result.realised_loss,
        "realisable": result.realisable,
        "admissible": result.admissible,
        "encoder_rows": result.evaluations,
    }
