"""Relearning from pictures: a few ordinary fine-tuning steps on other things bring an erased concept back.

Erasers that push a concept out of reach leave it in the weights, and a little training that has nothing to do with it
can undo the push.  The attack trains the erased denoiser on captioned pictures in which the concept is never seen or
named, draws the attacked prompts after each of several numbers of steps, and puts the weights back, so that the edits
on the model come off as before (source: "Unstable Unlearning", arXiv 2410.08074).

    L = || y - y*(x_t, t, c) ||^2       y: what the denoiser predicts (noise, velocity, ...), t over the whole schedule

``data="related"`` are pictures of other things of the concept's kind, ``"unrelated"`` of other kinds; ``"concept"``
are pictures of the concept itself, which any model learns from: the upper bound.  Fine-tuning teaches, so only the
advantage over a model that never knew the concept counts, along the curve.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from ...concept import Concept
from ...core import finetune, scores
from ...core.curves import Curve, affordable
from ...core.everyday_objects import EVERYDAY_OBJECTS
from ...core.layer_choice import LAYERS, trainable
from ...core.mentions import without
from ...core.target_pictures import concept_pictures, drawn_of, world_pictures
from ...core.trials import Meter, picture_rows, received
from ...errors import SettingError
from ...method import Attack, Attempts, Budget, Judge, Prompt, setting
from ...models.base import Pictures
from ...models.diffusion import DiffusionModel

__all__ = ["RelearningPictures"]


@dataclasses.dataclass(frozen=True)
class RelearningPictures(Attack):
    """The attack; see the module for the method."""

    id: ClassVar[str] = "relearning-pictures"
    title: ClassVar[str] = "Relearning from pictures"
    source: ClassVar[str] = "arXiv 2410.08074"
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    teaches: ClassVar[bool] = True
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        # 40 plain + 5 x 40 + 50 x 16 x 2 = 1,840 denoiser rows an item; the world renders the pictures.  Chosen on 8
        # development prompts of star on ESD: 2 of 8 at best with this rate, 1 with a fifth of it.
        "world": {"lr": 5e-4, "curve": (2, 5, 10, 20, 50), "steps": 20},
        # 40 + 2 x 40 + 8 x 16 x 2 = 376.
        "quick": {"lr": 5e-4, "curve": (2, 8), "steps": 20},
    }

    data: str = setting(
        "related",
        "What is trained on: other things of the kind, of other kinds, or the concept itself",
        choices=("related", "unrelated", "concept"),
    )
    names: tuple[str, ...] = setting(
        (), "What the pictures show; none: the world's, else the anchor (related) or everyday objects"
    )  # fmt: skip
    pictures: int = setting(128, "Pictures, shared by what they show", minimum=1)
    layers: str = setting("full", "What of the denoiser trains", choices=LAYERS)
    lr: float = setting(1e-5, "Learning rate of AdamW", minimum=0)
    weight_decay: float = setting(1e-2, "AdamW's weight decay", minimum=0)
    curve: tuple[int, ...] = setting(
        (50, 100, 200, 500, 1000), "Steps after which all prompts are drawn; the last decides", minimum=1
    )  # fmt: skip
    batch: int = setting(16, "Pictures a step; halve it when memory runs out", minimum=1)
    steps: int = setting(50, "Sampling steps of each picture", minimum=1)
    guidance: float | None = setting(
        None, "Classifier-free guidance; none: the model's own", minimum=0
    )

    def needs_reference(self, concept: Concept) -> bool:
        """Pictures of the concept itself are the original's, where no files are given."""
        return self.data == "concept" and not concept.images

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
        """Fine-tune, draw, put back; ``reference`` (default: the model, its edits lifted) draws what has no picture.

        Numbers of steps that the budget does not pay for are left out; training counts in full for each item.
        See :meth:`expunge.method.Attack.attack`.

        Raises:
            SettingError: The data name the concept, nothing is known to train on, or the budget is too small.
        """
        concept, budget, prompts = received(self, model, concept, judge, budget, prompts)
        model.needs("gradients")
        original = model if reference is None else reference
        meter = Meter(model, original)
        guidance = model.guidance if self.guidance is None else self.guidance
        names = self._names(original, concept)
        price = picture_rows(model, prompts, self.steps, guidance)
        with original.lifted() as bare:
            drawn = picture_rows(bare, prompts, self.steps, guidance)
        drawn *= sum(self._drawn(original, concept, names).values())
        points = tuple(sorted(set(self.curve)))
        prices = [
            price * (2 + i) + drawn + 2 * self.batch * steps for i, steps in enumerate(points)
        ]
        points = affordable(self, budget, points, prices, "steps")
        curve = Curve(
            model, concept, judge, prompts, of="steps", steps=self.steps, guidance=guidance
        )
        curve.points[0] = curve.plain
        origin, found = self._pictures(original, concept, names, guidance, seed)
        curve.share(drawn)
        task = _Relearn(self, model, found, curve, points)
        trained = finetune.fit(
            task,
            finetune.Loop(
                points[-1], finetune.Optimiser(self.lr, name="adamw", weight_decay=self.weight_decay)
            ),
            seed=seed,
            modules=tuple(model.parts().values()),
            label=self.id,
        )  # fmt: skip
        details: list[dict[str, Any]] = [
            {"data": self.data, "pictures_from": origin, "pictures": len(points)} for _ in prompts
        ]
        # The run is shared by all prompts, so its losses stand with the first one only.
        details[0] |= {"losses": trained.report()["losses"], "trained_on": list(names)}
        return curve.attempts(self, budget, seed, meter.read(), details)

    def _names(self, original: Any, concept: Concept) -> tuple[str, ...]:
        """What the pictures show, never the concept unless it is asked for."""
        if self.data == "concept":
            return (concept.name,)
        companions = original.companions
        known = companions.concept(concept.name) if companions is not None else None
        if self.names:
            found = self.names
        elif self.data == "related":
            near = companions.neighbours(known) if known is not None else ()
            found = tuple(near) or ((concept.anchor,) if concept.anchor else ())
        else:
            found = tuple(companions.unrelated) if companions is not None else ()
            found = found or EVERYDAY_OBJECTS[: self.pictures]
        if not found:
            raise SettingError(
                f"{self.id}: nothing is known that is related to {concept.name!r}; give names=, or an anchor"
            )
        # Case does not matter, and neither does a name inside a longer one.
        left = without(found, concept.names)
        if self.names and len(left) < len(found):
            raise SettingError(
                f"{self.id}: names holds {concept.name!r} itself; allowed are other things, or data='concept'"
            )
        return tuple(left)

    def _shares(self, names: Sequence[str]) -> dict[str, int]:
        """How many pictures of each name."""
        each, more = divmod(self.pictures, len(names))
        return {name: each + (i < more) for i, name in enumerate(names) if each + (i < more)}

    def _drawn(self, original: Any, concept: Concept, names: Sequence[str]) -> dict[str, int]:
        """How many pictures of each name the original has to draw."""
        if self.data == "concept":
            return {} if concept.images else {concept.name: self.pictures}
        return {
            name: count
            for name, count in self._shares(names).items()
            if world_pictures(original, Concept(name, concept.kind), 1, 0) is None
        }

    def _pictures(
        self, original: Any, concept: Concept, names: Sequence[str], guidance: float, seed: int
    ) -> tuple[str, Pictures]:
        """Where the pictures come from, and the pictures; none of their captions names the concept."""
        options: dict[str, Any] = {"steps": self.steps, "guidance": guidance}
        if self.data == "concept":
            return concept_pictures(original, concept, self.pictures, seed=seed, **options)
        found, origins = [], []
        for name, count in self._shares(names).items():
            rendered = world_pictures(original, Concept(name, concept.kind), count, seed)
            if rendered is None:
                asked = [
                    Prompt(f"a photo of {name}", seed * 1_000_003 + i, name) for i in range(count)
                ]
                rendered = drawn_of(original, asked, **options)
                origins.append("original")
            else:
                origins.append("world")
            found.append(rendered)
        pictures = np.concatenate([part.pictures for part in found])
        captions = [text for part in found for text in part.captions]
        left = [i for i, text in enumerate(captions) if without([text], concept.names)]
        if not left:
            raise SettingError(f"{self.id}: every caption names {concept.name!r}")
        made = Pictures(pictures[left], None, tuple(captions[i] for i in left))
        return " and ".join(dict.fromkeys(origins)), made


