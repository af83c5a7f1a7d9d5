"""Mined neighbours: conditions hold for every point, both samplers draw one distribution, words are found."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from scipy.stats import ks_2samp

from expunge.core.neighbour_mining import Mined, Mining, Survey, free_rows, mine
from expunge.core.token_policy import placed, span
from expunge.core.vocabulary_words import Words, whole_words
from expunge.errors import SettingError, UnsupportedModel
from expunge.models.base import noise_generator
from expunge.models.types import Segment, TextInput
from expunge.testing import tiny_diffusion

TOKENS, WIDTH = 12, 40


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


def embedding(scale=1.0, seed=1):
    return scale * torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed))


def free(first=1):
    return torch.arange(TOKENS) >= first


def mined(beyond=False, count=200, e=None, rows=None, seed=0, **settings) -> Mined:
    return mine(
        embedding() if e is None else e, free() if rows is None else rows, count, beyond=beyond,
        mining=Mining(**settings), generator=noise_generator(seed, "test"),
    )  # fmt: skip


@pytest.mark.parametrize("sampler", ["analytic", "rejection"])
@pytest.mark.parametrize("scale", [0.02, 1.0, 300.0])
def test_both_conditions_hold_for_every_point(sampler, scale):
    e = embedding(scale)
    own, size = e[1:].flatten().double(), float(e[1:].norm())
    for beyond in (False, True):
        found = mined(beyond, e=e, sampler=sampler, inner_radius=0.9)
        assert found.points.shape == (200, TOKENS, WIDTH)
        assert torch.equal(found.points[:, 0], e[:1].expand(200, WIDTH))
        flat = found.points[:, 1:].flatten(1).double()
        cosines = flat @ own / (flat.norm(dim=1) * own.norm())
        torch.testing.assert_close(cosines, found.cosines, atol=1e-5, rtol=0)
        away = (flat - own).norm(dim=1) / size
        if beyond:
            assert cosines.max() < 0.5 + 1e-5 and away.max() <= 1.6 + 1e-5
        else:
            assert cosines.min() >= 0.5 - 1e-5 and cosines.max() <= 0.9 + 1e-5
            assert away.max() <= 0.9 + 1e-5


@pytest.mark.parametrize("beyond", [False, True])
@pytest.mark.parametrize("deviation", [None, 0.3, 2.0])
def test_analytic_and_rejection_draw_one_distribution(beyond, deviation):
    both = [
        mined(beyond, 2500, sampler=sampler, deviation=deviation, radius=3.0, seed=seed)
        for seed, sampler in enumerate(("analytic", "rejection"))
    ]
    assert ks_2samp(*(found.cosines.numpy() for found in both)).pvalue > 0.01
    radii = [(f.points - embedding()).flatten(1).norm(dim=1).numpy() for f in both]
    assert ks_2samp(*radii).pvalue > 0.01
    assert both[0].accepted == pytest.approx(both[1].accepted, abs=0.04)
    # Another interval is another distribution: the test can tell.
    other = mined(beyond, 2500, sampler="rejection", radius=3.0, low=0.6, seed=5)
    assert ks_2samp(both[0].cosines.numpy(), other.cosines.numpy()).pvalue < 0.01


def test_radii_are_relative_and_agree_with_the_published_ones_at_the_size_of_clip():
    """D = 400 at a norm of 250: r from about 117 to 223 are neighbours, 28 % of draws; 42 % are beyond."""
    e = torch.randn(77, 768, generator=torch.Generator().manual_seed(2))
    e *= 250 / e.norm()
    every = torch.ones(77, dtype=torch.bool)
    near = mined(e=e, rows=every, count=64, radius=400 / 250, deviation=1.0)
    far = mined(True, e=e, rows=every, count=64, radius=400 / 250, deviation=1.0)
    away = (near.points - e).flatten(1).norm(dim=1)
    assert 112 < float(away.min()) < 135 and 205 < float(away.max()) < 228
    assert near.accepted == pytest.approx(0.28, abs=0.03)
    assert far.accepted == pytest.approx(0.42, abs=0.03)
    small = mined(e=e / 50, rows=every, count=64, radius=400 / 250)
    assert small.accepted == pytest.approx(near.accepted, abs=0.01)


def test_points_come_from_the_generator_alone_and_the_first_row_may_move():
    assert torch.equal(mined().points, mined().points)
    assert not torch.equal(mined().points, mined(seed=1).points)
    literal = mined(rows=free(0)).points
    assert not torch.equal(literal[:, 0], embedding()[:1].expand(200, WIDTH))


def test_what_cannot_be_met_is_refused():
    with pytest.raises(SettingError, match="raise the radius"):
        mined(radius=0.1)
    with pytest.raises(SettingError, match="raise the radius"):
        mined(True, radius=0.4, sampler="rejection")
    with pytest.raises(SettingError, match="no free row"):
        mined(rows=free(TOKENS))
    with pytest.raises(SettingError, match="must be the smaller"):
        Mining(low=0.9, high=0.5)
    with pytest.raises(SettingError, match="allowed: analytic, rejection"):
        Mining(sampler="exact")


def test_start_and_masked_rows_are_not_free(model):
    text = span(model.tokenizer, model.token_ids(["a star"])[0].tolist())
    assert free_rows(text, None, first_row=False).tolist() == [False] + [True] * 15
    assert free_rows(text, None, first_row=True).all()
    seen = [1] * 4 + [0] * 12
    assert free_rows(text, seen, first_row=False).tolist() == [False] + [True] * 3 + [False] * 12
    assert free_rows(span(None, [0]), None, first_row=False).tolist() == [True]


def test_whole_words_stand_alone_and_come_in_the_order_of_the_vocabulary(model):
    words = whole_words(model.tokenizer, 10_000)
    assert {"red", "star", "striped"} <= set(words) and all(word.isalpha() for word in words)
    ids = model.tokenizer(words, add_special_tokens=False).input_ids
    assert all(len(own) == 1 for own in ids) and ids == sorted(ids)
    assert whole_words(model.tokenizer, 3) == words[:3]


def test_nearest_words_are_those_of_the_largest_centred_cosine(model):
    known = Words(model.text_inputs()[0], 10_000, ["red star"])
    assert known.words[-1] == "red star" and known.rows.shape == (len(known.words), 64)
    rows = []
    for word in known.words:
        own = span(model.tokenizer, model.token_ids([word])[0].tolist())
        e = model.encode([word]).embeddings[0].double()
        rows.append(torch.cat([e[own.last], e[own.end]]))
    wanted = torch.stack(rows)
    torch.testing.assert_close(known.rows, wanted, atol=1e-5, rtol=1e-5)
    wanted = wanted - wanted.mean(0)
    wanted = wanted / wanted.norm(dim=1, keepdim=True)
    order = (wanted @ wanted[known.words.index("star")]).argsort(descending=True).tolist()
    best = [known.words[i] for i in order if known.words[i] not in ("star", "circle")]
    assert known.nearest("star", 3, leave=["Circle"]) == best[:3]
    pooled = TextInput(("w",), 32, lambda texts: [Segment(None, torch.zeros(1, 1), torch.zeros(1, 1, 32))])  # fmt: skip
    with pytest.raises(UnsupportedModel, match="no token"):
        Words(pooled, 3)


def test_the_survey_counts_points_and_names_words(model):
    text = model.text_inputs()[0]
    survey = Survey(Words(text, 10_000, ["star"]))
    (place,) = placed(text, [("star", "circle")], "content_to_end")
    near = mined(e=place.erased, rows=free_rows(place.span, None, first_row=False), count=9)
    exact = dataclasses.replace(Mining(), low=0.9999, high=0.99999)
    close = mine(place.erased, torch.ones(16, dtype=torch.bool), 7, beyond=False, mining=exact,
                 generator=noise_generator(0, "close"))  # fmt: skip
    survey.add(near, False)
    survey.add(close, False)
    survey.look("star", place, close)
    report = survey.report()
    assert (report["neighbours"], report["beyond"], report["beyond_accepted"]) == (16, 0, None)
    assert report["neighbours_accepted"] == pytest.approx(
        (9 * near.accepted + 7 * close.accepted) / 16
    )
    assert report["cosines"] == [float(near.cosines.min()), float(close.cosines.max())]
    words = report["nearest_words"]["star"]
    assert words["itself"] == 1.0 and sum(words["others"].values()) == 7
    assert "star" not in words["others"]
