"""The loss of a batch: by hand on small numbers, and against a dense transcription of the formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from expunge.core.sparse_autoencoder import SparseAutoencoder
from expunge.core.sparse_autoencoder.losses import Pass, training_pass
from expunge.core.sparse_autoencoder.model import NOT_SET

from .helpers import VARIANTS, config, normal, scrambled

NEVER = torch.tensor(NOT_SET)


def by_hand(**changes: Any) -> SparseAutoencoder:
    """W_d = W_e = [[1, 0], [0, 1], [0.6, 0.8]], b_e = [0, 0, -0.5], b = 0, k = 1."""
    model = SparseAutoencoder(config(width=2, units=3, k=1, **changes))
    with torch.no_grad():
        model.atoms.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]))
        model.encoder.copy_(model.atoms)
        model.offset.copy_(torch.tensor([0.0, 0.0, -0.5]))
    return model


X = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
# u = [[2, 1, 1.5], [0, 3, 1.9]]: unit 0 is kept in row 0, unit 1 in row 1, and e = [[0, 1], [0, 0]].


def passed(
    model: SparseAutoencoder, x: Tensor, silent: Any = None, theta: Tensor = NEVER, step: int = 0
) -> Pass:
    count = torch.zeros(model.config.units, dtype=torch.int64)
    return training_pass(model, x, count if silent is None else torch.tensor(silent), theta, step)


# -- the auxiliary loss, by hand -------------------------------------------------------------------


def test_auxk_by_hand() -> None:
    found = passed(by_hand(dead_tokens=10), X, [0, 0, 8])
    assert float(found.parts["reconstruction"]) == pytest.approx(0.5)
    # Unit 2 is dead after 8 + 2 rows: z_aux = 1.5 and 1.9, e_hat = [[0.9, 1.2], [1.14, 1.52]];
    # mean ||e - e_hat||^2 = (0.85 + 3.61) / 2 over mean ||e - mean e||^2 = 0.25.
    assert float(found.parts["auxiliary"]) == pytest.approx(2.23 / 0.25)
    assert float(found.loss.detach()) == pytest.approx(0.5 + 2.23 / 0.25 / 32)
    assert found.dead.tolist() == [False, False, True]


def test_units_are_dead_from_t_dead_tokens_on() -> None:
    assert "auxiliary" not in passed(by_hand(dead_tokens=11), X, [0, 0, 8]).parts
    assert "auxiliary" in passed(by_hand(dead_tokens=10), X, [0, 0, 8]).parts


@pytest.mark.parametrize(("aux_k", "share"), [(1, 1.0), (4, 0.25)])
def test_unscaled_auxk_by_hand(aux_k: int, share: float) -> None:
    model = by_hand(dead_tokens=10, auxiliary="auxk-unscaled", aux_weight=1.0, aux_k=aux_k)
    assert float(passed(model, X, [0, 0, 8]).parts["auxiliary"]) == pytest.approx(2.23 * share)


def test_an_error_without_spread_has_no_auxiliary_loss_and_finite_gradients() -> None:
    model = by_hand(dead_tokens=10)
    found = passed(model, X[:1].expand(4, 2), [0, 0, 8])
    assert float(found.parts["auxiliary"]) == 0
    found.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_the_largest_dead_units_of_each_row_are_taken() -> None:
    # All units silent for long except the kept ones: units 1 and 2 in no order of their own.
    model = by_hand(dead_tokens=10)
    x = torch.tensor([[2.0, 1.0], [2.0, -1.0]])  # u = [[2, 1, 1.5], [2, -1, -0.1]]
    found = passed(model, x, [0, 50, 50])
    # Row 0: the larger dead unit is 2, 1.5 [0.6, 0.8]; row 1: no dead unit is positive.  e = [[0, 1], [0, -1]].
    wrong = (0.9**2 + (1 - 1.2) ** 2 + 1) / 2
    assert float(found.parts["auxiliary"]) == pytest.approx(wrong / 1.0)


def test_residual_by_hand_is_not_detached() -> None:
    model = by_hand(auxiliary="residual", aux_weight=0.1, aux_k=1)
    found = passed(model, X)
    # The largest of ReLU(u) - z: row 0 has 1.5 at unit 2, row 1 has 1.9 at unit 2.
    assert float(found.parts["auxiliary"]) == pytest.approx(2.23)
    found.loss.backward()
    # Unit 0 is kept in row 0 at 2: -2 (2 / 2) e = [0, -2], and 0.1 times the same with e - e_hat = [-0.9, -0.2].
    torch.testing.assert_close(model.atoms.grad[0], torch.tensor([0.18, -1.96]))


def test_reanimation_raises_what_is_silent_in_the_batch() -> None:
    model = by_hand(auxiliary="reanimation", aux_weight=1e-3)
    found = passed(model, X)  # unit 2 is silent: u = 1.5 and 1.9
    assert float(found.parts["auxiliary"]) == pytest.approx(-1.7)
    found.loss.backward()
    assert float(model.offset.grad[2]) == pytest.approx(-1e-3)


# -- who fired -------------------------------------------------------------------------------------


def test_silence_is_counted_in_tokens() -> None:
    found = passed(by_hand(), X, [7, 5, 8])
    assert found.silent.tolist() == [0, 0, 10] and found.fired.tolist() == [True, True, False]


@pytest.mark.parametrize(("variant", "fired"), [("topk", 1), ("batch-topk", 0), ("k-sparse", 0)])
def test_a_kept_unit_at_zero_fires_in_topk_alone(variant: str, fired: int) -> None:
    found = passed(by_hand(variant=variant), torch.tensor([[-3.0, -3.0]]))
    assert int(found.fired.sum()) == fired


def test_official_silence_of_k_sparse_is_counted_in_steps() -> None:
    changes = {
        "variant": "k-sparse",
        "compat": "official",
        "batch": 154,
        "tokens_an_item": 77,
        "dead_tokens": 8,
        "fired_above": 2.5,
    }
    found = passed(by_hand(**changes), X, [3, 3, 3])
    assert found.silent.tolist() == [
        4,
        1,
        4,
    ]  # unit 0 was kept at 2, below 2.5; unit 1 shows 1 after firing
    assert not found.dead.any()  # the window is 8 / (154 / 77) = 4 steps, to be exceeded
    assert passed(by_hand(**changes), X, [3, 3, 4]).dead.tolist() == [False, False, True]


def test_the_official_k_sparse_bias_learns_from_the_auxiliary_loss() -> None:
    for compat, moved in (("official", True), ("paper", False)):
        model = by_hand(
            variant="k-sparse", compat=compat, auxiliary="auxk-k-sparse", aux_weight=1.0
        )
        found = passed(model, X)
        if not moved:
            assert "auxiliary" not in found.parts
            continue
        # No dead unit: e_hat = b - stopgrad(b) = 0; the loss is mean ||e||^2 / 0.25, its gradient -2 mean e / 0.25.
        assert float(found.parts["auxiliary"]) == pytest.approx(0.5 / 0.25)
        whole = torch.autograd.grad(found.loss, model.bias)[0]
        model.config.__dict__["aux_weight"] = 0.0
        rest = torch.autograd.grad(passed(model, X).loss, model.bias)[0]
        torch.testing.assert_close(whole - rest, torch.tensor([0.0, -4.0]))


# -- penalties and theta ---------------------------------------------------------------------------


def test_l1_by_hand_and_its_warm_up() -> None:
    model = by_hand(variant="vanilla", l1=0.1, sparsity_warm_up=100, auxiliary="none")
    # z = u: sums 4.5 and 4.9; x_hat = [[2.9, 2.2], [1.14, 4.52]].
    wrong = (0.9**2 + 1.2**2 + 1.14**2 + 1.52**2) / 2
    for step, share in ((0, 0.0), (25, 0.25), (100, 1.0), (500, 1.0)):
        found = passed(model, X, step=step)
        assert float(found.loss.detach()) == pytest.approx(wrong + share * 0.1 * 4.7)
    assert found.errors.tolist() == pytest.approx([2.25 + 0.45, 3.61 + 0.49], abs=1e-5)
    with torch.no_grad():
        model.atoms[2] *= 2
    model.config.__dict__.update(l1_by_norm=True)
    assert float(passed(model, X).parts["sparsity"]) == pytest.approx((4.5 + 1.5 + 4.9 + 1.9) / 2)


@pytest.mark.parametrize(("target", "term"), [(2.0, (2.5 / 2 - 1) ** 2), (None, 2.5)])
def test_l0_penalty_by_hand(target: float | None, term: float) -> None:
    model = by_hand(variant="jump-relu", l0_target=target, threshold=0.5, auxiliary="none")
    found = passed(model, X)  # on: 3 units in row 0, 2 in row 1
    assert float(found.parts["sparsity"]) == pytest.approx(term)


def test_the_official_l0_penalty_is_silent_below_theta() -> None:
    moved = {}
    for compat in ("paper", "official"):
        model = by_hand(
            variant="jump-relu",
            l0_target=None,
            threshold=1.6,
            bandwidth=0.5,
            auxiliary="none",
            compat=compat,
        )
        with torch.no_grad():
            model.atoms.zero_()  # only the penalty speaks
        found = passed(model, X)
        moved[compat] = torch.autograd.grad(found.loss, model.jump)[0][2]
    # Unit 2 has u = 1.5 (below theta, in the window) and 1.9 (above it, outside): theta dL0/dtheta = -1.6 / 0.5 / 2.
    assert float(moved["paper"]) == pytest.approx(-1.6)
    assert float(moved["official"]) == 0


def test_theta_of_batch_topk_is_an_average_of_the_smallest_kept() -> None:
    model = by_hand(variant="batch-topk", threshold_after=5, threshold_decay=0.9)
    assert float(passed(model, X, step=5).theta) == NOT_SET
    first = passed(model, X, step=6).theta  # kept: 3 and 2
    assert float(first) == pytest.approx(2.0)
    assert float(passed(model, 2 * X, theta=first, step=7).theta) == pytest.approx(
        0.9 * 2 + 0.1 * 4.3
    )
    from_zero = by_hand(
        variant="batch-topk", threshold_after=-1, threshold_decay=0.99, threshold_from_zero=True
    )
    assert float(passed(from_zero, X).theta) == pytest.approx(0.02)


def test_theta_of_topk_is_the_mean_over_rows() -> None:
    model = by_hand(threshold_after=-1)
    assert float(passed(model, X).theta) == pytest.approx(2.5)
    silent = torch.cat(
        [X, torch.tensor([[-3.0, -3.0]])]
    )  # a row without a positive unit does not count
    assert float(passed(model, silent).theta) == pytest.approx(2.5)
    assert float(passed(model, silent[2:]).theta) == NOT_SET


def test_the_official_batch_topk_keeps_k_over_the_whole_batch() -> None:
    for compat, kept in (("paper", 16 * 3), ("official", 3)):
        model = scrambled(variant="batch-topk", compat=compat, threshold_after=-1)
        found = passed(model, normal(16, 6))
        assert int(found.fired.sum()) <= kept
        assert (int(found.fired.sum()) <= 3) is (compat == "official")


# -- against dense formulas ------------------------------------------------------------------------


def dense_loss(model: SparseAutoencoder, x: Tensor, dead: Tensor) -> Tensor:
    """The formulas of the docstring with dense matrices and autograd."""
    c, atoms = model.config, model.dictionary()
    u = (x - model.bias if c.pre_bias else x) @ model.encoder.T + model.offset
    seen = u * atoms.norm(dim=1) if c.rescale_by_norm else u
    if c.variant in ("topk", "k-sparse"):
        mask = torch.zeros_like(u).scatter(1, seen.relu().topk(c.kept, 1).indices, 1.0)
    elif c.variant == "batch-topk":
        edge = seen.relu().flatten().topk(c.kept * len(x)).values[-1]
        mask = (seen >= edge).float()
    elif c.variant == "jump-relu":
        mask = (u > model.thresholds()).float()
    else:
        mask = torch.ones_like(u)
    z = u.relu() * mask
    x_hat = z @ atoms + model.bias
    loss = (x - x_hat).square().sum(1).mean()
    if c.variant == "vanilla":
        loss = loss + c.l1 * z.sum(1).mean()
    if c.auxiliary == "auxk" and dead.any():
        e = (x - x_hat).detach()
        hopeful = (seen.relu() * dead).detach()
        best = hopeful.topk(min(c.auxiliary_units, int(dead.sum())), 1).indices
        z_aux = u.relu() * dead * torch.zeros_like(u).scatter(1, best, 1.0)
        wrong = (e - z_aux @ atoms).square().sum(1).mean()
        loss = loss + c.aux_weight * wrong / (e - e.mean(0)).square().sum(1).mean()
    return loss


SILENT = torch.full((24,), 100)


def with_dead_units(**changes: Any) -> tuple[SparseAutoencoder, Tensor]:
    """Half of the units are kept in no row, yet some of their pre-activations are positive."""
    model = scrambled(units=24, k=2, dead_tokens=40, aux_weight=0.5, **changes)
    with torch.no_grad():
        model.offset[::2] -= 1.0
    return model, normal(16, 6)


@pytest.mark.parametrize(
    "dictionary", ["unit-norm", "normalised", "relaxed-archetypal", "rescaled"]
)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("pre_bias", [True, False])
def test_losses_and_gradients_are_those_of_dense_formulas(
    variant: str, dictionary: str, pre_bias: bool
) -> None:
    changes: dict[str, Any] = {"variant": variant, "dictionary": dictionary, "pre_bias": pre_bias}
    if dictionary == "rescaled":
        if variant not in ("topk", "batch-topk"):
            changes["dictionary"] = "free"
        else:
            changes |= {"dictionary": "free", "rescale_by_norm": True}
    if variant in ("vanilla", "jump-relu"):
        changes |= {"auxiliary": "none", "l0_weight": 0.0}
    model, x = with_dead_units(**changes)
    found = training_pass(model, x, SILENT, NEVER, 0)
    expected = dense_loss(model, x, found.dead)
    if model.config.auxiliary == "auxk":
        assert int(found.dead.sum()) > 3 and float(found.parts["auxiliary"]) != 1
    torch.testing.assert_close(found.loss, expected)
    parameters = [p for name, p in model.named_parameters() if name != "jump"]
    ours = torch.autograd.grad(found.loss, parameters, allow_unused=True)
    theirs = torch.autograd.grad(expected, parameters, allow_unused=True)
    for one, two in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_many_dead_units_give_the_same_loss_through_bags(monkeypatch: pytest.MonkeyPatch) -> None:
    from expunge.core.sparse_autoencoder import losses

    for changes in ({}, {"dictionary": "free", "rescale_by_norm": True}):
        model, x = with_dead_units(aux_k=2, **changes)
        made = []
        for most in (8, 0):  # one dense product; bags
            monkeypatch.setattr(losses, "DENSE", most)
            found = training_pass(model, x, SILENT, NEVER, 0)
            assert int(found.dead.sum()) > 3
            made.append((found.loss, *torch.autograd.grad(found.loss, list(model.parameters()))))
        for one, two in zip(*made, strict=True):
            torch.testing.assert_close(one, two)


def test_reconstruction_is_summed_or_averaged() -> None:
    model, x = scrambled(auxiliary="none"), normal(16, 6)
    losses = {}
    for how in ("sum", "mean", "variance"):
        model.config.__dict__["reconstruction"] = how
        losses[how] = training_pass(model, x, torch.zeros(12).long(), NEVER, 0, 0.25).loss.item()
    assert losses["mean"] == pytest.approx(losses["sum"] / 6)
    assert losses["variance"] == pytest.approx(losses["sum"] / 6 / 0.25)
