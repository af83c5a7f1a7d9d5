"""RECE: closed-form erasure that finds what still triggers the concept and erases that too.

After a closed-form edit (UCE) some other embedding still gives the concept's keys and values, because
the edit is a low-rank change.  RECE derives that embedding in closed form, erases it with the same
solver, and repeats; a penalty on its norm bounds the collateral damage.  No training, no pictures.

Source: arXiv 2407.12383 (ECCV 2024).  ``O_l`` (out, d) are the original key and value matrices and
``W_l`` the present ones, over all layers.

0. UCE: map the rows of the concept's text onto those of the guide (:mod:`expunge.core.closed_form`).
1. For every row c of E(concept), all T of them:
       c' = (r I + sum W_l^T W_l)^{-1} (sum W_l^T O_l) c,    the minimiser of
       sum_l ||W_l c' - O_l c||^2 + r ||c'||^2               (r: ``derive_ridge``)
2. Erase the pairs (c' -> rows of E(guide)), row by row, with scale ``epoch_erase_scale``, the empty
   prompt and what is to be kept preserved with ``epoch_preserve_scale``, ridge ``epoch_ridge``; values
   and ridge are taken from the present weights.
3. Repeat 1 and 2 for ``epochs``.  All concepts are derived from the same weights and solved together.

Each step multiplies every ``W_l`` from the right by one common ``I + D``, so the whole edit is
``W_l (I + D_0)(I + D_1)... = W_l (I + D)`` with one ``D`` for all layers, and ``sum W_l^T W_l`` after
a step is ``(I + D)^T G (I + D)``: after one pass over the layers everything is ``d x d``.  The
derivation is linear, so the moments of c' follow from those of c.

Earlier pairs are not re-imposed by step 2, so the concept's own embedding is free to move again.
``accumulate=True`` keeps all pairs (c, c'_1, c'_2, ...) and solves once from the starting weights,
with UCE's ridge and preserved rows.  With ``select=True`` validation pictures are made after each epoch and
the epoch with the lowest rate is returned, as the official procedure does; it is most of the time.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from ...concept import Concept, as_concepts
from ...core.closed_form import Moments, Solution
from ...core.derivation import REGULARISATIONS, Derivation, derive, residuals
from ...core.projections import (
    Projections,
    edited_texts,
    guide_of,
    kept_texts,
    preserved,
    shared_edit,
)
from ...core.sampling import prompts_digest, validation_prompts
from ...core.token_policy import POLICIES, Pair, accumulate, stream_pairs
from ...edit import Edit
from ...errors import SettingError
from ...method import Eraser, Judge, Prompt, setting

__all__ = ["RECE"]


@dataclasses.dataclass(frozen=True)
class RECE(Eraser):
    """Reliable and efficient concept erasure; see the module for the method."""

    id: ClassVar[str] = "rece"
    title: ClassVar[str] = (
        "RECE: Reliable and Efficient Concept Erasure of Text-to-Image Diffusion Models"
    )
    source: ClassVar[str] = "arXiv 2407.12383"
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper:object": {"epochs": 1, "derive_ridge": 1e-3},
        "paper:style": {"epochs": 1, "derive_ridge": 1e-3, "guide": "art"},
        "paper:unsafe": {"epochs": 3, "derive_ridge": 0.1, "empty_per_concept": True},
        # Chosen on development prompts of star, by pictures.  Whole captions give thousands of rows, so
        # the ridges are large: with small ones every epoch moves everything.
        "world": {
            "epochs": 1,
            "derive_ridge": 1e-3,
            "ridge": 1000.0,
            "epoch_ridge": 10_000.0,
            "preserve_scale": 3.0,
            "epoch_preserve_scale": 10.0,
            "context_prompts": 20,
            "general_prompts": 400,
        },
    }

    epochs: int = setting(1, "Rounds of deriving and erasing", minimum=0)
    derive_ridge: float = setting(
        1e-3, "Penalty on the squared norm of derived embeddings (lambda_r)", minimum=0
    )
    regularisation: str = setting(
        "zero", "What derived embeddings are pulled to", choices=REGULARISATIONS
    )
    erase_scale: float = setting(1.0, "UCE stage: weight a of the erased rows", minimum=0)
    preserve_scale: float | None = setting(
        None,
        "UCE stage: weight b of the kept rows; none: max(0.1, 1 / number of kept texts)",
        minimum=0,
    )
    ridge: float = setting(0.5, "UCE stage: weight of the distance to the old weights", minimum=0)
    tokens: str = setting(
        "last_token_to_end_aligned", "UCE stage: which rows of a text are mapped", choices=POLICIES
    )
    epoch_erase_scale: float = setting(1.0, "Epochs: weight of the derived rows", minimum=0)
    epoch_preserve_scale: float = setting(0.1, "Epochs: weight of the kept rows", minimum=0)
    epoch_ridge: float = setting(
        0.1, "Epochs: weight of the distance to the present weights", minimum=0
    )
    empty_per_concept: bool = setting(
        False,
        "Epochs: preserve the empty prompt once for each concept (the unsafe script), not once",
    )
    accumulate: bool = setting(False, "Keep all pairs and solve once from the starting weights")
    expand_prompts: bool = setting(False, "Erase five templates around each name too")
    templates: tuple[str, ...] = setting(
        (), "Further templates with {} for the name, erased and kept alike"
    )
    context_prompts: int = setting(
        0, "Whole prompts the model's world has of each concept, erased too", minimum=0
    )
    general_prompts: int = setting(
        0,
        "Captions of the model's world, preserved too; none names what an audit measures untold",
        minimum=0,
    )
    guide: str | None = setting(
        None, "What takes the place; none: the anchor, else 'art' for styles, else ''"
    )
    erase_phrases: bool = setting(True, "Erase the concept's listed phrases too")
    select: bool = setting(
        False, "Keep the epoch whose validation pictures show the concept least (needs a judge)"
    )
    select_prompts: int = setting(32, "Validation pictures for each concept and epoch", minimum=1)

    def erase(
        self,
        model: Any,
        concepts: Any,
        *,
        keep: Sequence[Any] = (),
        data: Any = None,
        judge: Judge | None = None,
        seed: int = 0,
        run: str | Path | None = None,
    ) -> Edit:
        """UCE, then ``epochs`` rounds; ``data`` are validation prompts for ``select``.

        See :meth:`expunge.method.Eraser.erase`.
        """
        model.check_family(self)
        if not self.select:
            self.without_data(data, "select=True")
        began, before = time.perf_counter(), model.cost.snapshot()
        listed = as_concepts(concepts, keep)
        groups = Projections.groups(model)
        pairs, kept = edited_texts(self, model, listed, keep)
        prompts = self._validation(model, listed, data, judge) if self.select else []
        examined = prompts_digest([p for _, own in prompts for p in own]) if prompts else None
        found = [self.solutions(group, listed, pairs, kept) for group in groups]
        chosen, rates = self.epochs, None
        report: dict[str, Any] = {
            "token_policy": self.tokens,
            "pairs": len(pairs),
            "kept": len(kept),
            "epochs": found[0][1] if len(found) == 1 else [rounds for _, rounds in found],
        }

        def edit(epoch: int) -> Edit:
            solved = [(g, s[epoch]) for g, (s, _) in zip(groups, found, strict=True)]
            return shared_edit(
                self, model, listed, solved, keep=kept_texts(keep), seed=seed,
                report=report | {"epoch": epoch, "validation_rates": rates},
                cost=model.cost.since(before), seconds=time.perf_counter() - began, data_digest=examined,
            )  # fmt: skip

        if prompts:
            rates = [_rate(model, edit(epoch), prompts, judge) for epoch in range(self.epochs + 1)]
            chosen = rates.index(min(rates))
        return edit(chosen)

    def solutions(
        self, projections: Projections, concepts: Sequence[Concept], pairs: list[Pair], kept: list[str]
    ) -> tuple[list[Solution], list[dict[str, float]]]:  # fmt: skip
        """The solution after the UCE stage and after each epoch, with what to report of each.

        Args:
            projections: Matrices that take the same rows.
            concepts: What is erased; the report is about their names.
            pairs: All texts to erase, with what takes their place.
            kept: All texts to keep.
        """
        text = projections.text
        first, scale = preserved(self.tokens, kept)
        if self.preserve_scale is not None:
            scale = self.preserve_scale
        stage = accumulate(text, pairs, first, self.tokens, erase=self.erase_scale, keep=scale)
        # The moments of all rows of the concept's texts; those of derived rows follow from them.
        concept_rows = accumulate(text, pairs, (), "all_rows", erase=1.0, keep=0.0)
        empty = [""] * (len(concepts) if self.empty_per_concept else 1)
        held = accumulate(
            text, (), [*empty, *kept], "all_rows", erase=0.0, keep=self.epoch_preserve_scale
        )
        names = [(c.name, guide_of(c, self.guide)) for c in concepts[:16]]
        blocks = list(stream_pairs(text, names, "all_rows"))
        sources = torch.cat([block.sources for block in blocks]).double().cpu()
        targets = torch.cat([block.targets for block in blocks]).double().cpu()
        sample = sources, targets

        solutions = [stage.solve(self.ridge)]
        present = _Present.after(projections, solutions[0])
        rounds = [_progress(projections, solutions[0], present, None, sample)]
        for _ in range(self.epochs):
            derivation = derive(
                present.edited, present.cross, self.derive_ridge, self.regularisation
            )
            derived = concept_rows.derived(derivation)
            if self.accumulate:
                stage = stage.plus(derived, erase=self.epoch_erase_scale)
                solutions.append(stage.solve(self.ridge))
            else:
                fresh = Moments(text.width).plus(derived, erase=self.epoch_erase_scale).plus(held)
                solutions.append(solutions[-1].then(fresh.solve(self.epoch_ridge)))
            present = _Present.after(projections, solutions[-1])
            rounds.append(_progress(projections, solutions[-1], present, derivation, sample))
        return solutions, rounds

    def _validation(
        self, model: Any, concepts: Sequence[Concept], data: Any, judge: Judge | None
    ) -> list[tuple[Concept, list[Prompt]]]:
        if judge is None:
            raise SettingError(
                f"{self.id}: select=True needs a judge; pass judge=, or leave select off"
            )
        found = [(c, validation_prompts(model, c, data, self.select_prompts)) for c in concepts]
        for concept, prompts in found:
            if not prompts:
                raise SettingError(
                    f"{self.id}: select=True needs validation prompts, and neither data= nor the world of "
                    f"{model.name} has one for {concept.name!r}"
                )
        return found


@dataclasses.dataclass(frozen=True)
class _Present:
    """The edited matrices, as far as derivations and reports need them.

    Attributes:
        edited: ``sum W^T W``.
        cross: ``sum W^T O``.
        moved: ``||all changes||^2 / ||all starting matrices||^2``.
    """

    edited: torch.Tensor
    cross: torch.Tensor
    moved: float

    @classmethod
    def after(cls, projections: Projections, solution: Solution) -> _Present:
        """After a solution, from the sums over the starting matrices."""
        gram, change = projections.gram, solution.change
        product = gram @ change
        shift = change.T @ product
        fixed = projections.cross
        mixed = product.T if fixed is gram else change.T @ fixed
        return cls(
            gram + product + product.T + shift, fixed + mixed, float(shift.trace() / gram.trace())
        )


def _progress(
    projections: Projections,
    solution: Solution,
    present: _Present,
    derivation: Derivation | None,
    sample: tuple[torch.Tensor, torch.Tensor],
) -> dict[str, float]:
    """How far the concept's values are from the original after a step, and what the step erased.

    ``sample``: rows of the concepts' names and of their guides, each ``(n, width)`` in float64.
    """
    rows, guides = sample
    edited, cross = present.edited, present.cross
    found = {
        "condition": solution.condition,
        "relative_change": max(0.0, present.moved) ** 0.5,
        "concept_residual": float(
            residuals(edited, cross, projections.original, rows, rows).mean()
        ),
    }
    if derivation is not None:
        derived = derivation.rows(rows, guides)
        found |= {
            "derived_norm": float((derived.norm(dim=1) / rows.norm(dim=1)).mean()),
            "derived_residual": float(
                residuals(edited, cross, projections.original, derived, rows).mean()
            ),
            "derive_condition": derivation.condition,
        }
    return found


def _rate(
    model: Any, edit: Edit, prompts: list[tuple[Concept, list[Prompt]]], judge: Judge | None
) -> float:
    """Share of validation pictures that show their concept under an edit."""
    assert judge is not None
    hits, count = 0, 0
    with edit.on(model, rebase=True):
        for concept, listed in prompts:
            verdicts = judge.judge(model.generate(listed), concept, listed)
            hits += int(verdicts.hit.sum())
            count += len(listed)
    return hits / count
