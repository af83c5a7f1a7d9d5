"""The discriminator of patches."""

import pytest
import torch

from expunge.core.patch_discriminator import PatchDiscriminator
from expunge.errors import SettingError


@pytest.mark.parametrize(("side", "halvings"), [(8, 1), (16, 2), (32, 3), (64, 4), (128, 4)])
def test_logits_stay_spatial(side, halvings):
    judge = PatchDiscriminator((4, side, side), 0, width=8)
    logits = judge(torch.randn(2, 4, side, side))
    assert logits.shape[:2] == (2, 1) and min(logits.shape[2:]) >= 3
    strides = [m.stride[0] for m in judge.modules() if isinstance(m, torch.nn.Conv2d)]
    assert strides == [2] * halvings + [1]
    if side <= 64:
        assert logits.shape[2:] == (3, 3)


def test_weights_come_from_the_seed_alone():
    def weights(seed):
        judge = PatchDiscriminator((4, 16, 16), seed)
        return torch.cat([p.detach().flatten() for p in judge.parameters()])

    state = torch.get_rng_state()
    assert torch.equal(weights(1), weights(1)) and not torch.equal(weights(1), weights(2))
    assert torch.equal(torch.get_rng_state(), state)


def test_there_is_no_state_beside_the_weights_and_small_latents_are_refused():
    assert not list(PatchDiscriminator((4, 16, 16), 0).buffers())
    with pytest.raises(SettingError, match="too small"):
        PatchDiscriminator((4, 4, 4), 0)
