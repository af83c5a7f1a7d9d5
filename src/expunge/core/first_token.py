"""The start-of-text row takes no part in learning keys and values.

Every text begins with the same row, the empty one included: what changes there changes the unconditional branch of
guidance with all its prompts.  Custom Diffusion (arXiv 2212.04488), and with it concept ablation and DoCo, therefore
stop the gradient of that row's keys and values.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..models.diffusion import DiffusionModel

__all__ = ["first_token_held", "starts_alike"]


def starts_alike(model: DiffusionModel) -> bool:
    """Whether the first row of every text is one and the same token.

    So with CLIP, whose texts begin with a start token.  T5 has none: the first row is the text's own, and nothing
    is to be held.
    """
    first = model.text_inputs()[0].segments(["", "a"])[0]
    if first.tokenizer is None:
        return False
    start = getattr(first.tokenizer, "bos_token_id", None)
    return start is not None and bool((first.ids[:, 0] == start).all())


@contextlib.contextmanager
def first_token_held(
    model: DiffusionModel, pairs: Sequence[tuple[str, nn.Parameter]]
) -> Iterator[bool]:
    """Inside the block no gradient reaches ``pairs`` through the first row of keys and values.

    Only linear layers that turn a text's rows into keys or values are held; outputs are the same numbers.

    Yields:
        Whether there was such a row.
    """
    handles: list[Any] = []
    held = starts_alike(model)
    if held:
        wanted = {id(parameter) for _, parameter in pairs}
        for name, module in model.denoiser.named_modules():
            reads = name.endswith(
                (".attn2.to_k", ".attn2.to_v", ".attn.add_k_proj", ".attn.add_v_proj")
            )
            if reads and any(id(p) in wanted for p in module.parameters(recurse=False)):
                handles.append(module.register_forward_hook(_held))
    try:
        yield held
    finally:
        for handle in handles:
            handle.remove()


def _held(module: nn.Module, inputs: tuple[Tensor, ...], answer: Tensor) -> Tensor:
    return torch.cat([answer[:, :1].detach(), answer[:, 1:]], 1)
