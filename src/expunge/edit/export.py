"""Edits for other programs: LoRA in the key layouts of diffusers, PEFT and kohya, or a full folder.

A shared low-rank edit becomes one LoRA per layer exactly: ``A = right``, ``B = W_l left``.  A dense edit is cut
to a rank, and what that loses is reported.  Tensors that a LoRA cannot carry (biases) are named as left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import torch as safetensors

from ..errors import InputError, SettingError, UnsupportedModel, nearest
from . import deltas, files

if TYPE_CHECKING:
    from ..models.base import Model
    from . import Edit

__all__ = ["FORMATS", "export", "lora_factors"]

FORMATS = ("diffusers", "peft", "kohya", "full")

Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def export(
    edit: Edit,
    path: str | os.PathLike[str],
    *,
    format: str = "diffusers",
    model: Model | None = None,
    rank: int | None = None,
) -> dict[str, Any]:
    """Write an edit for another program.

    Args:
        edit: A weight edit.
        path: A file for ``diffusers`` and ``kohya``, a folder for ``peft`` and ``full``.
        format: ``diffusers``, ``peft``, ``kohya`` or ``full``.
        model: The model the edit was fitted on, in the state it was fitted on; needed by ``full`` and by
            shared low-rank edits.
        rank: Rank to cut to; required for dense edits.

    Returns:
        ``rank`` (largest of a layer), ``relative_error`` (Frobenius, of the whole change),
        ``left_out`` (tensors a LoRA cannot carry) and ``tensors`` (number of edited ones).

    Raises:
        SettingError: An unknown format, or a dense edit without a rank.
        InputError: The format needs the model and none was given.
    """
    if format not in FORMATS:
        raise SettingError(f"format {format!r} is unknown{nearest(format, FORMATS)}")
    if format == "full":
        if model is None:
            raise InputError("exporting a full folder needs the model the edit was fitted on")
        return _full(edit, Path(path), model)
    factors, report = lora_factors(edit, model, rank)
    half = {n: (up.to(torch.float32), down.to(torch.float32)) for n, (up, down) in factors.items()}
    if format == "diffusers":
        tensors = {
            f"{_module(n)}.lora_{k}.weight": t for n, pair in half.items() for k, t in _ab(pair)
        }
        files.atomic_write(path, safetensors.save(tensors, metadata=_metadata(edit)))
    elif format == "kohya":
        files.atomic_write(path, safetensors.save(_kohya(half), metadata=_metadata(edit)))
    else:
        _peft(edit, Path(path), half)
    return report


def lora_factors(
    edit: Edit, model: Model | None, rank: int | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """``(up, down)`` for every weight the edit changes, in float64, and what is lost.

    Convolution weights give ``down (r, in, h, w)`` and ``up (out, r, 1, 1)``.
    """
    if edit.kind == "dense" and rank is None:
        raise SettingError("a dense edit has no rank of its own; say what to cut it to with rank=")
    if edit.kind == "shared-low-rank" and model is None:
        raise InputError("exporting a shared low-rank edit needs the model it was fitted on")
    current = model.tensors() if model is not None else {}
    if model is not None:
        model.edits.check(edit)
    found, left_out = {}, []
    lost = total = 0.0
    for target in edit.manifest.targets:
        weight = current.get(target.name, torch.zeros(target.shape))
        delta = edit.change(target.name, weight)
        total += float(delta.square().sum())
        if len(target.shape) < 2:
            left_out.append(target.name)
            lost += float(delta.square().sum())
            continue
        exact = deltas.factors(edit, target.name, weight)
        if exact is not None and (rank is None or rank >= exact[0].shape[1]):
            up, down = exact
        else:
            up, down, error = deltas.low_rank(delta, rank)
            lost += float(delta.square().sum()) * error**2
        if len(target.shape) == 4:
            up, down = up[:, :, None, None], down.reshape(-1, *target.shape[1:])
        found[target.name] = (up, down)
    if not found:
        raise UnsupportedModel(
            "the edit changes biases only, which no LoRA carries; export format='full'"
        )
    report = {
        "rank": max(up.shape[1] for up, _ in found.values()),
        "relative_error": (lost / total) ** 0.5 if total else 0.0,
        "left_out": left_out,
        "tensors": len(found),
    }
    return found, report


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _ab(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[tuple[str, torch.Tensor], ...]:
    up, down = pair
    return ("A", down.contiguous()), ("B", up.contiguous())


def _kohya(factors: Factors) -> dict[str, torch.Tensor]:
    prefixes = {"unet": "lora_unet", "transformer": "lora_transformer", "text_encoder": "lora_te"}
    tensors = {}
    for name, (up, down) in factors.items():
        part, _, path = _module(name).partition(".")
        if part not in prefixes:
            raise UnsupportedModel(f"{name}: the kohya layout has no place for a {part}")
        key = f"{prefixes[part]}_{path.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = down.contiguous()
        tensors[f"{key}.lora_up.weight"] = up.contiguous()
        # alpha equal to the rank makes the program's scale 1.
        tensors[f"{key}.alpha"] = torch.tensor(float(down.shape[0]))
    return tensors


def _peft(edit: Edit, folder: Path, factors: Factors) -> None:
    parts = {name.partition(".")[0] for name in factors}
    if len(parts) > 1:
        raise UnsupportedModel(
            f"a PEFT adapter belongs to one module; the edit touches {', '.join(sorted(parts))}"
        )
    modules = {_module(name).partition(".")[2]: pair for name, pair in factors.items()}
    tensors = {
        f"base_model.model.{m}.lora_{k}.weight": t
        for m, pair in modules.items()
        for k, t in _ab(pair)
    }
    ranks = {module: int(pair[1].shape[0]) for module, pair in modules.items()}
    rank = max(ranks.values())
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(modules),
        # Layers of a lower rank keep it; their alpha follows, so that every scale is 1.
        "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {m: r for m, r in ranks.items() if r != rank},
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
    }
    files.atomic_write(
        folder / "adapter_model.safetensors", safetensors.save(tensors, metadata=_metadata(edit))
    )
    files.atomic_write(
        folder / "adapter_config.json", (json.dumps(config, indent=2) + "\n").encode()
    )


def _metadata(edit: Edit) -> dict[str, str]:
    # Programs read "format"; where the file came from stays readable in any safetensors viewer.
    concepts = ", ".join(concept["name"] for concept in edit.manifest.concepts)
    return {
        "format": "pt",
        "expunge_edit": edit.digest,
        "expunge_method": edit.manifest.method,
        "concepts": concepts,
    }


def _full(edit: Edit, folder: Path, model: Model) -> dict[str, Any]:
    holder = getattr(model, "pipeline", None) or next(iter(model.parts().values()))
    with edit.on(model):
        holder.save_pretrained(folder)
        tokenizer = getattr(model, "tokenizer", None)
        if not hasattr(model, "pipeline") and tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return {
        "rank": None,
        "relative_error": 0.0,
        "left_out": [],
        "tensors": len(edit.manifest.targets),
    }
