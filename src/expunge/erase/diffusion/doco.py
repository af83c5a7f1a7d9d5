"""DoCo: the outputs for a concept are made indistinguishable from those for an anchor.

A discriminator tells the clean picture that the student sees for a concept's prompt from the one that the frozen
model sees for the anchor's prompt, in the same noised anchor picture; the student learns to be mistaken.  Matching
the outputs' distribution instead of single predictions is meant to reach prompts that training never saw.  Before
each step the part of the gradient that would raise the denoising loss on anchor pictures is taken away.

Source: Wu et al., AAAI 2025 (arXiv 2405.15304).  ``x_t`` and ``x'_t`` are noised anchor pictures, ``c`` their anchor
prompts, ``c*`` those for the concept, ``x0(eps) = (x_t - sigma eps) / alpha`` the clean latents ``(n, c, h, w)``:

    x_fake  = x0( eps_theta(x_t, c*, t) )           x_real = x0( eps_o(x_t, c, t) )
    L_D     = BCE(D(x_real), 0) + BCE(D(sg[x_fake]), 1)
    L_adv   = BCE(D(x_fake), 0)
    L_prior = mean || eps_theta(x'_t, c, t') - noise' ||^2
    a, b    = gradients of L_adv and L_prior, each with norm at most 1
    step    = a - strength (<a, b> / <b, b>) b   where <a, b> < 0, for every tensor by itself; else a

For the first ``warm_up`` steps only D learns; ``b`` itself is never followed.  Without ``surgery`` the step follows
``L_adv + 0.1 prior_weight L_prior``.  The gradient of a step is that of its start for both networks, so D sees the
``x_fake`` from before the student moves.

The published code multiplies the student's learning rate by the batch (6e-6 becomes 4.8e-5 at batch 8), which is the
default here.  It projects with a unit vector only on one side (``projection="official"``), and leaves in D's
gradient what the student's pass put there, which draws D's answers to fakes towards 0; that is not repeated.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from ...concept import as_concepts, names_of
from ...core import anchor_pictures as anchored
from ...core import finetune, gradient_surgery
from ...core.first_token import first_token_held
from ...core.layer_choice import LAYERS, trainable
from ...core.patch_discriminator import PatchDiscriminator
from ...core.trajectories import Trajectories
from ...edit import Edit
from ...errors import SettingError
from ...method import Eraser, Judge, setting
from ...models.diffusion import DiffusionModel

__all__ = ["DoCo"]

UNGUARDED = 0.1
"""Weight of the prior's loss without surgery, beside ``prior_weight``."""

BINS = 4
"""Shares of the schedule for which the discriminator's accuracy is reported."""


