"""The closed-form attack: feed the embedding that gives back the concept's original keys and values.

RECE's derivation turned against an edited model: for every row c of a prompt's text embedding, the
row c' whose keys and values in the attacked model best equal those of c in the original one,

    c' = argmin sum_l ||W_l c' - O_l c||^2    subject to  ||c'|| <= budget ||c||

(source: arXiv 2407.12383; the norm budget replaces its fixed penalty).  Without a budget the attack
always "succeeds", because an edit is invertible: only the norm of c' grows.  The Lagrangian of the
constraint is the ridge solution ``(r I + G)^{-1} H c`` with ``G = sum W_l^T W_l``,
``H = sum W_l^T O_l`` and its own r for each row, found by bisection.

It is a white-box attack on embeddings: it needs the attacked and the original matrices, ends in no
text, and bypasses the text encoder (c is the original encoder's).  It teaches nothing: no weight moves
and the rows are computed from matrices alone.  On the unedited model c' is c itself, or c shrunk
where the budget is below 1.

Matrices that take different rows (token rows and pooled vector in SD3 and Flux) are attacked each with their
own rows.  Where the denoiser itself makes the rows out of the text embedding (caption projection of PixArt and
Sana), a derived row cannot be fed in, and the attack is refused.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch

from ...concept import Concept
from ...core.closed_form import gram
from ...core.derivation import norm_budgeted, residuals
from ...core.trials import picture_rows, received
from ...errors import SettingError, UnsupportedModel
from ...method import Attack, Attempt, Attempts, Budget, Judge, Prompt, setting
from ...models.base import Model

__all__ = ["ClosedFormAttack"]

CHUNK = 64
"""Prompts whose rows are derived and whose pictures are made at a time."""


@dataclasses.dataclass(frozen=True)
class ClosedFormAttack(Attack):
    """RECE's derived embedding under a norm budget; see the module for the method."""

    id: ClassVar[str] = "closed-form"
    title: ClassVar[str] = "Closed-form derived embedding (RECE) under a norm budget"
    source: ClassVar[str] = "arXiv 2407.12383"
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    teaches: ClassVar[bool] = False

    norm_budget: float = setting(
        2.0, "Allowed norm of a derived row, in norms of the prompt's row", minimum=1e-6
    )
    steps: int = setting(20, "Sampling steps of each picture", minimum=1)
    guidance: float | None = setting(
        None, "Classifier-free guidance; none: the model's own", minimum=0
    )

    def needs_reference(self, concept: Concept) -> bool:
        """The derived rows are what the original matrices made of the prompt."""
        return True

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
        """Two pictures a prompt: the plain one and the one from derived rows.

        ``reference`` gives the original matrices and text embeddings; without it the attacked model
        with its edits lifted does.  See :meth:`expunge.method.Attack.attack`.
        """
        concept, budget, prompts = received(self, model, concept, judge, budget, prompts)
        if reference is not None and not isinstance(reference, Model):
            raise UnsupportedModel(
                f"{self.id}: the reference is {reference!r}; allowed is an opened model, or None for this one without "
                "edits"
            )
        before = model.cost.snapshot()
        listed = list(prompts)
        self._check(budget, model, listed)
        groups = _groups(model, reference if reference is not None else model)
        items: list[Attempt] = []
        shown: list[np.ndarray] = []
        for start in range(0, len(listed), CHUNK):
            part = listed[start : start + CHUNK]
            condition, ridges, left = self._derived(
                reference if reference is not None else model, model, part, groups
            )
            options = {"steps": self.steps, "guidance": self.guidance}
            plain = model.generate(part, **options)
            attacked = model.generate(part, condition=condition, **options)
            one, two = judge.judge(plain, concept, part), judge.judge(attacked, concept, part)
            for index, prompt in enumerate(part):
                pre, post = bool(one.hit[index]), bool(two.hit[index])
                use_plain = pre and not post
                verdicts = one if use_plain else two
                details = {
                    "attack_hit": post,
                    "attack_recognisable": bool(two.recognisable[index]),
                    "ridge": float(ridges[index]),
                    "residual": float(left[index]),
                    "norm_budget": self.norm_budget,
                }
                items.append(
                    Attempt(prompt, pre, pre or post, float(verdicts.score[index]), None, details)
                )
                shown.append((plain if use_plain else attacked)[index])
        return Attempts(
            attack=self.id, version=self.version, settings=self.settings(), teaches=self.teaches,
            budget=budget.name, judge=judge.id, threshold=judge.threshold, seed=seed,
            items=tuple(items), outputs=np.stack(shown) if shown else np.zeros((0, 0, 0, 3), np.uint8),
            cost=model.cost.since(before),
        )  # fmt: skip

    def _check(self, budget: Budget, model: Any, prompts: Sequence[Prompt]) -> None:
        shared = model.guidance if self.guidance is None else self.guidance
        needed = 2 * picture_rows(model, prompts, self.steps, shared)
        if budget.denoiser_rows is not None and needed > budget.denoiser_rows:
            raise SettingError(
                f"{self.id}: two pictures of {self.steps} steps take {needed} denoiser rows; budget "
                f"{budget.name!r} allows {budget.denoiser_rows}, so at most "
                f"{budget.denoiser_rows * self.steps // needed} steps"
            )

    def _derived(
        self, reference: Any, model: Any, prompts: Sequence[Prompt], groups: Sequence[_Group]
    ) -> tuple[Any, torch.Tensor, torch.Tensor]:
        """Condition of derived rows, and for each prompt the median ridge and residual of its rows.

        Of several groups, the larger median.
        """
        with reference.lifted() as original, torch.no_grad():
            condition = original.encode([prompt.text for prompt in prompts])
        made, ridges, left = {}, [], []
        for group in groups:
            given = getattr(condition, group.field)
            rows = given.reshape(-1, given.shape[-1])
            derived, ridge = norm_budgeted(group.edited, group.cross, rows, self.norm_budget)
            remaining = residuals(group.edited, group.cross, group.original, derived, rows)
            made[group.field] = derived.reshape(given.shape).to(model.device, given.dtype)
            ridges.append(ridge.reshape(len(prompts), -1).median(dim=1).values)
            left.append(remaining.reshape(len(prompts), -1).median(dim=1).values)
        return (
            dataclasses.replace(condition, texts=None, **made),
            torch.stack(ridges).amax(0),
            torch.stack(left).amax(0),
        )


