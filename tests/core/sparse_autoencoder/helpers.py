"""Small autoencoders and activations that several test files use."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from expunge.core.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderConfig
from expunge.models.base import noise_generator

VARIANTS = ("vanilla", "topk", "batch-topk", "jump-relu", "k-sparse")


def normal(*shape: int, purpose: str = "rows") -> Tensor:
    return torch.randn(*shape, generator=noise_generator(0, purpose))


def config(**changes: Any) -> SparseAutoencoderConfig:
    settings = {
        "width": 6, "units": 12, "k": 3, "steps": 6, "batch": 16, "lr": 1e-2, "normalise": "none", "l0_target": 3.0,
        "candidates": 16, "threshold": 0.2, "bandwidth": 0.5,
    }  # fmt: skip
    return SparseAutoencoderConfig(**{**settings, **changes})


def scrambled(**changes: Any) -> SparseAutoencoder:
    """An autoencoder whose every parameter is far from its start."""
    model = SparseAutoencoder(config(**changes), candidates=changes.get("candidate_rows"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name not in ("jump", "log_scale"):
                parameter += 0.3 * normal(*parameter.shape, purpose=name)
        if model.config.dictionary in ("archetypal", "relaxed-archetypal"):
            model.candidates.copy_(normal(*model.candidates.shape, purpose="candidates"))
    model.constrain()
    if model.config.sparse:
        model.theta.fill_(0.4)
    return model


def planted(
    rows: int = 600, width: int = 16, atoms: int = 24, active: int = 3
) -> tuple[Tensor, Tensor]:
    """Rows that are sparse combinations of true atoms, and the atoms."""
    true = torch.nn.functional.normalize(normal(atoms, width, purpose="true"), dim=1)
    generator = noise_generator(0, "planted")
    code = torch.zeros(rows, atoms)
    on = torch.rand(rows, atoms, generator=generator).topk(active, dim=1).indices
    code.scatter_(1, on, torch.rand(rows, active, generator=generator) + 0.5)
    return code @ true, true
