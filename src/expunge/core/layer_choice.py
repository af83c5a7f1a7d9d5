"""Which tensors of a denoiser a fine-tuning eraser trains, by choices that mean the same in every layout.

    cross-attention     every linear and convolution module through which text enters the pictures' rows
    cross-attention-kv  its keys and values only
    other               every linear and convolution module outside it, time embedding, input and output included
    all                 both
    attention           the linear modules of every attention layer
    full                every tensor, norms included

In UNets, PixArt and Sana text enters in ``attn2``.  SD3 and Flux attend to text and picture jointly: there it is
the text stream's own projections (``add_q_proj``, ``add_k_proj``, ``add_v_proj``, ``to_add_out``); Flux's single
blocks share their projections between both streams and count as ``other``.  All but ``full`` leave norms alone.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from ..errors import MissingPart, SettingError, nearest
from ..models.diffusion import DiffusionModel
from ..models.layouts.base import class_is

__all__ = ["LAYERS", "block_weights", "trainable"]

JOINT = (".add_q_proj", ".add_k_proj", ".add_v_proj", ".to_add_out")
LAYERS = ("cross-attention", "cross-attention-kv", "other", "all", "attention", "full")


def _separate(layers: str, name: str) -> bool:
    """Whether a module is chosen where cross-attention is a layer of its own."""
    return {
        "cross-attention": ".attn2." in name,
        "cross-attention-kv": name.endswith((".attn2.to_k", ".attn2.to_v")),
        "other": ".attn2." not in name,
        "attention": ".attn1." in name or ".attn2." in name,
    }.get(layers, True)


def _joint(layers: str, name: str) -> bool:
    """Whether a module is chosen where text and picture attend jointly; SD3.5's ``attn2`` sees pictures only."""
    return {
        "cross-attention": name.endswith(JOINT),
        "cross-attention-kv": name.endswith((".add_k_proj", ".add_v_proj")),
        "other": not name.endswith(JOINT),
        "attention": ".attn." in name or ".attn2." in name,
    }.get(layers, True)


def trainable(model: DiffusionModel, layers: str) -> list[tuple[str, nn.Parameter]]:
    """Canonical names and parameters that a choice of layers trains, weights and biases.

    Raises:
        SettingError: The choice is unknown.
        MissingPart: It selects nothing in this denoiser.
    """
    if layers not in LAYERS:
        raise SettingError(f"layers={layers!r} is unknown{nearest(layers, LAYERS)}")
    part = f"{model.layout.part}."
    own = {n: p for n, p in model.tensors().items() if n.startswith(part)}
    if layers != "full":
        chosen = _separate if not any(n.endswith(".add_k_proj.weight") for n in own) else _joint
        own = _of_modules(model, own, lambda name: chosen(layers, name), layers == "attention")
    if not own:
        raise MissingPart(
            f"{model.name}: layers={layers!r} selects nothing in this denoiser ({model.layout.title})"
        )
    return list(own.items())


def block_weights(model: DiffusionModel) -> list[str]:
    """Canonical names of the weights of all linear and convolution layers inside a denoiser's transformer blocks.

    In UNets these are the spatial transformers with their projections at entry and exit; elsewhere the blocks of the
    transformer, modulation of their norms included.

    Raises:
        MissingPart: The denoiser has no such block.
    """
    part, root = model.layout.part, model.denoiser
    blocks = [
        path
        for path, module in root.named_modules()
        if class_is(module, "Transformer2DModel")
        or (part != "unet" and path.rpartition(".")[0].endswith("transformer_blocks"))
    ]
    inside = tuple(f"{part}.{path}." for path in blocks if path)
    own = dict(model.tensors())
    found = _of_modules(model, own, lambda name: name.startswith(inside), False) if inside else {}
    names = [name for name in found if name.endswith(".weight")]
    if not names:
        raise MissingPart(
            f"{model.name}: this denoiser has no transformer blocks ({model.layout.title})"
        )
    return names


def _of_modules(
    model: DiffusionModel,
    own: dict[str, nn.Parameter],
    wanted: Callable[[str], bool],
    linear: bool,
) -> dict[str, nn.Parameter]:
    """The tensors of wanted linear and convolution modules."""
    kinds = (nn.Linear,) if linear else (nn.Linear, nn.Conv2d)
    mine = {
        id(parameter)
        for module in model.denoiser.modules()
        if isinstance(module, kinds)
        for parameter in module.parameters(recurse=False)
    }
    return {n: p for n, p in own.items() if id(p) in mine and wanted(n.rpartition(".")[0])}
