"""SPM: concept-semipermeable membranes, one-dimensional adapters that open as far as a prompt asks for the concept.

Beside every linear and convolution layer of the denoiser's transformer blocks stands an adapter of rank one; the
weights themselves stay as they are.  It learns ESD's loss for the concept and to change nothing for anchors, text
embeddings drawn around it (latent anchoring), so no pictures or captions are needed.  While the model draws, the
likeness of each prompt to the concept is a gate on every adapter (facilitated transport): other prompts see the model
almost as it was, adapters of several concepts add up, and the file works on fine-tuned siblings of the model.

Source: Lyu et al., CVPR 2024 (arXiv 2312.16145).

    y      = W x + sum_c gamma_c (v_reg,c^T x) v_sig,c s         v_reg (width,), v_sig (out,), s = alpha / rank
    L_era  = mean || eps(x_t, c_tar | M) - [ eps(x_t, c_sur) - eta ( eps(x_t, c_tar) - eps(x_t, c_sur) ) ] ||^2
    L_anc  = mean || eps(x_t, c~ | M) - eps(x_t, c~) ||^2        c~ ~ P(c~) proportional to (1 - |cos(c~, c_tar)|)^a
    L      = L_era + lambda L_anc
    gamma_c(p) = factor max( cos(E(p), E(c)), |T(c) and T(p)| / |T(c)| )

``eps( | M)`` has the adapter on, fully open, ``eps`` off.  ``x_t`` stands after ``k ~ U{1, ..., N - 1}`` steps of the
model with its adapter, guided to ``c_tar``.  ``c_sur`` is the empty text unless ``surrogate`` names one.  Anchors and
gate are described in :mod:`expunge.core.embedding_anchors` and :mod:`expunge.core.gated_adapters`.

The gate belongs to the prompt: in guidance both branches of a picture run with it, as the paper evaluates the gated
model for a prompt.  Several concepts of one run, and listed phrases, share one adapter, whose gate is the largest of
theirs; adapters of their own are erased one by one and stacked.

``compat="official"`` is the published code where it leaves the paper: the gate stands on both factors (``gamma^2``, and
cross terms between adapters), anchors are accepted by ``1 - cos`` without the bars.  Its batching slip, which cancels
two of four anchors against each other, is not repeated.  ``time_label="official"`` tells the denoiser ``T - 1 -
floor(k T / N)``, which is noisier than ``x_t`` is.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...concept import Concept, as_concepts, names_of
from ...core import embedding_anchors as around
from ...core import finetune, scores, trajectories
from ...core.gated_adapters import SCORES, Gate, GatedAdapters
from ...core.layer_choice import block_weights
from ...core.low_rank import LowRank, adaptable
from ...core.trajectories import Trajectories
from ...edit import Edit
from ...edit.adapters import ALPHA
from ...edit.deltas import DOWN, UP
from ...errors import SettingError, UnsupportedModel
from ...method import Control, Eraser, Judge, setting
from ...models.diffusion import DiffusionModel
from ...models.types import Condition

__all__ = ["SPM"]

SIZES = (".resolution_embedder.", ".aspect_ratio_embedder.")
"""Layers that see the size of a picture."""

SIDES = (4 / 8, 5 / 8, 6 / 8, 7 / 8)
"""Sides of training pictures over the model's own, where they are random."""


