"""UCE: unified concept editing, a closed-form edit of the text projections.

UCE edits the cross-attention key and value matrices so that the text rows of a concept give the keys
and values of a harmless guide, while listed concepts keep theirs and a ridge holds everything else.
No training and no pictures: one solve, seconds.

Source: arXiv 2308.14761 (WACV 2024).  For every key or value matrix ``W`` (out, d):

    minimise  sum_i a ||W c_i - W_old g_i||^2 + sum_j b ||W p_j - W_old p_j||^2 + ridge ||W - W_old||_F^2

    W = W_old (ridge I + a A + b P) (ridge I + a C + b P)^{-1}
    A = sum g c^T,  C = sum c c^T,  P = sum p p^T                      (each d x d, the same for all W)

``c`` are rows of the erased texts, ``g`` of the guide (``W_old g`` is what they shall give), ``p`` of
the kept texts.  Which rows count is the token policy (:mod:`expunge.core.token_policy`); sums run
over rows, so the ridge means less where a text gives many rows.

``technique="tensor"`` removes the concept's own direction from the guide's values instead: with
``V_c, V_g`` (rows, out) the values of one pair, ``U = V_c / ||V_c||_F`` and ``s = sum(U * V_g)``, the
target is ``V_g - s U``.  It differs from matrix to matrix, so nothing is shared but the solve.

``technique="debias"`` erases no name but what a name is taken to look like: a loop of pictures and solves
that leads to wished shares of ``attributes``; see :mod:`expunge.core.debias`.

Defaults are the 2025 form (one row a text); the preset ``2023`` maps content to padding and keeps
whole prompts, the empty one always among them.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from ...concept import as_concepts
from ...core.closed_form import ValueMoments
from ...core.debias import Debias
from ...core.projections import (
    Projections,
    edited_texts,
    kept_texts,
    per_layer_edit,
    preserved,
    shared_edit,
)
from ...core.token_policy import (
    POLICIES,
    Pair,
    accumulate,
    stream_pairs,
    stream_rows,
)
from ...edit import Edit
from ...errors import SettingError
from ...method import Eraser, Judge, setting

__all__ = ["UCE"]


@dataclasses.dataclass(frozen=True)
class UCE(Eraser):
    """Unified concept editing; see the module for the method."""

    id: ClassVar[str] = "uce"
    title: ClassVar[str] = "UCE: Unified Concept Editing in Diffusion Models"
    source: ClassVar[str] = "arXiv 2308.14761"
    version: ClassVar[int] = 1
    families: ClassVar[tuple[str, ...]] = ("diffusion",)
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "paper:object": {},
        "paper:style": {"guide": "art"},
        "paper:unsafe": {},
        "2023": {"tokens": "last_token_to_end_aligned"},
        # Chosen on development prompts of star, by pictures: star is gone with 20 captions as with 100, and
        # with 100 a heavier weight on kept captions keeps more.
        "world": {
            "tokens": "last_token_to_end_aligned",
            "ridge": 20.0,
            "preserve_scale": 3.0,
            "context_prompts": 100,
            "general_prompts": 400,
            # Debiasing four backgrounds of tree: ten pictures cannot show quarters, and with 24 a round was
            # taken for balanced by chance.
            "pictures": 48,
            "tolerance": 0.1,
        },
    }

    erase_scale: float = setting(1.0, "Weight a of the erased rows", minimum=0)
    preserve_scale: float | None = setting(
        None,
        "Weight b of the kept rows; none: 1, or max(0.1, 1 / number of kept texts) under the 2023 policy",
        minimum=0,
    )
    ridge: float = setting(
        0.5, "Weight of the distance to the old weights (squared embedding norm)", minimum=0
    )
    tokens: str = setting("last_token", "Which rows of a text are mapped", choices=POLICIES)
    technique: str = setting("replace", "Target: the guide's values, those less the concept's direction, or debias",
                             choices=("replace", "tensor", "debias"))  # fmt: skip
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
    attributes: tuple[str, ...] = setting(
        (), "Debias: what a picture of the concept shows one of, for example woman,man"
    )
    ratios: tuple[float, ...] = setting(
        (), "Debias: wished share of each attribute; empty: equal shares", minimum=0, maximum=1
    )
    pictures: int = setting(10, "Debias: pictures of each concept and round", minimum=1)
    sampling_steps: int = setting(20, "Debias: sampling steps of a picture", minimum=1)
    rounds: int = setting(30, "Debias: rounds of measuring and solving, at most", minimum=1)
    tolerance: float = setting(
        0.05,
        "Debias: a concept rests in a round where all its shares are closer than this",
        minimum=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("attributes", "ratios"):
            if self.technique != "debias" and getattr(self, name):
                raise SettingError(
                    f"{self.id}: {name} is {getattr(self, name)!r}, but technique={self.technique!r} erases the "
                    "name itself; allowed with technique='debias'"
                )

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
        """One solve for all concepts; debiasing needs a judge, and takes prompts as ``data``.

        See :meth:`expunge.method.Eraser.erase`.
        """
        model.check_family(self)
        began, before = time.perf_counter(), model.cost.snapshot()
        listed = as_concepts(concepts, keep)
        if self.technique == "debias":
            return Debias(self, model, listed, judge, keep=keep, data=data, seed=seed).run()
        self.without_data(data, "technique='debias'")
        groups = Projections.groups(model)
        pairs, kept = edited_texts(self, model, listed, keep)
        kept, b = self.preserved(kept)
        report: dict[str, Any] = {
            "token_policy": self.tokens,
            "preserve_scale": b,
            "pairs": len(pairs),
            "kept": len(kept),
        }
        shared: dict[str, Any] = {"keep": kept_texts(keep), "seed": seed}

        def spent() -> dict[str, Any]:
            return {"cost": model.cost.since(before), "seconds": time.perf_counter() - began}

        if self.technique == "tensor":
            values = [(group, self._tensor_moments(group, pairs, kept, b)) for group in groups]
            return per_layer_edit(
                self, model, listed, values, self.ridge, report=report, **shared, **spent()
            )
        moments = [
            accumulate(group.text, pairs, kept, self.tokens, erase=self.erase_scale, keep=b)
            for group in groups
        ]
        solved = [(g, m.solve(self.ridge)) for g, m in zip(groups, moments, strict=True)]
        report |= {
            "erase_rows": sum(m.erase_rows for m in moments),
            "keep_rows": sum(m.keep_rows for m in moments),
        }
        return shared_edit(self, model, listed, solved, report=report, **shared, **spent())

    def preserved(self, kept: Sequence[str]) -> tuple[list[str], float]:
        """All texts to keep, and the weight b of their rows."""
        texts, weight = preserved(self.tokens, kept)
        if self.preserve_scale is not None:
            return texts, self.preserve_scale
        return texts, weight if self.tokens == "last_token_to_end_aligned" else 1.0

    def _tensor_moments(
        self, projections: Projections, pairs: list[Pair], kept: list[str], b: float
    ) -> ValueMoments:
        """Moments of ``technique="tensor"``: one scalar ``s`` a pair and matrix, not a row."""
        moments = ValueMoments(projections.weights)
        for block in stream_pairs(projections.text, pairs, self.tokens):
            sources = block.sources.to("cpu", torch.float64).split(block.sizes)
            targets = block.targets.to("cpu", torch.float64).split(block.sizes)
            for c, g in zip(sources, targets, strict=True):
                wished = {}
                for name, weight in projections.weights.items():
                    w = weight.to("cpu", torch.float64)
                    concept, guide = c @ w.T, g @ w.T
                    unit = concept / concept.norm().clamp_min(1e-12)
                    wished[name] = guide - (unit * guide).sum() * unit
                moments.erase(c, wished, self.erase_scale)
        for rows in stream_rows(projections.text, kept, self.tokens):
            rows = rows.to("cpu", torch.float64)
            moments.keep_moment(rows.T @ rows, len(rows), b)
        return moments
