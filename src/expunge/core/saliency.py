"""Which weights matter for a loss: gradients at fixed weights, thresholded to masks.

    gradients = summed_gradients(model, pairs, losses)      # sign kept while summing
    masks = salient(gradients, 0.5)                         # global threshold
    masks = salient(gradients, 0.5, scope="tensor")         # in each tensor by itself
    masks, densities = intersected([maker, ...], run=folder, settings=...)

A mask is bool, like its tensor, and true where the absolute value of the summed gradient is among the largest.
:meth:`expunge.core.tasks.Task.movable` makes it a hard constraint of a training.  Sources: SalUn, arXiv 2310.12508
(one mask, threshold over all parameters together); ANT, arXiv 2504.12782 (threshold in each tensor, intersection
over prompts and seeds).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import NonFiniteError, SettingError
from .checkpoints import Checkpoint, CheckpointFile
from .progress import Progress
from .training import HALF_SCALE, differentiable

if TYPE_CHECKING:
    from ..models.base import Model

__all__ = [
    "CHOICES",
    "MaskFile",
    "density",
    "intersected",
    "packed",
    "report",
    "salient",
    "summed_gradients",
    "unpacked",
]

CHOICES = ("salient", "least", "none")
"""What may train: the most salient share, as a control the least salient share, or everything."""

Masks = dict[str, Tensor]

BINS = 2**16


def summed_gradients(
    model: Model,
    pairs: Sequence[tuple[str, nn.Parameter]],
    losses: Iterable[Callable[[], Tensor]],
) -> dict[str, Tensor]:
    """The sum over batches of the gradients of their losses, sign kept, at the weights as they are.

    Nothing is left behind: gradients are not stored on the parameters, and flags and modes are put back.

    Args:
        model: Its parts' parameters are frozen meanwhile, those of ``pairs`` excepted.
        pairs: Names and parameters.
        losses: Each gives the scalar loss of one batch when it is called.

    Returns:
        Name -> float32 tensor like the parameter; zeros where no loss depends on it.

    Raises:
        NonFiniteError: A gradient is NaN or infinite; names the tensor.
    """
    parameters = [parameter for _, parameter in pairs]
    half = any(
        p.dtype == torch.float16 for part in model.parts().values() for p in part.parameters()
    )
    scale = HALF_SCALE if half else 1.0
    total = {name: torch.zeros(p.shape, device=p.device) for name, p in pairs}
    with differentiable(parameters, model.parts().values()):
        for loss in losses:
            found = torch.autograd.grad(loss() * scale, parameters, allow_unused=True)
            for (name, _), gradient in zip(pairs, found, strict=True):
                if gradient is not None:
                    total[name].add_(gradient.float(), alpha=1 / scale)
    for name, gradient in total.items():
        if not bool(torch.isfinite(gradient).all()):
            raise NonFiniteError(f"{model.name}: the summed gradient of {name!r} is not finite")
    return total


# -- thresholds --------------------------------------------------------------------------------------


def salient(
    gradients: Mapping[str, Tensor],
    ratio: float,
    *,
    scope: str = "all",
    choice: str = "salient",
) -> Masks:
    """Masks of the ``int(ratio n)`` entries of largest absolute value.

    Equal values are taken in the order of the tensors and, within one, of their entries.

    Args:
        gradients: Name -> summed gradients.
        ratio: Share of the entries, 0 to 1.
        scope: ``all``: one threshold for all tensors together; ``tensor``: each by itself.
        choice: ``salient``, or as a control ``least``: the ``int(ratio n)`` smallest.

    Raises:
        SettingError: The ratio, scope or choice is not allowed.
    """
    if not 0 <= ratio <= 1:
        raise SettingError(f"the ratio of a mask is {ratio}; allowed is 0 to 1")
    if scope not in ("all", "tensor") or choice not in CHOICES[:2]:
        raise SettingError(
            f"a mask of scope {scope!r} and choice {choice!r} is unknown; allowed are 'all' and 'tensor', "
            "'salient' and 'least'"
        )
    if scope == "tensor":
        parts = (salient({n: g}, ratio, choice=choice) for n, g in gradients.items())
        return {name: mask for part in parts for name, mask in part.items()}
    count = sum(g.numel() for g in gradients.values())
    wanted = int(ratio * count)
    if choice == "least":
        masks = _largest(gradients, count - wanted)
        return {name: ~mask for name, mask in masks.items()}
    return _largest(gradients, wanted)


def _bits(gradient: Tensor) -> Tensor:
    """Whole numbers in the order of the absolute values: the bits of float32 that is not negative."""
    return gradient.detach().float().abs().contiguous().view(torch.int32)


def _rank(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin in which the ``wanted``-th largest lies, and how many of that bin are wanted."""
    above = counts.flip(0).cumsum(0)
    place = int((above < wanted).sum())
    return len(counts) - 1 - place, wanted - (int(above[place - 1]) if place else 0)


