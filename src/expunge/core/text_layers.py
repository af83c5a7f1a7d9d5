"""Which tensors of the text encoders an eraser trains, by role and by place in the stack of layers.

    feed-forward  the feed-forward block of a layer, weights and biases
    attention     its self-attention, with T5's table of relative positions
    norms         its norms, those of queries and keys included
    final-norm    the norm behind the last layer
    projection    behind the final norm, the map to the pooled vector of CLIP encoders that have one
    embeddings    token and position tables

The first three stand in layers, which are counted from 0 and chosen by number: ``"all"``, ``"last"``, or the first
``n``.  The rest belong to no layer and are taken whenever their role is named.  Encoders are CLIP (SD, SDXL, SD3,
Flux), T5 (PixArt, SD3, Flux) and Gemma (Sana).

What a pipeline does not read counts as not there: SDXL takes the rows of its first encoder before the last layer,
so that layer and the norm behind it are left out, and the last layer is the one before.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from ..errors import MissingPart, SettingError, UnsupportedModel, nearest
from ..models.diffusion import DiffusionModel

__all__ = ["ROLES", "text_layer_count", "trainable_text"]

ROLES = ("feed-forward", "attention", "norms", "final-norm", "projection", "embeddings")

IN_LAYER = re.compile(r"(?:^|\.)(?:layers|block)\.(\d+)\.(.+)$")
"""CLIP ``encoder.layers.3.``, T5 ``encoder.block.3.``, Gemma ``layers.3.``."""

OUTSIDE = (
    ("final-norm", re.compile(r"(?:^|\.)(?:final_layer_norm|norm)\.(?:weight|bias)$")),
    ("projection", re.compile(r"(?:^|\.)text_projection\.")),
    ("embeddings", re.compile(r"(?:^|\.)(?:\w*embed\w*|shared)\.")),
)


class _Place(NamedTuple):
    """What a tensor of a text encoder is for, and the number of its layer, if it stands in one."""

    role: str
    layer: int | None


def _place(name: str) -> _Place | None:
    """The place of a tensor, by its name in the encoder; ``None`` where it has none of those above."""
    found = IN_LAYER.search(name)
    if found is None:
        return next((_Place(role, None) for role, form in OUTSIDE if form.search(name)), None)
    within = found[2]
    if "norm" in within:  # norms of queries and keys stand inside attention
        return _Place("norms", int(found[1]))
    if "self_attn." in within or "SelfAttention." in within:
        return _Place("attention", int(found[1]))
    if "mlp." in within or "DenseReluDense." in within:
        return _Place("feed-forward", int(found[1]))
    return None


def _towers(model: DiffusionModel, towers: Sequence[str] | None) -> list[str]:
    present = [name for name in model.layout.towers if name in model.parts()]
    for name in towers or ():
        if name not in present:
            raise MissingPart(
                f"{model.name}: there is no text encoder {name!r}{nearest(name, present)}"
            )
    return [name for name in present if towers is None or name in towers]


def _places(model: DiffusionModel, tower: str) -> dict[str, tuple[_Place, nn.Parameter]]:
    """Place and parameter of every tensor that is read, by canonical name; refused where one has no place."""
    found = {}
    for name, parameter in model.tensors().items():
        if name.startswith(f"{tower}."):
            place = _place(name.removeprefix(f"{tower}."))
            if place is None:
                kind = type(model.parts()[tower]).__name__
                raise UnsupportedModel(
                    f"{model.name}: the {tower} is a {kind} whose tensor {name!r} has none of the known roles; "
                    "covered are CLIP, T5 and Gemma encoders"
                )
            found[name] = (place, parameter)
    unread = model.layout.unread_layers.get(tower, 0)
    if not unread:
        return found
    end = _count(found) - unread
    return {
        name: (place, parameter)
        for name, (place, parameter) in found.items()
        if place.role not in ("final-norm", "projection")
        and (place.layer is None or place.layer < end)
    }


def _count(places: Mapping[str, tuple[_Place, nn.Parameter]]) -> int:
    return 1 + max((p.layer for p, _ in places.values() if p.layer is not None), default=-1)


def text_layer_count(model: DiffusionModel, tower: str = "text_encoder") -> int:
    """How many layers of a text encoder the pipeline reads."""
    [name] = _towers(model, [tower])
    return _count(_places(model, name))


def trainable_text(
    model: DiffusionModel,
    roles: Sequence[str],
    layers: str | int = "all",
    *,
    towers: Sequence[str] | None = None,
) -> list[tuple[str, nn.Parameter]]:
    """Canonical names and parameters of the text encoders that have certain roles, in certain layers.

    Args:
        model: A model of any covered layout.
        roles: Some of :data:`ROLES`.
        layers: ``"all"``, ``"last"``, or how many of the first layers; of each encoder.
        towers: Names of the text encoders (``text_encoder``, ``text_encoder_2``, ...); all that are there if unset.

    Raises:
        SettingError: An unknown role or choice of layers, or more layers than an encoder has.
        MissingPart: An encoder that is not there, or a choice that selects nothing.
        UnsupportedModel: A text encoder that is neither CLIP, T5 nor Gemma.
    """
    for role in roles:
        if role not in ROLES:
            raise SettingError(f"role {role!r} of a text encoder is unknown{nearest(role, ROLES)}")
    whole = isinstance(layers, int) and not isinstance(layers, bool)
    if not whole and layers not in ("all", "last"):
        raise SettingError(
            f"layers={layers!r} of a text encoder; allowed are 'all', 'last' and a number"
        )
    chosen = []
    for tower in _towers(model, towers):
        places = _places(model, tower)
        count = _count(places)
        if isinstance(layers, int) and not 1 <= layers <= count:
            raise SettingError(
                f"the first {layers} layers of the {tower} of {model.name}; allowed is 1 to {count}"
            )
        first = count - 1 if layers == "last" else 0
        end = layers if isinstance(layers, int) else count
        chosen += [
            (name, parameter)
            for name, (place, parameter) in places.items()
            if place.role in roles and (place.layer is None or first <= place.layer < end)
        ]
    if not chosen:
        raise MissingPart(
            f"{model.name}: roles {', '.join(map(repr, roles)) or 'none'} select nothing in its text encoders"
        )
    return chosen
