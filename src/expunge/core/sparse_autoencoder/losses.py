"""One training pass: the loss of a batch, which units fired, and the next value of theta.

    vanilla         mean_B ||x - x_hat||^2 + l1 mean_B sum_i z_i            (or sum_i z_i ||W_d,i||)
    TopK family     mean_B ||x - x_hat||^2 + a_aux L_aux
    jump-relu       mean_B ||x - x_hat||^2 + weight (L0 / L0* - 1)^2         (or weight L0), L0 the mean of the batch

With ``e = stopgrad(x - x_hat)`` and ``z_aux`` the k_aux largest ReLU(u) among dead units in each row,
``e_hat = z_aux W_d`` (no bias):

    auxk            mean_B ||e - e_hat||^2 / mean_B ||e - mean e||^2, the mean of each dimension; NaN is 0
    auxk-unscaled   min(#dead / k_aux, 1) mean_B ||e - e_hat||^2                                        (SAELens)
    auxk-k-sparse   auxk; with compat="official" ``e_hat = z_aux W_d + b - stopgrad(b)``                  (ItD, SDXL)
    residual        mean_B ||(x - x_hat) - e_hat||^2 with the k_aux largest ReLU(u) - z of all units; the
                    residual is not detached                                                      (overcomplete)
    reanimation     minus the mean pre-activation of units that are dead in this batch              (overcomplete)

k_aux is at most the number of dead units.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.nn import functional

from .activations import batch_top_k, count_above, jump_relu, top_k
from .config import SparseAutoencoderConfig
from .model import NOT_SET, SparseAutoencoder
from .support import Support, decode_entries, encode_entries

__all__ = ["Pass", "auxiliary_loss", "next_theta", "training_pass"]

DENSE = 8
"""Dead units over k_aux up to which one dense product is faster than bags."""


@dataclasses.dataclass(frozen=True)
class Pass:
    """What one batch gave.

    Attributes:
        loss: What is minimised.
        parts: Its terms before their weights, detached.
        fired: Units that fired in this batch, bool ``(K,)``.
        silent: Rows (``official`` k-sparse: steps) since each unit fired, this batch included, ``(K,)``.
        dead: Units that were dead when the auxiliary loss was taken, bool ``(K,)``.
        theta: The running threshold after this batch.
        errors: ``||x - x_hat||^2`` plus the l1 penalty of each row, ``(B,)``, for resampling.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    fired: Tensor
    silent: Tensor
    dead: Tensor
    theta: Tensor
    errors: Tensor


@dataclasses.dataclass
class _Coded:
    """A batch's code: sparse (values of a support) or dense."""

    u: Tensor  # (B, K), without a graph where the code is sparse
    values: Tensor  # (n,) or (B, K), with a graph
    support: Support | None
    atoms: Tensor
    centred: Tensor

    def decoded(self) -> Tensor:
        if self.support is not None:
            return decode_entries(self.values, self.atoms, self.support)
        return self.values @ self.atoms


def _coded(model: SparseAutoencoder, rows: Tensor) -> _Coded:
    config, atoms = model.config, model.dictionary()
    centred = (rows - model.bias.detach()) if config.pre_bias else rows
    if not config.sparse:
        u = model.pre_activations(rows)
        if config.variant == "vanilla":
            return _Coded(u, u.relu(), None, atoms, centred)
        z = jump_relu(u, model.thresholds(), config.bandwidth, config.kernel)
        return _Coded(u, z, None, atoms, centred)
    with torch.no_grad():
        plain = functional.linear(centred, model.encoder, model.offset).to(rows.dtype)
        norms = atoms.norm(dim=1) if config.rescale_by_norm else None
        u = plain if norms is None else plain * norms
        if config.variant == "batch-topk":
            count = config.kept if config.official else config.kept * len(rows)
            values, support = batch_top_k(u, count)
        else:
            kept, indices = top_k(u, config.kept, config.variant == "topk")
            values, support = kept.reshape(-1), Support.of(indices, config.units)
        if norms is not None:
            values = plain[support.row_of, support.columns]
    bias = model.bias if config.pre_bias else None
    # Where norms rescale u, z W_d / ||W_d|| needs only ReLU(plain): the norms cancel.
    values = encode_entries(model.encoder, model.offset, bias, centred, values, support)
    return _Coded(u, values.relu(), support, atoms, centred)


