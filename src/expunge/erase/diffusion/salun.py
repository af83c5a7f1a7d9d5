"""SalUn: the concept is taught to look like something else, in the weights that matter for it.

Pictures of the concept are noised, and the prediction for their captions is drawn to the model's own prediction for
the same captions with another concept in its place; a second term keeps ordinary denoising of other pictures.  Only
the half of all weights with the largest summed gradient of a forgetting loss may move, as a hard constraint.

Source: arXiv 2310.12508 (ICLR 2024), its text-to-image form.  ``z_t`` are noised latents of the concept's pictures
with noise ``n``, ``c_f`` their captions, ``c_other`` the captions with the replacement, ``sg`` a stopped gradient:

    g     = | sum over batches of  grad mean || n - ( (1 + s) e(z_t, c_f) - s e(z_t, 0) ) ||^2 |   at the start
    m     = 1 on the int(ratio * count) largest entries of g over all trained tensors together
    L     = mean || e(z_t, c_f) - sg e(z_t, c_other) ||^2  +  alpha mean || n' - e(z'_t, c_r) ||^2
    theta = m * (theta_0 + change) + (1 - m) * theta_0

``e`` is the model as it is by then, in both predictions of the first term; ``z'_t`` and ``n'`` belong to pictures of
what is to be retained, ``c_r`` their captions.  Signs are kept while gradients are summed; masks hold exactly.

``c_other`` is the concept's anchor (``other`` wins over it; styles without one become "art", all else the caption
without the name).  Where its pictures come from: ``data``, else the files it names, else the model's world, else the
model draws them.  Retained are pictures of every other name in ``data``, of what is to be kept, and of the anchor.

The authors' code encodes the pictures twice, so that the two predictions see slightly different latents, and for a
time did not apply the mask; here both see one latent.  Ours: thresholds count the tensors that train (with ``xattn``
not the whole network); a step's retained pictures are drawn with replacement; captions of retained pictures that
name what an audit of the model's world measures as kept are left out, unless it was named to be kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...concept import Concept, as_concepts, listed
from ...core import examples, finetune, saliency, scores
from ...core.examples import Shown
from ...core.layer_choice import trainable
from ...core.mentions import exchanged, without
from ...core.projections import guide_of, kept_texts
from ...core.trajectories import Trajectories
from ...edit import Edit
from ...errors import InputError, SettingError
from ...method import Eraser, Judge, setting
from ...models.base import Pictures, noise_generator
from ...models.diffusion import DiffusionModel
from ...models.types import Condition

__all__ = ["SalUn"]

LAYERS = {"full": "full", "xattn": "cross-attention"}
"""The paper's names of the choices of :mod:`expunge.core.layer_choice`."""

TEMPLATE = "an image of {}"


