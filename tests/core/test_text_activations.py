"""Layers of text encoders and the places of tokens: start, content, end, padding."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from expunge.core.text_activations import Rows, Site, places, recorded, sites
from expunge.errors import MissingPart, SettingError, UnsupportedModel
from expunge.testing import tiny_diffusion
from expunge.testing.layouts import tiny_layout

CLIP = Site("text_encoder", "x", 4, start=7, end=8)
NEITHER = Site("text_encoder", "x", 4, start=None, end=None)


def shown(site, ids, attended=None):
    mask = None if attended is None else torch.tensor([attended])
    real, first = places(site, torch.tensor([ids]), mask)
    return real[0].int().tolist(), first[0].int().tolist()


@pytest.mark.parametrize(
    ("site", "ids", "mask", "real", "first"),
    [
        (CLIP, [7, 1, 2, 8, 8, 8], None, [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]),
        (CLIP, [7, 8, 0, 0], None, [1, 1, 0, 0], [1, 0, 0, 0]),  # an empty text, another padding token
        (CLIP, [7, 0, 2, 8, 0, 0], None, [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0]),  # that is also a word
        (CLIP, [7, 1, 2, 3], None, [1, 1, 1, 1], [1, 0, 0, 0]),  # cut before its end
        (Site("t", "x", 4, 8, 8), [8, 1, 8, 8], None, [1, 1, 1, 0], [1, 0, 0, 0]),  # one token for both
        (Site("t", "x", 4, None, 1), [5, 6, 1, 0], None, [1, 1, 1, 0], [0, 0, 0, 0]),  # T5 has no start
        (Site("t", "x", 4, 3, None), [3, 6, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]),
        (Site("t", "x", 4, 3, None), [0, 0, 3, 6], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 1, 0]),  # on the left
        (NEITHER, [1, 2], None, [1, 1], [0, 0]),
    ],
)  # fmt: skip
def test_places(site, ids, mask, real, first):
    assert shown(site, ids, mask) == (real, first)


LAYERS = {
    "sdxl": ["text_encoder.encoder.layers.0", "text_encoder_2.encoder.layers.1"],
    "pixart": ["text_encoder.encoder.block.0"],
    "sana": ["text_encoder.layers.0"],
    "sd3": [f"text_encoder{n}.encoder.{kind}.0" for n, kind in (("", "layers"), ("_2", "layers"), ("_3", "block"))],
    "flux": ["text_encoder.encoder.layers.0", "text_encoder_2.encoder.block.0"],
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_sites_of_every_layout_and_what_texts_give_there(name):
    model = tiny_layout(name)
    found = sites(model, (0, 1) if name == "sdxl" else (0,))
    assert [site.layer for site in found] == LAYERS[name]
    texts = ["a red star", "a photo of a blue circle", "heart"]
    parts = list(recorded(model, found, texts, batch=2))
    for site in found:
        rows = Rows.joined([part[site.tower] for part in parts])
        assert rows.hidden.shape[0] == 3 and rows.hidden.shape[2] == site.width
        assert rows.hidden.dtype == torch.float32
        assert bool(rows.real.any(1).all()) and bool((rows.first.sum(1) <= 1).all())
        assert not bool((rows.first & ~rows.real).any())
    assert not model.acting


def test_padding_is_no_real_token_and_batches_change_nothing():
    model = tiny_diffusion()
    texts = ["a red star", "heart"]
    [part] = recorded(model, sites(model, (1,)), texts)
    rows = part["text_encoder"]
    assert rows.real.sum(1).tolist() == [5, 3]  # start, content, end
    assert rows.first.sum(1).tolist() == [1, 1]
    alone = [p["text_encoder"] for p in recorded(model, sites(model, (1,)), texts, batch=1)]
    assert torch.allclose(Rows.joined(alone).hidden, rows.hidden, atol=1e-5)
    assert torch.equal(rows[1:].hidden, rows.hidden[1:])


def test_a_model_that_reads_no_text_is_refused():
    layout = SimpleNamespace(towers=(), title="a UNet with class labels")
    model = SimpleNamespace(name="shapes", layout=layout, parts=lambda: {"unet": None})
    with pytest.raises(UnsupportedModel, match="a UNet with class labels has no text encoder"):
        sites(model, (0,))


def test_refusals_in_words():
    model = tiny_diffusion()
    with pytest.raises(SettingError, match="no layer 8 that is read; allowed is 0 to 1"):
        sites(model, (8,))
    with pytest.raises(SettingError, match="2 layers for 1 text encoders"):
        sites(model, (0, 1))
    with pytest.raises(MissingPart, match="text_encoder_2"):
        sites(model, (0,), ("text_encoder_2",))
    sdxl = tiny_layout("sdxl")
    with pytest.raises(SettingError, match="no layer 1 that is read; allowed is 0 to 0"):
        sites(sdxl, (1,))
    assert [s.tower for s in sites(sdxl, (1,), ("text_encoder_2",))] == ["text_encoder_2"]