class _Group(NamedTuple):
    """Matrices that take the same rows: ``sum W^T W``, ``sum W^T O`` and ``sum O^T O`` of attacked and original."""

    field: str
    edited: torch.Tensor
    cross: torch.Tensor
    original: torch.Tensor


def _groups(model: Any, reference: Any) -> list[_Group]:
    """The groups of text projections of an attacked model, with their originals."""
    present, found = model.tensors(), []
    for text in model.text_inputs():
        if text.field is None:
            raise UnsupportedModel(
                f"closed-form: the denoiser of {model.name} makes the rows of {text.names[0]} itself, so derived rows "
                "cannot be fed in; allowed are layouts whose matrices take the text embedding as it is"
            )
        attacked = {name: present[name].detach() for name in text.names}
        originals = _originals(reference, attacked)
        grams = gram(attacked), gram(attacked, originals), gram(originals)
        found.append(_Group(text.field, *grams))
    return found


def _originals(reference: Any, attacked: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    with reference.lifted() as original:
        theirs = original.tensors()
        for name, weight in attacked.items():
            if name not in theirs or theirs[name].shape != weight.shape:
                raise UnsupportedModel(
                    f"closed-form: the reference {original.name} has no matrix {name} of shape "
                    f"{tuple(weight.shape)}; it must be the original of the attacked model"
                )
        # Cloned: lifting exchanges values in place, so the same storage holds other numbers outside.
        return {name: theirs[name].detach().clone() for name in attacked}