@dataclasses.dataclass(frozen=True)
class SalUn(Eraser):
    """Saliency unlearning of text-to-image models; defaults are the paper's for a class."""

    id: ClassVar[str] = "salun"
    title: ClassVar[str] = (
        "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in Both Image "
        "Classification and Generation"
    )
    source: ClassVar[str] = "arXiv 2310.12508"
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper:object": {},
        "paper:unsafe": {"epochs": 1, "other": "a person wearing clothes"},
        # One trial on 40 development prompts: star in none of the pictures, 70 % of the untold neighbours kept.
        "world": {"steps": 120, "lr": 2e-4, "batch": 16, "pictures": 128, "sampling_steps": 20},
    }

    ratio: float = setting(0.5, "Share of all trained entries that may move", minimum=0, maximum=1)
    mask: str = setting("salient", "Which entries may move", choices=saliency.CHOICES)
    mask_guidance: float = setting(7.5, "Guidance s of the loss that makes the mask", minimum=0)
    alpha: float = setting(0.5, "Weight of retained pictures", minimum=0)
    lr: float = setting(1e-5, "Learning rate of Adam", minimum=0)
    layers: str = setting("full", "Which modules train", choices=tuple(LAYERS))
    epochs: int = setting(5, "Passes over the concept's pictures", minimum=1)
    steps: int | None = setting(
        None, "Optimiser steps; none: as many as the epochs make", minimum=1
    )
    batch: int = setting(8, "Pictures of the concept a step, and retained ones", minimum=1)
    pictures: int = setting(800, "Pictures of either kind, where none are given", minimum=1)
    other: str | None = setting(None, "What the concept is to look like; none: its anchor")
    erase_phrases: bool = setting(True, "Erase the concept's listed phrases too")
    sampling_steps: int = setting(50, "Sampling steps of pictures the model draws", minimum=2)
    guidance: float = setting(7.5, "Guidance of pictures the model draws", minimum=0)

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
        """Make the mask, train.

        ``data`` is a mapping with ``pictures``, name -> ``(pictures, masks or None, captions)`` (see
        :class:`~expunge.models.base.Pictures`; masks are not used): of the concepts, and of what is retained.
        """
        model.check_family(self)
        model.needs("gradients")
        wanted = as_concepts(concepts, keep)
        counted = model.cost.snapshot()
        pictures, _ = examples.given(data, model, parts=("pictures",))
        # Refused before pictures are made: nothing to train, to take a concept's place, or to retain.
        trainable(model, LAYERS[self.layers])
        guides = [guide_of(concept, self.other) for concept in wanted]
        named = self._named(wanted, guides, kept_texts(keep), pictures)
        own = examples.at_hand(model, [*wanted, *listed(keep)], pictures)
        forget = {c.name: self._forgotten(model, c, own, seed) for c in wanted}
        retain = self._retained(model, wanted, named, own, seed) if self.alpha else {}
        task = _Relabelling(self, model, wanted, forget, retain, seed)
        report: dict[str, Any] = {
            "pictures": {n: origin for n, (origin, _) in {**retain, **forget}.items()},
            "retained": list(retain),
            "named_like_the_erased": [text for text in kept_texts(keep) if text not in named],
        }
        digest = examples.examples_digest({**retain, **forget})
        if self.mask != "none":
            settings = finetune.request(self, model, wanted, keep=kept_texts(keep), data=digest)
            task.chosen, _ = saliency.intersected(
                [task.mask], run=run, settings={**settings, "seed": seed}, label=f"{self.id}: mask"
            )
            report["mask"] = saliency.report(task.chosen)
        steps = self.steps or self.epochs * math.ceil(len(task.forget) / self.batch)
        return finetune.train_edit(
            self, model, wanted, task, finetune.Loop(steps, finetune.Optimiser(self.lr)), seed=seed,
            keep=kept_texts(keep), run=run, data_digest=digest, report=report, cost_before=counted,
        )  # fmt: skip

    # -- pictures ------------------------------------------------------------------------------

    def _shown(
        self,
        model: DiffusionModel,
        names: Sequence[str],
        own: Mapping[str, Shown],
        count: int,
        seed: int,
    ) -> Shown:
        """Pictures of the first name, and where they come from; the model is asked by all names in turn."""
        texts = [TEMPLATE.replace("{}", name) for name in names]
        return examples.examples(
            model, names[0], own, count=count, texts=texts, seed=seed, steps=self.sampling_steps,
            guidance=self.guidance,
        )  # fmt: skip

    def _forgotten(
        self,
        model: DiffusionModel,
        concept: Concept,
        own: Mapping[str, Shown],
        seed: int,
    ) -> Shown:
        """Pictures of a concept, each caption naming it by one of its names in turn."""
        names = concept.names if self.erase_phrases else (concept.name,)
        origin, found = self._shown(model, names, own, self.pictures, seed)
        known = model.companions.concept(concept.name) if model.companions is not None else None
        spoken = (*concept.names, *(known.names if known is not None else ()))
        return origin, examples.called(found, spoken, names)

    def _named(
        self,
        concepts: Sequence[Concept],
        guides: Sequence[str],
        keep: Sequence[str],
        data: Mapping[str, Pictures],
    ) -> list[str]:
        """What is retained: what is given, kept, or takes a concept's place, and names no concept."""
        erased = [name for c in concepts for name in c.names]
        given = [name for name in data if name not in {c.name for c in concepts}]
        named = without([n for n in dict.fromkeys([*given, *keep, *guides]) if n], erased)
        for name in given:
            if name not in named:
                raise InputError(
                    f"data: {name!r} names what is erased, but pictures of that stand under a concept's own name, "
                    f"{', '.join(repr(c.name) for c in concepts)}, and pictures to retain under another"
                )
        if self.alpha and not named:
            raise self._nothing()
        return named

    def _nothing(self) -> SettingError:
        return SettingError(
            f"{self.id}: alpha is {self.alpha:g}, but there is nothing to retain; name what to keep, give the "
            "concept an anchor or pictures of something else as data, or set alpha=0"
        )

    def _retained(
        self,
        model: DiffusionModel,
        concepts: Sequence[Concept],
        named: Sequence[str],
        own: Mapping[str, Shown],
        seed: int,
    ) -> dict[str, Shown]:
        """Pictures of what is named, by captions that name no concept."""
        erased = [name for c in concepts for name in c.names]
        banned = [*erased, *self._untold(model, concepts, named)]
        each = math.ceil(self.pictures / max(1, len(named)))
        found: dict[str, Shown] = {}
        for name in named:
            origin, shown = self._shown(model, (name,), own, each, seed)
            # A user's own captions are bound by the concepts alone.
            left = set(without(shown.captions, banned if origin in ("world", "model") else erased))
            rows = [i for i, caption in enumerate(shown.captions) if caption in left]
            if not rows and origin == "data":
                raise InputError(
                    f"data: every caption of {name!r} names what is erased, so none of its pictures can be retained"
                )
            if rows:
                found[name] = (
                    origin,
                    Pictures(shown.pictures[rows], None, tuple(shown.captions[i] for i in rows)),
                )
        if not found:
            raise self._nothing()
        return found

    def _untold(
        self, model: DiffusionModel, concepts: Sequence[Concept], named: Sequence[str]
    ) -> list[str]:
        """Names and phrases of what an audit of the model's world measures as kept, unless it was named."""
        if model.companions is None:
            return []
        known = [c for c in concepts if model.companions.concept(c.name) is not None]
        measured = [n for c in known for n in model.companions.neighbours(c)]
        told = {word.lower() for name in named for word in (name, *name.split())}
        untold = [n for n in (*measured, *model.companions.unrelated) if n.lower() not in told]
        found = {n: model.companions.concept(n) for n in untold}
        return [word for n, c in found.items() for word in ((n,) if c is None else c.names)]


