"""Attacks that let a model draw on from a picture of the concept: image to image, and inpainting.

A picture of the concept is noised to a share of the sampling steps and denoised by the model under attack, with the
attacked prompt.  At a small strength the picture comes through whatever the model knows; the larger it is, the more
has to come from the model.  The picture carries the concept, so these attacks teach: only the advantage over a model
that never knew it counts, strength by strength.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..concept import Concept
from ..errors import SettingError
from ..method import Attack, Attempts, Budget, Judge, Prompt, setting
from ..models.base import Pictures
from ..models.walks import Source
from .curves import Curve, affordable
from .target_pictures import (
    concept_pictures,
    drawn_of,
    other_than,
    said_of_another,
    world_pictures,
)
from .trials import Meter, picture_rows, received

__all__ = ["Redrawing", "Targets", "redraw", "walked_rows"]

TARGETS = 64
"""Pictures of the world at most, which the items take in turn."""


def walked_rows(model: Any, strength: float, steps: int, price: int) -> int:
    """Denoiser rows of a walk of this strength, where a whole picture costs ``price``."""
    sampler = model.sampler(steps)
    first = Source(torch.zeros(1), strength).first(steps, getattr(sampler, "order", 1))
    whole = len(sampler.times)
    return price * (whole - first) // whole


def redraw(
    model: Any,
    latents: Tensor,
    prompts: Sequence[Prompt],
    *,
    strength: float,
    steps: int,
    guidance: float,
    kept: Tensor | None = None,
    noise: str = "noise over a picture",
    batch: int = 32,
) -> np.ndarray:
    """Pictures uint8 ``(n, H, W, 3)`` that a model, as it is now, draws on from others.

    Args:
        model: Edits and controls act as they do in any sampling.
        latents: Scaled clean latents ``(n, channels, height, width)`` of what it sets out from.
        prompts: What each is to become, with the seed of its noise.
        strength: Share of the steps that are walked.
        steps, guidance: Of the sampling.
        kept: ``(n, 1, height, width)``, 1 where the latents stay.
        noise: Purpose the noise is drawn for.
        batch: Pictures at a time.
    """
    made = []
    with torch.no_grad():
        for first in range(0, len(prompts), batch):
            part = slice(first, first + batch)
            asked = prompts[part]
            weight = torch.tensor([p.guided(guidance) for p in asked], dtype=torch.float64)
            source = Source(
                latents[part], strength, None if kept is None else kept[part], noise=noise
            )
            walked = model.sample(
                model.encode([p.text for p in asked]), [p.seed for p in asked], steps=steps,
                guidance=weight, source=source,
            )  # fmt: skip
            made.append(model.pictures_of(walked))
    return np.concatenate(made)


@dataclasses.dataclass(frozen=True)
class Targets:
    """What the items set out from.

    Attributes:
        origin: ``files``, ``original`` or ``world``.
        found: A picture for each item, with masks where they are known.
    """

    origin: str
    found: Pictures


@dataclasses.dataclass(frozen=True)
class Redrawing(Attack):
    """What both attacks share: targets, strengths, accounts."""

    strengths: tuple[float, ...] = setting(
        (0.3, 0.5, 0.7, 0.9), "Shares of the sampling steps that are walked; the largest decides",
        minimum=1e-6, maximum=1,
    )  # fmt: skip
    target: str = setting(
        "auto",
        "Where the picture comes from: the concept's files, the unerased model, the world; auto: the first there is",
        choices=("auto", "files", "original", "world"),
    )
    shows: str = setting(
        "concept",
        "What the picture shows; other: something else of the kind, the control",
        choices=("concept", "other"),
    )
    steps: int = setting(50, "Sampling steps of a whole picture", minimum=1)
    guidance: float | None = setting(
        None, "Classifier-free guidance; none: the model's own", minimum=0
    )
    batch: int = setting(32, "Pictures at a time; halve it when memory runs out", minimum=1)

    def order(self) -> tuple[str, ...]:
        """Where targets are looked for under ``auto``, first come first."""
        return ("files", "original")

    def needs_reference(self, concept: Concept) -> bool:
        """The original draws the targets, where they are no files and not the world's."""
        files = bool(concept.images) and self.shows == "concept"
        return self.target == "original" or (self.target == "auto" and not files)

    def kept(self, model: Any, targets: Targets) -> tuple[Tensor | None, Mapping[str, Any]]:
        """What of the latents stays, ``(n, 1, height, width)``, and what is to be recorded of it."""
        return None, {}

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
        """Draw on at every strength; ``reference`` (default: the model, its edits lifted) draws the targets.

        Strengths that the budget does not pay for are left out, the largest first.  See
        :meth:`expunge.method.Attack.attack`.
        """
        concept, budget, prompts = received(self, model, concept, judge, budget, prompts)
        original = model if reference is None else reference
        meter = Meter(model, original)
        guidance = model.guidance if self.guidance is None else self.guidance
        price = picture_rows(model, prompts, self.steps, guidance)
        strengths = sorted(set(self.strengths))
        each = {s: walked_rows(model, s, self.steps, price) for s in strengths}
        drawn = 0
        if self._origin(original, concept) == "original":
            with original.lifted() as bare:
                drawn = picture_rows(bare, prompts, self.steps, guidance)
        prices = [price + drawn + sum(list(each.values())[: i + 1]) for i in range(len(each))]
        strengths = list(affordable(self, budget, strengths, prices, "strengths"))
        curve = Curve(
            model, concept, judge, prompts, of="strength", steps=self.steps, guidance=self.guidance
        )
        targets = self._targets(original, concept, curve, seed)
        curve.spent += drawn
        shown = judge.judge(targets.found.pictures, concept, curve.prompts)
        with torch.no_grad():
            latents = model.latents_of(targets.found.pictures)
        kept, more = self.kept(model, targets)
        for strength in strengths:
            pictures = redraw(
                model, latents, curve.prompts, strength=strength, steps=self.steps, guidance=guidance, kept=kept,
                noise=f"{self.id} {seed}", batch=self.batch,
            )  # fmt: skip
            curve.show(strength, pictures, each[strength])
        details = [
            {"target": targets.origin, "shows": self.shows, "target_hit": bool(hit), **more}
            for hit in shown.hit
        ]
        return curve.attempts(self, budget, seed, meter.read(), details)

    def _origin(self, original: Any, concept: Concept) -> str:
        """Where the targets come from; files show the concept, so nothing else can be asked of them."""
        can = {
            "files": bool(concept.images) and self.shows == "concept",
            "world": world_pictures(original, concept, 1, 0) is not None,
            "original": True,
        }
        wanted = self.order() if self.target == "auto" else (self.target,)
        found = next((name for name in wanted if can[name]), None)
        if found is None:
            why = {
                "files": f"{concept.name!r} names no picture files, or shows='other' is asked for",
                "world": f"{original.name} has no world with pictures of {concept.name!r} in its size",
            }[self.target]
            raise SettingError(f"{self.id}: target={self.target!r} cannot be had: {why}")
        return found

    def _targets(self, original: Any, concept: Concept, curve: Curve, seed: int) -> Targets:
        origin, count = self._origin(original, concept), len(curve.prompts)
        options: dict[str, Any] = {"steps": self.steps, "guidance": curve.options["guidance"]}
        other = other_than(original, concept) if self.shows == "other" else None
        if origin == "original":
            asked = curve.prompts
            if other is not None:
                asked = [said_of_another(prompt, concept, other) for prompt in asked]
            return Targets(origin, drawn_of(original, asked, **options))
        if origin == "files":
            found = concept_pictures(original, concept, count, seed=seed, **options)[1]
        else:
            about = concept if other is None else Concept(other, kind=concept.kind)
            rendered = world_pictures(original, about, min(count, TARGETS), seed)
            if rendered is None:
                raise SettingError(f"{self.id}: the world has no pictures of {other!r}")
            found = rendered
        turn = [i % len(found.pictures) for i in range(count)]
        masks = None if found.masks is None else np.asarray(found.masks)[turn]
        captions = tuple(found.captions[i] for i in turn)
        return Targets(origin, Pictures(found.pictures[turn], masks, captions))
