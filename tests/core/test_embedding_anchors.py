"""Anchors around a concept: length and chance by hand, rejection where it matters, words, every layout's parts."""

from __future__ import annotations

import pytest
import torch

from expunge.core import embedding_anchors
from expunge.core.embedding_anchors import Vocabulary, acceptance, gaussian
from expunge.core.gated_adapters import features
from expunge.errors import MissingPart, SettingError
from expunge.models.types import Condition
from expunge.testing import tiny_diffusion, tiny_layout


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def flat(count, **more):
    """A text space of two dimensions, in which the cosine of a random direction is anything but small."""
    return Condition(torch.tensor([[[3.0, 4.0]]]).repeat(count, 1, 1), **more)


def test_acceptance_by_hand():
    cosines = torch.tensor([0.0, 0.5, -0.5, 1.0, -1.0])
    assert acceptance(cosines, 1.0).tolist() == [1.0, 0.5, 0.5, 0.0, 0.0]
    assert acceptance(cosines, 2.0).tolist() == [1.0, 0.25, 0.25, 0.0, 0.0]
    assert acceptance(cosines, 1.0, signed=True).tolist() == [1.0, 0.5, 1.0, 0.0, 1.0]
    assert acceptance(cosines, 0.0).tolist() == [1.0] * 5


def test_lengths_are_those_of_the_concept_within_a_fifth():
    made = features(gaussian(flat(200), draw())).norm(dim=1) / 5
    assert 0.799 < float(made.min()) < 0.82 and 1.18 < float(made.max()) < 1.201
    assert abs(float(made.mean()) - 1.0) < 0.02


@pytest.mark.parametrize(
    ("exponent", "signed"), [(1.0, False), (3.0, False), (1.0, True), (0.0, False)]
)
def test_directions_follow_the_density(exponent, signed):
    """On a circle the density over the angle is (1 - |cos|)^a; its mean |cos| is found by summing."""
    own = torch.tensor([0.6, 0.8])
    made = gaussian(flat(600), draw(1), exponent=exponent, signed=signed)
    cosines = torch.nn.functional.cosine_similarity(features(made), own[None])
    angle = torch.linspace(0, 2 * torch.pi, 20_001)
    weight = acceptance(angle.cos(), exponent, signed)
    for value in (lambda c: c.abs(), lambda c: c):
        wanted = float((weight * value(angle.cos())).sum() / weight.sum())
        assert abs(float(value(cosines).mean()) - wanted) < 0.06


def test_no_direction_is_left(monkeypatch):
    monkeypatch.setattr(embedding_anchors, "TRIES", 50)
    with pytest.raises(SettingError, match=r"50 directions.*1e\+09"):
        gaussian(Condition(torch.ones(1, 1, 1)), draw(), exponent=1e9)


def test_in_a_real_text_space_hardly_anything_is_refused(model):
    own = model.encode(["a star"] * 50)
    made = gaussian(own, draw())
    cosines = torch.nn.functional.cosine_similarity(features(made), features(own))
    assert made.embeddings.shape == own.embeddings.shape and made.texts is None
    assert float(cosines.abs().mean()) < 0.06
    again = gaussian(own, draw())
    assert torch.equal(made.embeddings, again.embeddings)
    assert not torch.equal(made.embeddings, gaussian(own, draw(1)).embeddings)


@pytest.mark.parametrize("layout", ["sdxl", "pixart", "sana", "sd3", "flux"])
def test_what_else_a_condition_holds(layout):
    model = tiny_layout(layout)
    own = model.encode(["a star", "a red circle"])
    made = gaussian(own, draw())
    assert made.embeddings.dtype == own.embeddings.dtype and made.extra.keys() == own.extra.keys()
    ratio = features(made).norm(dim=1) / features(own).norm(dim=1)
    assert bool(((ratio > 0.799) & (ratio < 1.201)).all())
    if own.mask is not None:
        assert torch.equal(made.mask, own.mask) and not made.embeddings[own.mask == 0].any()
    if own.pooled is not None:
        lengths = made.pooled.norm(dim=1) / own.pooled.norm(dim=1)
        torch.testing.assert_close(lengths, ratio)
        assert not torch.allclose(made.pooled, own.pooled)
    points = torch.zeros(2, *model.latent_shape)
    assert torch.isfinite(model.predict(points, model.timesteps(4)[:1], made).value).all()


def test_words_are_drawn_by_their_distance(model):
    own = model.encode(["star", "circle"])
    words = Vocabulary(model, own, ("star",), limit=50)
    assert "star" not in words.words and "circle" in words.words
    rows = features(model.encode(words.words))
    wanted = 1 - torch.nn.functional.cosine_similarity(features(own)[:1], rows).abs()
    torch.testing.assert_close(words.weights[0], wanted, atol=1e-5, rtol=1e-4)
    assert (
        float(words.weights[1, words.words.index("circle")]) < 1e-5
    )  # the concept itself is never drawn
    made = words.draw(torch.tensor([0, 1, 1]), draw())
    assert made.rows == 3 and all(text in words.words for text in made.texts)
    assert torch.equal(made.embeddings, model.encode(list(made.texts)).embeddings)
    with pytest.raises(MissingPart, match="can be an anchor"):
        Vocabulary(model, own, tuple(words.words), limit=len(words.words))