@dataclasses.dataclass(frozen=True)
class SPM(Eraser):
    """Concept-semipermeable membranes; defaults are the paper's."""

    id: ClassVar[str] = "spm"
    title: ClassVar[str] = "One-dimensional Adapter to Rule Them All"
    source: ClassVar[str] = "arXiv 2312.16145"
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper:object": {},
        "paper:style": {"factor": 2.0},
        "paper:unsafe": {"steps": 15_000, "eta": 3.0, "anchoring": 100.0, "factor": 2.0},
        # Chosen on 48 development prompts: star left in 8 %, all other objects kept; at 120 steps, lr 3e-3, eta 2 and
        # anchoring 30 a third was left.
        "world": {
            "steps": 150, "lr": 5e-3, "warmup": 10, "restarts": 1, "batch": 8, "anchors": 1, "eta": 3.0,
            "anchoring": 10.0, "sampling_steps": 20, "bank": 128, "phrases": True,
        },
    }  # fmt: skip

    surrogate: str = setting("", "text the concept is drawn to; the empty one by default")
    eta: float = setting(1.0, "strength of the push away from the concept", minimum=0)
    anchoring: float = setting(1000.0, "weight of latent anchoring, lambda", minimum=0)
    anchors: int = setting(4, "anchors of each point", minimum=0)
    anchor_exponent: float = setting(1.0, "a: how anchors avoid the concept", minimum=0)
    anchor_source: str = setting(
        "gaussian", "random directions or real words", choices=("gaussian", "vocabulary")
    )
    anchor_empty: bool = setting(False, "the empty text is one more anchor")
    vocabulary: int = setting(1000, "words that anchors are drawn from", minimum=1)
    layers: str = setting(
        "blocks", "where adapters stand: transformer blocks, or all linear and convolution layers",
        choices=("blocks", "all"),
    )  # fmt: skip
    rank: int = setting(1, "rank of an adapter", minimum=1)
    alpha: float = setting(1.0, "an adapter counts alpha / rank", minimum=0)
    gate: str = setting("max", "what the gate goes by; open is 1 for every text", choices=SCORES)
    factor: float = setting(1.0, "times the gate; 0 shuts it", minimum=0)
    compat: str = setting(
        "paper", "official: the published code's double gate, anchors without bars", choices=("paper", "official"),
    )  # fmt: skip
    steps: int = setting(3000, "optimiser steps", minimum=1)
    lr: float = setting(1e-4, "largest learning rate of AdamW", minimum=0)
    warmup: int = setting(500, "steps until it is reached", minimum=0)
    restarts: int = setting(3, "falls of the cosine schedule, each from the top", minimum=1)
    weight_decay: float = setting(0.01, "of AdamW", minimum=0)
    batch: int = setting(1, "trajectories a step", minimum=1)
    guidance: float = setting(3.0, "guidance of the walk to x_t", minimum=0)
    sampling_steps: int = setting(30, "steps N of a whole walk", minimum=2)
    walked: str = setting(
        "student", "whose walk gives x_t; with a bank the frozen model's", choices=scores.WALKED
    )
    bank: int | None = setting(
        None, "points drawn once by the frozen model; fresh ones every step when unset", minimum=1
    )
    time_label: str = setting(
        "true", "the time of x_t that is told, its own or the official one", choices=("true", "official"),
    )  # fmt: skip
    sides: str = setting(
        "full", "size of training pictures; random: each side 4 to 7 eighths, UNets only", choices=("full", "random"),
    )  # fmt: skip
    phrases: bool = setting(False, "erase the concept's listed phrases as well as its name")

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
        """Learn adapters; ``keep`` has no part in the method and is only recorded.

        Raises:
            SettingError: Random sides with a bank, whose points are of one size.
            UnsupportedModel: The model reads no text, or the denoiser has no random sides or official time label.
        """
        model.check_family(self)
        self.without_data(data)
        model.needs("gradients", "controls")
        wanted = as_concepts(concepts, keep)
        self._check(model)
        counted, start, kept = model.cost.snapshot(), time.monotonic(), names_of(keep)
        adapters = LowRank(
            model, self._weights(model), rank=self.rank, seed=seed, scale=self.alpha / self.rank,
            purpose="membrane", convolutions=True, start="kaiming",
        )  # fmt: skip
        task = _Membrane(self, model, wanted, adapters, seed)
        adamw = finetune.Optimiser(
            self.lr, "adamw", weight_decay=self.weight_decay, warmup=self.warmup, schedule="cosine",
            cycles=self.restarts,
        )  # fmt: skip
        trained = finetune.fit(
            task, finetune.Loop(self.steps, adamw), seed=seed, modules=tuple(model.parts().values()), run=run,
            settings=finetune.request(self, model, wanted, keep=kept), label=self.id,
        )  # fmt: skip
        return Edit.make(
            self, model, wanted, kind="gated-adapter", tensors=self._tensors(adapters, trained.values),
            acts=True, keep=kept, seed=seed, cost=model.cost.since(counted), seconds=time.monotonic() - start,
            report={**trained.report(), **task.report()},
        )  # fmt: skip

    def _check(self, model: DiffusionModel) -> None:
        if not model.vocabularies():
            raise UnsupportedModel(
                f"{model.name}: spm's anchors and gate compare texts, and {model.layout.title} reads none"
            )
        if self.sides == "random" and self.bank is not None:
            raise SettingError(
                "spm: sides='random' needs fresh points for every size; allowed is sides='full' or no bank"
            )
        if self.sides == "random" and model.layout.part != "unet":
            raise UnsupportedModel(
                f"{model.name}: spm with sides='random' is defined for UNets; {model.layout.title} draws pictures of "
                "one size, so take sides='full'"
            )
        if self.time_label == "official" and model.prediction_kind == "flow":
            raise UnsupportedModel(
                f"{model.name}: spm's official time label is an entry of a list of whole timesteps, which flow "
                "matching does not have; take time_label='true'"
            )

    def _weights(self, model: DiffusionModel) -> list[str]:
        part, possible = f"{model.layout.part}.", set(adaptable(model))
        names = block_weights(model) if self.layers == "blocks" else model.tensors()
        chosen = [name for name in names if name.startswith(part) and name in possible]
        # PixArt embeds the sides of a picture one by one: rows that stand for no text, so nothing says how far to open.
        return [name for name in chosen if not any(sides in name for sides in SIZES)]

    def _tensors(self, adapters: LowRank, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The factors as an edit carries them: kernels of convolutions in their own shape."""
        found = {ALPHA: torch.tensor(float(self.alpha))}
        for name, module in adapters.modules.items():
            shape: Any = module.weight.shape
            down = values[f"{name}.low_rank_down"].detach().float()
            found[UP + name] = values[f"{name}.low_rank_up"].detach().float()
            found[DOWN + name] = down.reshape(-1, *shape[1:])
        return found

    def spoken(self, concepts: Sequence[Concept]) -> list[str]:
        """What is erased and opens the gate."""
        return [text for c in concepts for text in (c.names if self.phrases else (c.name,))]

    @classmethod
    def control(cls, edit: Edit, model: DiffusionModel) -> Control:
        """The adapters with their gate."""
        method = cls(**edit.manifest.settings)
        phrases = method.spoken([Concept.from_dict(c) for c in edit.manifest.concepts])
        gate = Gate(tuple(phrases), method.gate, method.factor)
        return GatedAdapters(model, edit, gate, doubled=method.compat == "official")

    @classmethod
    def regated(cls, edit: Edit, **settings: Any) -> Edit:
        """The same adapters under another gate: ``gate``, ``factor`` or ``compat``; nothing is trained.

        Raises:
            SettingError: Another setting, which would need a new training.
        """
        for name in settings:
            if name not in ("gate", "factor", "compat"):
                raise SettingError(
                    f"spm: {name!r} is part of the training; allowed without it: gate, factor, compat"
                )
        changed = cls.configured(None, **{**edit.manifest.settings, **settings}).settings()
        return Edit(edit.manifest.model_copy(update={"settings": changed}), edit.tensors)


class _Membrane(finetune.Task):
    """The loss above."""

    def __init__(
        self,
        method: SPM,
        model: DiffusionModel,
        concepts: Sequence[Concept],
        adapters: LowRank,
        seed: int,
    ) -> None:
        self.method, self.model, self.adapters = method, model, adapters
        self.texts = method.spoken(concepts)
        with torch.no_grad():
            self.concept = model.encode(self.texts).detach()
            self.empty = model.unconditional().detach()
            self.surrogate = (
                model.encode([method.surrogate]).detach() if method.surrogate else self.empty
            )
        self.signed = method.compat == "official"
        self.words: around.Vocabulary | None = None
        if method.anchor_source == "vocabulary" and method.anchors:
            self.words = around.Vocabulary(
                model, self.concept, [n for c in concepts for n in c.names], limit=method.vocabulary,
                exponent=method.anchor_exponent, signed=self.signed,
            )  # fmt: skip
        self.points = scores.PointSource(
            model, self.texts, steps=method.sampling_steps, guidance=method.guidance, seed=seed,
            batch=method.batch, low=1, bank=method.bank, answer=self.banked,
            walked=method.walked if method.bank is None else "frozen",
        )  # fmt: skip

    def parameters(self) -> finetune.Groups:
        return {"adapters": self.adapters.parameters()}

    def step(self, step: finetune.Step) -> dict[str, Tensor]:
        """``L_era + lambda L_anc`` at one draw of points and anchors."""
        with self.adapters.attached():
            points, answers = self.points.at(step, shape=self.shape(step))
        points = self.told(points)
        anchors = self.drawn(points, step.generator("anchors"))
        target, still = self.frozen(points, anchors, answers.get("target"))
        count, several = len(points.which), 1 + len(anchors)
        with self.adapters.attached():
            made = scores.epsilon(
                self.model,
                Trajectories.concatenate([points] * several),
                Condition.concatenate([self.concept.select(points.which), *anchors]),
            )
        self.model.cost.add("denoiser", len(made), "backward")
        loss = (made[:count] - target).square().mean()
        if anchors:
            loss = loss + self.method.anchoring * (made[count:] - still).square().mean()
        return {"adapters": loss}

    def shape(self, step: finetune.Step) -> tuple[int, int, int] | None:
        """Another size of pictures for each step, where sides are random."""
        if self.method.sides == "full":
            return None
        channels, height, width = self.model.latent_shape
        pick = torch.randint(len(SIDES), (2,), generator=step.generator("sides")).tolist()
        return channels, round(height * SIDES[pick[0]]), round(width * SIDES[pick[1]])

    def told(self, points: Trajectories) -> Trajectories:
        """The points with the times the denoiser is told."""
        if self.method.time_label == "true":
            return points
        steps = self.method.sampling_steps
        whole = int(self.model.pipeline.scheduler.config.num_train_timesteps)
        depths = trajectories.depths_of(self.model, points, steps=steps)
        label = whole - 1 - torch.div(depths * whole, steps, rounding_mode="floor")
        return dataclasses.replace(points, timesteps=label.to(points.timesteps))

    def drawn(self, points: Trajectories, generator: torch.Generator) -> list[Condition]:
        """``c~``: anchors of each point, a condition of ``n`` rows for each."""
        own, method = self.concept.select(points.which), self.method
        found = []
        for _ in range(method.anchors):
            if self.words is not None:
                found.append(self.words.draw(points.which, generator))
                continue
            found.append(
                around.gaussian(own, generator, exponent=method.anchor_exponent, signed=self.signed)
            )
        return [*found, self.empty.repeat(own.rows)] if method.anchor_empty else found

    def frozen(
        self, points: Trajectories, anchors: Sequence[Condition], target: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The erasing target of each point and the predictions for its anchors, in one call without adapters."""
        asked = list(anchors)
        if target is None:
            asked += [self.concept.select(points.which), self.surrogate]
        made = scores.asked(self.model, points, asked) if asked else []
        if target is None:
            *made, concept, surrogate = made
            target = surrogate - self.method.eta * (concept - surrogate)
        return target, torch.cat(made) if made else target[:0]

    def banked(self, points: Trajectories) -> dict[str, Tensor]:
        """What is known of points of a bank beforehand: the erasing target."""
        if self.method.bank is None:
            return {}
        return {"target": self.frozen(self.told(points), (), None)[0]}

    def report(self) -> dict[str, Any]:
        """What opens the gate, and how large the adapters are."""
        numbers = sum(parameter.numel() for _, parameter in self.adapters.parameters())
        return {
            "phrases": ", ".join(self.texts), "rank": self.method.rank, "alpha": self.method.alpha,
            "adapters": len(self.adapters.modules), "numbers": numbers,
        }  # fmt: skip