@dataclasses.dataclass(frozen=True)
class DoCo(Eraser):
    """Domain correction with gradient surgery; defaults are the published code's recommended values."""

    id: ClassVar[str] = "doco"
    title: ClassVar[str] = (
        "DoCo: Unlearning Concepts in Diffusion Model via Concept Domain Correction and Concept Preserving Gradient"
    )
    source: ClassVar[str] = "arXiv 2405.15304"
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper:object": {"augment": True},
        "paper:style": {"discriminator_lr": 5e-4},
        "paper:unsafe": {"anchor": "clothed", "pairing": "object", "augment": True},
        # Concept ablation's learning rate.  On 32 development prompts of star: nothing left, by unlisted words
        # neither, the anchor in 94 %, 94 % of the untold neighbours kept.
        "world": {
            "pairing": "object", "phrases": True, "steps": 300, "warm_up": 100, "lr": 2e-4, "batch": 16,
            "pictures": 160, "sampling_steps": 20,
        },
    }  # fmt: skip

    anchor: str | None = setting(
        None, "what the concept is to look like; its own anchor when unset"
    )
    pairing: str = setting(
        "auto", "how an anchor prompt becomes one for the concept; auto: by its kind",
        choices=("auto", *anchored.PAIRINGS),
    )  # fmt: skip
    layers: str = setting("cross-attention-kv", "which modules train", choices=LAYERS)
    surgery: bool = setting(True, "take away what of the gradient opposes the prior's")
    projection: str = setting(
        "exact", "how; official mixes lengths as the published code", choices=gradient_surgery.FORMS
    )
    strength: float = setting(1.0, "lambda, share of the opposing part taken away", minimum=0)
    prior_weight: float = setting(
        1.0, "weight of the prior's loss, times 0.1, where there is no surgery", minimum=0
    )
    discriminator: str = setting(
        "trained",
        "frozen: random weights that never learn, a control",
        choices=("trained", "frozen"),
    )
    augment: bool = setting(False, "make pictures smaller and larger; the paper does, for objects")
    phrases: bool = setting(False, "erase the concept's listed phrases as well as its name")
    steps: int = setting(2000, "steps in all", minimum=1)
    warm_up: int = setting(1000, "first steps in which only the discriminator learns", minimum=0)
    lr: float = setting(
        4.8e-5, "learning rate of AdamW: the paper's 6e-6 times its batch of 8", minimum=0
    )
    discriminator_lr: float = setting(1e-4, "learning rate of the discriminator's Adam", minimum=0)
    batch: int = setting(8, "pictures a step for each loss", minimum=1)
    weight_decay: float = setting(0.01, "of AdamW", minimum=0)
    pictures: int = setting(1000, "anchor pictures that the model makes", minimum=1)
    captions: int = setting(200, "different anchor prompts at most", minimum=1)
    sampling_steps: int = setting(25, "sampling steps of an anchor picture", minimum=1)
    guidance: float = setting(6.0, "guidance of an anchor picture", minimum=0)

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
        """Learn an edit; ``keep`` has no part and is only recorded.

        ``data``: ``captions``, anchor prompts; ``pictures``, a mapping from an anchor's name to pictures of it.

        Raises:
            SettingError: A concept has no anchor, latents are too small for a discriminator, or the warm-up takes all
                steps.
            InputError: The data is not as described, or no caption speaks of the anchor alone.
        """
        model.check_family(self)
        model.needs("gradients")
        wanted = as_concepts(concepts, keep)
        counted, kept = model.cost.snapshot(), names_of(keep)
        if self.discriminator == "trained" and self.warm_up >= self.steps:
            raise SettingError(
                f"{self.id}: the discriminator warms up for warm_up={self.warm_up} of steps={self.steps}, so the model "
                "would never train; allowed is a warm_up below steps"
            )
        # Before a thousand pictures are made: what cannot be trained is refused.
        trainable(model, self.layers)
        PatchDiscriminator(model.latent_shape, seed)
        material = anchored.Material(model, wanted, self, data, seed)
        task = _Correction(self, model, material, seed)
        adamw = finetune.Optimiser(self.lr, "adamw", weight_decay=self.weight_decay)
        adam = finetune.Optimiser(self.discriminator_lr, betas=(0.5, 0.999))
        loop = finetune.Loop(self.steps, adamw, groups={"discriminator": adam})
        with first_token_held(model, task.trained):
            trained = finetune.fit(
                task, loop, seed=seed, modules=(*model.parts().values(), task.judge), run=run,
                settings=finetune.request(self, model, wanted, keep=kept, data=material.digest), label=self.id,
            )  # fmt: skip
        own = [name for name, _ in task.trained]
        return finetune.edit_from(
            self, model, wanted, {n: trained.before[n] for n in own}, {n: trained.values[n] for n in own},
            keep=kept, seed=seed, cost=model.cost.since(counted),
            seconds=trained.seconds, report={**trained.report(), **material.report, **task.report()},
            data_digest=material.digest,
        )  # fmt: skip


