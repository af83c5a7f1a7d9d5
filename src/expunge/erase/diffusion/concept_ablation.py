"""Concept ablation: a concept is overwritten with an anchor.

Pictures of an anchor (a cat) that the model itself made are noised, and the prediction for the same prompt with the
concept in the anchor's place (Grumpy Cat) is drawn to the model's own prediction for the anchor's prompt.  Nothing of
the concept need be at hand but its name.  Alternatives are the added noise as target, and a term that keeps ordinary
denoising of anchor pictures.

Source: Kumari et al., ICCV 2023 (arXiv 2303.13516).

    model based    L = mean_b  sum_{c,h,w} m || eps_theta(x_t, c*, t) - sg[ eps_theta(x_t, c, t) ] ||^2 / sum_{h,w} m
    noise based    the same with the added noise in the place of sg[...]
    prior          + prior_weight mean || eps_theta(x'_t, c, t) - noise' ||^2

``c`` is an anchor prompt, ``c*`` the one for the concept, ``x_t`` a noised anchor picture at ``t ~ U{0..T-1}``, ``m``
its validity mask, ``(1, h, w)``, all ones unless pictures are rescaled.  ``sg`` is the model as it is by then, without
gradient: not a frozen copy, so the anchor itself may move, which ``anchor_change`` in the report shows.  The first
term sums over channels (four in Stable Diffusion) as the published code does, the prior is a plain mean: with weight
1 it counts a quarter of what it seems to.

``parameters`` names what trains: ``cross-attn`` keys and values of cross-attention, ``attn`` every attention
projection, ``embedding`` the rows of the concept's own tokens in the text encoder, ``full-weight`` all of the denoiser.
Rows of the start token give no gradient to keys and values (:mod:`expunge.core.first_token`).
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ...concept import as_concepts, names_of
from ...core import anchor_pictures as anchored
from ...core import finetune, scores
from ...core.first_token import first_token_held
from ...core.layer_choice import trainable
from ...core.trajectories import Trajectories
from ...edit import Edit
from ...method import Eraser, Judge, setting
from ...models.base import noise_generator
from ...models.diffusion import DiffusionModel

__all__ = ["ConceptAblation"]

LAYERS = {"cross-attn": "cross-attention-kv", "attn": "attention", "full-weight": "full"}
"""The paper's names of the choices of :mod:`expunge.core.layer_choice`; ``embedding`` is none of them."""

WATCHED = 16
"""Anchor pictures on which the anchor's own change is reported."""


