"""Inner attacks: free vectors in a prompt, descended on a loss that is drawn anew at every step.

    start = random_start(model, rows=1, tokens=1, generator=step.generator("start"))
    found = descend(loss, start, steps=30, lr=1e-3)          # loss(step, vectors (R, k, d)) -> (R,)
    condition = splice.encode(found.vectors, item)

Rows are restarts: they share each forward pass and nothing else, because Adam and the sign act on every entry by
itself.  Gradients are those of the present step alone, and what is returned stands behind the last step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import NonFiniteError
from .adversarial_prompts import ordinary_ids
from .training import HALF_SCALE

__all__ = ["RULES", "Found", "descend", "random_start"]

RULES = ("adam", "sign", "random")
"""How vectors move: by Adam, by the sign of the gradient, not at all."""


@dataclasses.dataclass(frozen=True)
class Found:
    """Where a descent ended.

    Attributes:
        vectors: ``(R, k, d)`` float32.
        losses: Mean over the rows before each step; of the last vectors it is not known.
    """

    vectors: Tensor
    losses: tuple[float, ...]


def random_start(model: Any, rows: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Embeddings ``(rows, tokens, d)`` float32 of ids drawn evenly from the vocabulary, special tokens left out."""
    ids = ordinary_ids(model)
    drawn = ids[torch.randint(len(ids), (rows, tokens), generator=generator)]
    return model.token_table()[drawn].float()


def descend(
    loss: Callable[[int, Tensor], Tensor],
    start: Tensor,
    *,
    steps: int,
    lr: float,
    rule: str = "adam",
    half: bool = False,
) -> Found:
    """``steps`` steps down ``loss`` from ``start``.

    Args:
        loss: ``loss(step, vectors (R, k, d)) -> (R,)``, differentiable.
        start: ``(R, k, d)``; not changed.
        steps: How many; 0 returns the start.
        lr: Learning rate of Adam, or how far each entry moves a step by ``sign``.
        rule: One of :data:`RULES`.
        half: Gradients pass through float16: the loss is scaled on their way.

    Raises:
        NonFiniteError: A loss or a gradient is NaN or infinite.
    """
    vectors = start.detach().float().clone()
    optimiser = torch.optim.Adam([vectors], lr=lr)
    scale, losses = HALF_SCALE if half else 1.0, []
    for step in range(0 if rule == "random" else steps):
        leaf = vectors.detach().requires_grad_(True)
        with torch.enable_grad():
            values = loss(step, leaf)
            (slope,) = torch.autograd.grad(values.sum() * scale, leaf)
        slope = slope / scale
        if not (bool(torch.isfinite(values).all()) and bool(torch.isfinite(slope).all())):
            raise NonFiniteError(f"the loss of an inner attack is not finite at step {step + 1}")
        losses.append(float(values.detach().mean()))
        if rule == "sign":
            vectors -= lr * slope.sign()
            continue
        vectors.grad = slope
        optimiser.step()
    return Found(vectors.detach(), tuple(losses))
