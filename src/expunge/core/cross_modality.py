"""Text that looks at a picture before it looks at itself, and pictures that are pulled to their captions.

Cross-modality attention (CMA) stands before the self-attention of a layer of a text decoder: text tokens H_t attend
to visual tokens H_v, which pass unchanged,

    H_t <- H_t + g CMA(Q = H_t, K = H_v, V = H_v)         g a learnable gate, 0 at the start
    L_con = InfoNCE(pooled visual tokens, pooled caption)  in the batch, both directions

Source: the evaluator of T2ISafety, arXiv 2501.12612.  The paper gives neither the gate's start nor the temperature;
0 leaves a decoder as it was.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import SettingError

__all__ = ["Attention", "CrossModalityAttention", "info_nce"]


class Attention(nn.Module):
    """Multi-head attention of one sequence to another or to itself, without a norm or a residual.

    Args:
        width: Of queries and of what comes out.
        heads: Must divide the width.
        read_width: Of the sequence that is read; ``None``: the width.

    Raises:
        SettingError: The heads do not divide the width.
    """

    def __init__(self, width: int, heads: int, read_width: int | None = None) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise SettingError(f"width {width} cannot be shared by {heads} heads")
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(read_width or width, width, bias=False)
        self.value = nn.Linear(read_width or width, width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, queries: Tensor, read: Tensor, causal: bool = False) -> Tensor:
        """``(n, q, width)`` and ``(n, k, read_width)`` -> ``(n, q, width)``; ``causal``: a token reads no later one."""
        q, k, v = (
            made.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for made in (self.query(queries), self.key(read), self.value(read))
        )
        found = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
        mixed: Tensor = self.out(found.transpose(1, 2).flatten(2))
        return mixed


class CrossModalityAttention(nn.Module):
    """The gated step ``H_t + g CMA(H_t, H_v)``; both sides are normalised before they are compared.

    Args:
        width: Of text and visual tokens.
        heads: Must divide the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.text_norm, self.visual_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.gate = nn.Parameter(torch.zeros(()))

    def forward(self, text: Tensor, visual: Tensor) -> Tensor:
        """New text tokens ``(n, tokens, width)``; visual tokens ``(n, visual, width)`` are only read."""
        seen: Tensor = self.attention(self.text_norm(text), self.visual_norm(visual))
        return text + self.gate * seen


def info_nce(
    first: Tensor, second: Tensor, temperature: float, same: Tensor | None = None
) -> Tensor:
    """Mean over rows and both directions of ``-log softmax(cos / temperature)`` at the row's own partner.

    Args:
        first, second: ``(n, width)``, row by row partners; lengths do not matter.
        temperature: Divides the cosines.
        same: bool ``(n, n)``: pairs that are no strangers to each other (pictures of one caption) and are left out
            of the sums; the diagonal always counts.

    Raises:
        SettingError: The temperature is not positive, or the two do not pair.
    """
    if temperature <= 0:
        raise SettingError(f"the temperature is {temperature}; a positive number is needed")
    if first.shape != second.shape or first.ndim != 2 or not len(first):
        raise SettingError(
            f"shapes {tuple(first.shape)} and {tuple(second.shape)} do not pair; two of (n, width) are needed"
        )
    one, two = functional.normalize(first, dim=-1), functional.normalize(second, dim=-1)
    likeness = one @ two.T / temperature
    if same is not None:
        own = torch.eye(len(likeness), dtype=torch.bool, device=likeness.device)
        likeness = likeness.masked_fill(same & ~own, float("-inf"))
    partner = torch.arange(len(likeness), device=likeness.device)
    there = functional.cross_entropy(likeness, partner)
    back = functional.cross_entropy(likeness.T, partner)
    return (there + back) / 2
