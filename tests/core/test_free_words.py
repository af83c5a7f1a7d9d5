"""A free word: a vector learnt by textual inversion, through whatever acts on the model."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from expunge import Concept
from expunge.core import free_words
from expunge.core.concept_features import Deactivated, Deactivation
from expunge.core.free_words import BEFORE, free_word
from expunge.core.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderConfig
from expunge.core.text_activations import sites
from expunge.errors import MissingCapability
from expunge.models.base import Pictures
from expunge.testing import tiny_diffusion
from expunge.testing.layouts import tiny_layout

STAR = Concept("star")
SHOWN = Pictures(
    np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8), None, ("a star",) * 3
)
QUICK = {"steps": 3, "lr": 0.1, "batch": 2, "seed": 0}


def test_the_word_moves_and_its_prompts_are_heard():
    model = tiny_diffusion()
    before = model.cost.snapshot()
    word = free_word(model, STAR, SHOWN, **QUICK)
    start = free_word(model, STAR, SHOWN, **QUICK | {"lr": 0.0})
    assert word.vectors.shape == (1, 1, 32) and len(word.losses) == 3
    assert not torch.equal(word.vectors, start.vectors)
    assert torch.equal(word.vectors, free_word(model, STAR, SHOWN, **QUICK).vectors)
    spent = model.cost.since(before)
    assert spent["denoiser.forward"] == spent["denoiser.backward"] == 3 * 3 * 2
    rows = word.rows(sites(model, (1,)))["text_encoder"]
    assert rows.hidden.shape == (len(BEFORE), 16, 32)
    assert not model.acting


def test_it_is_learnt_through_what_acts():
    model = tiny_diffusion()
    site = sites(model, (0,))[0]
    config = SparseAutoencoderConfig.configured("itd", width=32, units=64, k=4)
    autoencoder = SparseAutoencoder(config).eval().requires_grad_(False)
    edited = Deactivated(site, autoencoder, torch.ones(64, dtype=torch.bool), -8.0)
    plain = free_word(model, STAR, SHOWN, **QUICK)
    with model.controlled(Deactivation([edited])):
        through = free_word(model, STAR, SHOWN, **QUICK)
    assert plain.losses[0] != through.losses[0] and not torch.equal(plain.vectors, through.vectors)


def test_gradients_of_half_precision_are_scaled_on_their_way(monkeypatch):
    scaled = []
    own = free_words.descend
    monkeypatch.setattr(
        free_words, "descend", lambda *a, **k: scaled.append(k.get("half", False)) or own(*a, **k)
    )
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        word = free_word(tiny_diffusion(dtype=dtype), STAR, SHOWN, **QUICK)
        assert torch.isfinite(word.vectors).all()
    assert scaled == [False, True, False]


def test_several_text_encoders_are_refused():
    with pytest.raises(MissingCapability, match="one CLIP text encoder"):
        free_word(tiny_layout("sdxl"), STAR, SHOWN, **QUICK)