class _Correction(finetune.Task):
    """The losses above.

    Attributes:
        seen: Real, fake answers by share of the schedule: how many, and how many were right.
        conflicts: Share of tensors whose gradients were in conflict, each step of the student.
    """

    def __init__(
        self, method: DoCo, model: DiffusionModel, material: anchored.Material, seed: int
    ) -> None:
        self.method, self.model, self.material = method, model, material
        self.trained = trainable(model, method.layers)
        self.judge = PatchDiscriminator(model.latent_shape, seed).to(model.device)
        self.protected: dict[str, Tensor] = {}
        self.seen = torch.zeros(BINS, 2)
        self.conflicts: list[float] = []

    def parameters(self) -> finetune.Groups:
        groups: finetune.Groups = {"denoiser": self.trained}
        if self.method.discriminator == "trained":
            groups["discriminator"] = [
                (f"discriminator.{n}", p) for n, p in self.judge.named_parameters()
            ]
        return groups

    def step(self, step: finetune.Step) -> dict[str, Tensor]:
        """Discriminator alone while it warms up; after that both, from one pass of the student."""
        draw, n = step.generator(), self.method.batch
        batch = self.material.batch(n, draw)
        learns = self.method.discriminator == "trained"
        warming = learns and step.index < self.method.warm_up
        with step.original(), torch.no_grad():
            real = self._clean(batch.points, batch.anchors)
        if warming:
            with torch.no_grad():
                fake = self._clean(batch.points, batch.targets)
            loss = self._discriminated(real, fake, batch.points)
            return {"discriminator": loss}
        others, added, anchors = self.material.anchors_alone(n, draw)
        points = Trajectories.concatenate([batch.points, others])
        made = self.model.predict(
            points.latents, points.timesteps, self.model.encode([*batch.targets, *anchors])
        )  # fmt: skip
        self.model.cost.add("denoiser", 2 * len(points.which), "backward")
        made, latents = made.wide(), points.latents.float()
        fake = made.x0(latents)[:n]
        prior = (made.epsilon(latents)[n:] - added).square().mean()
        answers = self.judge(fake)
        adversarial = functional.binary_cross_entropy_with_logits(
            answers, torch.zeros_like(answers)
        )
        losses = {"denoiser": adversarial}
        if self.method.surgery:
            self.protected = _clipped(gradient_surgery.gradients_of(prior, self.trained))
        else:
            losses["denoiser"] = adversarial + UNGUARDED * self.method.prior_weight * prior
        found = self._discriminated(real, fake.detach(), batch.points)
        if learns:
            losses["discriminator"] = found
        return losses

    def _clean(self, points: Trajectories, texts: Sequence[str]) -> Tensor:
        made = self.model.predict(points.latents, points.timesteps, self.model.encode(texts))
        return made.wide().x0(points.latents.float())

    def _discriminated(self, real: Tensor, fake: Tensor, points: Trajectories) -> Tensor:
        """``L_D``; its answers are counted."""
        answers = self.judge(real), self.judge(fake)
        whole = float(self.model.pipeline.scheduler.config.num_train_timesteps)
        place = (points.timesteps / whole * BINS).long().clamp(max=BINS - 1).cpu()
        right = [answers[0].detach().mean((1, 2, 3)) < 0, answers[1].detach().mean((1, 2, 3)) >= 0]
        # Older answers fade: what is reported is how D does at the end.
        self.seen *= 0.98
        for correct in right:
            self.seen.index_add_(
                0, place, torch.stack([torch.ones(len(place)), correct.cpu().float()], 1)
            )
        goals = torch.zeros_like(answers[0]), torch.ones_like(answers[1])
        return sum(
            functional.binary_cross_entropy_with_logits(a, g)
            for a, g in zip(answers, goals, strict=True)
        )  # type: ignore[return-value]

    def gradients(self, step: finetune.Step, group: str, gradients: dict[str, Tensor]) -> None:
        """The surgery, on the student's gradient only."""
        if group != "denoiser" or not self.method.surgery:
            return
        found, conflicts = gradient_surgery.projected(
            _clipped(gradients), self.protected, form=self.method.projection, strength=self.method.strength
        )  # fmt: skip
        self.conflicts.append(conflicts)
        gradients.update(found)

    def state(self) -> dict[str, Tensor]:
        return {"seen": self.seen, "conflicts": torch.tensor(self.conflicts, dtype=torch.float64)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.seen, self.conflicts = state["seen"].clone(), state["conflicts"].tolist()

    def report(self) -> dict[str, Any]:
        """How the discriminator did at the end, cleanest share of the schedule first, and conflicts on average."""
        count, right = self.seen.unbind(1)
        told: dict[str, Any] = {
            "discriminator_accuracy": [
                float(r / c) if c > 0 else None for c, r in zip(count, right, strict=True)
            ]
        }
        if self.conflicts:
            told["conflicts"] = sum(self.conflicts) / len(self.conflicts)
        return told


def _clipped(gradients: Mapping[str, Tensor], most: float = 1.0) -> dict[str, Tensor]:
    """Gradients whose norm, all tensors together, is at most ``most``."""
    norm = float(torch.stack([g.norm() for g in gradients.values()]).norm()) if gradients else 0.0
    scale = min(1.0, most / norm) if norm > 0 else 1.0
    return {name: gradient * scale for name, gradient in gradients.items()}
