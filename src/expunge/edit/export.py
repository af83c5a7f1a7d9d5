"""Edits for other programs: LoRA in the key layouts of diffusers, PEFT and kohya, or a full folder.

A shared low-rank edit becomes one LoRA per layer exactly: ``A = right``, ``B = W_l left``.  A dense edit is cut
to a rank, and what that loses is reported.  What a layout cannot carry (biases; in diffusers and kohya also norms
and embeddings) is named as left out.

New tokens of an edit without weights become a file of textual inversion, token -> row.  diffusers reads one token
from a file; several are loaded in one line:

    pipeline.load_textual_inversion([{token: row} for token, row in load_file(path).items()])

Beside a LoRA they are named as left out, and so is everywhere the control of an edit that acts; ``full`` carries
tokens and weights together.

No other program knows the gate of a gated adapter.  It is exported without it only where that is asked for by name,
with a warning: the same change then acts on every prompt.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import torch as safetensors

from ..errors import InputError, SettingError, UnsupportedModel, nearest
from . import adapters, deltas, files
from .layers import Kind, Layer, kind_of_shape, layers
from .tokens import PARTS, PREFIX

if TYPE_CHECKING:
    from ..models.base import Model
    from . import Edit

__all__ = ["FORMATS", "export", "lora_factors"]

FORMATS = ("diffusers", "peft", "kohya", "full")

Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
Allowed = Mapping[str, bool]

CARRIES: Mapping[str, frozenset[Kind]] = {
    "diffusers": frozenset({"linear", "convolution"}),
    "kohya": frozenset({"linear", "convolution"}),
    "peft": frozenset({"linear", "convolution", "embedding", "transposed"}),
}
"""Layers that a layout has factors for; PEFT also takes whole layers of vectors (norms)."""


def export(
    edit: Edit,
    path: str | os.PathLike[str],
    *,
    format: str = "diffusers",
    model: Model | None = None,
    rank: int | None = None,
    without_gate: bool = False,
    rebase: bool = False,
    sibling: bool = False,
) -> dict[str, Any]:
    """Write an edit for another program.

    Args:
        edit: A weight edit.
        path: A file for ``diffusers`` and ``kohya``, a folder for ``peft`` and ``full``.
        format: ``diffusers``, ``peft``, ``kohya`` or ``full``.
        model: The model the edit was fitted on, in the state it was fitted on; needed by ``full``, ``peft``
            and shared low-rank edits.
        rank: Rank to cut to; required for dense edits.
        without_gate: Leave out the gate of a gated adapter, which is refused otherwise.
        rebase, sibling: Allow a model in another state, or a fine-tuned sibling, as :meth:`Edit.on` does.

    Returns:
        ``rank`` (largest of a layer), ``relative_error`` (Frobenius, of the whole change),
        ``left_out`` (tensors the layout cannot carry), ``whole`` (those that a PEFT adapter holds as they
        are: norms and tied embeddings), ``tensors`` (number of those it carries), and where a gate is lost ``warning``.

    Raises:
        SettingError: An unknown format, a dense edit without a rank, or a gate that would be lost unasked.
        InputError: The format needs the model and none was given.
    """
    if format not in FORMATS:
        raise SettingError(f"format {format!r} is unknown{nearest(format, FORMATS)}")
    allowed = {"rebase": rebase, "sibling": sibling}
    if edit.kind == adapters.GATED:
        plain = _without_gate(edit, without_gate)
        report = export(plain, path, format=format, model=model, rank=rank, **allowed)
        return {**report, "left_out": ["gate", *report["left_out"]], "warning": GATE_LOST}
    if model is None and format in ("full", "peft"):
        what = {"full": "a full folder", "peft": "a PEFT adapter"}[format]
        raise InputError(f"exporting {what} needs the model the edit was fitted on")
    if model is not None and format == "full":
        return _full(edit, Path(path), model, allowed)
    if format == "diffusers" and edit.manifest.tokens and not edit.manifest.targets:
        return _textual_inversion(edit, path, model, allowed)
    if format in ("diffusers", "kohya"):
        _need_loader(edit, format, model)
    factors, report = lora_factors(edit, model, rank, format, **allowed)
    half = {n: (up.to(torch.float32), down.to(torch.float32)) for n, (up, down) in factors.items()}
    if format == "diffusers":
        tensors = {
            f"{_library_path(n, model)}.lora_{k}.weight": t
            for n, pair in _one_rank(half).items()
            for k, t in _ab(pair)
        }
        files.atomic_write(path, safetensors.save(tensors, metadata=_metadata(edit)))
    elif format == "kohya":
        several = model is not None and "text_encoder_2" in model.parts()
        files.atomic_write(path, safetensors.save(_kohya(half, several), metadata=_metadata(edit)))
    elif model is not None:
        _peft(edit, Path(path), half, model, allowed)
    return report


GATE_LOST = (
    "the gate is left out: the change acts on every prompt with full weight, those of other concepts included, so "
    "expect more damage to them than the edit does"
)


def _without_gate(edit: Edit, asked: bool) -> Edit:
    """The edit merged for all prompts alike; refused unless asked for, and warned of all the same."""
    if not asked:
        raise SettingError(
            f"the edit of {edit.manifest.method} is weighed anew for each prompt by its gate, which no other program "
            "knows; export it for all prompts alike with without_gate=True (--without-gate), or keep using it here"
        )
    warnings.warn(f"{edit.manifest.method}: {GATE_LOST}", stacklevel=4)
    return adapters.ungated(edit)


def lora_factors(
    edit: Edit, model: Model | None, rank: int | None, format: str = "diffusers", **allowed: bool
) -> tuple[dict[str, Any], dict[str, Any]]:
    """``(up, down)`` for every weight that a layout has factors for, in float64, and a report as of :func:`export`.

    Convolution weights give ``down (r, in, h, w)`` and ``up (out, r, 1, 1)``.
    """
    if edit.kind == "dense" and rank is None:
        raise SettingError("a dense edit has no rank of its own; say what to cut it to with rank=")
    if edit.kind == "shared-low-rank" and model is None:
        raise InputError("exporting a shared low-rank edit needs the model it was fitted on")
    current = model.tensors() if model is not None else {}
    known = layers(model) if model is not None else {}
    if model is not None:
        model.edits.check(edit, **allowed)
    whole = _whole(edit, known, model) if format == "peft" and model is not None else {}
    found, left_out = {}, _beside(edit)
    lost = total = 0.0
    for target in edit.manifest.targets:
        weight = current.get(target.name, torch.zeros(target.shape))
        delta = edit.change(target.name, weight)
        total += float(delta.square().sum())
        if target.name in whole:
            continue
        if not _carries(format, known.get(target.name), target.shape):
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
            f"the edit changes nothing that a LoRA of the {format} layout has factors for (it leaves out "
            f"{', '.join(left_out[:3]) or 'norms'}); export format='full'"
        )
    report = {
        "rank": max(up.shape[1] for up, _ in found.values()),
        "relative_error": (lost / total) ** 0.5 if total else 0.0,
        "left_out": left_out,
        "whole": list(whole),
        "tensors": len(found) + len(whole),
    }
    return found, report


def _carries(format: str, layer: Layer | None, shape: tuple[int, ...]) -> bool:
    if layer is None:
        return kind_of_shape(shape) in CARRIES[format]
    return layer.kind in CARRIES[format] and not layer.ties


def _whole(edit: Edit, known: Mapping[str, Layer], model: Model) -> dict[str, Any]:
    """Edited tensors that PEFT stores as whole layers beside the factors, and the layers by path.

    They are those of norms, and tied ones: PEFT adds factors to such a tensor once while they stand beside it,
    but once for each layer that holds it when they are merged.
    """
    found: dict[str, Any] = {}
    paths = {part: list(dict(root.named_modules())) for part, root in model.parts().items()}
    for target in edit.manifest.targets:
        layer, others = known[target.name], paths[target.name.partition(".")[0]]
        if layer.kind != "vector" and not layer.ties:
            continue
        own = {layer.path: layer.module, **dict(layer.ties)}
        # PEFT finds such a layer by the end of its name, so no other name may end in the same way.
        if all(sum(path.endswith(end) for path in others) == 1 for end in own):
            found[target.name] = own
    return found


def _beside(edit: Edit) -> list[str]:
    """What an edit brings beside weights, as it is named where it is left out."""
    rows = [PREFIX + PARTS[name] for name in edit.manifest.tokens]
    return [*(["control"] if edit.manifest.acts else []), *rows]


def _textual_inversion(
    edit: Edit, path: str | os.PathLike[str], model: Model | None, allowed: Allowed
) -> dict[str, Any]:
    pipeline = getattr(model, "pipeline", None)
    if pipeline is not None and not hasattr(pipeline, "load_textual_inversion"):
        raise UnsupportedModel(
            f"{type(pipeline).__name__} has no loader of textual inversions in diffusers; export format='full'"
        )
    if list(edit.manifest.tokens) != ["tokenizer"]:
        raise UnsupportedModel(
            f"the edit adds tokens to {', '.join(edit.manifest.tokens)}; a file of textual inversion belongs to the "
            "first tokenizer alone, so export format='full'"
        )
    if "__metadata__" in edit.manifest.tokens["tokenizer"]:
        raise UnsupportedModel(
            "the edit adds the token '__metadata__', which safetensors keeps for itself; export format='full'"
        )
    if model is not None:
        model.edits.check(edit, **allowed)
    rows = edit.tensors[PREFIX + PARTS["tokenizer"]]
    pairs = zip(edit.manifest.tokens["tokenizer"], rows, strict=True)
    tensors = {text: row.to(torch.float32).clone() for text, row in pairs}
    files.atomic_write(path, safetensors.save(tensors, metadata=_metadata(edit)))
    left_out = ["control"] if edit.manifest.acts else []
    return {
        "rank": None, "relative_error": 0.0, "left_out": left_out, "whole": [], "tensors": len(tensors),
    }  # fmt: skip


def _module(name: str) -> str:
    return name.removesuffix(".weight")


def _ab(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[tuple[str, torch.Tensor], ...]:
    up, down = pair
    return ("A", down.contiguous()), ("B", up.contiguous())


def _need_loader(edit: Edit, format: str, model: Model | None) -> None:
    """Refuse where the loaders of diffusers would not find the file's layers, which most of them do silently."""
    pipeline = getattr(model, "pipeline", None)
    kinds = {kind.__name__ for kind in type(pipeline).__mro__}
    if pipeline is not None and not hasattr(pipeline, "load_lora_weights"):
        raise UnsupportedModel(
            f"{type(pipeline).__name__} has no LoRA loader in diffusers; export format='peft' "
            "(an adapter of the transformer) or format='full'"
        )
    parts = {target.name.partition(".")[0] for target in edit.manifest.targets}
    transformer = "transformer" in parts if pipeline is None else hasattr(pipeline, "transformer")
    if format == "kohya" and transformer and "FluxLoraLoaderMixin" not in kinds:
        raise UnsupportedModel(
            "of transformers the kohya layout is read for Flux alone, and there the model is needed; "
            "export format='diffusers'"
        )


