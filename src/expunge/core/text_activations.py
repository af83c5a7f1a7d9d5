"""Hidden states of text encoders at chosen layers: which layers there are, and what texts give there.

    for rows in recorded(model, sites(model, (8,)), texts, batch=50):
        rows["text_encoder"].hidden            # (n, T, d), the output of the ninth layer

A row is a token.  Real rows are the start token (where a tokenizer sets one), the content and the first end token;
what follows is padding, which the denoiser reads all the same where the pipeline masks none.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..edit.tokens import PARTS
from ..errors import SettingError, UnsupportedModel
from ..method import Control
from ..models.diffusion import DiffusionModel
from ..models.types import Context
from .text_layers import text_layer_count

__all__ = ["Rows", "Site", "heard_of", "hidden_rows", "places", "recorded", "sites"]


@dataclasses.dataclass(frozen=True)
class Site:
    """A layer of a text encoder.

    Attributes:
        tower: Name of the text encoder, ``text_encoder`` or ``text_encoder_2``, ...
        layer: Canonical name of the module whose output is meant.
        width: Numbers of a hidden state, ``d``.
        start, end: Ids of the start and the end token; ``None`` where the tokenizer sets none.
    """

    tower: str
    layer: str
    width: int
    start: int | None
    end: int | None


@dataclasses.dataclass(frozen=True)
class Rows:
    """Hidden states of ``n`` texts at one site.

    Attributes:
        hidden: ``(n, T, d)``, float32 on the model's device.
        real: bool ``(n, T)``: start, content and end, without padding.
        first: bool ``(n, T)``: the start token.
    """

    hidden: Tensor
    real: Tensor
    first: Tensor

    def __getitem__(self, index: Any) -> Rows:
        return Rows(self.hidden[index], self.real[index], self.first[index])

    @staticmethod
    def joined(parts: Sequence[Rows]) -> Rows:
        """The rows of several groups of texts, one group after another."""
        fields = ("hidden", "real", "first")
        return Rows(*(torch.cat([getattr(part, name) for part in parts]) for name in fields))


def sites(
    model: DiffusionModel, layers: Sequence[int], towers: Sequence[str] | None = None
) -> tuple[Site, ...]:
    """The sites at layers of the text encoders, in the pipeline's order.

    Args:
        model: A model of any covered layout.
        layers: Numbers of layers from 0; one for all text encoders, or one for each.
        towers: Names of text encoders; all that are there if unset.

    Raises:
        SettingError: Numbers that do not go with the encoders, or a layer that the pipeline does not read.
        MissingPart: An encoder that is not there.
        UnsupportedModel: No text encoder at all.
    """
    present = [name for name in model.layout.towers if name in model.parts()]
    chosen = list(present if towers is None else towers)
    if not chosen:
        raise UnsupportedModel(f"{model.name}: {model.layout.title} has no text encoder")
    if len(layers) not in (1, len(chosen)):
        raise SettingError(
            f"{model.name}: {len(layers)} layers for {len(chosen)} text encoders ({', '.join(chosen)}); allowed is "
            "one for all, or one each"
        )
    numbers = list(layers) * len(chosen) if len(layers) == 1 else list(layers)
    found = []
    for tower, number in zip(chosen, numbers, strict=True):
        count = text_layer_count(model, tower)
        if not 0 <= number < count:
            raise SettingError(
                f"{model.name}: its {tower} has no layer {number} that is read; allowed is 0 to {count - 1}"
            )
        found.append(_site(model, tower, number))
    return tuple(found)


def _site(model: DiffusionModel, tower: str, number: int) -> Site:
    encoder: Any = model.parts()[tower]
    form = re.compile(rf"(?:^|\.)(?:layers|block)\.{number}$")
    names = [name for name, _ in encoder.named_modules() if form.search(name)]
    if len(names) != 1:
        raise UnsupportedModel(
            f"{model.name}: its {tower}, a {type(encoder).__name__}, has {len(names)} stacks of layers; needed is one"
        )
    tokenizer = getattr(model.pipeline, next(t for t, part in PARTS.items() if part == tower))
    return Site(
        tower, f"{tower}.{model.canonical(names[0])}", int(encoder.config.hidden_size),
        getattr(tokenizer, "bos_token_id", None), getattr(tokenizer, "eos_token_id", None),
    )  # fmt: skip


def places(site: Site, ids: Tensor, attended: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Which rows of token ids ``(n, T)`` are real, and which of these are start tokens; bool ``(n, T)`` each.

    Args:
        site: Whose ids they are.
        ids: Token ids.
        attended: The mask that the encoder was given; without one a text ends with its first end token.
    """
    there = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)
    if attended is not None:
        real = attended.bool()
    elif site.end is None:
        real = torch.ones_like(ids, dtype=torch.bool)
    else:
        # One token may be start and end; at index 0 it is the start.
        ends = (ids == site.end) & (there > 0)
        last = torch.where(ends.any(1), ends.int().argmax(1), ids.shape[1] - 1)
        real = there <= last[:, None]
    first = there == real.int().argmax(1)[:, None]
    start = torch.zeros_like(real) if site.start is None else first & real & (ids == site.start)
    return real, start


def hidden_rows(site: Site, context: Context, hidden: Tensor) -> Rows:
    """What a control is shown of a site, with its places, in float32."""
    if context.ids is None:
        raise UnsupportedModel(
            f"{site.tower} was not given token ids, so its rows stand for no text"
        )
    mask = context.attended
    # Decoders such as Gemma build a mask of four dimensions of their own inside; at the door it has two.
    given = mask if mask is not None and mask.ndim == 2 else None
    return Rows(hidden.float(), *places(site, context.ids, given))


class _Recorder(Control):
    """Keeps what it is shown and changes nothing."""

    def __init__(self, wanted: Sequence[Site]) -> None:
        self.wanted = {site.layer: site for site in wanted}
        self.layers = tuple(self.wanted)
        self.held: dict[str, list[Rows]] = {}

    def activations(self, context: Context, hidden: Tensor) -> Tensor:
        site = self.wanted[context.layer]
        self.held.setdefault(site.tower, []).append(hidden_rows(site, context, hidden.detach()))
        return hidden


def recorded(
    model: DiffusionModel, wanted: Sequence[Site], texts: Sequence[str], *, batch: int = 64
) -> Iterator[Mapping[str, Rows]]:
    """Hidden states of texts as the model has them now, edits included: a mapping by tower for each batch.

    One pass of the text encoders a batch, all of their layers; nothing is remembered.
    """
    for first in range(0, len(texts), batch):
        part = list(texts[first : first + batch])
        yield heard_of(model, wanted, lambda part=part: model.encode(part))  # type: ignore[misc]


def heard_of(
    model: DiffusionModel, wanted: Sequence[Site], call: Callable[[], Any]
) -> Mapping[str, Rows]:
    """Hidden states of whatever a call encodes, by tower, without gradients."""
    control = _Recorder(wanted)
    with torch.no_grad(), model.controlled(control):
        call()
    return {tower: Rows.joined(parts) for tower, parts in control.held.items()}
