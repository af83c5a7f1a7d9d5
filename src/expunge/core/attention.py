"""How much the pixels of a region attend to some tokens of their text, as a quantity to train on.

Defined for denoisers whose text stands in cross-attention of its own, in which a column of the attention
probabilities is a token.  Where text and pixels attend to each other in one sequence there is no such column,
and a column of it would not stand for the same thing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import UnsupportedModel
from ..method import Control
from .token_policy import paired_rows, span

if TYPE_CHECKING:
    from ..models.diffusion import DiffusionModel
    from ..models.types import Context, TextInput

__all__ = [
    "AttentionNorms",
    "attention_norms",
    "need_cross_attention",
    "shrunk_masks",
    "token_columns",
]


def need_cross_attention(model: DiffusionModel, who: str) -> TextInput:
    """The cross-attention keys and values of a model, where a column of their attention is a token.

    Raises:
        UnsupportedModel: Text and pixels attend to each other, or the model shows no attention.
    """
    inputs = model.text_inputs()
    strangers = [name for group in inputs for name in group.names if ".attn2." not in name]
    if len(inputs) != 1 or strangers or not model.layout.shows_attention:
        raise UnsupportedModel(
            f"{who}: {model.name} ({model.layout.title}) shows no attention in which a column is a token of the "
            "text; allowed are UNets and PixArt, whose text stands in cross-attention (attn2)"
        )
    return inputs[0]


def shrunk_masks(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks ``(n, height, width)`` on a smaller map, by the nearest pixel: bool ``(n, *size)``."""
    return functional.interpolate(masks[:, None].float(), size=size, mode="nearest")[:, 0] > 0.5


def token_columns(
    text: TextInput, texts: Sequence[str], names: Sequence[str], *, padding: bool
) -> Tensor:
    """Tokens of every occurrence of a name in its text, bool ``(n, tokens)``.

    Args:
        text: Where rows come from (see :func:`need_cross_attention`); its tokenizer is asked.
        texts, names: A text and the name in it, ``n`` each.
        padding: The first end token and all that follows count too.

    Raises:
        PromptError: A name's tokens do not stand in its text.
    """
    (whole,), (alone,) = text.segments(list(texts)), text.segments(list(names))
    columns = torch.zeros(whole.ids.shape, dtype=torch.bool)
    for row, (ids, name) in enumerate(zip(whole.ids.tolist(), alone.ids.tolist(), strict=True)):
        found, keyword = span(whole.tokenizer, ids), span(whole.tokenizer, name).content
        columns[row, paired_rows("keyword_tokens", found, found, keyword)[0]] = True
        if padding:
            columns[row, found.end :] = True
    return columns


def attention_norms(probabilities: Tensor, masks: Tensor, columns: Tensor) -> Tensor:
    """Frobenius norm ``(rows,)`` of the probabilities of masked pixels and chosen columns.

    Args:
        probabilities: ``(rows, heads, pixels, tokens)``.
        masks: bool ``(rows, pixels)``.
        columns: bool ``(rows, tokens)``.
    """
    chosen = masks[:, None, :, None] & columns[:, None, None, :]
    return torch.linalg.vector_norm((probabilities * chosen).flatten(1), dim=1)


class AttentionNorms(Control):
    """Sums :func:`attention_norms` over the cross-attention layers while the denoiser runs.

    Args:
        masks: ``(rows, height, width)`` in 0 to 1, of any size: read at the nearest pixel, with 0.5 as the
            threshold; ``None`` stands for the whole picture.
        columns: bool ``(rows, tokens)``.
        size: Height and width of the latents.

    Attributes:
        total: ``(rows,)``, the sum over the layers seen so far; gradients reach the probabilities.
        layers: Their names.
    """

    def __init__(self, masks: Tensor | None, columns: Tensor, size: tuple[int, int]) -> None:
        self.masks, self.columns, self.size = masks, columns, size
        self.total: Tensor | float = 0.0
        self.layers: list[str] = []

    def attention(self, context: Context, probabilities: Tensor) -> Tensor:
        """Take in a layer; nothing is changed."""
        if context.layer.endswith("attn2"):
            rows, _, pixels, _ = probabilities.shape
            masks = self._masks(rows, pixels).to(probabilities.device)
            norms = attention_norms(probabilities, masks, self.columns.to(probabilities.device))
            self.total = self.total + norms
            self.layers.append(context.layer)
        return probabilities

    def _masks(self, rows: int, pixels: int) -> Tensor:
        """The masks on the map of a layer, bool ``(rows, pixels)``."""
        if self.masks is None:
            return torch.ones(rows, pixels, dtype=torch.bool)
        height, width = self.size
        shrunk = round((height * width / pixels) ** 0.5)
        shape = -(-height // shrunk), -(-width // shrunk)
        if shape[0] * shape[1] != pixels:
            raise UnsupportedModel(
                f"an attention map of {pixels} pixels does not fit latents of {height} x {width}; allowed are "
                "maps that are smaller by a whole number"
            )
        return shrunk_masks(self.masks, shape).flatten(1)
