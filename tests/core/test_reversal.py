"""Late steps and the reversal of guidance: which steps, what is predicted, and that nothing else moves."""

from __future__ import annotations

import pytest
import torch

from expunge.core.reversal import Reversal, depths, late
from expunge.errors import MissingCapability, SettingError
from expunge.method import Control
from expunge.testing import tiny_diffusion, tiny_layout


def test_early_and_late_are_those_of_steps_counted_down_to_one():
    """Step label S - k after k guided steps; early are labels above t', late the rest."""
    for t_prime in (43, 40, 47, 1):
        found = depths(50, t_prime)
        early = [k for k in range(50) if 50 - k > t_prime]
        assert list(range(*found["preserve"])) == early
        assert list(range(*found["erase"])) == [k for k in range(50) if k not in early]
    assert depths(50, 43)["preserve"] == (0, 7)
    assert depths(50, 50) == {"erase": (0, 50)}


def test_other_numbers_of_steps_have_the_same_share_and_one_late_step_at_least():
    assert depths(20, 40) == {"erase": (4, 20), "preserve": (0, 4)}
    assert depths(100, 43) == {"erase": (14, 100), "preserve": (0, 14)}
    assert [late(20, t) for t in (0, 10, 43, 48, 50)] == [0, 4, 17, 19, 20]
    assert depths(4, 1) == {"erase": (3, 4), "preserve": (0, 3)}


def test_swapped_ranges_are_the_mirror_image():
    assert depths(50, 43, swapped=True) == {"erase": (0, 43), "preserve": (43, 50)}


class Seen(Control):
    """Keeps the value of every prediction."""

    def __init__(self):
        self.values = []

    def prediction(self, context, prediction):
        self.values.append(prediction.value.clone())
        return prediction


def sampled(model, *controls, guidance=3.0):
    with model.controlled(*controls), torch.no_grad():
        return model.sample(model.encode(["a star"]), [3], steps=4, guidance=guidance)


@pytest.mark.parametrize("kind", ["tiny", "v", "sana", "sd3"])
def test_the_conditional_branch_is_turned_in_late_steps_only(kind):
    model = {
        "tiny": tiny_diffusion,
        "v": lambda: tiny_diffusion(prediction_type="v_prediction"),
    }.get(kind, lambda: tiny_layout(kind))()
    before, after = Seen(), Seen()
    sampled(model, before, Reversal(38, eta=0.5), after)
    for call, (old, new) in enumerate(zip(before.values, after.values, strict=True)):
        empty, own = old.chunk(2)
        assert torch.equal(new.chunk(2)[0], empty)
        wanted = own if call < 1 else empty - 0.5 * (own - empty)
        assert torch.equal(new.chunk(2)[1], wanted)


def test_nothing_turned_is_nothing_changed():
    model = tiny_diffusion()
    plain = sampled(model)
    assert torch.equal(sampled(model, Reversal(0)), plain)
    torch.testing.assert_close(sampled(model, Reversal(50, eta=-1.0)), plain)
    assert not torch.allclose(sampled(model, Reversal(13)), plain)
    assert torch.equal(sampled(model), plain)


def test_what_cannot_be_turned_is_refused():
    with pytest.raises(SettingError, match="t_prime"):
        Reversal(51)
    with pytest.raises(MissingCapability, match="branch"):
        sampled(tiny_diffusion(), Reversal(25), guidance=1.0)
    with pytest.raises(MissingCapability, match="branch"):
        sampled(tiny_layout("flux"), Reversal(25))
