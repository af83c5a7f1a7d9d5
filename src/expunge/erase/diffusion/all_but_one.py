"""All but One: the guidance term of one concept is rewritten, everything around it is held.

Classifier-free guidance adds to the unconditional score a term that stands for the text.  Fine-tuning changes
that term for the concept only: to the term of an alternative the user names, or to none, or to its opposite.  The
unconditional score, which every prompt is guided from, is measured while the weights move and held where it was.

Source: AAAI 2024 (arXiv 2312.12807).  **Reconstruction**: no code was published, and of the
paper only the abstract and the first figure's caption were at hand.  From there come the two principles (only the
guidance term is updated, the unconditional score is constrained), the alternative concept, and purification
(:func:`expunge.core.inversion.purify`).  Everything else below is ours: losses, weights, points, layers, numbers.

    g(x_t, c) = eps(x_t, c, t) - eps(x_t, 0, t)                           the guidance term, 0 the empty prompt
    g*        = g_o(x_t, c')  |  -eta g_o(x_t, c)  |  0                   alternative c', away, zero
    L_g       = mean || eps_theta(x_t, c, t) - sg[eps_theta(x_t, 0, t)] - g* ||^2
    L_u       = mean || eps_theta(y_s, 0, s) - eps_o(y_s, 0, s) ||^2
    L         = L_g + lambda L_u

``eps_o`` is the frozen model, ``sg`` stops the gradient, so that L_g cannot be met by moving the unconditional score;
every score is ``(n, c, h, w)`` noise.  ``x_t`` comes from the frozen model's guided sampling towards ``c``, where
the concept is present however far training has come.  ``y_s`` are all ``x_t`` and, as ``constraint_share`` of the
whole, points of the empty prompt and of what is to be kept: elsewhere nothing would hold the unconditional score.

With ``projected`` the gradient of L_g loses what opposes that of L_u before the two are added.  ``bank`` draws points
and frozen scores once; that is exact in kind, since none of them depends on the student.

Guidance-distilled models (Flux) have no unconditional branch.  The empty text takes its place here: L is defined
as above at the model's own guidance, but sampling never asks for what L_u holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...concept import Concept, as_concepts, names_of
from ...core import finetune, scores
from ...core.gradient_surgery import gradients_of, projected
from ...core.layer_choice import LAYERS, trainable
from ...core.projections import kept_texts
from ...core.trajectories import Trajectories
from ...edit import Edit
from ...errors import SettingError
from ...method import Eraser, Judge, setting
from ...models.base import noise_generator
from ...models.diffusion import DiffusionModel
from ...models.types import Condition

__all__ = ["AllButOne"]

GOALS = ("auto", "alternative", "away", "zero")


@dataclasses.dataclass(frozen=True)
class AllButOne(Eraser):
    """All but One; the defaults are our reconstruction, not numbers of the paper."""

    id: ClassVar[str] = "all-but-one"
    title: ClassVar[str] = (
        "All but One: Surgical Concept Erasing with Model Preservation in Text-to-Image Diffusion Models"
    )
    source: ClassVar[str] = "arXiv 2312.12807"
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # Small model: fewer sampling steps, larger learning rate, a bank.  Chosen on 40 development prompts of star.
        "world": {
            "steps": 250, "lr": 5e-4, "batch": 4, "sampling_steps": 20, "bank": 128, "phrases": True,
        },
    }  # fmt: skip

    layers: str = setting("cross-attention", "which modules train", choices=LAYERS)
    goal: str = setting(
        "auto",
        "what the guidance term becomes; auto: the alternative's where one is named, else away",
        choices=GOALS,
    )
    alternative: str | None = setting(None, "what takes the concept's place; its anchor when unset")
    eta: float = setting(1.0, "strength of the push away", minimum=0)
    constraint: float = setting(1.0, "lambda, the weight of the unconditional score", minimum=0)
    constraint_share: float = setting(
        0.5,
        "share of constraint points from the empty prompt and what is kept; the rest are the concept's",
        minimum=0,
        maximum=0.9,
    )
    projected: bool = setting(
        False, "take away what of the guidance term's gradient opposes the constraint's"
    )
    highest_time: float = setting(
        1.0, "train up to this share of the schedule; 0.7 spares the layout", minimum=0, maximum=1
    )
    steps: int = setting(1000, "optimiser steps", minimum=1)
    lr: float = setting(2e-5, "learning rate of Adam", minimum=0)
    batch: int = setting(4, "points of the concept a step", minimum=1)
    guidance: float = setting(3.0, "guidance of the sampling that gives the points", minimum=0)
    sampling_steps: int = setting(50, "sampling steps of a whole trajectory", minimum=2)
    phrases: bool = setting(False, "erase the concept's listed phrases as well as its name")
    bank: int | None = setting(
        None, "points drawn once and reused; fresh ones every step when unset", minimum=1
    )

    def erase(
        self,
        model: DiffusionModel,
        concepts: Any,
        *,
        keep: Sequence[Any] = (),
        data: Any = None,
        judge: Judge | None = None,
        seed: int = 0,
        run: str | Path | None = None,
    ) -> Edit:
        """Learn an edit of the denoiser.

        ``keep``: names, concepts or prompts; constraint points are drawn from them beside the empty prompt.

        Raises:
            SettingError: ``goal`` is ``alternative`` and a concept has none; an alternative is itself erased; or
                no sampling step lies below ``highest_time``.
        """
        model.check_family(self)
        self.without_data(data)
        model.needs("gradients")
        wanted = as_concepts(concepts, keep)
        told = kept_texts(keep)
        counted = model.cost.snapshot()
        goals = self._goals(wanted)
        task = _Surgery(self, model, goals, told, seed)
        return finetune.train_edit(
            self,
            model,
            wanted,
            task,
            finetune.Loop(steps=self.steps, optimiser=finetune.Optimiser(lr=self.lr)),
            seed=seed,
            keep=names_of(keep),
            run=run,
            cost_before=counted,
            report=task.report,
        )

    def _goals(self, concepts: Sequence[Concept]) -> dict[str, tuple[str, float]]:
        """Text that is erased -> ``(text, factor)``: its guidance term becomes the factor times the other's."""
        if self.alternative is not None and self.goal in ("away", "zero"):
            raise SettingError(
                f"{self.id}: alternative={self.alternative!r} has no part in goal={self.goal!r}; leave one out"
            )
        erased = {name.lower() for concept in concepts for name in concept.names}
        found = {}
        for concept in concepts:
            instead = self.alternative if self.alternative is not None else concept.anchor
            if self.goal == "alternative" and instead is None:
                raise SettingError(
                    f"{self.id}: goal='alternative', but {concept.name!r} has no anchor; give one, or "
                    "alternative=..., or take goal='away' or 'zero'"
                )
            if self.goal in ("away", "zero"):
                instead = None
            if instead is not None and instead.lower() in erased:
                raise SettingError(
                    f"{self.id}: {concept.name!r} shall become {instead!r}, which is erased as well; choose "
                    "another alternative"
                )
            for name in concept.names if self.phrases else (concept.name,):
                away = 0.0 if self.goal == "zero" else -self.eta
                found[name] = (name, away) if instead is None else (instead, 1.0)
        return found


