"""How large the edits on a model are: rank, relative change, drift."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..core.token_policy import span
from .measuring import Notes
from .schema import EditRecord

if TYPE_CHECKING:
    from ..models.base import Model

__all__ = ["edit_record"]

RANK_TOLERANCE = 1e-6
LARGEST_RANK_WORK = 3e11
"""Multiply-adds (rows x columns x least side, summed) up to which numerical ranks are computed."""


def edit_record(model: Model, names: Sequence[str], notes: Notes) -> EditRecord | None:
    """The edits on a model taken together, in its present state; ``None`` without edits.

    Args:
        model: The erased model, edits on.
        names: Unrelated names; drift is what the edited projections do to their embeddings.
        notes: Where protocols and reasons go.

    ``relative_change`` is ``|W - W0| / |W0|`` (Frobenius) over all changed tensors.  ``drift`` is the
    mean over embeddings ``u`` of ``|(W - W0) u|^2 / |W0 u|^2``, all edited text projections stacked.
    """
    edits = list(model.edits)
    if not edits:
        return None
    originals, now = model.edits.originals, model.tensors()
    # A token table may have further rows now, which are no change of the old ones.
    changes = {
        name: (now[name].detach()[: len(before)] if before.ndim else now[name].detach()).sub(before).double()
        for name, before in originals.items()
    }  # fmt: skip
    moved = math.sqrt(sum(float(change.square().sum()) for change in changes.values()))
    size = math.sqrt(sum(float(before.double().square().sum()) for before in originals.values()))
    record = EditRecord(
        methods=[edit.manifest.method for edit in edits],
        digests=[edit.digest for edit in edits],
        relative_change=moved / size if size > 0 else None,
        parameters=sum(tensor.numel() for edit in edits for tensor in edit.tensors.values()),
        tensors=len(changes),
        acts=[edit.manifest.method for edit in edits if edit.manifest.acts],
        manifests=[edit.manifest.plain() for edit in edits],
    )
    for edit in edits:
        for name, texts in edit.manifest.tokens.items():
            record.tokens.setdefault(name, []).extend(texts)
    if record.relative_change is None:
        notes.null("edit.relative_change", "no weight was changed")
    notes.protocols["edit.relative_change"] = "|W - W0| / |W0|, Frobenius, over the changed tensors"
    record.rank = _rank(changes, originals, notes)
    record.drift = _drift(model, changes, names, notes)
    return record


def _rank(
    changes: dict[str, torch.Tensor], originals: dict[str, torch.Tensor], notes: Notes
) -> int | None:
    matrices = {name: c.reshape(c.shape[0], -1) for name, c in changes.items() if c.dim() > 1}
    work = sum(m.shape[0] * m.shape[1] * min(m.shape) for m in matrices.values())
    if not matrices or work > LARGEST_RANK_WORK:
        notes.null(
            "edit.rank",
            "no matrix was changed"
            if not matrices
            else "the changed tensors are too many for a rank",
        )
        return None
    notes.protocols["edit.rank"] = (
        f"largest numerical rank of a changed matrix, singular values above {RANK_TOLERANCE:g} of the largest"
    )
    largest = 0
    for name, matrix in matrices.items():
        # Rounding the edited weight leaves noise in the change; it is not rank.
        values = torch.linalg.svdvals(matrix)
        before = originals[name]
        noise = (
            torch.finfo(before.dtype).eps * math.sqrt(max(matrix.shape)) * float(before.abs().max())
        )
        floor = max(RANK_TOLERANCE * float(values[0]), noise)
        largest = max(largest, int((values > floor).sum()) if float(values[0]) > 0 else 0)
    return largest


def _drift(
    model: Any, changes: dict[str, torch.Tensor], names: Sequence[str], notes: Notes
) -> float | None:
    if model.family != "diffusion" or not hasattr(model, "text_projections"):
        notes.null(
            "edit.drift", f"drift is defined for text projections; this is a {model.family} model"
        )
        return None
    targets = [name for name in model.text_projections() if name in changes]
    if not targets or not names or len(targets) < len(changes):
        reason = (
            "the edit also changes other tensors than text projections"
            if targets
            else "the edit changes no text projection"
        )
        notes.null("edit.drift", reason if names else "no unrelated names are known")
        return None
    shares = []
    for text in model.text_inputs():
        edited = [name for name in text.names if name in changes]
        # Content tokens and the end-of-text row: what stands for the name in the layers above.
        vectors = torch.cat(
            [
                segment.rows[index, spoken.first : spoken.end + 1]
                for segment in text.segments(list(names))
                for index in range(len(names))
                for spoken in [span(segment.tokenizer, segment.ids[index].tolist())]
            ]
        ).double()
        change, before = torch.zeros(len(vectors)).double(), torch.zeros(len(vectors)).double()
        for name in edited:
            base = model.edits.originals[name].double()
            change += (vectors @ changes[name].T).square().sum(dim=1).cpu()
            before += (vectors @ base.T).square().sum(dim=1).cpu()
        if edited:
            shares.append(change / before.clamp_min(1e-30))
    drift = torch.cat(shares)
    notes.protocols["edit.drift"] = (
        "mean of |(W - W0) u|^2 / |W0 u|^2 over text rows u of unrelated names"
    )
    notes.n["edit.drift"] = len(drift)
    return float(drift.mean())