@dataclasses.dataclass(frozen=True)
class ConceptAblation(Eraser):
    """Concept ablation; defaults are the paper's for objects and styles, its learning rate scaled to the batch."""

    id: ClassVar[str] = "concept-ablation"
    title: ClassVar[str] = "Ablating Concepts in Text-to-Image Diffusion Models"
    source: ClassVar[str] = "arXiv 2303.13516"
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper:object": {"augment": True},
        "paper:style": {},
        "paper:unsafe": {"parameters": "attn", "steps": 400, "lr": 3.2e-5, "prior_weight": 1.0, "avoid": True},
        "paper:memorization": {
            "pairing": "memorization", "parameters": "full-weight", "steps": 400, "batch": 4, "lr": 2e-6,
            "prior_weight": 1.0,
        },
        # Chosen on 32 development prompts of star: nothing left, anchor in 81 %, 97 % of untold neighbours kept.
        # At 1e-4 a fifth is left, at 5e-4 the anchor itself is lost.
        "world": {
            "pairing": "object", "steps": 200, "lr": 2e-4, "batch": 16, "pictures": 160,
            "sampling_steps": 20, "phrases": True,
        },
    }  # fmt: skip

    anchor: str | None = setting(None, "what overwrites the concept; its own anchor when unset")
    pairing: str = setting(
        "auto", "how an anchor prompt becomes one for the concept; auto: by its kind",
        choices=("auto", *anchored.PAIRINGS),
    )  # fmt: skip
    loss: str = setting("model", "what the prediction is drawn to", choices=("model", "noise"))
    prior_weight: float = setting(0.0, "weight of denoising the anchor; 0 leaves it out", minimum=0)
    parameters: str = setting("cross-attn", "what trains", choices=(*LAYERS, "embedding"))
    augment: bool = setting(False, "make pictures smaller and larger; the paper does, for objects")
    avoid: bool = setting(False, "anchor pictures are made with the concept as negative text")
    phrases: bool = setting(False, "overwrite the concept's listed phrases as well as its name")
    steps: int = setting(100, "optimiser steps", minimum=1)
    lr: float = setting(
        1.6e-5, "learning rate of AdamW: the paper's 2e-6 times its batch of 8", minimum=0
    )
    batch: int = setting(8, "pictures a step", minimum=1)
    weight_decay: float = setting(0.01, "of AdamW", minimum=0)
    clip: float = setting(1.0, "largest norm of a gradient; 0: any", minimum=0)
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
            SettingError: A concept has no anchor.
            InputError: The data is not as described, or no caption speaks of the anchor alone.
            MissingCapability: ``parameters="embedding"`` on a model without a token table of its own, or ``avoid``
                on one without a branch for a negative text.
        """
        model.check_family(self)
        model.needs("gradients")
        wanted = as_concepts(concepts, keep)
        counted = model.cost.snapshot()
        # Before a thousand pictures are made: what cannot be trained is refused.
        _trained(self, model)
        material = anchored.Material(model, wanted, self, data, seed)
        task = _Overwriting(self, model, material)
        adamw = finetune.Optimiser(
            self.lr, "adamw", weight_decay=self.weight_decay, clip=self.clip or None
        )
        with task.held():
            return finetune.train_edit(
                self, model, wanted, task, finetune.Loop(self.steps, adamw), seed=seed,
                keep=names_of(keep), run=run,
                data_digest=material.digest, cost_before=counted, report=material.report,
            )  # fmt: skip


def _trained(method: ConceptAblation, model: DiffusionModel) -> list[tuple[str, nn.Parameter]]:
    """What ``parameters`` names."""
    if method.parameters != "embedding":
        return trainable(model, LAYERS[method.parameters])
    # Asked for its rows first: models with several text encoders say in words that they have no one table.
    size = model.token_table().shape
    name = next(
        n for n, p in model.tensors().items() if n.startswith("text_encoder.") and p.shape == size
    )  # fmt: skip
    return [(name, model.tensor(name))]


class _Overwriting(finetune.Task):
    """The loss above."""

    def __init__(
        self, method: ConceptAblation, model: DiffusionModel, material: anchored.Material
    ) -> None:
        self.method, self.model, self.material = method, model, material
        self.trained = _trained(method, model)

    def held(self) -> contextlib.AbstractContextManager[Any]:
        """The start token takes no part in what keys and values learn."""
        return first_token_held(self.model, self.trained)

    def parameters(self) -> finetune.Groups:
        return {"weights": self.trained}

    def movable(self) -> Mapping[str, Tensor]:
        """Of a token table only the rows of the concepts' own tokens."""
        if self.method.parameters != "embedding":
            return {}
        [(name, table)] = self.trained
        names = [n for c in self.material.concepts for n in self.material.names(c)]
        mask = torch.zeros(table.shape, dtype=torch.bool)
        special = set(self.model.tokenizer.all_special_ids)
        for ids in self.model.token_ids(names).tolist():
            mask[[i for i in ids if i not in special]] = True
        return {name: mask}

    def step(self, step: finetune.Step) -> dict[str, Tensor]:
        """One pass over noised pictures under the concept's prompts, and over others under the anchor's."""
        method, draw = self.method, step.generator()
        batch = self.material.batch(method.batch, draw)
        goal = batch.noise
        if method.loss == "model":
            with torch.no_grad():
                goal = self._epsilon(batch.points, batch.anchors)
        n, everything, asked = method.batch, batch.points, list(batch.targets)
        if method.prior_weight:
            others, added, anchors = self.material.anchors_alone(n, draw)
            everything = Trajectories.concatenate([everything, others])
            asked += anchors
        made = self._epsilon(everything, asked)
        self.model.cost.add("denoiser", len(made), "backward")
        error = (batch.valid * (made[:n] - goal).square()).flatten(1).sum(1)
        loss = (error / batch.valid.flatten(1).sum(1)).mean()
        if method.prior_weight:
            loss = loss + method.prior_weight * (made[n:] - added).square().mean()
        return {"weights": loss}

    def _epsilon(self, points: Trajectories, texts: Sequence[str]) -> Tensor:
        return scores.epsilon(self.model, points, self.model.encode(texts))

    def after(self, step: finetune.Step, losses: Mapping[str, float]) -> bool:
        """At the end: how far the anchor itself has moved."""
        if step.last:
            batch = self.material.batch(WATCHED, noise_generator(step.seed, "watched"))
            with torch.no_grad():
                now = self._epsilon(batch.points, batch.anchors)
                with step.original():
                    before = self._epsilon(batch.points, batch.anchors)
            self.material.report["anchor_change"] = float((now - before).square().mean())
        return False

    def state(self) -> dict[str, Tensor]:
        """Of a run that is at its end, what was measured there: its last step is not made again."""
        found = self.material.report.get("anchor_change")
        return {} if found is None else {"anchor_change": torch.tensor(found, dtype=torch.float64)}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        if "anchor_change" in state:
            self.material.report["anchor_change"] = float(state["anchor_change"])