class _Surgery(finetune.Task):
    """The loss above.  Made while the model is ``eps_o``.

    Attributes:
        points: ``x_t`` with ``goal = g*`` and ``empty = eps_o(x_t, 0)``.
        others: Sources of further ``y_s`` with ``empty``; they take turns.
        parts: L_g, L_u and whether their gradients conflicted (NaN: not compared), each step.
        report: For the manifest; complete when training has ended.
    """

    def __init__(
        self,
        method: AllButOne,
        model: DiffusionModel,
        goals: Mapping[str, tuple[str, float]],
        kept: Sequence[str],
        seed: int,
    ) -> None:
        self.method, self.model = method, model
        self.trained = trainable(model, method.layers)
        texts = list(goals)
        self.factors = torch.tensor([factor for _, factor in goals.values()])
        with torch.no_grad():
            self.concept = model.encode(texts).detach()
            self.towards = model.encode([text for text, _ in goals.values()]).detach()
            self.empty = model.unconditional().detach()
        self.protected: dict[str, Tensor] = {}
        self.parts: list[tuple[float, float, float]] = []
        self.now = (0.0, 0.0, 0.0)
        self.report: dict[str, Any] = {
            "goals": {text: {"towards": t, "factor": f} for text, (t, f) in goals.items()},
        }
        walk: dict[str, Any] = {
            "steps": method.sampling_steps, "low": _first_depth(model, method),
        }  # fmt: skip
        self.points = scores.PointSource(
            model, texts, guidance=method.guidance, seed=seed, batch=method.batch, bank=method.bank,
            answer=self.target, **walk,
        )  # fmt: skip
        # No walk of theirs may start from the noise of the concept's.
        self.seed = int(torch.randint(2**31, (1,), generator=noise_generator(seed, "constraint")))
        self.others = self._sources(kept, walk) if method.constraint or method.projected else []

    def _sources(self, kept: Sequence[str], walk: Mapping[str, Any]) -> list[scores.PointSource]:
        method = self.method
        share = method.constraint_share / (1 - method.constraint_share)
        if not share:
            return []
        # Where the empty prompt is walked towards, guidance would add nothing but a second branch.
        alone = 1.0 if self.model.two_branches else method.guidance
        listed = [([""], alone)] + ([(list(kept), method.guidance)] if kept else [])
        held = None if method.bank is None else max(1, round(method.bank * share / len(listed)))
        return [
            scores.PointSource(
                self.model, texts, guidance=guidance, seed=self.seed + number,
                batch=max(1, round(method.batch * share)), bank=held, answer=self.held, partial=True,
                **walk,
            )
            for number, (texts, guidance) in enumerate(listed)
        ]  # fmt: skip

    def parameters(self) -> finetune.Groups:
        return {"denoiser": self.trained}

    def step(self, step: finetune.Step) -> dict[str, Tensor]:
        """``L``, from one pass over the concept's points under both prompts and the others under none."""
        points, answers = self.points.at(step)
        held, still, n = [answers["empty"]], [], len(points.which)
        if self.others:
            # Banks are picked from by the step's seed: with the concept's, the same rows would always meet.
            own = dataclasses.replace(step, seed=self.seed)
            other, more = self.others[step.index % len(self.others)].at(own)
            still, held = [other], [*held, more["empty"]]
        everywhere = Trajectories.concatenate([points, points, *still])
        rows = Condition.concatenate(
            [self.concept.select(points.which), self.empty.repeat(len(everywhere.which) - n)]
        )
        made = scores.epsilon(self.model, everywhere, rows)
        term = (made[:n] - made[n : 2 * n].detach() - answers["goal"]).square().mean()
        drift = (made[n:] - torch.cat(held)).square().mean()
        self.now = (float(term.detach()), float(drift.detach()), float("nan"))
        passes = 1
        if self.method.projected:
            self.protected = gradients_of(drift, self.trained)
            passes, drift = 2, drift.detach()
        if not self.method.constraint:
            drift = drift.detach()
        self.model.cost.add("denoiser", passes * len(made), "backward")
        return {"denoiser": term + self.method.constraint * drift}

    def gradients(self, step: finetune.Step, group: str, gradients: dict[str, Tensor]) -> None:
        """The projected gradient of L_g plus lambda times that of L_u."""
        if not self.method.projected:
            return
        found, conflict = projected(gradients, self.protected, whole=True)
        self.now = (*self.now[:2], conflict)
        gradients.update(found)
        for name, gradient in self.protected.items():
            if name in gradients:
                gradients[name] = gradients[name] + self.method.constraint * gradient

    def after(self, step: finetune.Step, losses: Mapping[str, float]) -> bool:
        """Note the parts of the loss."""
        self.parts.append(self.now)
        if step.last:
            self._summarise()
        return False

    def state(self) -> dict[str, Tensor]:
        return {"parts": torch.tensor(self.parts, dtype=torch.float64).reshape(-1, 3)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.parts = [(float(a), float(b), float(c)) for a, b, c in state["parts"]]
        self._summarise()

    def _summarise(self) -> None:
        """Means of the last tenth of the training."""
        every = torch.tensor(self.parts, dtype=torch.float64)
        recent = every[-max(1, self.method.steps // 10) :].mean(0)
        self.report["guidance_term_loss"] = float(recent[0])
        self.report["unconditional_drift"] = float(recent[1])
        if self.method.projected:
            self.report["conflicts"] = float(every[:, 2].mean())

    def target(self, points: Trajectories) -> dict[str, Tensor]:
        """``g*`` and ``eps_o(0)`` of each point, frozen model."""
        conditions = [self.empty]
        if bool(self.factors.any()):
            conditions.append(self.towards.select(points.which))
        empty, *towards = scores.asked(self.model, points, conditions)
        factor = self.factors[points.which].to(empty.device).reshape(-1, 1, 1, 1)
        goal = factor * (towards[0] - empty) if towards else torch.zeros_like(empty)
        return {"goal": goal, "empty": empty}

    def held(self, points: Trajectories) -> dict[str, Tensor]:
        """``eps_o(0)`` of each point, frozen model."""
        return {"empty": scores.asked(self.model, points, [self.empty])[0]}


def _first_depth(model: DiffusionModel, method: AllButOne) -> int:
    """The first sampling step at or below ``highest_time``."""
    sampler = model.sampler(method.sampling_steps)
    whole = float(model.pipeline.scheduler.config.num_train_timesteps)
    times = sampler.times[list(sampler.stops)].double() / whole
    below = (times <= method.highest_time).nonzero().flatten()
    if not len(below):
        raise SettingError(
            f"{method.id}: none of {method.sampling_steps} sampling steps lies below highest_time="
            f"{method.highest_time}; the last one is at {float(times[-1]):.3f} of the schedule"
        )
    return int(below[0])
