"""ESD: erased stable diffusion.

The denoiser is fine-tuned so that its prediction for the concept becomes the frozen model's prediction
pushed away from the concept: classifier-free guidance with the sign turned, used as a teacher.  Only the
concept's name is needed; no pictures.  Points ``x_t`` come from the frozen model's own guided sampling
towards the concept.

Source: Gandikota et al., ICCV 2023 (arXiv 2303.07345).

    L = || eps_theta(x_t, f, t) - [ eps_o(x_t, f, t) - eta ( eps_o(x_t, c, t) - eps_o(x_t, 0, t) ) ] ||^2

with ``c`` the concept, ``f`` the prompt it is erased from (``f = c`` unless ``erase_from`` is set), 0 the
empty prompt, ``eps_o`` the frozen model.  The paper writes the target as ``eps_o(0) - eta' (eps_o(c) -
eps_o(0))``; for ``f = c`` that is ``eta = eta' + 1``, so ``eta = 2`` is the paper's strength of 1.

``layers`` chooses what trains, always weights and biases of linear and convolution modules, never norms:

    esd-x         everything inside cross-attention (styles and names)
    esd-x-strict  cross-attention keys and values only
    esd-u         everything outside cross-attention (concepts that appear without being named)
    esd-all       both
    text-encoder  instead of the denoiser, all layers and the final norm of the text encoder; ours, a control of
                  AdvUnlearn (arXiv 2405.15234), whose ablation it is

``bank`` draws that many points once, with their teacher targets, and trains on them in batches.  That is
exact in kind (points and targets both come from the frozen model) and saves most of the time; without it
every step draws fresh points, as in the paper.
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
from ...core.layer_choice import trainable
from ...core.text_layers import ROLES, trainable_text
from ...core.trajectories import Trajectories
from ...edit import Edit
from ...method import Eraser, Judge, setting
from ...models.diffusion import DiffusionModel
from ...models.types import Condition

__all__ = ["ESD"]

LAYERS = {
    "esd-x": "cross-attention",
    "esd-x-strict": "cross-attention-kv",
    "esd-u": "other",
    "esd-all": "all",
}
"""The paper's names of the choices of :mod:`expunge.core.layer_choice`."""

TEXT_ENCODER = "text-encoder"


@dataclasses.dataclass(frozen=True)
class ESD(Eraser):
    """Erased stable diffusion; defaults are the paper's."""

    id: ClassVar[str] = "esd"
    title: ClassVar[str] = "Erasing Concepts from Diffusion Models"
    source: ClassVar[str] = "arXiv 2303.07345"
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper:object": {"layers": "esd-u"},
        "paper:style": {"layers": "esd-x"},
        "paper:identity": {"layers": "esd-x"},
        "paper:unsafe": {"layers": "esd-u"},
        # Small model: fewer sampling steps, larger learning rate, a bank.  Chosen on 56 development prompts of
        # star: esd-x leaves it in 21 to 30 % of the pictures (18 % at eta 4 and 700 steps), esd-u in 5 %.
        "world": {
            "layers": "esd-u", "steps": 350, "lr": 5e-4, "eta": 3.0, "sampling_steps": 20, "batch": 16,
            "bank": 384, "phrases": True,
        },
    }  # fmt: skip

    layers: str = setting("esd-x", "which modules train", choices=(*LAYERS, TEXT_ENCODER))
    eta: float = setting(2.0, "strength of the push; the paper's eta' + 1", minimum=0)
    steps: int = setting(1000, "optimiser steps", minimum=1)
    lr: float = setting(1e-5, "learning rate of Adam", minimum=0)
    batch: int = setting(1, "points a step", minimum=1)
    guidance: float = setting(3.0, "guidance of the sampling that gives the points", minimum=0)
    sampling_steps: int = setting(50, "sampling steps of a whole trajectory", minimum=2)
    erase_from: str | None = setting(None, "prompt the concept is erased from; its own when unset")
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
        """Learn an edit of the denoiser; ``keep`` has no part in ESD and is only recorded."""
        model.check_family(self)
        self.without_data(data)
        model.needs("gradients")
        wanted = as_concepts(concepts, keep)
        counted = model.cost.snapshot()
        task = _Push(self, model, wanted, seed)
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
        )


class _Push(finetune.Task):
    """The loss above."""

    def __init__(
        self, method: ESD, model: DiffusionModel, concepts: Sequence[Concept], seed: int
    ) -> None:
        self.method, self.model = method, model
        texts = [t for c in concepts for t in (c.names if method.phrases else (c.name,))]
        towards = [method.erase_from] * len(texts) if method.erase_from is not None else texts
        with torch.no_grad():
            self.concept = model.encode(texts).detach()
            self.source = model.encode(towards).detach()
            self.empty = model.unconditional().detach()
        self.towards = towards
        self.points = scores.PointSource(
            model, towards, steps=method.sampling_steps, guidance=method.guidance, seed=seed,
            batch=method.batch, bank=method.bank, answer=self.target,
        )  # fmt: skip

    def parameters(self) -> finetune.Groups:
        if self.method.layers == TEXT_ENCODER:
            return {"denoiser": trainable_text(self.model, ROLES[:4])}
        return {"denoiser": trainable(self.model, LAYERS[self.method.layers])}

    def step(self, step: finetune.Step) -> dict[str, Tensor]:
        """Mean squared distance of the prediction from the teacher's target."""
        points, answers = self.points.at(step)
        made = scores.epsilon(self.model, points, self.student(points))
        self.model.cost.add("denoiser", len(made), "backward")
        return {"denoiser": (made - answers["target"]).square().mean()}

    def student(self, points: Trajectories) -> Condition:
        """What the student is asked under; what the text encoder says changes while it trains."""
        if self.method.layers != TEXT_ENCODER:
            return self.source.select(points.which)
        return self.model.encode([self.towards[int(i)] for i in points.which])

    def target(self, points: Trajectories) -> dict[str, Tensor]:
        """``eps_o(f) - eta (eps_o(c) - eps_o(0))`` of each point, frozen model."""
        conditions = [self.concept.select(points.which), self.empty]
        if self.method.erase_from is not None:
            conditions.append(self.source.select(points.which))
        concept, empty, *source = scores.asked(self.model, points, conditions)
        start = source[0] if source else concept
        return {"target": start - self.method.eta * (concept - empty)}