def _library_path(name: str, model: Model | None) -> str:
    """A layer as diffusers looks for it: with the wrappers that canonical names leave out."""
    if model is None:
        return _module(name)
    return f"{name.partition('.')[0]}.{layers(model)[name].path}"


def _one_rank(factors: Factors) -> Factors:
    """The same products with factors of one rank, filled up with zeros.

    A file without alphas means a scale of 1 in every layer, but older loaders take the rank of the first layer
    for the alpha of all.
    """
    rank = max(down.shape[0] for _, down in factors.values())
    found = {}
    for name, (up, down) in factors.items():
        more = rank - down.shape[0]
        wider = up.new_zeros(up.shape[0], more, *up.shape[2:])
        taller = down.new_zeros(more, *down.shape[1:])
        found[name] = torch.cat([up, wider], 1), torch.cat([down, taller], 0)
    return found


def _kohya(factors: Factors, several: bool) -> dict[str, torch.Tensor]:
    prefixes = {"unet": "lora_unet", "transformer": "lora_transformer"}
    # These programs keep a wrapper of CLIP towers that canonical names leave out, and count two of them.
    first, second = f"lora_te{1 if several else ''}_text_model", "lora_te2_text_model"
    prefixes |= {"text_encoder": first} | ({"text_encoder_2": second} if several else {})
    tensors = {}
    for name, (up, down) in factors.items():
        part, _, path = _module(name).partition(".")
        prefix = prefixes.get(part)
        if prefix is None:
            raise UnsupportedModel(f"{name}: the kohya layout has no place for a {part}")
        key = f"{prefix}_{path.replace('.', '_')}"
        tensors[f"{key}.lora_down.weight"] = down.contiguous()
        tensors[f"{key}.lora_up.weight"] = up.contiguous()
        # alpha equal to the rank makes the program's scale 1.
        tensors[f"{key}.alpha"] = torch.tensor(float(down.shape[0]))
    return tensors


