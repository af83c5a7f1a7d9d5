"""From pre-activations ``u (B, K)`` to codes ``z >= 0``: what is kept, and JumpReLU's gradient.

    topk        the k largest of ReLU(u) in each row
    k-sparse    ReLU of the k largest of u in each row
    batch-topk  the k B largest of ReLU(u) in the whole batch
    jump-relu   u 1[u > theta_i]

Gradients of JumpReLU, with ``K`` the kernel and eps its width (arXiv 2407.14435):

    dz/du = 1[u > theta],   dz/dtheta_i = -(theta_i / eps) K((u_i - theta_i) / eps)
    L0 = sum_i 1[u_i > theta_i],   dL0/dtheta_i = -(1 / eps) K((u_i - theta_i) / eps)
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .support import Support

__all__ = ["batch_top_k", "count_above", "jump_relu", "running_top_k", "silverman", "top_k"]


def top_k(u: Tensor, k: int, relu_first: bool = True) -> tuple[Tensor, Tensor]:
    """Values before ReLU and units of the ``k`` kept in each row, both ``(B, k)``.

    Args:
        u: Pre-activations.
        k: Units a row.
        relu_first: Choose among ReLU(u): entries that are not positive are ties.
    """
    kept = (u.relu() if relu_first else u).topk(k, dim=-1, sorted=False).indices
    return u.gather(-1, kept), kept


def batch_top_k(u: Tensor, count: int) -> tuple[Tensor, Support]:
    """Values before ReLU ``(count,)`` and support of the ``count`` largest of ReLU(u) in the whole batch."""
    rows, units = u.shape
    flat = u.relu().reshape(-1)
    if count > flat.numel():
        count = flat.numel()
    kept = flat.topk(count, sorted=False).indices.sort().values
    counts = torch.bincount(kept // units, minlength=rows)
    return u.reshape(-1)[kept], Support(kept % units, counts, rows, units)


def running_top_k(blocks: Any, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of each row over blocks of columns, largest first, never holding all columns.

    Args:
        blocks: Yields ``(first column, (B, width of the block))``.
        k: How many.
    """
    best: tuple[Tensor, Tensor] | None = None
    for first, block in blocks:
        values, kept = block.topk(min(k, block.shape[1]), dim=-1)
        kept = kept + first
        if best is not None:
            values, kept = torch.cat([best[0], values], 1), torch.cat([best[1], kept], 1)
            values, order = values.topk(min(k, values.shape[1]), dim=-1)
            kept = kept.gather(1, order)
        best = (values, kept)
    if best is None:
        raise ValueError("there are no blocks")
    return best


def rectangle(v: Tensor) -> Tensor:
    """1 for ``|v| < 1/2``, else 0."""
    return (v.abs() < 0.5).to(v.dtype)


def silverman(v: Tensor) -> Tensor:
    """Silverman's kernel, ``exp(-|v| / sqrt 2) sin(|v| / sqrt 2 + pi / 4) / 2``."""
    scaled = v.abs() / math.sqrt(2)
    return 0.5 * torch.exp(-scaled) * torch.sin(scaled + math.pi / 4)


KERNELS = {"rectangle": rectangle, "silverman": silverman}


class _JumpReLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, theta: Tensor, bandwidth: float, kernel: str) -> Tensor:
        ctx.save_for_backward(u, theta)
        ctx.bandwidth, ctx.kernel = bandwidth, kernel
        return u * (u > theta)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        u, theta = ctx.saved_tensors
        window = KERNELS[ctx.kernel]((u - theta) / ctx.bandwidth)
        of_theta = -(theta / ctx.bandwidth) * (window * gradient).sum(0)
        return gradient * (u > theta), of_theta, None, None


class _Above(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, u: Tensor, theta: Tensor, bandwidth: float, kernel: str) -> Tensor:
        ctx.save_for_backward(u, theta)
        ctx.bandwidth, ctx.kernel = bandwidth, kernel
        return (u > theta).to(u.dtype).sum(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None, None]:
        u, theta = ctx.saved_tensors
        window = KERNELS[ctx.kernel]((u - theta) / ctx.bandwidth)
        return None, -(gradient @ window) / ctx.bandwidth, None, None


def jump_relu(u: Tensor, theta: Tensor, bandwidth: float, kernel: str = "rectangle") -> Tensor:
    """``u 1[u > theta]`` of ``(B, K)`` and ``(K)``, with the straight-through gradient of theta."""
    found: Tensor = _JumpReLU.apply(u, theta, bandwidth, kernel)
    return found


def count_above(u: Tensor, theta: Tensor, bandwidth: float, kernel: str = "rectangle") -> Tensor:
    """L0 of each row, ``(B,)``, with the straight-through gradient of theta and none of u."""
    found: Tensor = _Above.apply(u, theta, bandwidth, kernel)
    return found
