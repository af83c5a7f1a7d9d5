"""Predictions of every kind say the same thing; conditions keep their rows together."""

from __future__ import annotations

import pytest
import torch

from expunge.errors import UnsupportedModel
from expunge.models.types import Condition, Prediction

KINDS = ("epsilon", "v", "x0", "flow")


def truth(flow: bool):
    draw = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(3, 4, 5, 5, generator=draw, dtype=torch.float64) for _ in range(2))
    sigma = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64).reshape(3, 1, 1, 1)
    alpha = 1 - sigma if flow else (1 - sigma.square()).sqrt()
    value = {"epsilon": noise, "x0": x0, "v": alpha * noise - sigma * x0, "flow": noise - x0}
    return x0, noise, alpha, sigma, value


@pytest.mark.parametrize("flow", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_converts_to_every_other(kind, flow):
    x0, noise, alpha, sigma, value = truth(flow)
    noised = alpha * x0 + sigma * noise
    made = Prediction(kind, value[kind], alpha, sigma)
    torch.testing.assert_close(made.x0(noised), x0)
    torch.testing.assert_close(made.epsilon(noised), noise)
    torch.testing.assert_close(made.velocity(noised), value["v"])
    wrong = Prediction(kind, value[kind] + 0.1, alpha, sigma)  # control
    assert not torch.allclose(wrong.x0(noised), x0) and not torch.allclose(
        wrong.epsilon(noised), noise
    )


@pytest.mark.parametrize(("kind", "flow"), [("v", False), ("flow", True)])
def test_noise_and_velocity_do_not_cancel_in_half_precision(kind, flow):
    """Near the clean end x_t - alpha x0 is a small difference of large numbers, and sigma divides it."""
    draw = torch.Generator().manual_seed(0)
    x0, noise = (torch.randn(2, 4, 8, 8, generator=draw) for _ in range(2))
    sigma = torch.tensor([0.03, 0.01]).reshape(2, 1, 1, 1)
    alpha = 1 - sigma if flow else (1 - sigma.square()).sqrt()
    value = noise - x0 if flow else alpha * noise - sigma * x0
    parts = [t.bfloat16() for t in (value, alpha, sigma, alpha * x0 + sigma * noise)]
    made = Prediction(kind, *parts[:3])
    rounding = 2**-7 * 4  # of numbers up to about 4
    assert (made.epsilon(parts[3]) - noise).abs().max() < 2 * rounding
    assert (made.velocity(parts[3]) - (alpha * noise - sigma * x0)).abs().max() < 3 * rounding


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_of_training_is_what_a_perfect_denoiser_says(kind):
    x0, noise, alpha, sigma, value = truth(kind == "flow")
    assert torch.equal(Prediction(kind, noise, alpha, sigma).target(x0, noise), value[kind])


def test_guidance_is_linear_and_kinds_do_not_mix():
    _, _, alpha, sigma, value = truth(False)
    one, two = (Prediction("epsilon", value[k], alpha, sigma) for k in ("epsilon", "x0"))
    scale = torch.tensor([0.0, 1.0, 3.0]).reshape(3, 1, 1, 1)
    guided = one.guided(two, scale)
    torch.testing.assert_close(guided.value[0], two.value[0])
    torch.testing.assert_close(guided.value[1], one.value[1])
    torch.testing.assert_close(guided.value[2], 3 * one.value[2] - 2 * two.value[2])
    with pytest.raises(UnsupportedModel, match="cannot be mixed"):
        one.guided(Prediction("v", value["v"], alpha, sigma), scale)
    assert one.select(slice(1, 3)).value.shape[0] == one.select(slice(1, 3)).alpha.shape[0] == 2


def test_conditions_keep_rows_together():
    def condition(n, offset=0.0):
        rows = torch.arange(n, dtype=torch.float32) + offset
        return Condition(
            rows[:, None, None].expand(n, 4, 2),
            rows[:, None].expand(n, 4),
            rows[:, None],
            {"time": rows},
        )

    def rows_of(c):
        assert torch.equal(c.embeddings[:, 0, 0], c.mask[:, 0])
        assert torch.equal(c.pooled[:, 0], c.extra["time"]) and torch.equal(
            c.mask[:, 0], c.pooled[:, 0]
        )
        return c.extra["time"].tolist()

    both = Condition.concatenate([condition(2), condition(3, 10.0)])
    assert both.rows == 5 and rows_of(both) == [0, 1, 10, 11, 12]
    assert rows_of(both.select([4, 0])) == [12, 0]
    assert rows_of(condition(2).repeat(2)) == [0, 0, 1, 1]
    bare = Condition(torch.ones(2, 4, 2, requires_grad=True))
    assert bare.repeat(2).mask is None and not bare.detach().embeddings.requires_grad


def test_texts_go_with_their_rows_and_only_while_the_rows_are_theirs():
    rows = torch.arange(6.0).reshape(3, 1, 2)
    own = Condition(rows, texts=("a", "b", "c"))
    assert own.select(slice(1, None)).texts == ("b", "c") and own.select([2, 0]).texts == ("c", "a")
    assert own.select(torch.tensor([1, 1])).texts == ("b", "b")
    assert own.select(torch.tensor([True, False, True])).texts == ("a", "c")
    assert own.repeat(2).texts == ("a", "a", "b", "b", "c", "c") and own.detach().texts == own.texts
    bare = Condition(rows)
    assert Condition.concatenate([bare, own]).texts == (None,) * 3 + own.texts
    assert Condition.concatenate([bare, bare]).texts is None and bare.select([0]).texts is None
    assert own.with_embeddings(-rows).texts is None and own.map(torch.neg).texts is None
