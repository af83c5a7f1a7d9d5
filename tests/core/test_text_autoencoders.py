"""Autoencoders of text encoders: what they learn from, when they are trained, how an edit carries them."""

from __future__ import annotations

import pytest
import torch

from expunge.core import text_autoencoders
from expunge.core.sampling import SHARED
from expunge.core.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderConfig
from expunge.core.text_activations import Rows, Site, sites
from expunge.core.text_autoencoders import (
    loaded,
    packed,
    reference,
    rounded,
    rows_of,
    trained,
    unpacked,
)  # fmt: skip
from expunge.errors import EditFormatError, InputError, ResumeMismatch, RunError, SettingError
from expunge.testing import tiny_diffusion

TEXTS = [
    f"{a} {b}"
    for a in ("a red", "a blue", "photo of a")
    for b in ("star", "circle", "heart", "square")
]


@pytest.fixture(autouse=True)
def forgotten():
    SHARED.clear()


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


def config(site, **more):
    settings = {"units": 48, "k": 3, "steps": 3, "batch": 8, "warm_up": 1, **more}
    return SparseAutoencoderConfig.configured("itd", width=site.width, site=site.layer, **settings)


def made(model, run=None, texts=TEXTS, **more):
    options = {"padding": 2, "starts": True, "seed": 0, **more}
    return trained(model, sites(model, (1,)), texts, config, run=run, **options)["text_encoder"]


def test_what_is_learnt_from():
    hidden = torch.arange(8.0).reshape(1, 8, 1)
    real = torch.tensor([[1, 1, 1, 0, 0, 0, 0, 0]]).bool()
    rows = Rows(hidden, real, torch.tensor([[1, 0, 0, 0, 0, 0, 0, 0]]).bool())
    draw = torch.Generator().manual_seed(0)
    assert rows_of(rows, 0, True, draw).flatten().tolist() == [0, 1, 2]
    assert rows_of(rows, 0, False, draw).flatten().tolist() == [1, 2]
    assert rows_of(rows, None, False, draw).flatten().tolist() == [1, 2, 3, 4, 5, 6, 7]
    two = rows_of(rows, 2, False, draw).flatten().tolist()
    assert two[:2] == [1, 2] and len(two) == 4 and set(two[2:]) <= {3, 4, 5, 6, 7}
    assert len(rows_of(rows, 99, False, draw)) == 7


def test_an_autoencoder_is_trained_once_for_a_model(model, monkeypatch):
    calls = []
    fit = text_autoencoders.fit
    monkeypatch.setattr(text_autoencoders, "fit", lambda *a, **k: calls.append(1) or fit(*a, **k))
    first = made(model)
    assert made(model) is first and calls == [1]
    assert made(model, seed=1) is not first and len(calls) == 2
    made(model, texts=TEXTS[:-1])
    assert len(calls) == 3
    assert first.quality["held_out"] and first.config.site == "text_encoder.encoder.layers.1"


def test_a_folder_asked_for_later_receives_what_is_known(model, tmp_path):
    first = made(model)
    assert made(model, tmp_path) is first
    kept = SparseAutoencoder.load(tmp_path / "text_encoder" / "autoencoder")
    assert torch.equal(kept.atoms, first.atoms) and kept.quality == first.quality


@pytest.mark.parametrize("more", [{}, {"untrained": True}])
def test_what_is_learnt_does_not_depend_on_a_folder(model, tmp_path, more):
    texts = [f"{text} number {n}" for text in TEXTS for n in range(3)]
    without = made(model, texts=texts, **more)
    SHARED.clear()
    within = made(model, tmp_path, texts=texts, **more)
    assert all(torch.equal(without.tensors()[n], t) for n, t in within.tensors().items())
    assert without.quality == within.quality


def test_a_run_folder_goes_on_and_refuses_other_texts(model, tmp_path):
    first = made(model, tmp_path)
    SHARED.clear()
    again = made(model, tmp_path)
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.tensors().values(), again.tensors().values(), strict=True)
    )
    saved = (
        loaded(tmp_path, sites(model, (1,))[0])
        if (tmp_path / "autoencoder.json").exists()
        else None
    )
    assert saved is None
    kept = SparseAutoencoder.load(tmp_path / "text_encoder" / "autoencoder")
    assert torch.equal(kept.atoms, first.atoms)
    SHARED.clear()
    with pytest.raises((RunError, ResumeMismatch)):
        made(model, tmp_path, texts=TEXTS[:-1])


@pytest.mark.parametrize("folder", [False, True])
def test_hidden_states_beyond_half_precision_are_kept_whole(tmp_path, folder):
    large = tiny_diffusion()
    with torch.no_grad():  # as the hidden states of T5 are
        large.text_encoder.get_input_embeddings().weight.mul_(1e8)
    found = made(large, tmp_path if folder else None)
    assert found.quality["mse"] < float("inf") and torch.isfinite(found.bias).all()
    assert float(found.bias.abs().max()) > 65_504


def test_a_random_one_learnt_nothing_but_the_median(model):
    random, learnt = made(model, untrained=True), made(model)
    assert random.quality["held_out"] and not random.trained
    assert not torch.equal(random.atoms, learnt.atoms)
    assert torch.allclose(random.atoms.norm(dim=1), torch.ones(48))


def test_packed_and_unpacked_in_half_precision(model):
    own = rounded(made(model))
    tensors = packed(own, "t.")
    assert tensors["t.autoencoder.encoder"].dtype == torch.float16
    again = unpacked(tensors, "t.")
    rows = torch.randn(5, 32)
    assert torch.equal(own(rows), again(rows)) and again.config == own.config
    with pytest.raises(EditFormatError, match=r"no autoencoder that fits its settings under 'u\.'"):
        unpacked(tensors, "u.")
    with pytest.raises(EditFormatError, match="no autoencoder"):
        unpacked({**tensors, "t.autoencoder.atoms": torch.zeros(2, 2)}, "t.")
    with pytest.raises(EditFormatError, match="no autoencoder"):
        unpacked({**tensors, "t.settings": torch.tensor([1, 2], dtype=torch.uint8)}, "t.")


def test_a_folder_is_referred_to_by_its_digest(model, tmp_path):
    own, site = made(model), sites(model, (1,))[0]
    own.save(tmp_path / "one")
    digest = reference(own, "t.")["t.digest"]
    assert len(digest) == 32
    assert torch.equal(loaded(tmp_path / "one", site, wanted=digest).atoms, own.atoms)
    with pytest.raises(EditFormatError, match="another autoencoder than the edit was made with"):
        loaded(tmp_path / "one", site, wanted=digest.flip(0))
    own.save(tmp_path / "many" / "text_encoder")
    assert torch.equal(loaded(tmp_path / "many", site).atoms, own.atoms)
    with pytest.raises(EditFormatError):
        loaded(tmp_path / "one", site, several=True)
    with pytest.raises(SettingError, match=r"layers\.0 of width 32"):
        loaded(tmp_path / "one", sites(model, (0,))[0])
    with pytest.raises(SettingError, match="of width 5"):
        loaded(tmp_path / "one", Site("text_encoder", site.layer, 5, None, None))


def test_one_text_is_refused(model):
    with pytest.raises(InputError, match="at least 2"):
        made(model, texts=["a star"])
