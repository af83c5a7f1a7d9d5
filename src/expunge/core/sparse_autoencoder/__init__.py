"""Sparse autoencoders: one implementation of all variants, their training, metrics and files.

config = SparseAutoencoderConfig.configured("dictionary-learning:topk", width=768, units=6144, k=32, steps=5000)
autoencoder = fit(activations, config, seed=0, held_out=more)      # (n, d) tensor, or an ActivationCache
values, units = autoencoder.encode_sparse(x)                       # (..., k) each
x_hat = autoencoder.decode_sparse(values, units)
autoencoder.save("folder"); SparseAutoencoder.load("folder").quality["r2"]
"""

from __future__ import annotations

from .config import PRESETS, SparseAutoencoderConfig
from .files import load, save
from .metrics import loss_recovered, mean_max_cosine, quality, recovery, stability
from .model import SparseAutoencoder
from .sae_lens import load_sae_lens, save_sae_lens
from .stream import ActivationCache
from .trainer import fit, fit_all

__all__ = [
    "PRESETS", "ActivationCache", "SparseAutoencoder", "SparseAutoencoderConfig", "fit", "fit_all", "load",
    "load_sae_lens", "loss_recovered", "mean_max_cosine", "quality", "recovery", "save", "save_sae_lens", "stability",
]  # fmt: skip