class _Relearn(finetune.Task):
    """Ordinary fine-tuning of the denoiser; draws the prompts when a number of steps is reached."""

    def __init__(
        self, method: RelearningPictures, model: DiffusionModel, found: Pictures, curve: Curve, points: Sequence[int]
    ) -> None:  # fmt: skip
        self.method, self.model, self.curve, self.points = method, model, curve, points
        self.captions = list(found.captions)
        with torch.no_grad():
            self.latents = model.latents_of(found.pictures)

    def parameters(self) -> finetune.Groups:
        return {"denoiser": trainable(self.model, self.method.layers)}

    def step(self, step: finetune.Step) -> dict[str, torch.Tensor]:
        draw = step.generator("pictures")
        pick = torch.randint(len(self.captions), (self.method.batch,), generator=draw)
        clean = self.latents[pick.to(self.latents.device)]
        points, noise = scores.noised(self.model, clean, draw)
        condition = self.model.encode([self.captions[int(i)] for i in pick])
        error = scores.denoising_error(self.model, points, clean, noise, condition)
        self.model.cost.add("denoiser", len(pick), "backward")
        return {"denoiser": error.mean()}

    def after(self, step: finetune.Step, losses: Mapping[str, float]) -> bool:
        done = step.index + 1
        if done in self.points:
            self.curve.share(2 * self.method.batch * (done - self._trained()))
            made = self.model.generate(self.curve.prompts, **self.curve.options)
            self.curve.show(done, made)
        return False

    def _trained(self) -> int:
        """Steps of the last point that was shown."""
        return int(max(self.curve.points))
