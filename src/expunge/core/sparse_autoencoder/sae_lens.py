"""Folders of SAELens: ``cfg.json`` and ``sae_weights.safetensors``, as its version 6 writes and reads them.

Tensors: ``W_enc (d, K)``, ``b_enc (K)``, ``W_dec (K, d)``, ``b_dec (d)``; ``threshold (K)`` for JumpReLU
(``log_threshold`` in older checkpoints), ``topk_threshold`` in training checkpoints of BatchTopK.  Keys that change
what the autoencoder does: ``architecture``, ``d_in``, ``d_sae``, ``k``, ``apply_b_dec_to_input``,
``normalize_activations``, ``rescale_acts_by_decoder_norm``; versions before 6 say ``activation_fn(_str)`` and
``activation_fn_kwargs``.

What SAELens has no place for is folded into the weights, exactly: one factor of all activations (``W_enc`` times it,
``W_dec`` and ``b_dec`` over it) and the norms of the atoms.  BatchTopK becomes JumpReLU with one threshold, as there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import torch as safetensors
from torch import Tensor

from ...edit.files import atomic_write
from ...errors import EditFormatError, MissingPart, SettingError, nearest
from . import files
from .config import SparseAutoencoderConfig
from .model import SparseAutoencoder

__all__ = ["load_sae_lens", "save_sae_lens"]

VERSION = "6.21.0"
"""The version whose form is written; readers treat folders without one, or below 6, as of the older form."""

ARCHITECTURES = {
    "standard": "vanilla", "topk": "topk", "jumprelu": "jump-relu", "batchtopk": "batch-topk",
}  # fmt: skip
ROW_BY_ROW = {"constant_norm_rescale": "row-norm", "layer_norm": "layer-norm"}


def save_sae_lens(
    model: SparseAutoencoder,
    folder: str | os.PathLike[str],
    *,
    hook_name: str | None = None,
    model_name: str | None = None,
) -> Path:
    """Write a folder that ``sae_lens.SAE.load_from_disk`` opens; returns it.

    Args:
        model: The autoencoder.
        folder: Where.
        hook_name: Name of the site in TransformerLens; default: the site of the settings.
        model_name: Name of the language model.

    Raises:
        SettingError: A threshold is needed that is not calibrated.
    """
    config = model.config
    with torch.no_grad():
        atoms, scale = model.dictionary().clone(), model.scale
        encoder, offset = model.encoder.to(atoms.dtype).clone(), model.offset.clone()
        if config.rescale_by_norm:
            norms = atoms.norm(dim=1).clamp_min(1e-8)
            atoms, encoder, offset = (
                atoms / norms[:, None],
                encoder * norms[:, None],
                offset * norms,
            )
        tensors = {
            "W_enc": (encoder * scale).T, "b_enc": offset, "W_dec": atoms / scale, "b_dec": model.bias / scale,
        }  # fmt: skip
        keeps = model.keeps_k
        if model.needs_theta or config.variant == "jump-relu":
            tensors["threshold"] = model.thresholds()
    architecture = "topk" if keeps else "standard" if config.variant == "vanilla" else "jumprelu"
    rows = {ours: theirs for theirs, ours in ROW_BY_ROW.items()}
    cfg: dict[str, Any] = {
        "architecture": architecture,
        "d_in": config.width,
        "d_sae": config.units,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": config.pre_bias,
        "normalize_activations": rows.get(config.normalise, "none"),
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": VERSION, "sae_lens_training_version": None, "model_name": model_name,
            "hook_name": hook_name or config.site or None,
        },
    }  # fmt: skip
    if keeps:
        cfg |= {"k": config.kept, "rescale_acts_by_decoder_norm": False}
    if model.quality:
        cfg["expunge"] = {"quality": model.quality}  # keys it does not know are left alone
    folder = Path(folder)
    plain = {name: t.detach().float().to("cpu").contiguous() for name, t in tensors.items()}
    atomic_write(folder / files.LENS_WEIGHTS, safetensors.save(plain))
    atomic_write(folder / files.LENS_DESCRIPTION, (json.dumps(cfg, indent=1) + "\n").encode())
    return folder


def load_sae_lens(
    folder: str | os.PathLike[str], *, activation_scale: float | None = None
) -> SparseAutoencoder:
    """Read a folder of SAELens, of version 6 or older.

    Args:
        folder: Holds ``cfg.json`` and ``sae_weights.safetensors``.
        activation_scale: The factor of the activations where ``normalize_activations`` is
            ``expected_average_only_in``, which SAELens does not store.

    Raises:
        EditFormatError: A file is missing or damaged, or tensors of other shapes than the configuration says.
        SettingError: An architecture or normalisation that is not defined here, or a factor that is missing.
    """
    folder = Path(folder)
    cfg = files.read_json(folder / files.LENS_DESCRIPTION)
    tensors = files.read_tensors(folder / files.LENS_WEIGHTS)
    architecture = str(cfg.get("architecture", "standard"))
    function = cfg.get("activation_fn_str") or cfg.get("activation_fn") or "relu"
    if architecture == "standard" and function != "relu":
        architecture = str(function)  # before version 6
    if architecture not in ARCHITECTURES:
        raise SettingError(
            f"{folder.name}: architecture {architecture!r} of SAELens is not read here"
            f"{nearest(architecture, ARCHITECTURES)}"
        )
    variant = ARCHITECTURES[architecture]
    k: Any = cfg.get("k", (cfg.get("activation_fn_kwargs") or {}).get("k"))
    try:
        settings: dict[str, Any] = {"width": int(cfg["d_in"]), "units": int(cfg["d_sae"])}
        if variant in ("topk", "batch-topk"):
            settings["k"] = max(1, int(k))
    except (KeyError, TypeError, ValueError):
        raise EditFormatError(f"{folder.name}: cfg.json lacks d_in, d_sae or k") from None
    normalise, scale = _normalisation(folder.name, cfg, activation_scale)
    metadata = cfg.get("metadata") or cfg
    config = SparseAutoencoderConfig.configured(
        variant=variant,
        dictionary="free",
        normalise=normalise,
        pre_bias=bool(cfg.get("apply_b_dec_to_input", True)),
        rescale_by_norm=bool(cfg.get("rescale_acts_by_decoder_norm", False)) and variant != "jump-relu",
        log_threshold=False,
        auxiliary="none",
        site=str(metadata.get("hook_name") or metadata.get("hook_point") or ""),
        **settings,
    )  # fmt: skip
    model = SparseAutoencoder(config, seed=None)
    with torch.no_grad():
        for ours, value in _renamed(folder.name, tensors, config).items():
            getattr(model, ours).copy_(value)
        model.scale.fill_(scale)
    model.quality = dict((cfg.get("expunge") or {}).get("quality") or {})
    return model.eval().requires_grad_(False)


def _normalisation(
    name: str, cfg: Mapping[str, Any], activation_scale: float | None
) -> tuple[str, float]:
    said = cfg.get("normalize_activations")
    if isinstance(said, bool):  # before version 3
        said = "expected_average_only_in" if said else "none"
    said = said or "none"
    if said == "expected_average_only_in":
        if activation_scale is None:
            raise SettingError(
                f"{name}: was trained on activations times a factor that SAELens does not store "
                "(normalize_activations is expected_average_only_in); give it as activation_scale, 1.0 if it was "
                "folded in"
            )
        return "mean-norm", float(activation_scale)
    if said not in ("none", *ROW_BY_ROW):
        raise SettingError(
            f"{name}: normalize_activations is {said!r}"
            f"{nearest(str(said), ['none', 'expected_average_only_in', *ROW_BY_ROW])}"
        )
    return ROW_BY_ROW.get(said, "none"), 1.0


def _renamed(
    name: str, tensors: Mapping[str, Tensor], config: SparseAutoencoderConfig
) -> dict[str, Tensor]:
    """Their tensors under our names, checked."""
    found = dict(tensors)
    scaling = found.pop("scaling_factor", None)
    if scaling is not None and not torch.allclose(scaling, torch.ones_like(scaling)):
        raise SettingError(
            f"{name}: holds finetuning factors of units (scaling_factor), which are not read here"
        )
    if "log_threshold" in found:
        found["threshold"] = found.pop("log_threshold").exp()
    d, units = config.width, config.units
    wanted = {
        "W_enc": ("encoder", (d, units)), "b_enc": ("offset", (units,)), "W_dec": ("atoms", (units, d)),
        "b_dec": ("bias", (d,)),
    }  # fmt: skip
    if config.variant == "jump-relu":
        wanted["threshold"] = ("jump", (units,))
    if config.variant == "batch-topk":
        wanted["topk_threshold"] = ("theta", ())
    if set(found) != set(wanted):
        wrong = sorted(set(found) ^ set(wanted))[0]
        raise MissingPart(f"{name}: tensors must be {', '.join(sorted(wanted))}; {wrong!r} differs")
    for theirs, (_, shape) in wanted.items():
        if tuple(found[theirs].shape) != shape:
            raise EditFormatError(
                f"{name}: {theirs} has shape {tuple(found[theirs].shape)}; cfg.json says {shape}"
            )
    made = {ours: found[theirs].float() for theirs, (ours, _) in wanted.items()}
    made["encoder"] = made["encoder"].T
    return made
