"""Gated adapters: low-rank changes that stand beside weights and are never merged into them.

An edit of kind ``gated-adapter`` holds, for each layer of weight ``W``, two factors under the weight's canonical name,

    up.<name>  (out, r)      down.<name>  (r, in), of a convolution (r, in, height, width)

and one number ``alpha``; the layer answers ``W x + gamma (alpha / r) up (down x)``.  The gate ``gamma`` is the
method's own and depends on what is asked for, so that no weight says the same: :func:`ungated` is the plain low-rank
edit that is left without it.  Such edits never see each other, so they go on a model in any number and order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ..errors import EditFormatError, MissingPart, UnsupportedModel, WrongShape, nearest
from . import files
from .deltas import DOWN, UP
from .manifest import Manifest, Target

if TYPE_CHECKING:
    from ..models.base import Model
    from . import Edit

__all__ = ["ALPHA", "GATED", "check", "check_factors", "layers", "scale", "stacked_on", "ungated"]

GATED = "gated-adapter"
ALPHA = "alpha"


def layers(edit: Edit) -> dict[str, tuple[int, ...]]:
    """Canonical name of each weight an adapter stands beside -> that weight's shape; empty for other kinds."""
    return {} if edit.kind != GATED else shapes(edit.tensors)


def shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """The same of tensors that are on their way into an edit."""
    names = [key.removeprefix(UP) for key in tensors if key.startswith(UP)]
    return {n: (len(tensors[UP + n]), *tensors[DOWN + n].shape[1:]) for n in names}


def check_factors(manifest: Manifest, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse an edit of this kind without adapters, with factors that do not go together, or without ``alpha``."""
    if manifest.kind != GATED:
        return
    ups, downs = (
        {key.removeprefix(side) for key in tensors if key.startswith(side)} for side in (UP, DOWN)
    )
    for name in sorted(ups ^ downs):
        raise EditFormatError(
            f"{manifest.method}: the edit lacks the tensor {(UP if name in downs else DOWN) + name!r}"
        )
    if not ups:
        raise EditFormatError(f"{manifest.method}: the edit of kind {GATED} holds no adapter")
    if tensors.get(ALPHA, torch.zeros(1)).shape != ():
        raise EditFormatError(f"{manifest.method}: the edit lacks {ALPHA!r}, a single number")
    for name in sorted(ups):
        up, down = tensors[UP + name], tensors[DOWN + name]
        fits = up.ndim == 2 and down.ndim in (2, 4) and up.shape[1] == len(down) > 0
        if not fits or not (up.is_floating_point() and down.is_floating_point()):
            raise EditFormatError(
                f"{manifest.method}: the factors of {name!r} are {tuple(up.shape)} and {tuple(down.shape)}; needed "
                "are numbers (out, r) and (r, in) or (r, in, height, width)"
            )


def scale(edit: Edit, name: str) -> float:
    """``alpha / r`` of one adapter."""
    return float(edit.tensors[ALPHA]) / len(edit.tensors[DOWN + name])


def check(edit: Edit, model: Model) -> None:
    """Refuse, in words, adapters for layers that the model does not have."""
    tensors = model.tensors()
    for name, shape in layers(edit).items():
        if name not in tensors:
            raise MissingPart(f"{model.name}: there is no tensor {name!r}{nearest(name, tensors)}")
        if tuple(tensors[name].shape) != shape:
            raise WrongShape(
                f"{name}: the adapter is for a weight of {shape}, the model has {tuple(tensors[name].shape)}"
            )


def stacked_on(edit: Edit, below: tuple[Edit, ...]) -> tuple[str, ...]:
    """Digests of the edits below that matter to one that goes on top: for an adapter not those of other adapters."""
    fitted = edit.manifest.fitted_on
    return tuple(
        other.digest
        for other in below
        if edit.kind != GATED or other.kind != GATED or other.digest in fitted
    )


def ungated(edit: Edit) -> Edit:
    """The same change merged into the weights, for every prompt alike: a plain low-rank edit.

    Raises:
        UnsupportedModel: The edit has no gate to lose.
    """
    from . import Edit

    if edit.kind != GATED:
        raise UnsupportedModel(
            f"the edit of {edit.manifest.method} is of kind {edit.kind}; it has no gate"
        )
    tensors = {}
    for name in layers(edit):
        tensors[UP + name] = scale(edit, name) * edit.tensors[UP + name]
        tensors[DOWN + name] = edit.tensors[DOWN + name].flatten(1).contiguous()
    changes = {
        "kind": "low-rank", "acts": False, "tensors_digest": files.tensors_digest(tensors),
        "targets": [Target(name=name, shape=shape) for name, shape in layers(edit).items()],
        "report": {**edit.manifest.report, "gate": "lost: acts on every prompt alike"},
    }  # fmt: skip
    return Edit(edit.manifest.model_copy(update=changes), tensors)
