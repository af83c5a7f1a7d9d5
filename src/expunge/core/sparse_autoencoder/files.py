"""Files of autoencoders (those of SAELens: :mod:`.sae_lens`).

A folder holds ``autoencoder.safetensors`` and ``autoencoder.json``: format, settings (variant, k, site), factor of the
activations, thresholds, digest of the tensors, and the quality table, without which nothing is written.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from ...edit.files import atomic_write, tensors_digest
from ...errors import EditFormatError, NonFiniteError, SettingError
from .config import SparseAutoencoderConfig
from .model import NOT_SET, SparseAutoencoder

__all__ = ["load", "read_json", "read_tensors", "save"]

FORMAT = 1
WEIGHTS, DESCRIPTION = "autoencoder.safetensors", "autoencoder.json"
LENS_WEIGHTS, LENS_DESCRIPTION = "sae_weights.safetensors", "cfg.json"


def save(model: SparseAutoencoder, folder: str | os.PathLike[str]) -> Path:
    """Write a folder of ours; a kill leaves no folder that can be read as a whole one.

    Raises:
        SettingError: The autoencoder has no quality table yet.
    """
    if not model.quality:
        raise SettingError(
            f"{model.config.id}: this autoencoder has no quality table; set autoencoder.quality = "
            "quality(autoencoder, held_out_activations) first"
        )
    folder, tensors = (
        Path(folder),
        {n: t.to("cpu").contiguous() for n, t in model.tensors().items()},
    )
    description = {
        "format": FORMAT,
        "settings": model.config.settings(),
        "version": model.config.version,
        "scale": float(model.scale),
        "theta": None if float(model.theta) == NOT_SET else float(model.theta),
        "tensors_digest": tensors_digest(tensors),
        "quality": model.quality,
        "trained": model.trained,
    }
    # The description goes last and names the digest of the weights: an older one never fits newer weights.
    atomic_write(folder / WEIGHTS, safetensors.save(tensors))
    atomic_write(
        folder / DESCRIPTION, (json.dumps(description, indent=1, sort_keys=True) + "\n").encode()
    )
    return folder


def load(folder: str | os.PathLike[str]) -> SparseAutoencoder:
    """Read a folder of ours, or one of SAELens.

    Raises:
        EditFormatError: Not such a folder, damaged, or of another format.
        NonFiniteError: A tensor holds NaN or infinity.
    """
    folder = Path(folder)
    if not (folder / DESCRIPTION).exists() and (folder / LENS_DESCRIPTION).exists():
        from .sae_lens import load_sae_lens

        return load_sae_lens(folder)
    description = read_json(folder / DESCRIPTION)
    if description.get("format") != FORMAT:
        raise EditFormatError(
            f"{folder}: is an autoencoder of format {description.get('format')!r}; this version reads {FORMAT}"
        )
    tensors = read_tensors(folder / WEIGHTS)
    if tensors_digest(tensors) != description.get("tensors_digest"):
        raise EditFormatError(f"{folder / WEIGHTS}: does not agree with its digest; it is damaged")
    stored = dict(description["settings"]).items()
    settings = {key: tuple(v) if isinstance(v, list) else v for key, v in stored}
    model = _empty(SparseAutoencoderConfig.configured(**settings), tensors)
    model.quality, model.trained = dict(description["quality"]), dict(description["trained"])
    return model


def _empty(config: SparseAutoencoderConfig, tensors: Mapping[str, Tensor]) -> SparseAutoencoder:
    model = SparseAutoencoder(config, seed=None, candidates=tensors.get("candidates"))
    try:
        model.load_state_dict(dict(tensors), assign=True)
    except RuntimeError as error:
        raise EditFormatError(f"the tensors do not fit the settings ({error})") from None
    return model.eval().requires_grad_(False)


def read_json(file: Path) -> dict[str, Any]:
    """The mapping that a JSON file holds."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EditFormatError(
            f"{file.parent}: holds no autoencoder ({file.name} is missing)"
        ) from None
    except (ValueError, OSError) as error:
        raise EditFormatError(f"{file}: is not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise EditFormatError(f"{file}: must hold one mapping")
    return found


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The finite tensors of a safetensors file."""
    try:
        tensors = safetensors.load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise EditFormatError(f"{file}: is missing or damaged ({error})") from None
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NonFiniteError(f"{file}: tensor {name!r} holds NaN or infinity")
    return tensors
