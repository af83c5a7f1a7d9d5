"""Every metric on numbers small enough for pencil and paper."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from expunge.core.sparse_autoencoder import (
    SparseAutoencoder,
    loss_recovered,
    mean_max_cosine,
    quality,
    recovery,
    stability,
)
from expunge.errors import SettingError

from .helpers import config, normal, scrambled


def identity(**changes: float) -> SparseAutoencoder:
    """x_hat = ReLU(x) + b with two units, of activations with two numbers."""
    model = SparseAutoencoder(config(width=2, units=2, variant="vanilla", pre_bias=False))
    with torch.no_grad():
        model.encoder.copy_(torch.eye(2))
        model.atoms.copy_(torch.eye(2))
        model.bias.fill_(changes.get("bias", 0.0))
    return model


def test_a_quality_table_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0], [-1.0, 2.0], [2.0, 0.0], [-2.0, -2.0]])
    found = quality(identity(), x)
    # x_hat = [[3, 4], [0, 2], [2, 0], [0, 0]]: errors [0, 0], [-1, 0], [0, 0], [-2, -2], means of x 0.5 and 1.
    spread = 2.5**2 + 1.5**2 + 1.5**2 + 2.5**2 + 9 + 1 + 1 + 9
    assert found["r2"] == pytest.approx(1 - 9 / spread)
    varied = (5 - 4 * 0.75**2) + (4 - 4 * 0.5**2)
    assert found["variance_explained"] == pytest.approx(1 - varied / spread)
    assert found["l0"] == pytest.approx(4 / 4)
    assert found["dead_share"] == 0 and found["rows"] == 4 and found["mse"] == pytest.approx(9 / 8)
    assert found["cosine"] == pytest.approx((1 + 2 / math.sqrt(5) + 1 + 0) / 4)
    # Hoyer of [3, 4]: (sqrt 2 - 7 / 5) / (sqrt 2 - 1); of one unit 1; a code of nothing has none.
    assert found["hoyer"] == pytest.approx(((2**0.5 - 1.4) / (2**0.5 - 1) + 1 + 1) / 3)
    assert found["held_out"] is True
    assert quality(identity(), x[2:])["dead_share"] == 0.5


def test_variance_explained_forgives_an_offset_and_r2_does_not() -> None:
    x = normal(50, 2).abs()
    exact, moved = quality(identity(), x), quality(identity(bias=0.7), x)
    assert exact["r2"] == pytest.approx(1) and moved["variance_explained"] == pytest.approx(1)
    spread = float((x - x.mean(0)).square().sum())
    assert moved["r2"] == pytest.approx(1 - 50 * 2 * 0.49 / spread, abs=1e-5)


def test_r2_has_a_mean_for_each_dimension() -> None:
    x = normal(200, 2) * 0.1 + torch.tensor([0.0, 100.0])
    # Predicting each dimension's mean explains nothing, though one scalar mean would say 0.9999.
    model = identity()
    with torch.no_grad():
        model.atoms.zero_()
        model.bias.copy_(x.mean(0))
    assert quality(model, x)["r2"] == pytest.approx(0, abs=1e-4)


def test_the_table_does_not_depend_on_how_rows_come() -> None:
    model, x = scrambled(), normal(90, 6)
    whole = quality(model, x)
    parts = quality(model, [x[:7], x[7:70].reshape(9, 7, 6), x[70:]])
    assert parts == pytest.approx(whole, nan_ok=True)
    assert quality(model, x, limit=10)["rows"] == 10
    z = model.encode(x)
    assert whole["l0"] == pytest.approx(float((z > 0).sum(1).float().mean()))
    assert whole["dead_share"] == pytest.approx(float((z.amax(0) == 0).float().mean()))
    with pytest.raises(SettingError):
        quality(model, x[:0])


def test_stability_needs_one_partner_each() -> None:
    atoms = functional.normalize(normal(5, 4), dim=1)
    order = torch.tensor([3, 0, 4, 1, 2])
    assert stability(atoms, 3 * atoms[order]) == pytest.approx(1)
    eye, both = torch.eye(2), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert stability(both, eye) == pytest.approx(0.5)  # one of the two must take the other atom
    assert mean_max_cosine(both, eye) == pytest.approx(1)  # the cheap proxy does not see it
    assert mean_max_cosine(eye, both) == pytest.approx(0.5)
    assert stability(-eye, eye) == pytest.approx(0)  # signs count: matched to orthogonal atoms
    with pytest.raises(SettingError, match="2 and 3 atoms"):
        stability(eye, torch.ones(3, 2))
    with pytest.raises(SettingError, match="2 and 3 numbers"):
        mean_max_cosine(eye, torch.ones(2, 3))


def test_recovery_is_over_true_atoms_and_without_sign() -> None:
    true = torch.eye(3)
    learned = torch.tensor([[-2.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    assert recovery(true, learned) == pytest.approx((1 + 2 * 0.5**0.5) / 3)


def test_loss_recovered_by_hand() -> None:
    assert loss_recovered(2.0, 3.0, 6.0) == pytest.approx(0.75)
    assert loss_recovered(2.0, 7.0, 6.0) < 0
    with pytest.raises(SettingError, match="nothing is recovered"):
        loss_recovered(2.0, 2.0, 2.0)
