"""One dispatching attention processor, installed only while a control asks for attention.

Fused attention never forms probabilities, so layers run eagerly while a control reads them; the two
agree to about 1e-6 in float32.  Only adapters use this module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .types import Context

if TYPE_CHECKING:
    from ..method import Control

__all__ = ["dispatching"]


class _Dispatch:
    """Eager attention that shows its probabilities to the controls, in their order."""

    def __init__(self, layer: str, controls: Sequence[Control], context: Context) -> None:
        self.layer, self.controls, self.context = layer, controls, context

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if hidden_states.ndim == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        source = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        mask = attn.prepare_attention_mask(attention_mask, source.shape[1], len(source))
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        if encoder_hidden_states is not None and attn.norm_cross:
            source = attn.norm_encoder_hidden_states(source)
        query = attn.head_to_batch_dim(attn.to_q(hidden_states))
        key, value = (
            attn.head_to_batch_dim(attn.to_k(source)),
            attn.head_to_batch_dim(attn.to_v(source)),
        )
        scores = attn.get_attention_scores(query, key, mask)
        rows = scores.unflatten(0, (-1, attn.heads))
        self.context.layer = self.layer
        # Rows of further branches come last; they belong to the control that asked for them.
        rows, rest = rows[: self.context.rows], rows[self.context.rows :]
        for control in self.controls:
            rows = control.attention(self.context, rows)
        rows = torch.cat([rows, rest]) if len(rest) else rows
        out = attn.batch_to_head_dim(torch.bmm(rows.flatten(0, 1), value))
        out = attn.to_out[1](attn.to_out[0](out))
        if residual.ndim == 4:
            out = out.transpose(1, 2).reshape(shape)
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor


@contextlib.contextmanager
def dispatching(
    denoiser: nn.Module, controls: Sequence[Control], context: Context
) -> Iterator[None]:
    """Install the dispatcher on every attention layer; the stock processors come back at the end."""
    watching = [control for control in controls if "attention" in control.hooks()]
    if not watching:
        yield
        return
    saved = dict(denoiser.attn_processors)  # type: ignore[arg-type]
    own = {n: _Dispatch(n.removesuffix(".processor"), watching, context) for n in saved}
    denoiser.set_attn_processor(own)  # type: ignore[operator]
    try:
        yield
    finally:
        denoiser.set_attn_processor(saved)  # type: ignore[operator]
