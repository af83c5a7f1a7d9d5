"""Cross-modality attention and the contrastive loss, against pencil and paper."""

from __future__ import annotations

import math

import pytest
import torch

from expunge.core.cross_modality import Attention, CrossModalityAttention, info_nce
from expunge.errors import SettingError

DRAW = torch.Generator().manual_seed(0)
TEXT, VISUAL = torch.randn(2, 3, 8, generator=DRAW), torch.randn(2, 5, 8, generator=DRAW)


def cross(gate: float) -> CrossModalityAttention:
    made = CrossModalityAttention(8, 2)
    for number, tensor in enumerate(made.parameters()):
        if tensor.ndim > 1:
            own = torch.Generator().manual_seed(number)
            tensor.data.copy_(torch.randn(tensor.shape, generator=own))
    made.attention.out.bias.data.zero_()
    made.gate.data.fill_(gate)
    return made


def test_a_gate_begins_at_zero_and_leaves_text_as_it_is_bit_for_bit():
    assert CrossModalityAttention(8, 2).gate.item() == 0
    before = VISUAL.clone()
    assert torch.equal(cross(0.0)(TEXT, VISUAL), TEXT)
    assert not torch.equal(cross(0.5)(TEXT, VISUAL), TEXT)
    assert torch.equal(VISUAL, before)


def test_the_step_is_linear_in_the_gate():
    one, two = cross(1.0)(TEXT, VISUAL) - TEXT, cross(2.0)(TEXT, VISUAL) - TEXT
    torch.testing.assert_close(two, 2 * one)


def test_attention_is_the_formula():
    made = Attention(2, 1)
    for name in ("query", "key", "value", "out"):
        getattr(made, name).weight.data.copy_(torch.eye(2))
    made.out.bias.data.zero_()
    queries, read = torch.tensor([[[math.sqrt(2), 0.0]]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    # q k / sqrt(2) = 1 and 0: shares e / (1 + e) and 1 / (1 + e).
    share = math.e / (1 + math.e)
    torch.testing.assert_close(made(queries, read), torch.tensor([[[share, 1 - share]]]))
    # A token that comes first reads nothing but itself.
    torch.testing.assert_close(made(read, read, causal=True)[0, 0], read[0, 0])


def test_text_tokens_attend_for_themselves_and_order_of_visual_tokens_does_not_matter():
    made = cross(1.0)
    torch.testing.assert_close(made(TEXT, VISUAL.flip(1)), made(TEXT, VISUAL))
    torch.testing.assert_close(made(TEXT[:, 1:2], VISUAL), made(TEXT, VISUAL)[:, 1:2])


def test_heads_must_divide_the_width():
    with pytest.raises(SettingError, match="width 8 cannot be shared by 3 heads"):
        Attention(8, 3)


def test_info_nce_by_hand():
    axes = torch.eye(2)
    own = math.log(1 + math.exp(-1))  # -log e / (e + 1)
    assert info_nce(axes, 5 * axes, 1.0).item() == pytest.approx(own)
    assert info_nce(axes, axes, 0.5).item() == pytest.approx(math.log(1 + math.exp(-2)))
    # Rows: cosines (1, 1) and (0, 0), log 2 each.  Columns: (1, 0) both, with partners 1 and 0.
    one_sided = info_nce(axes, torch.tensor([[1.0, 0.0], [1.0, 0.0]]), 1.0)
    assert one_sided.item() == pytest.approx((math.log(2) + (own + own + 1) / 2) / 2)
    assert info_nce(axes[:1], axes[:1], 0.1).item() == 0


def test_pictures_of_one_caption_are_no_strangers():
    pair = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert info_nce(pair, pair, 1.0).item() == pytest.approx(math.log(2))
    assert info_nce(pair, pair, 1.0, torch.ones(2, 2, dtype=torch.bool)).item() == 0
    three = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    same = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
    # The first two have one stranger each, at cosine 0; the third has two.
    wanted = (2 * math.log(1 + math.exp(-1)) + math.log(1 + 2 * math.exp(-1))) / 3
    assert info_nce(three, three, 1.0, same).item() == pytest.approx(wanted)


def test_info_nce_refuses_what_does_not_pair():
    with pytest.raises(SettingError, match="a positive number is needed"):
        info_nce(torch.eye(2), torch.eye(2), 0.0)
    with pytest.raises(SettingError, match="do not pair"):
        info_nce(torch.eye(2), torch.eye(3), 1.0)