def _peft(edit: Edit, folder: Path, factors: Factors, model: Model, allowed: Allowed) -> None:
    known = layers(model)
    whole = _whole(edit, known, model)
    parts = {name.partition(".")[0] for name in (*factors, *whole)}
    if len(parts) > 1:
        raise UnsupportedModel(
            f"a PEFT adapter belongs to one module; the edit touches {', '.join(sorted(parts))}"
        )
    tensors: dict[str, torch.Tensor] = {}
    for name, (up, down) in factors.items():
        key = f"base_model.model.{known[name].path}.lora_"
        if known[name].kind in ("embedding", "transposed"):  # PEFT transposes these products
            up, down = down.T, up.T
        embedding = known[name].kind == "embedding"
        for letter, tensor in _ab((up, down)):
            tensors[f"{key}embedding_{letter}" if embedding else f"{key}{letter}.weight"] = tensor
    with edit.on(model, **allowed):
        tensors |= _saved(whole)
    ranks = {known[name].path: int(pair[1].shape[0]) for name, pair in factors.items()}
    rank = max(ranks.values())
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(ranks),
        # Layers of a lower rank keep it; their alpha follows, so that every scale is 1.
        "rank_pattern": {m: r for m, r in ranks.items() if r != rank},
        "alpha_pattern": {m: r for m, r in ranks.items() if r != rank},
        "modules_to_save": sorted({path for own in whole.values() for path in own}) or None,
        "fan_in_fan_out": any(known[name].kind == "transposed" for name in factors),
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


