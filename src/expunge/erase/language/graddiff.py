"""GradDiff: gradient difference with a retain set.

The model is fine-tuned to make the answers it must forget unlikely and, in the same step, to keep the
answers of a retain set likely.  It is the plainest baseline that does not simply destroy the model:
gradient ascent alone does.

Source: the baseline of TOFU (arXiv 2401.06121), as kept in OpenUnlearning (arXiv 2506.12618).

    L = gamma L_forget + alpha L_retain
    L_forget = -CE(forget batch)      CE = mean of -log p(token | all before) over the label tokens
    L_retain =  CE(retain batch)      labels: the answer and the end token, not the prompt

One epoch walks the forget set in a fresh order; every forget item comes with a retain item drawn at
random with replacement.  Both halves go through the model in one pass.  The loss has no lower bound:
``stop_nll`` ends training when the forget batch's mean loss has passed it, and the report carries the
losses of every step, so that over-forgetting shows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from ...concept import as_concepts, names_of
from ...core import answers, finetune
from ...edit import Edit
from ...method import Eraser, Judge, setting
from ...models.base import noise_generator
from ...models.language import LanguageModel

__all__ = ["GradDiff"]


@dataclasses.dataclass(frozen=True)
class GradDiff(Eraser):
    """Gradient difference; defaults are those of OpenUnlearning on TOFU."""

    id: ClassVar[str] = "graddiff"
    title: ClassVar[str] = "Gradient Difference"
    source: ClassVar[str] = "arXiv 2506.12618"
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("language",)
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper:fact": {},
        "world": {
            "lr": 3e-4,
            "epochs": 16,
            "batch": 12,
            "alpha": 4.0,
            "warmup_epochs": 0,
            "stop_nll": 4.0,
        },
    }

    lr: float = setting(1e-5, "peak learning rate of AdamW", minimum=0)
    epochs: int = setting(10, "walks over the forget set", minimum=1)
    batch: int = setting(32, "forget items a step; as many retain items come with them", minimum=1)
    gamma: float = setting(1.0, "weight of the forget term", minimum=0)
    alpha: float = setting(1.0, "weight of the retain term", minimum=0)
    weight_decay: float = setting(0.01, "decoupled weight decay", minimum=0)
    warmup_epochs: int = setting(1, "epochs over which the rate rises", minimum=0)
    schedule: str = setting("linear", "rate after the warm-up", choices=("constant", "linear"))
    stop_nll: float | None = setting(
        None, "stop once the forget batch's mean loss (nats a token) has reached this", minimum=0
    )

    def erase(
        self,
        model: LanguageModel,
        concepts: Any,
        *,
        keep: Sequence[Any] = (),
        data: Any = None,
        judge: Judge | None = None,
        seed: int = 0,
        run: str | Path | None = None,
    ) -> Edit:
        """Learn an edit of all weights; see :meth:`expunge.method.Eraser.erase`.

        ``data`` is ``{"forget": [(prompt, answer), ...], "retain": [...]}``; what it leaves out comes
        from the concepts' texts and the model's companions.
        """
        model.check_family(self)
        model.needs("gradients", "score")
        wanted = as_concepts(concepts, keep)
        pairs = answers.pairs_for(model, wanted, keep, data, method=self.id)
        per_epoch = -(-len(pairs["forget"]) // self.batch)
        loop = finetune.Loop(
            steps=per_epoch * self.epochs,
            optimiser=finetune.Optimiser(
                lr=self.lr,
                name="adamw",
                weight_decay=self.weight_decay,
                warmup=per_epoch * self.warmup_epochs,
                schedule=self.schedule,
            ),
        )
        return finetune.train_edit(
            self,
            model,
            wanted,
            _Difference(self, model, pairs, seed),
            loop,
            seed=seed,
            keep=names_of(keep),
            run=run,
            data_digest=answers.digest(pairs),
        )


class _Difference(finetune.Task):
    """The loss above; every weight of the model trains."""

    def __init__(
        self,
        method: GradDiff,
        model: LanguageModel,
        pairs: Mapping[str, list[answers.Pair]],
        seed: int,
    ) -> None:
        self.method, self.model, self.seed = method, model, seed
        self.forget, self.retain = (
            model.sequences([p for p, _ in pairs[part]], [a for _, a in pairs[part]])
            for part in ("forget", "retain")
        )
        self.forget_nll = 0.0

    def parameters(self) -> finetune.Groups:
        return {"weights": list(self.model.tensors().items())}

    def step(self, step: finetune.Step) -> dict[str, torch.Tensor]:
        """The loss above on one forget batch and as many retain items."""
        method = self.method
        chosen = answers.batches(
            len(self.forget),
            method.batch,
            step.index,
            lambda epoch: noise_generator(self.seed, "graddiff:order", epoch),
        )
        drawn = torch.randint(
            len(self.retain), (len(chosen),), generator=step.generator("retain")
        ).tolist()
        both = self.forget.select(chosen) + self.retain.select(drawn)
        loss, mask = self.model.token_nll(both)
        self.model.cost.add("language", len(both), "backward")
        n = len(chosen)
        forget = loss[:n].sum() / mask[:n].sum()
        retain = loss[n:].sum() / mask[n:].sum()
        self.forget_nll = float(forget.detach())
        return {"weights": method.alpha * retain - method.gamma * forget}

    def after(self, step: finetune.Step, losses: Mapping[str, float]) -> bool:
        return self.method.stop_nll is not None and self.forget_nll >= self.method.stop_nll
