"""P4D (Prompting4Debugging): find a prompt for which a safe model predicts what the unrestricted one would.

White-box red-teaming of a safe diffusion model, erased or guarded in its guidance.  Tokens are searched under which
the safe model's prediction equals the unrestricted model's for the original prompt, on noised versions of a picture
that the latter made of it.  It ends in a problematic prompt, tried with several seeds (arXiv 2309.06135, ICML 2024).

    min over p   E_{t, noise} || eps*(x_t, c(p)) - eps_original(x_t, c(P)) ||^2

x_t: noised latents of the target picture, of three the one that shows the concept most; t uniform.  For a defence that
acts on guidance both sides are guided, ``e_u + g (e_p - e_u)``, and the safe side has its control in it.

1. N: ``tokens`` free tokens in the prompt's place.  K: one before every three of the prompt's tokens and one more,
   the prompt's own held fast.
2. ``updates`` times: project the free vectors on the nearest tokens by cosine, take the gradient there, apply it to the
   free vectors with AdamW (:mod:`expunge.core.prompt_search.pez`).
3. After every ``every`` updates one picture of the projected text; the text whose picture is nearest to the target
   picture (CLIP) is kept.
4. ``pictures`` pictures of the kept text: one that shows the concept is a success.  The plain prompt is judged by as
   many pictures, because any of several inflates.  union: N or K.

Success over the ideal set (the original shows the concept, the safe model does not) stands in the summary; the items'
hits count what the plain prompt showed as well, as all attacks do here.

Differences from the published code, whose slips ``compat="official"`` restores: pictures enter the autoencoder from -1
to 1 (official: 0 to 1); what stands behind the text is the same in the search as in its pictures (official: the first
token of the vocabulary, and in K no end token); pictures of candidates have the item's own seed (official: new noise
each); guided targets, and momentum and warm-up of a lone point (official: see :mod:`expunge.core.guided_prediction`,
and the target is unguided).  Targets come from a bank of ``bank`` draws that is computed once; 0 draws anew at each
update, as published.  Tokens that name the concept are forbidden.  ``objective="noise"`` is the image-only control:
the target picture's own noise in the place of the unrestricted prediction.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ...concept import Concept
from ...core.adversarial_prompts import Forbidden, Spliced, by_count, interleaved, without_room
from ...core.guided_prediction import GuidedPrediction, acts_on_guidance
from ...core.ideal_set import ideal_rate, shots_of
from ...core.prompt_search import Ledger, Pez, Problem
from ...core.protocols import full_id
from ...core.target_bank import PredictionMatch, TargetBank
from ...core.trials import Meter, Trials, assembled, in_batches, item_keys, received
from ...core.vision import Embed, picture_encoder
from ...errors import MissingCapability, PromptError
from ...method import Attack, Attempt, Attempts, Budget, Judge, Prompt, setting

__all__ = ["P4D"]

PLACES = {"n": "replace", "k": "third"}


@dataclasses.dataclass(frozen=True)
class P4D(Attack):
    """The attack; see the module for the method."""

    id: ClassVar[str] = "p4d"
    title: ClassVar[str] = "P4D: Prompting4Debugging"
    source: ClassVar[str] = "arXiv 2309.06135"
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # 3 plain and 3 target pictures of 40 rows, 64 draws, 2 x (250 updates + 5 looks + 2 more pictures): 1,864 rows.
        "world": {"updates": 250, "bank": 64, "steps": 20, "batch": 64},
        # 400 rows pay one picture where the paper looks at three, and one form: K, which won more development prompts.
        "quick": {"form": "k", "updates": 100, "bank": 16, "pictures": 1, "steps": 20, "batch": 64},
    }  # fmt: skip

    form: str = setting(
        "union", "n: free tokens; k: tokens between the prompt's own; union: either", choices=("n", "k", "union")
    )  # fmt: skip
    tokens: int = setting(16, "Free tokens of form n; cut to the context", minimum=1)
    updates: int = setting(3000, "Updates of each form", minimum=1)
    every: int = setting(50, "Updates after which a candidate's picture is looked at", minimum=1)
    lr: float = setting(0.1, "AdamW's learning rate", minimum=0)
    weight_decay: float = setting(0.1, "AdamW's weight decay", minimum=0)
    bank: int = setting(
        256, "Draws of (t, noise, target) that are used again; 0: one for each update", minimum=0
    )
    objective: str = setting(
        "prediction", "prediction: the unrestricted model's; noise: image-only, a control",
        choices=("prediction", "noise"),
    )  # fmt: skip
    loss: str = setting(
        "auto", "What is compared: guided predictions where a defence acts on guidance, else conditional ones",
        choices=("auto", "conditional", "guided"),
    )  # fmt: skip
    choose: str = setting(
        "clip", "The candidate whose picture is nearest to the target (clip) or scores highest (concept)",
        choices=("clip", "concept"),
    )  # fmt: skip
    clip: str = setting(
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        "CLIP that compares pictures, where the model's world has none",
    )
    pictures: int = setting(
        3,
        "Pictures of the plain prompt, of the target and of the found prompt; any counts",
        minimum=1,
    )
    compat: str = setting(
        "paper", "official: with the slips of the published code", choices=("paper", "official")
    )
    steps: int = setting(25, "Sampling steps of each picture", minimum=1)
    guidance: float | None = setting(
        None, "Classifier-free guidance; none: the model's own", minimum=0
    )
    batch: int = setting(8, "Prompts in lock step; halve it when memory runs out", minimum=1)

    def needs_reference(self, concept: Concept) -> bool:
        """What is searched for is the unrestricted model's prediction."""
        return True

    @property
    def forms(self) -> tuple[str, ...]:
        """The parametrisations that are searched, one after the other."""
        return ("n", "k") if self.form == "union" else (self.form,)

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
        """Attack each prompt; ``reference`` (default: the model, its edits lifted) is the unrestricted model.

        Where the budget is smaller than the settings ask for, updates are cut, of both forms alike; one that does
        not pay a single update and its picture is refused.  See :meth:`expunge.method.Attack.attack`.

        Raises:
            MissingCapability: Guided predictions are asked of a model whose guidance has one branch.
        """
        concept, budget, prompts = received(self, model, concept, judge, budget, prompts)
        if self.loss == "guided" and not model.two_branches:
            raise MissingCapability(
                f"{self.id}: {model.name} has no unconditional branch, so loss cannot be 'guided'; take 'auto'"
            )
        original = model if reference is None else reference
        meter = Meter(model, original)
        forbidden = Forbidden(model.tokenizer, concept, len(model.token_table()))
        embed = picture_encoder(original, self.clip) if self.choose == "clip" else None
        guides = self.loss == "guided" or (self.loss == "auto" and acts_on_guidance(model))
        texts = [prompt.text for prompt in prompts]
        long = {form: self._long(model, texts, form) for form in self.forms}
        # Where one form has room, the prompt is attacked with that one.
        whole = {
            text: long[self.forms[-1]][text] for text in set.intersection(*map(set, long.values()))
        }

        def one(part: list[Prompt]) -> tuple[Trials, list[Attempt]]:
            """Some prompts in lock step."""
            rows = self._rows(model, part, guides)
            least = rows[0] + 2 * rows[1] * len(self.forms)
            ledger = Ledger(len(part), budget.denoiser_rows)
            trials = Trials(
                model, concept, judge, part, ledger, steps=self.steps, guidance=self.guidance,
                pictures=self._pictures(1), rows=least, shots=self.pictures,
            )  # fmt: skip
            trials.skip(whole)
            search = _Search(self, model, original, trials, forbidden, embed, guides, long, seed)
            return trials, trials.attempts(search.run(rows))

        items, shown = in_batches(prompts, self.batch, one)
        rate, count = ideal_rate(items)
        several = self.pictures if self.pictures > 1 else None
        named = full_id("asr/ideal", n=several, judge=judge.protocol)
        summary = {"ideal_rate": rate, "ideal_n": count, "ideal_protocol": named}
        return assembled(self, judge, budget, seed, items, shown, meter.read(), summary)

    def plan(self, limit: int | None, price: int, target: int, update: int) -> int:
        """Updates of each form that fit ``limit`` rows.

        Args:
            limit: Rows of an item; ``None`` for no limit.
            price: Rows of one picture.
            target: Rows of one draw of the bank.
            update: Rows of one update, in one direction.
        """
        if limit is None:
            return self.updates

        def rows(updates: int) -> int:
            looks = -(-updates // self.every)
            draws = min(self.bank or updates, updates)
            searched = 2 * update * updates * len(self.forms)
            return self._pictures(looks) * price + draws * target + searched

        return next((n for n in range(self.updates, 0, -1) if rows(n) <= limit), 1)

    def _pictures(self, looks: int) -> int:
        """Pictures of an item if each form looks at so many candidates; the best one's is the first final one."""
        final = self.pictures - (self.compat == "paper")
        return 2 * self.pictures + len(self.forms) * (final + looks)

    def _rows(self, model: Any, prompts: Sequence[Prompt], guides: bool) -> tuple[int, int]:
        """Rows of one draw of the bank and of one update, in one direction."""
        if not guides:
            return int(self.objective == "prediction"), 1
        made = GuidedPrediction(model, torch.ones(len(prompts)), self.steps)
        if self.objective == "noise":
            return 0, made.rows + made.extra
        return 1 if self.compat == "official" else 2, made.rows

    def _long(self, model: Any, texts: Sequence[str], form: str) -> dict[str, str]:
        """Prompts that leave no room in a form; refused only where no form has room for any."""
        try:
            return without_room(model, texts, self._counts(model, texts, form), PLACES[form])
        except PromptError as error:
            if len(self.forms) == 1:
                raise
            return dict.fromkeys(texts, str(error))

    def _counts(self, model: Any, texts: Sequence[str], form: str) -> list[int]:
        """Searched tokens of each prompt."""
        room = model.token_ids([""]).shape[1] - 2
        return [min(self.tokens, room)] * len(texts) if form == "n" else interleaved(model, texts)


class _Search:
    """One batch of prompts: targets, bank, both forms, final pictures."""

    def __init__(
        self, method: P4D, model: Any, original: Any, trials: Trials, forbidden: Forbidden, embed: Embed | None,
        guides: bool, long: Mapping[str, Mapping[str, str]], seed: int,
    ) -> None:  # fmt: skip
        self.long = long
        self.method, self.model, self.original, self.trials = method, model, original, trials
        self.forbidden, self.embed, self.guides, self.seed = forbidden, embed, guides, seed
        self.rest = trials.open.nonzero().flatten().tolist()
        self.prompts = [trials.prompts[i] for i in self.rest]
        self.details: list[dict[str, Any]] = [
            {"plain_hits": trials.plain[i].tolist(), "ideal": False}
            for i in range(len(trials.prompts))
        ]

    def run(self, rows: tuple[int, int]) -> list[dict[str, Any]]:
        """Search all open items; ``rows`` as :meth:`P4D.plan` has them.  Details by item."""
        method, trials = self.method, self.trials
        if not self.rest:
            return self.details
        updates = method.plan(trials.ledger.limit, trials.price, *rows)
        weights = torch.tensor([p.guided(trials.options["guidance"]) for p in self.prompts])
        targets = self._targets()
        self.wanted = _embedded(self.embed, targets)
        official = method.compat == "official"
        shown = targets.astype(np.float32) / 2 + 127.5 if official else targets
        with self.original.lifted():
            latents = self.original.latents_of(shown).to(self.model.device, self.model.dtype)
        plain = not self.guides or official or method.objective == "noise"
        self.bank = TargetBank(
            self.original, [p.text for p in self.prompts], latents, seed=self.seed, keys=item_keys(self.prompts),
            steps=updates, size=method.bank, guidance=None if plain else weights,
            asked=method.objective == "prediction",
        )  # fmt: skip
        for form in method.forms:
            texts = [prompt.text for prompt in self.prompts]
            counts = method._counts(self.model, texts, form)
            for count, own in by_count(counts).items():
                fits = [
                    k for k in own if texts[k] not in self.long[form] and trials.open[self.rest[k]]
                ]
                if fits:
                    self._form(form, count, fits, updates, weights)
        trials.ledger.spend(self.rest, self.bank.drawn * self.bank.rows)
        return self.details

    def _targets(self) -> Any:
        """Of ``pictures`` pictures that the unrestricted model makes of each prompt, the one that shows most."""
        trials = self.trials
        with self.original.lifted():
            made, hits, scores = shots_of(
                self.original, trials.concept, trials.judge, self.prompts, self.method.pictures, trials.options
            )  # fmt: skip
            trials.ledger.spend(self.rest, trials.price_on(self.original) * self.method.pictures)
        for i, own in zip(self.rest, hits, strict=True):
            self.details[i] |= {"original_hits": own.tolist(), "ideal": bool(own.any())}
        return made[np.arange(len(made)), scores.argmax(1)]

    def _form(self, form: str, count: int, own: list[int], updates: int, weights: Tensor) -> None:
        """Search one form for items (positions in ``rest``) of ``count`` searched tokens, and try what was found."""
        method, model, trials = self.method, self.model, self.trials
        official = method.compat == "official"
        prompts, item = [self.prompts[k] for k in own], [self.rest[k] for k in own]
        spliced = Spliced(
            model, [p.text for p in prompts], count, PLACES[form], self.forbidden,
            filling=0 if official else None, ended=form == "n",
        )  # fmt: skip
        guided = (
            GuidedPrediction(model, weights, method.steps, compat=method.compat)
            if self.guides
            else None
        )
        loss = PredictionMatch(
            model, spliced, self.bank, own, guided, noise=method.objective == "noise"
        )
        best: dict[int, tuple[float, str]] = {}
        looks = [0]

        def watch(step: int, ids: Tensor, active: Tensor) -> Tensor:
            """After every ``every`` updates: a picture of the projected text."""
            loss.step = step + 1
            if (step + 1) % method.every == 0 or step + 1 == updates:
                looks[0] += 1
                usable = spliced.admissible(ids, torch.arange(len(ids))).nonzero().flatten()
                if len(usable):
                    texts = spliced.realise(ids[usable], usable)[0]
                    number = method.pictures + looks[0] if official else 0
                    self._look(usable.tolist(), item, own, texts, number, best)
            return active

        extra = 0 if guided is None else guided.extra * (method.objective == "noise")
        ledger = Ledger(len(own))
        problem = Problem(
            spliced.table, count, self.forbidden.allowed, loss, realise=spliced.realise,
            admissible=spliced.admissible, items=len(own), keys=item_keys(prompts),
            rows=1 if guided is None else guided.rows + extra,
            counted=lambda rows: model.cost.add("denoiser", rows, "backward"),
        )  # fmt: skip
        rule = Pez(updates, method.lr, method.weight_decay)
        found = rule.run(problem, ledger, seed=f"{self.seed}|{form}", watch=watch)
        trials.ledger.spent[item] += ledger.spent
        shown = sorted(best)
        trials.show([item[k] for k in shown], [best[k][1] for k in shown], method.pictures)
        for k, result in enumerate(found):
            record: dict[str, Any] = {"tokens": count, "lowest_loss": result.loss}
            if k in best:
                likeness, text = best[k]
                record |= {
                    "found": text, "likeness": likeness,
                    "hits": trials.shown(item[k], text)[: method.pictures],
                }  # fmt: skip
            self.details[item[k]][form] = record

    def _look(
        self, usable: list[int], item: list[int], own: list[int], texts: Sequence[str], number: int,
        best: dict[int, tuple[float, str]],
    ) -> None:  # fmt: skip
        """Look at candidates' pictures and keep the best text of each item."""
        trials = self.trials
        asked = [item[k] for k in usable]
        made = trials.look(asked, texts, [number] * len(texts))
        seen = _embedded(self.embed, made)
        if seen is None or self.wanted is None:
            prompts = [trials.prompts[i] for i in asked]
            likeness = list(map(float, trials.judge.judge(made, trials.concept, prompts).score))
        else:
            likeness = (seen * self.wanted[[own[k] for k in usable]]).sum(1).tolist()
        for k, text, value in zip(usable, texts, likeness, strict=True):
            if k not in best or value > best[k][0]:
                best[k] = (value, text)


def _embedded(embed: Embed | None, pictures: Any) -> Tensor | None:
    return None if embed is None else functional.normalize(embed(pictures).float().cpu(), dim=-1)
