"""UnlearnDiffAtk: search a few tokens that make an erased diffusion model denoise the concept again.

White-box prompt search that needs neither a classifier nor the original model in its loop: the erased
model's own denoising loss on one picture of the concept is the objective ("the diffusion model is its
own classifier").  It ends in an adversarial prompt for each test prompt (arXiv 2310.11868, ECCV 2024).

    min over A  E_{t, eps} || eps - eps*(x_t, c([A E ; prompt])) ||^2,   x_t = alpha_t x_0 + sigma_t eps

A: relaxed one-hot rows (k, V) of the k searched tokens, on the simplex; E: token table (V, d); c: text
encoder; eps*: the attacked denoiser; x_0: latents (mean of the autoencoder's posterior, scaled) of the
target, a picture of the concept.

Whose picture that is (``target``):

    original    the unerased model's, of the same prompt and seed: the paper's protocol.  Where no original is
                given and no edit can be lifted, the next of these that there is
    pictures    any picture of the concept, here those the concept names, else its world's: the paper's
                equation asks for no more, and its authors say that such pictures serve
    own         no picture and no original, for auditors who have neither; OURS, neither paper nor code has
                such a form: of the pictures that the attacked model itself drew for the prompt, plain or
                attacked, the one the judge gives the highest score.  It begins with the plain picture and
                climbs; the judge, which else only ends the search, takes part in it

Where something that acts on guidance guards the model (Safe Latent Diffusion, a negative text), the
prediction of the prompt alone does not see it; the loss then takes the effective prediction of
:mod:`expunge.core.guided_prediction` (``loss``), which is the prompt's own where nothing acts.  Also ours.

1. The plain prompt's picture; where it shows the concept, the item counts as pre-attack success.
2. A = 1 / V.  For timesteps in increasing order (10, 30, ..., 990 of 1000), ``updates`` times: draw
   tokens from A, fresh noise, gradient straight through to A, clipped entrywise to [-1, 1]; Adam (L2
   weight decay); exact projection on the simplex (:mod:`expunge.core.prompt_search.simplex`).
3. After each timestep: arg-max tokens, decoded, tokenised again, one picture with the item's seed;
   success ends the item.  A string seen before costs nothing.

Differences from the published code: noise and draws come from private generators that run on; the
projection is exact; tokens that name the concept are forbidden; the table is the attacked model's own;
prompts that leave no room for the tokens are judged plain and reported as skipped.  The published
sampler resets the global random state with each picture, so that the same draws and the same noise
repeat at every timestep: ``rng="official"`` does so with one private generator an item.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from ...concept import Concept
from ...core.adversarial_prompts import Forbidden, Spliced, without_room
from ...core.examples import pictures_of_concept
from ...core.guided_prediction import GuidedPrediction, acts_on_guidance
from ...core.prompt_search import Ledger, Problem, Simplex
from ...core.sampling import SHARED, outputs
from ...core.trials import Meter, Trials, assembled, in_batches, item_keys, received
from ...errors import InputError, MissingCapability
from ...method import Attack, Attempt, Attempts, Budget, Judge, Prompt, setting
from ...models.base import noise_generator

__all__ = ["DenoisingLoss", "UnlearnDiffAtk"]

TARGETS = ("original", "pictures", "own")
TARGET_PICTURES = 64
"""Pictures of the concept among which targets are dealt, where its world has them."""


class DenoisingLoss:
    """``|| eps - eps*(x_t, c) ||^2`` averaged over the picture, with private noise for each item.

    Attributes:
        timestep: The present t, an index of the training schedule.
    """

    def __init__(
        self, model: Any, spliced: Spliced, latents: Tensor, seed: int, keys: Sequence[str],
        guided: GuidedPrediction | None = None,
    ) -> None:  # fmt: skip
        self.model, self.spliced, self.latents, self.guided = model, spliced, latents, guided
        self.generators = [noise_generator(seed, "unlearndiffatk noise", key) for key in keys]
        self.timestep = 0

    def rewind(self) -> None:
        """Begin the noise again from its seeds."""
        for generator in self.generators:
            generator.manual_seed(generator.initial_seed())

    def __call__(self, vectors: Tensor, item: Tensor) -> Tensor:
        """Losses ``(B,)`` of searched vectors ``(B, k, d)``."""
        clean = self.latents[item.to(self.latents.device)]
        noise = torch.stack(
            [torch.randn(clean.shape[1:], generator=self.generators[int(i)]) for i in item]
        ).to(clean)
        times = torch.full((len(item),), self.timestep, device=clean.device)
        noised = self.model.noised(clean, noise, times)
        condition = self.spliced.encode(vectors, item)
        if self.guided is None:
            made = self.model.predict(noised, times, condition)
        else:
            made = self.guided.effective(noised, self.timestep, condition, item)
        return (noise - made.epsilon(noised)).float().square().flatten(1).mean(1)


@dataclasses.dataclass(frozen=True)
class UnlearnDiffAtk(Attack):
    """The attack; see the module for the method."""

    id: ClassVar[str] = "unlearndiffatk"
    title: ClassVar[str] = "UnlearnDiffAtk"
    source: ClassVar[str] = "arXiv 2310.11868"
    version: ClassVar[int] = 2
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper:unsafe": {},
        "paper:object": {"tokens": 3},
        "paper:style": {"tokens": 3},
        # 40 target + 40 plain + 10 x (75 x 2 updates + 40 picture) = 1,980 denoiser rows an item.
        "world": {"tokens": 3, "timesteps": 10, "updates": 75, "steps": 20, "batch": 64},
        # 40 + 40 + 3 x (33 x 2 + 40) = 398 rows.
        "quick": {"tokens": 3, "timesteps": 3, "updates": 33, "steps": 20, "batch": 64},
    }

    tokens: int = setting(5, "Searched tokens k", minimum=1, maximum=70)
    placement: str = setting(
        "prefix", "Where they stand", choices=("prefix", "suffix", "middle", "spread", "third")
    )
    timesteps: int = setting(50, "Timesteps visited, evenly over the schedule", minimum=1)
    updates: int = setting(40, "Updates at each timestep", minimum=1)
    lr: float = setting(0.01, "Adam's learning rate", minimum=0)
    weight_decay: float = setting(0.1, "Adam's L2 weight decay", minimum=0)
    clip: float = setting(1.0, "Bound of each entry of the one-hot gradient", minimum=0)
    target: str = setting(
        "original", "Whose picture is the target: the unerased model's, one of the concept, the attacked model's own",
        choices=TARGETS,
    )  # fmt: skip
    loss: str = setting(
        "auto", "Which prediction: the effective one where a defence acts on guidance, else the prompt's own",
        choices=("auto", "conditional", "guided"),
    )  # fmt: skip
    rng: str = setting(
        "private",
        "private: noise and draws run on; official: they repeat after each picture, as published",
        choices=("private", "official"),
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
        """Attack each prompt; ``reference`` (default: the model, its edits lifted) makes the targets "original".

        Where the budget is smaller than the settings ask for, updates are cut evenly, then timesteps;
        one that does not pay a single update and its picture is refused.  See
        :meth:`expunge.method.Attack.attack`.
        """
        concept, budget, prompts = received(self, model, concept, judge, budget, prompts)
        original = model if reference is None else reference
        forbidden = Forbidden(model.tokenizer, concept, len(model.token_table()))
        meter = Meter(model, original)
        self._check_loss(model)
        target, given = self._target(model, reference, concept)
        long = without_room(model, [p.text for p in prompts], self.tokens, self.placement)

        def one(part: list[Prompt]) -> tuple[Trials, list[Attempt]]:
            """Some prompts in lock step."""
            trials = Trials(
                model, concept, judge, part, Ledger(len(part), budget.denoiser_rows),
                steps=self.steps, guidance=self.guidance, pictures=2 + (target == "original"),
                rows=2 * self._rows(model),
            )  # fmt: skip
            trials.skip(long)
            return trials, self._search(model, original, trials, forbidden, seed, target, given)

        items, pictures = in_batches(prompts, self.batch, one)
        return assembled(self, judge, budget, seed, items, pictures, meter.read())

    def schedule(
        self, limit: int | None, price: int, last: int, rows: int = 1, targets: int = 1
    ) -> tuple[list[int], int]:
        """Timesteps and updates at each that fit ``limit`` rows with pictures of ``price`` rows.

        With the defaults and ``last = 1000``: 10, 30, ..., 990 and 40.  ``rows``: of one update, in one
        direction; ``targets``: target pictures that are paid for.
        """
        visited, updates = self.timesteps, self.updates
        if limit is not None:
            left = limit - (1 + targets) * price  # the plain picture and the target
            visited = max(1, min(visited, left // (price + 2 * rows)))
            updates = max(0, min(updates, (left // visited - price) // (2 * rows)))
        return [int((2 * i + 1) * last / (2 * visited)) for i in range(visited)], updates

    def _check_loss(self, model: Any) -> None:
        if self.loss == "guided" and not model.two_branches:
            raise MissingCapability(
                f"{self.id}: {model.name} has no unconditional branch, so loss cannot be 'guided'; take 'auto'"
            )

    def _guides(self, model: Any) -> bool:
        return self.loss == "guided" or (self.loss == "auto" and acts_on_guidance(model))

    def _rows(self, model: Any) -> int:
        """Denoiser rows of one loss, in one direction."""
        if not self._guides(model):
            return 1
        made = GuidedPrediction(model, torch.ones(1), self.steps)
        return made.rows + made.extra

    def _target(self, model: Any, reference: Any, concept: Concept) -> tuple[str, Any]:
        """Which target it is, and pictures of the concept where they are it."""
        lifts = reference is not None or len(model.edits) > 0 or bool(model.controls)
        if self.target == "own" or (self.target == "original" and lifts):
            return self.target, None
        found = pictures_of_concept(model, concept, TARGET_PICTURES)
        if found is None and self.target == "pictures":
            raise InputError(
                f"{self.id}: target 'pictures' needs pictures of {concept.name!r}; name files in the concept's images"
            )
        return ("own", None) if found is None else ("pictures", found.pictures)

    def _search(
        self, model: Any, original: Any, trials: Trials, forbidden: Forbidden, seed: int, target: str, given: Any
    ) -> list[Attempt]:  # fmt: skip
        """Search the items whose plain prompt does not show the concept already."""
        details: list[dict[str, Any]] = [{} for _ in trials.prompts]
        ledger = trials.ledger
        last = int(model.pipeline.scheduler.config.num_train_timesteps)
        rows = self._rows(model)
        paid = int(target == "original")
        times, updates = self.schedule(ledger.limit, trials.price, last, rows, paid)
        rest = trials.open.nonzero().flatten().tolist()
        if not rest:
            return trials.attempts(details)
        prompts = [trials.prompts[i] for i in rest]
        latents = self._latents(model, original, trials, rest, seed, target, given)
        spliced = Spliced(
            model, [prompt.text for prompt in prompts], self.tokens, self.placement, forbidden
        )
        guided = None
        if self._guides(model):
            weights = torch.tensor([p.guided(trials.options["guidance"]) for p in prompts])
            guided = GuidedPrediction(model, weights, self.steps)
        loss = DenoisingLoss(model, spliced, latents, seed, item_keys(prompts), guided)
        loss.timestep = times[0]
        own, official = Ledger(len(rest)), self.rng == "official"

        def watch(step: int, ids: Tensor, active: Tensor) -> Tensor:
            """After each timestep: pictures of the arg-max strings; the next timestep."""
            done, remainder = divmod(step + 1, updates)
            if remainder:
                return active
            loss.timestep = times[min(done, len(times) - 1)]
            if official:
                loss.rewind()
            item = active.nonzero().flatten()
            usable = item[spliced.admissible(ids[item], item)]
            texts = spliced.realise(ids[usable], usable)[0]
            before = [float(trials.top[rest[int(i)]]) for i in usable]
            hit = trials.show([rest[int(i)] for i in usable], texts)
            active[usable[hit]] = False
            if target == "own":
                higher = [
                    int(i)
                    for i, was in zip(usable, before, strict=True)
                    if trials.top[rest[int(i)]] > was and bool(active[i])
                ]
                if higher:
                    shown = np.stack([trials.best[rest[i]] for i in higher])
                    loss.latents[higher] = model.latents_of(shown).to(loss.latents)
            return active

        problem = Problem(
            spliced.table, self.tokens, forbidden.allowed, loss,
            realise=spliced.realise, admissible=spliced.admissible, items=len(rest), keys=item_keys(prompts),
            generators=loss.generators if official else None, rows=rows,
            counted=lambda rows: model.cost.add("denoiser", rows, "backward"),
        )  # fmt: skip
        rule = Simplex(updates * len(times), self.lr, self.weight_decay, self.clip)
        found = rule.run(problem, own, seed=seed, watch=watch)
        ledger.spent[rest] += own.spent
        for i, result in zip(rest, found, strict=True):
            details[i] = {
                "ids": result.ids.tolist(), "found": result.text, "realisable": result.realisable,
                "admissible": result.admissible, "last_draw_loss": result.last_draw_loss, "target": target,
            }  # fmt: skip
        return trials.attempts(details)

    def _latents(
        self, model: Any, original: Any, trials: Trials, rest: list[int], seed: int, target: str, given: Any
    ) -> Tensor:  # fmt: skip
        """``x_0`` of each searched item's target; one that the original draws is paid for."""
        prompts = [trials.prompts[i] for i in rest]
        if target == "own":
            latents = model.latents_of(np.stack([trials.best[i] for i in rest]))
        elif target == "pictures":
            latents = model.latents_of(_dealt(given, seed, item_keys(prompts)))
        else:
            with original.lifted():
                targets = outputs(original, prompts, cache=SHARED, **trials.options)
                latents = original.latents_of(targets)
                trials.ledger.spend(rest, trials.price_on(original))
        # An autoencoder may be wider than the denoiser, which is to be given its own precision.
        return latents.to(model.device, model.dtype)  # type: ignore[no-any-return]


def _dealt(pictures: Any, seed: int, keys: Sequence[str]) -> Any:
    """One picture an item, whoever else is attacked."""
    rows = [
        int(torch.randint(len(pictures), (), generator=noise_generator(seed, "target", key)))
        for key in keys
    ]
    return np.asarray(pictures)[rows]