def _largest(gradients: Mapping[str, Tensor], wanted: int) -> Masks:
    """Masks of the ``wanted`` largest: two histograms find the exact threshold, nothing is sorted or joined."""
    if wanted == 0:
        return {name: torch.zeros_like(g, dtype=torch.bool) for name, g in gradients.items()}
    upper = torch.zeros(BINS, dtype=torch.int64)
    for gradient in gradients.values():
        upper += torch.bincount((_bits(gradient) >> 16).flatten(), minlength=BINS).cpu()
    high, rest = _rank(upper, wanted)
    lower = torch.zeros(BINS, dtype=torch.int64)
    for gradient in gradients.values():
        bits = _bits(gradient).flatten()
        near = bits[(bits >> 16) == high] & (BINS - 1)
        lower += torch.bincount(near, minlength=BINS).cpu()
    low, ties = _rank(lower, rest)
    threshold, masks = high * BINS + low, {}
    for name, gradient in gradients.items():
        bits = _bits(gradient)
        mask = bits > threshold
        equal = (bits == threshold).flatten().nonzero().flatten()[:ties]
        mask.view(-1)[equal] = True
        ties -= len(equal)
        masks[name] = mask
    return masks


# -- several masks, and what is said of them -----------------------------------------------------------


def density(masks: Mapping[str, Tensor]) -> float:
    """Share of entries that are true, all tensors together."""
    count = sum(mask.numel() for mask in masks.values())
    return sum(int(mask.sum()) for mask in masks.values()) / max(1, count)


def report(masks: Mapping[str, Tensor]) -> dict[str, Any]:
    """Share of true entries, ``density``; least and largest of a tensor; tensors with none."""
    own = sorted(float(mask.float().mean()) for mask in masks.values())
    return {
        "density": density(masks), "least": own[0], "largest": own[-1], "tensors": len(own),
        "empty_tensors": sum(share == 0 for share in own),
    }  # fmt: skip


def packed(mask: Tensor) -> Tensor:
    """The mask as bits, uint8 ``(ceil(n / 8),)``, first entry lowest."""
    flat = mask.detach().flatten().to(torch.uint8)
    flat = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).view(-1, 8)
    weights = 2 ** torch.arange(8, device=flat.device, dtype=torch.uint8)
    return (flat * weights).sum(1, dtype=torch.uint8)


def unpacked(bits: Tensor, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`packed`."""
    places = torch.arange(8, device=bits.device, dtype=torch.uint8)
    flat = ((bits[:, None] >> places) & 1).flatten()[: math.prod(shape)]
    return flat.bool().reshape(tuple(shape))


class MaskFile(CheckpointFile):
    """``mask.safetensors`` in a run folder: the intersection so far, as packed bits."""

    NAME = "mask.safetensors"


def intersected(
    makers: Sequence[Callable[[], Mapping[str, Tensor]]],
    *,
    run: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    label: str = "mask",
) -> tuple[Masks, list[float]]:
    """Entries that are true in all masks, made one after another.

    Args:
        makers: Each makes one mask; all of the same tensors.
        run: Folder that keeps the intersection after each; a run that was cut off goes on there.
        settings: Everything else that can change a mask, as plain values; a folder with others is refused.
        label: Shown beside the progress bar.

    Returns:
        The masks, and their density after each maker.

    Raises:
        ResumeMismatch: The folder holds masks made with other settings.
        SettingError: No mask was asked for, or no entry is in all of them.
    """
    if not makers:
        raise SettingError("no mask was asked for; at least one is needed")
    file = None if run is None else MaskFile(run, {"makers": len(makers), **(settings or {})})
    saved = None if file is None else file.read()
    masks: Masks = {}
    densities: list[float] = []
    began, spent = time.monotonic(), 0.0
    if saved is not None:
        densities, spent = saved.tensors["densities"].tolist(), saved.seconds
        for key, bits in saved.tensors.items():
            if key.startswith("bits/"):
                name = key.removeprefix("bits/")
                masks[name] = unpacked(bits, saved.tensors[f"shape/{name}"].tolist())
    with Progress(label, len(makers), done=len(densities)) as bar:
        for maker in makers[len(densities) :]:
            for name, mask in maker().items():
                masks[name] = masks[name].to(mask.device) & mask if name in masks else mask
            densities.append(density(masks))
            if file is not None:
                file.write(_checkpoint(masks, densities, spent + time.monotonic() - began))
            bar.advance(f"density {densities[-1]:.3f}")
    if not densities[-1]:
        raise SettingError(
            f"{label}: no entry is in all {len(makers)} masks, so nothing would train; allowed is a larger ratio, or "
            "fewer masks"
        )
    return masks, densities


def _checkpoint(masks: Masks, densities: Sequence[float], seconds: float) -> Checkpoint:
    tensors = {"densities": torch.tensor(densities, dtype=torch.float64)}
    for name, mask in masks.items():
        tensors[f"bits/{name}"] = packed(mask)
        tensors[f"shape/{name}"] = torch.tensor(mask.shape, dtype=torch.int64)
    return Checkpoint(len(densities), seconds, False, tensors)
