"""Inner attacks: Adam and sign steps by hand, nothing added up, nothing stale, rows that do not meet."""

from __future__ import annotations

import pytest
import torch

from expunge.core.soft_prompts import descend, random_start
from expunge.errors import NonFiniteError
from expunge.testing import tiny_diffusion

START = torch.tensor([[[0.5, -0.25]], [[2.0, 1.0]]])


def squares(step: int, vectors: torch.Tensor) -> torch.Tensor:
    return vectors.square().flatten(1).sum(1)


def test_adam_by_hand_with_fresh_gradients():
    """Three steps of Adam on x^2 in float64; gradients that add up end elsewhere."""

    def by_hand(added_up: bool) -> torch.Tensor:
        x, m, v, held = START.double().clone(), 0.0, 0.0, torch.zeros_like(START.double())
        for step in range(1, 4):
            gradient = 2 * x
            held = held + gradient if added_up else gradient
            m, v = 0.9 * m + 0.1 * held, 0.999 * v + 0.001 * held**2
            x = x - 0.1 * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
        return x

    found = descend(squares, START, steps=3, lr=0.1)
    torch.testing.assert_close(found.vectors.double(), by_hand(False), atol=1e-6, rtol=1e-5)
    assert float((found.vectors.double() - by_hand(True)).abs().max()) > 1e-3
    assert len(found.losses) == 3 and list(found.losses) == sorted(found.losses)[::-1]


def test_what_is_returned_stands_behind_the_last_step():
    """One step moves; the losses are those before each step."""
    one, two = (descend(squares, START, steps=n, lr=0.1) for n in (1, 2))
    assert not torch.equal(one.vectors, START)
    assert two.losses[1] == pytest.approx(float(squares(0, one.vectors).mean()))
    assert torch.equal(descend(squares, START, steps=0, lr=0.1).vectors, START)


def test_sign_steps_follow_the_present_gradient():
    """|x| falls by exactly alpha a step, and turns round behind zero: a sign that stuck would walk on."""
    found = descend(squares, torch.tensor([[[0.25]]]), steps=4, lr=0.1, rule="sign")
    assert float(found.vectors) == pytest.approx(0.25 - 0.1 - 0.1 - 0.1 + 0.1, abs=1e-6)
    one = descend(squares, START, steps=1, lr=0.1, rule="sign")
    assert torch.allclose(one.vectors, START - 0.1 * START.sign())


def test_random_never_moves_and_asks_nothing():
    found = descend(lambda *_: 1 / 0, START, steps=5, lr=0.1, rule="random")
    assert torch.equal(found.vectors, START) and found.losses == ()


def test_restarts_do_not_meet_and_half_precision_changes_nothing():
    both = descend(squares, START, steps=5, lr=0.1).vectors
    for row in range(2):
        alone = descend(squares, START[row : row + 1], steps=5, lr=0.1).vectors
        assert torch.equal(alone[0], both[row])
    assert torch.equal(descend(squares, START, steps=5, lr=0.1, half=True).vectors, both)


def test_a_loss_that_is_not_finite_is_an_error():
    with pytest.raises(NonFiniteError, match="step 2"):
        descend(lambda step, x: x.sum((1, 2)) / (1 - step), START, steps=3, lr=0.1)


def test_starts_are_rows_of_ordinary_tokens():
    model = tiny_diffusion()
    made = random_start(model, 300, 2, torch.Generator().manual_seed(0))
    assert made.shape == (300, 2, 32)
    table = model.token_table()
    nearest = torch.cdist(made.flatten(0, 1), table).min(1)
    assert float(nearest.values.max()) < 1e-4
    assert not set(nearest.indices.tolist()) & set(model.tokenizer.all_special_ids)