def training_pass(
    model: SparseAutoencoder, x: Tensor, silent: Tensor, theta: Tensor, step: int, variance: float = 1.0
) -> Pass:  # fmt: skip
    """The loss of a batch of activations.

    Args:
        model: The autoencoder.
        x: Activations ``(B, d)``.
        silent: Rows since each unit fired, before this batch, ``(K,)`` int64.
        theta: The running threshold, -1 where it is not set.
        step: Updates done before this one.
        variance: For ``reconstruction="variance"``: mean square of the first batch around its mean.
    """
    config = model.config
    rows = model.normalised(x).rows
    coded = _coded(model, rows)
    error = rows - (coded.decoded() + model.bias)
    squares = error.square().sum(1)
    over = {"sum": 1.0, "mean": config.width, "variance": config.width * variance}[
        config.reconstruction
    ]
    loss = squares.mean() / over
    parts = {"reconstruction": loss.detach()}
    fired = _fired(config, coded)
    silent = _silence(config, silent, fired, len(rows))
    dead = _dead(config, silent)
    penalty = _sparsity(model, coded)
    errors = squares.detach()
    if penalty is not None:
        term, weight = penalty
        warm = 1.0 if not config.sparsity_warm_up else min(step / config.sparsity_warm_up, 1.0)
        loss = loss + warm * weight * term.mean()
        parts["sparsity"] = term.mean().detach()
        if config.variant == "vanilla":
            errors = errors + warm * weight * term.detach()
    term = auxiliary_loss(model, coded, error, dead, fired, over)
    if term is not None:
        loss = loss + config.aux_weight * term
        parts["auxiliary"] = term.detach()
    return Pass(loss, parts, fired, silent, dead, next_theta(config, coded, theta, step), errors)


def _sparsity(model: SparseAutoencoder, coded: _Coded) -> tuple[Tensor, float] | None:
    """The penalty of each row (or one number) and its weight."""
    config = model.config
    if config.variant == "vanilla":
        z = coded.values
        return (z * coded.atoms.norm(dim=1) if config.l1_by_norm else z).sum(1), config.l1
    if config.variant != "jump-relu":
        return None
    seen = coded.values if config.official else coded.u
    l0 = count_above(seen, model.thresholds(), config.bandwidth, config.kernel).mean()
    if config.l0_target is None:
        return l0, config.l0_weight
    return (l0 / config.l0_target - 1).square(), config.l0_weight


@torch.no_grad()
def _fired(config: SparseAutoencoderConfig, coded: _Coded) -> Tensor:
    """Units that fired, ``(K,)``: topk by being kept, even at 0; k-sparse by a kept u above ``fired_above``."""
    if coded.support is None:
        return (coded.values > 0).any(0)
    kept = coded.support.columns
    if config.variant != "topk":
        kept = kept[coded.values > (config.fired_above if config.variant == "k-sparse" else 0)]
    return torch.zeros(config.units, dtype=torch.bool, device=kept.device).index_fill_(
        0, kept, True
    )


def _silence(
    config: SparseAutoencoderConfig, silent: Tensor, fired: Tensor, rows: int
) -> Tensor:  # fmt: skip
    if config.official and config.variant == "k-sparse":  # set to 0 and then always counted on
        return torch.where(fired, 0, silent) + 1
    return torch.where(fired, 0, silent + rows)


def _dead(config: SparseAutoencoderConfig, silent: Tensor) -> Tensor:
    if config.official and config.variant == "k-sparse":
        items = max(1.0, config.batch / config.tokens_an_item)
        return silent > config.dead_tokens / items
    return silent >= config.dead_tokens


@torch.no_grad()
def next_theta(config: SparseAutoencoderConfig, coded: _Coded, theta: Tensor, step: int) -> Tensor:
    """The running threshold: an average of the smallest positive kept value.

    batch-topk takes it of the whole batch, topk and k-sparse the mean over rows of each row's; the first one is taken
    as it is, unless theta is to start from 0.
    """
    if coded.support is None or step <= config.threshold_after:
        return theta
    values = coded.values.detach()
    if config.rescale_by_norm:
        values = values * coded.atoms.norm(dim=1)[coded.support.columns]
    positive = values > 0
    if not positive.any():
        return theta
    if config.variant == "batch-topk":
        found = values[positive].min()
    else:
        least = torch.where(positive, values, torch.inf).reshape(coded.support.rows, -1).amin(1)
        found = least[least < torch.inf].mean()
    if float(theta) == NOT_SET:
        if not config.threshold_from_zero:
            return found
        theta = torch.zeros_like(theta)
    return config.threshold_decay * theta + (1 - config.threshold_decay) * found