def _saved(whole: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """All tensors of the layers that are stored whole, with the edit that is on them."""
    tensors: dict[str, torch.Tensor] = {}
    for own in whole.values():
        for path, module in own.items():
            for key, value in module.state_dict().items():
                # A copy: the edit comes off again, and files hold no shared memory.
                copy = value.detach().to("cpu").contiguous().clone()
                tensors[f"base_model.model.{path}.{key}"] = copy
    return tensors


def _metadata(edit: Edit) -> dict[str, str]:
    # Programs read "format"; where the file came from stays readable in any safetensors viewer.
    concepts = ", ".join(concept["name"] for concept in edit.manifest.concepts)
    return {
        "format": "pt",
        "expunge_edit": edit.digest,
        "expunge_method": edit.manifest.method,
        "concepts": concepts,
        **({"gate": str(edit.manifest.report["gate"])} if "gate" in edit.manifest.report else {}),
    }


def _full(edit: Edit, folder: Path, model: Model, allowed: Allowed) -> dict[str, Any]:
    if not (edit.manifest.targets or edit.manifest.tokens):
        raise UnsupportedModel(
            f"the edit of {edit.manifest.method} only acts while the model runs; no other program can carry that"
        )
    holder = getattr(model, "pipeline", None) or next(iter(model.parts().values()))
    with edit.on(model, **allowed):
        # The folder holds the edits below as well; what of theirs acts is lost with this one's.
        acts = bool(model.edits.controls)
        holder.save_pretrained(folder)
        tokenizer = getattr(model, "tokenizer", None)
        if not hasattr(model, "pipeline") and tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return {
        "rank": None, "relative_error": 0.0, "left_out": ["control"] if acts else [], "whole": [],
        "tensors": len(edit.manifest.targets) + len(edit.manifest.tokens),
    }  # fmt: skip
