"""Attention to some tokens from some pixels: columns, norms by hand, masks on maps of every layer, gradients."""

from __future__ import annotations

import pytest
import torch

from expunge.core.attention import (
    AttentionNorms,
    attention_norms,
    need_cross_attention,
    token_columns,
)
from expunge.errors import PromptError, UnsupportedModel
from expunge.testing import tiny_diffusion
from expunge.testing.layouts import tiny_layout


@pytest.fixture(scope="module")
def model():
    return tiny_diffusion()


def test_every_occurrence_of_a_name_counts_and_padding_where_asked(model):
    texts = ["red star of a star", "heart"]
    columns = token_columns(model.text_inputs()[0], texts, ["star", "heart"], padding=False)
    assert columns.nonzero().tolist() == [[0, 2], [0, 5], [1, 1]]
    whole = token_columns(model.text_inputs()[0], texts, ["star", "heart"], padding=True)
    assert whole[0].nonzero().flatten().tolist() == [2, 5, *range(6, 16)]
    assert whole[1].nonzero().flatten().tolist() == [1, *range(2, 16)]
    with pytest.raises(PromptError, match="keyword"):
        token_columns(model.text_inputs()[0], ["a circle"], ["star"], padding=True)


def test_the_norm_is_that_of_the_chosen_entries_of_each_row():
    probabilities = torch.arange(2 * 2 * 3 * 4, dtype=torch.float64).reshape(2, 2, 3, 4)
    masks = torch.tensor([[True, False, True], [False, False, True]])
    columns = torch.tensor([[False, True, True, False], [True, False, False, False]])
    found = attention_norms(probabilities, masks, columns)
    first = [1, 2, 9, 10, 13, 14, 21, 22]
    second = [32, 44]
    wanted = torch.tensor([sum(v * v for v in row) ** 0.5 for row in (first, second)]).double()
    torch.testing.assert_close(found, wanted)


def run(model, masks, columns, seed=0, rows=2):
    latents = torch.randn(rows, *model.latent_shape, generator=torch.Generator().manual_seed(seed))
    watch = AttentionNorms(masks, columns, tuple(model.latent_shape[1:]))
    condition = model.encode(["a red star", "star"][:rows])
    with model.controlled(watch):
        model.predict(latents, torch.tensor([300] * rows), condition)
    return watch


def test_the_sum_over_layers_is_that_of_the_denoisers_own_probabilities(model):
    columns = token_columns(
        model.text_inputs()[0], ["a red star", "star"], ["star", "star"], padding=True
    )
    masks = torch.zeros(2, 16, 16)
    masks[0, :8] = 1
    masks[1, :, 4:] = 1
    seen = {}

    class Keep(AttentionNorms):
        def attention(self, context, probabilities):
            if context.layer.endswith("attn2"):
                seen[context.layer] = probabilities.detach().double()
            return probabilities

    keep = Keep(masks, columns, (8, 8))
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with model.controlled(keep):
        model.predict(latents, torch.tensor([300, 300]), model.encode(["a red star", "star"]))
    watch = run(model, masks, columns)
    assert watch.layers == list(seen) and len(seen) > 2
    total = torch.zeros(2, dtype=torch.float64)
    for probabilities in seen.values():
        side = round(probabilities.shape[2] ** 0.5)
        for row in range(2):
            small = masks[row, :: 16 // side, :: 16 // side].flatten() > 0.5
            total[row] += probabilities[row][:, small][:, :, columns[row]].square().sum().sqrt()
    torch.testing.assert_close(watch.total.double(), total, rtol=1e-5, atol=1e-6)
    everything = run(model, None, columns)
    assert (everything.total > watch.total).all()
    # A row's norm does not depend on the other rows.
    alone = run(model, masks[:1], columns[:1], rows=1)
    first = AttentionNorms(masks[:1], columns[:1], (8, 8))
    with model.controlled(first):
        model.predict(latents[:1], torch.tensor([300]), model.encode(["a red star"]))
    torch.testing.assert_close(first.total, watch.total[:1], rtol=1e-5, atol=1e-6)
    assert alone.layers == watch.layers


def test_maps_that_do_not_fit_and_joint_attention_are_refused(model):
    columns = torch.ones(1, 16, dtype=torch.bool)
    with pytest.raises(UnsupportedModel, match="pixels"):
        AttentionNorms(torch.ones(1, 4, 4), columns, (8, 8))._masks(1, 63)
    tall = AttentionNorms(torch.ones(1, 4, 4), columns, (6, 10))
    assert tall._masks(1, 60).shape == (1, 60) and tall._masks(1, 15).shape == (1, 15)
    assert need_cross_attention(model, "this").names == model.text_projections()
    with pytest.raises(UnsupportedModel, match="attn2"):
        need_cross_attention(tiny_layout("sd3"), "this")


def test_columns_of_another_tokenizer_without_a_start():
    text = need_cross_attention(tiny_layout("pixart"), "this")
    columns = token_columns(text, ["a red star of a star"], ["star"], padding=False)
    assert columns[0].nonzero().flatten().tolist() == [2, 5]