def auxiliary_loss(
    model: SparseAutoencoder, coded: _Coded, error: Tensor, dead: Tensor, fired: Tensor, over: float
) -> Tensor | None:
    """L_aux of the module's table, before its weight; ``None`` where there is nothing to revive.

    Args:
        model: The autoencoder.
        coded: The batch's code.
        error: ``x - x_hat (B, d)``, with its graph.
        dead: Dead units, bool ``(K,)``.
        fired: Units that fired in this batch, bool ``(K,)``.
        over: What squared errors are divided by, as in the reconstruction.
    """
    config = model.config
    if config.auxiliary == "none":
        return None
    if config.auxiliary == "residual":
        return _residual(model, coded, error) / over
    if config.auxiliary == "reanimation":
        units = (~fired).nonzero().flatten()
        return -_pre(model, coded, units).mean() if len(units) else None
    units = dead.nonzero().flatten()
    moving = config.official and config.auxiliary == "auxk-k-sparse"
    if not len(units) and not moving:
        return None
    e = error.detach()
    made = _revived(model, coded, units) if len(units) else torch.zeros_like(e)
    if moving:
        made = made + model.bias - model.bias.detach()
    wrong = (e - made).square().sum(1).mean()
    if config.auxiliary == "auxk-unscaled":
        return wrong / over * min(len(units) / config.auxiliary_units, 1.0)
    spread = (e - e.mean(0)).square().sum(1).mean()
    # No spread, no loss: a quotient of NaN would reach the weights through its gradient.
    return torch.where(spread > 0, wrong / spread.clamp_min(1e-30), 0.0)


def _pre(model: SparseAutoencoder, coded: _Coded, units: Tensor) -> Tensor:
    """u of some units ``(B, m)``, with a graph."""
    seen = coded.centred
    if model.config.pre_bias:  # the bias learns here, too
        seen = seen + model.bias.detach() - model.bias
    return functional.linear(seen, model.encoder[units], model.offset[units])


def _revived(model: SparseAutoencoder, coded: _Coded, units: Tensor) -> Tensor:
    """``z_aux W_d (B, d)`` of the k_aux largest ReLU(u) among ``units`` in each row."""
    config = model.config
    count = min(config.auxiliary_units, len(units))
    with torch.no_grad():
        among = coded.u[:, units].relu()
        kept = among.topk(count, dim=1, sorted=False).indices
    if len(units) <= DENSE * count or coded.support is None:
        # Where norms rescale u they choose the units, and cancel in what is decoded.
        z = _pre(model, coded, units).relu()
        if count < len(units):
            z = z * torch.zeros_like(z).scatter(1, kept, 1.0)
        return z @ coded.atoms[units]
    support = Support.of(units[kept], config.units)
    return decode_entries(_entries(model, coded, support).relu(), coded.atoms, support)


def _entries(model: SparseAutoencoder, coded: _Coded, support: Support) -> Tensor:
    """u (without rescaling) at the places of a support, with a graph."""
    values = coded.u.detach()[support.row_of, support.columns]
    if model.config.rescale_by_norm:
        values = values / coded.atoms.detach().norm(dim=1).clamp_min(1e-8)[support.columns]
    bias = model.bias if model.config.pre_bias else None
    return encode_entries(model.encoder, model.offset, bias, coded.centred, values, support)


def _residual(model: SparseAutoencoder, coded: _Coded, error: Tensor) -> Tensor:
    """The residual, not detached, from the k_aux largest of ReLU(u) - z of all units."""
    config = model.config
    with torch.no_grad():
        left = coded.u.relu()
        if coded.support is None:
            left = left - coded.values
        else:
            left[coded.support.row_of, coded.support.columns] = 0.0
        kept = left.topk(min(config.auxiliary_units, config.units), dim=1, sorted=False).indices
    if coded.support is None:
        rest = coded.u.relu() - coded.values
        made = (rest * torch.zeros_like(rest).scatter(1, kept, 1.0)) @ coded.atoms
    else:
        mask = torch.zeros_like(left).scatter(1, kept, 1.0) * (left > 0)
        every = torch.arange(config.units, device=left.device)
        made = (_pre(model, coded, every) * mask) @ coded.atoms
    return (error - made).square().sum(1).mean()