class _Latents:
    """Latents of pictures and the conditions of their captions."""

    def __init__(self, model: DiffusionModel, shown: Sequence[Pictures]) -> None:
        self.model = model
        self.latents = torch.cat([model.latents_of(found.pictures).cpu() for found in shown])
        self.captions = [caption for found in shown for caption in found.captions]
        with torch.no_grad():
            self.condition = model.encode(self.captions).detach()

    def __len__(self) -> int:
        return len(self.captions)

    def noised(self, rows: Tensor, draw: torch.Generator) -> tuple[Trajectories, Tensor]:
        """``z_t`` of some pictures and the noise in them."""
        return scores.noised(self.model, self.latents[rows], draw, which=rows)


class _Relabelling(finetune.Task):
    """Mask and loss of the module's equations."""

    def __init__(
        self,
        method: SalUn,
        model: DiffusionModel,
        concepts: Sequence[Concept],
        forget: Mapping[str, Shown],
        retain: Mapping[str, Shown],
        seed: int,
    ) -> None:
        self.method, self.model, self.seed = method, model, seed
        self.chosen: dict[str, Tensor] = {}
        self.forget = _Latents(model, [found for _, found in forget.values()])
        self.retain = _Latents(model, [found for _, found in retain.values()]) if retain else None
        others = [
            exchanged(caption, concept.names, guide_of(concept, method.other))[0].strip()
            for concept in concepts
            for caption in forget[concept.name][1].captions
        ]
        with torch.no_grad():
            self.other = model.encode(others).detach()
            self.empty = model.unconditional().detach()

    def parameters(self) -> finetune.Groups:
        return {"denoiser": self._pairs()}

    def _pairs(self) -> list[tuple[str, nn.Parameter]]:
        return trainable(self.model, LAYERS[self.method.layers])

    def movable(self) -> Mapping[str, Tensor]:
        return self.chosen

    def mask(self) -> dict[str, Tensor]:
        """``m``, from one pass over the concept's pictures at the weights as they are."""
        gradients = saliency.summed_gradients(self.model, self._pairs(), self._batches())
        return saliency.salient(gradients, self.method.ratio, choice=self.method.mask)

    def _batches(self) -> Iterator[Callable[[], Tensor]]:
        draw, scale = noise_generator(self.seed, "salun mask"), self.method.mask_guidance
        for start in range(0, len(self.forget), self.method.batch):
            rows = torch.arange(start, min(start + self.method.batch, len(self.forget)))
            points, noise = self.forget.noised(rows, draw)

            def loss(points: Trajectories = points, noise: Tensor = noise) -> Tensor:
                both = Trajectories.concatenate([points, points])
                own = self.forget.condition.select(points.which)
                rows = Condition.concatenate([own, self.empty.repeat(own.rows)])
                named, empty = scores.epsilon(self.model, both, rows).chunk(2)
                self.model.cost.add("denoiser", 2 * own.rows, "backward")
                return (noise - (1 + scale) * named + scale * empty).square().mean()

            yield loss

    def step(self, step: finetune.Step) -> dict[str, Tensor]:
        """L of one batch: pictures of the concept in the order of the epoch, retained ones at random."""
        model, method, draw = self.model, self.method, step.generator()
        points, _ = self.forget.noised(self._order(step.index), draw)
        count = len(points.which)
        with torch.no_grad():
            target = scores.epsilon(model, points, self.other.select(points.which))
        rows, noise = self.forget.condition.select(points.which), None
        if self.retain is not None:
            pick = torch.randint(len(self.retain), (method.batch,), generator=draw)
            kept, noise = self.retain.noised(pick, draw)
            rows = Condition.concatenate([rows, self.retain.condition.select(kept.which)])
            points = Trajectories.concatenate([points, kept])
        made = scores.epsilon(model, points, rows)
        model.cost.add("denoiser", len(made), "backward")
        loss = (made[:count] - target).square().mean()
        if noise is not None:
            loss = loss + method.alpha * (noise - made[count:]).square().mean()
        return {"denoiser": loss}

    def _order(self, index: int) -> Tensor:
        """Which pictures of the concept a step takes: each once in an epoch."""
        total, size = len(self.forget), min(self.method.batch, len(self.forget))
        epoch, place = divmod(index, math.ceil(total / size))
        draw = noise_generator(self.seed, "salun epoch", epoch)
        return torch.randperm(total, generator=draw)[place * size : (place + 1) * size]
