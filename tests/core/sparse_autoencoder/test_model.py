"""Encoding and decoding of every variant, thresholds, constraints, settings."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from expunge.core.sparse_autoencoder import PRESETS, SparseAutoencoder, SparseAutoencoderConfig
from expunge.core.sparse_autoencoder.activations import (
    batch_top_k,
    count_above,
    jump_relu,
    running_top_k,
    silverman,
    top_k,
)
from expunge.core.sparse_autoencoder.support import Support, decode_entries, encode_entries
from expunge.errors import SettingError, WrongShape

from .helpers import VARIANTS, config, normal, scrambled

X = normal(40, 6)


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_allowed(preset: str) -> None:
    made = SparseAutoencoderConfig.configured(preset, width=16, units=256)
    assert made.preset == preset and SparseAutoencoder(made).dictionary().shape == (256, 16)


def test_defaults_of_the_libraries() -> None:
    def made(preset: str, **more: int) -> SparseAutoencoderConfig:
        return SparseAutoencoderConfig.configured(preset, width=768, units=16384, **more)

    topk = made("dictionary-learning:topk")
    assert topk.rate == pytest.approx(2e-4) and topk.auxiliary_units == 384
    assert SparseAutoencoderConfig(width=8, units=4096).rate == pytest.approx(4e-4)
    assert (topk.aux_weight, topk.dead_tokens, topk.clip, topk.warm_up) == (
        1 / 32,
        10_000_000,
        1.0,
        1000,
    )
    jump = made("dictionary-learning:jump-relu")
    assert (jump.betas, jump.l0_target, jump.pre_bias, jump.rate) == (
        (0.0, 0.999),
        20.0,
        False,
        7e-5,
    )
    assert (jump.threshold, jump.bandwidth, jump.sparsity_warm_up) == (0.001, 0.001, 2000)
    assert made("overcomplete:topk").kept == 1638 and made("sae-lens:topk").kept == 100
    lens = made("sae-lens:jump-relu")
    assert (lens.threshold, lens.bandwidth, lens.l0_target, lens.normalise) == (
        0.01,
        0.05,
        None,
        "mean-norm",
    )
    itd = made("itd")
    assert (itd.kept, itd.auxiliary_units, itd.adam_eps, itd.batch) == (64, 256, 6.25e-10, 3850)
    assert made("overcomplete:jump-relu").threshold == pytest.approx(math.exp(-3))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"variant": "top-k"}, "did you mean 'topk'"),
        ({"k": 13}, "k is 13; allowed is at most units, which is 12"),
        ({"units": 0}, "units is 0"),
        ({"variant": "vanilla", "rescale_by_norm": True}, "topk, batch-topk"),
        ({"betas": (0.9,)}, "allowed are two"),
    ],
)
def test_wrong_settings_are_named(changes: dict, said: str) -> None:
    with pytest.raises(SettingError, match=said):
        config(**changes)


def test_an_unknown_preset_names_the_nearest() -> None:
    with pytest.raises(SettingError, match="dictionary-learning:topk"):
        SparseAutoencoderConfig.configured("dictionary-learning:topq", width=4, units=8)


# -- start -----------------------------------------------------------------------------------------


def test_the_encoder_begins_as_the_dictionary_transposed() -> None:
    for norm in (1.0, 0.1):
        model = SparseAutoencoder(config(encoder_norm=norm), seed=3)
        assert torch.equal(model.encoder, model.atoms)
        torch.testing.assert_close(model.atoms.norm(dim=1), torch.full((12,), norm))
        assert not model.offset.any() and not model.bias.any()
    assert not torch.equal(model.atoms, SparseAutoencoder(config(), seed=4).atoms)


def test_a_uniform_encoder_gives_its_directions_to_the_atoms() -> None:
    model = SparseAutoencoder(config(encoder_start="uniform"))
    assert model.encoder.abs().max() <= 6**-0.5 and model.encoder.abs().max() > 0.9 * 6**-0.5
    torch.testing.assert_close(model.atoms, functional.normalize(model.encoder, dim=1))


# -- identities ------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["topk", "k-sparse"])
def test_topk_never_has_more_than_k(variant: str) -> None:
    model = scrambled(variant=variant)
    on = (model.encode(X) > 0).sum(1)
    assert on.max() == 3
    model = scrambled(variant=variant, k=12)
    u = model.pre_activations(X)
    # k = K is a ReLU autoencoder.
    torch.testing.assert_close(model.encode(X), u.relu())
    assert model.decode(model.encode(X)).shape == X.shape


def test_relu_first_and_relu_last_give_one_code() -> None:
    u = normal(50, 12) - 0.8  # many rows have fewer than 6 positive entries
    assert ((u > 0).sum(1) < 6).any()
    codes = []
    for first in (True, False):
        values, kept = top_k(u, 6, first)
        codes.append(torch.zeros_like(u).scatter(1, kept, values.relu()))
    assert torch.equal(*codes)
    assert torch.equal((codes[0] > 0).sum(1), (u > 0).sum(1).clamp_max(6))


def test_batch_topk_averages_k_and_not_in_each_row() -> None:
    u = normal(40, 12)
    values, support = batch_top_k(u, 3 * 40)
    dense = support.dense(values)
    assert (dense > 0).sum() == 120 and (dense > 0).sum(1).max() > 3 > (dense > 0).sum(1).min()
    assert dense[dense > 0].min() >= u.relu()[dense == 0].max()


def test_a_running_top_k_is_the_top_k() -> None:
    u = normal(9, 50)
    for width in (1, 7, 50, 64):
        blocks = ((at, u[:, at : at + width]) for at in range(0, 50, width))
        values, kept = running_top_k(blocks, 5)
        assert torch.equal(values, u.topk(5, 1).values) and torch.equal(kept, u.topk(5, 1).indices)
    with pytest.raises(ValueError, match="no blocks"):
        running_top_k([], 5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_sparse_and_dense_codes_are_one(variant: str) -> None:
    model = scrambled(variant=variant)
    x = normal(5, 8, 6)
    z = model.encode(x)
    values, kept = model.encode_sparse(x)
    assert values.shape[:2] == (5, 8) and (values >= 0).all() and (z >= 0).all()
    assert torch.equal(torch.zeros_like(z).scatter_add(-1, kept, values), z)
    torch.testing.assert_close(model.decode_sparse(values, kept), model.decode(z))
    torch.testing.assert_close(model(x), z @ model.dictionary() + model.bias)
    for chunk in (1, 5):  # fewer columns at once than k
        again = model.encode_sparse(x, chunk=chunk)
        torch.testing.assert_close(again[0].sum(-1), values.sum(-1))
        assert torch.equal(again[1].sort().values, kept.sort().values)


def test_a_code_of_nothing_decodes_to_the_bias() -> None:
    model = scrambled(variant="jump-relu", threshold=1e3)
    values, kept = model.encode_sparse(X)
    assert values.shape == (40, 1) and not values.any()
    torch.testing.assert_close(model.decode_sparse(values, kept), model.bias.expand(40, 6))


def test_a_bfloat16_encoder_changes_little_and_stays_sparse() -> None:
    model = scrambled(width=6)
    before = model(X)
    assert model.half_encoder() is model and model.encoder.dtype == torch.bfloat16
    assert (model(X) - before).norm() / before.norm() < 0.05


def test_gradients_of_codes_reach_the_activations() -> None:
    for variant in VARIANTS:
        model, x = scrambled(variant=variant), X[:4].clone().requires_grad_()
        model.encode(x).sum().backward()
        z = model.encode(X[:4])
        torch.testing.assert_close(x.grad, (z > 0).float() @ model.encoder)


def test_rescaling_by_norm_chooses_as_with_unit_atoms() -> None:
    model = scrambled(dictionary="free", rescale_by_norm=True)
    norms = model.atoms.norm(dim=1)
    assert norms.max() / norms.min() > 1.5
    other = scrambled(dictionary="free", rescale_by_norm=False)
    with torch.no_grad():
        other.atoms.copy_(model.atoms / norms[:, None])
        other.encoder.copy_(model.encoder * norms[:, None])
        other.offset.copy_(model.offset * norms)
        other.bias.copy_(model.bias)
    torch.testing.assert_close(model.encode(X), other.encode(X))
    torch.testing.assert_close(model(X), other(X))


# -- thresholds ------------------------------------------------------------------------------------


def test_batch_topk_without_a_threshold_is_an_error() -> None:
    model = SparseAutoencoder(config(variant="batch-topk"))
    for ask in (model.encode, model.encode_sparse, model):
        with pytest.raises(SettingError, match="not calibrated"):
            ask(X)
    assert model.calibrate(X) > 0
    assert (model.encode(X) > 0).sum() == 3 * 40
    with torch.no_grad():
        model.offset.fill_(-100.0)
    with pytest.raises(SettingError, match="no unit is on for any of these 40 rows"):
        model.calibrate(X)


def test_topk_may_use_a_learned_threshold() -> None:
    model = SparseAutoencoder(config(threshold_inference=True))
    with pytest.raises(SettingError, match="not calibrated"):
        model.encode(X)
    model.theta.fill_(0.7)
    u = model.pre_activations(X)
    assert torch.equal(model.encode(X), u * (u > 0.7))


def test_what_equals_theta_is_kept_by_the_official_code_only() -> None:
    for compat, kept in (("paper", False), ("official", True)):
        model = SparseAutoencoder(config(variant="batch-topk", compat=compat))
        model.theta.copy_(model.pre_activations(X[:1]).max().detach())
        assert bool((model.encode(X[:1]) > 0).any()) is kept


# -- JumpReLU --------------------------------------------------------------------------------------


def test_jump_relu_gradients_by_hand() -> None:
    u = torch.tensor([[0.5, 0.30], [0.46, -2.0]], requires_grad=True)
    theta = torch.tensor([0.48, 0.25], requires_grad=True)
    z = jump_relu(u, theta, 0.2)
    assert torch.equal(z, torch.tensor([[0.5, 0.30], [0.0, 0.0]]))
    (z * torch.tensor([[1.0, 2.0], [3.0, 4.0]])).sum().backward()
    assert torch.equal(u.grad, torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    # Unit 0: both rows are within 0.1 of theta, so -(0.48 / 0.2) (1 + 3); unit 1: row 0 only, -(0.25 / 0.2) 2.
    torch.testing.assert_close(theta.grad, torch.tensor([-9.6, -2.5]))
    theta.grad = u.grad = None
    l0 = count_above(u, theta, 0.2)
    assert torch.equal(l0, torch.tensor([2.0, 0.0]))
    (l0 * torch.tensor([1.0, 10.0])).sum().backward()
    torch.testing.assert_close(
        theta.grad, torch.tensor([-55.0, -5.0])
    )  # -(1 / 0.2) (1 + 10), -(1 / 0.2)
    assert u.grad is None  # the straight-through estimator is for theta alone


def test_the_window_is_open_and_silverman_has_tails() -> None:
    theta = torch.ones(1, requires_grad=True)
    count_above(torch.tensor([[1.5]]), theta, 1.0).sum().backward()
    assert theta.grad == 0
    theta.grad = None
    count_above(torch.tensor([[1.5]]), theta, 1.0, "silverman").sum().backward()
    v = 0.5 / math.sqrt(2)
    assert float(theta.grad) == pytest.approx(-0.5 * math.exp(-v) * math.sin(v + math.pi / 4))
    steps = torch.linspace(-40, 40, 80_001)
    assert float(torch.trapezoid(silverman(steps), steps)) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("log", [True, False])
def test_theta_is_what_was_asked_for(log: bool) -> None:
    model = SparseAutoencoder(config(variant="jump-relu", log_threshold=log, threshold=0.3))
    torch.testing.assert_close(model.thresholds(), torch.full((12,), 0.3))
    with torch.no_grad():
        model.jump.fill_(-1.0)
    torch.testing.assert_close(model.thresholds(), torch.full((12,), math.exp(-1) if log else 0.0))


# -- archetypal dictionaries -----------------------------------------------------------------------


def test_archetypal_atoms_are_mixtures_of_candidates() -> None:
    rows = normal(20, 6)
    model = SparseAutoencoder(config(dictionary="relaxed-archetypal"), candidates=rows)
    assert torch.equal(model.dictionary(), rows[:12])  # the identity pattern, L = 0, m = 0
    with torch.no_grad():
        model.mixture.copy_(normal(12, 20))
        model.relaxation.copy_(torch.cat([3 * normal(6, 6), 0.01 * normal(6, 6)]))
        model.log_scale.fill_(0.5)
    small = model.relaxation[6:].clone()
    expected = model.mixture.clamp_min(0)
    expected = expected / (expected.sum(1, keepdim=True) + 1e-8)
    model.constrain()
    torch.testing.assert_close(model.mixture.detach(), expected)
    norms = model.relaxation.norm(dim=1)
    torch.testing.assert_close(norms[:6], torch.ones(6))
    assert torch.equal(model.relaxation[6:], small)  # within delta: untouched
    made = (model.mixture @ rows + model.relaxation) * math.exp(0.5)
    torch.testing.assert_close(model.dictionary(), made)
    assert (made.norm(dim=1) - 1).abs().max() > 0.1  # not unit norm


def test_more_atoms_than_candidates_begin_on_the_simplex() -> None:
    model = SparseAutoencoder(config(dictionary="archetypal"), candidates=normal(5, 6))
    assert torch.equal(model.mixture[:5], torch.eye(5))
    rest = model.mixture[5:]
    assert (rest > 0).all()
    torch.testing.assert_close(rest.sum(1), torch.ones(7))
    with torch.no_grad():
        model.relaxation.fill_(1.0)
    model.constrain()
    assert not model.relaxation.any()  # archetypal is relaxed archetypal with delta = 0


# -- normalisation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("normalise", ["row-norm", "layer-norm"])
def test_rows_normalised_one_by_one_come_back(normalise: str) -> None:
    model = scrambled(normalise=normalise, k=12)
    rows = model.normalised(X).rows
    if normalise == "row-norm":
        torch.testing.assert_close(rows.norm(dim=1), torch.full((40,), 6**0.5))
    else:
        torch.testing.assert_close(rows.std(dim=1), torch.ones(40), rtol=1e-4, atol=1e-4)
    z = model.encode(X)
    inner = z @ model.dictionary() + model.bias
    back = model.decode(z, of=X)
    torch.testing.assert_close(
        model.normalised(X).factor * (back - X), inner - rows, rtol=1e-4, atol=1e-4
    )
    with pytest.raises(SettingError, match=r"decode\(z, of=x\)"):
        model.decode(z)


def test_activations_of_another_width_are_refused() -> None:
    with pytest.raises(WrongShape, match="have 5 numbers; allowed is 6"):
        scrambled().encode(torch.zeros(3, 5))


# -- products over entries -------------------------------------------------------------------------


def test_products_over_entries_are_those_of_dense_matrices() -> None:
    mask = (normal(9, 12, purpose="mask") > 0.4).double()
    mask[4] = 0  # a row without entries
    columns = mask.nonzero()[:, 1]
    support = Support(columns, mask.sum(1).long(), 9, 12)
    weight, offset, bias = (normal(*s).double().requires_grad_() for s in ((12, 6), (12,), (6,)))
    atoms = normal(12, 6, purpose="atoms").double().requires_grad_()
    x = normal(9, 6).double()
    parameters = (weight, offset, bias, atoms)
    u = (x - bias) @ weight.T + offset
    dense = (u * mask).relu() @ atoms
    seen = (x - bias).detach()
    entries = u.detach()[support.row_of, columns]
    made = encode_entries(weight, offset, bias, seen, entries, support)
    sparse = decode_entries(made.relu(), atoms, support)
    torch.testing.assert_close(sparse, dense)
    torch.testing.assert_close(support.dense(entries), (u * mask).detach())
    pull = normal(9, 6, purpose="pull").double()
    for one, two in zip(
        torch.autograd.grad(sparse, parameters, pull),
        torch.autograd.grad(dense, parameters, pull),
        strict=True,
    ):
        torch.testing.assert_close(one, two)
