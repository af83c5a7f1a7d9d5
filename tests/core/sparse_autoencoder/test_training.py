"""Training: what is settled at the start, the order of one update, resampling, several at once, kill and resume."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from expunge.core.finetune import Loop
from expunge.core.finetune import fit as train
from expunge.core.sparse_autoencoder import PRESETS, SparseAutoencoderConfig, fit, fit_all
from expunge.core.sparse_autoencoder.losses import training_pass
from expunge.core.sparse_autoencoder.model import NOT_SET, SparseAutoencoder
from expunge.core.sparse_autoencoder.start import centroids, factor, geometric_median, started
from expunge.core.sparse_autoencoder.stream import Rows
from expunge.core.sparse_autoencoder.trainer import Rising, _Autoencoders, _optimiser
from expunge.errors import NonFiniteError, ResumeMismatch, SettingError, WrongShape
from expunge.testing.resuming import Killed, writing

from .helpers import config, normal, planted, scrambled

X = normal(64, 6) + 1.0


# -- start -----------------------------------------------------------------------------------------


def test_the_geometric_median_by_hand() -> None:
    line = torch.tensor([[0.0, 1.0], [1.0, 1.0], [10.0, 1.0]])
    # On a line it is the median; Weiszfeld comes close to a data point slowly.
    torch.testing.assert_close(
        geometric_median(line, 2000, 0.0).float(), torch.tensor([1.0, 1.0]), atol=1e-2, rtol=0
    )
    # The Fermat point of a right triangle with legs 1 stands at (1 - 1 / sqrt 3) / 2 from both.
    corner = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    place = (1 - 3**-0.5) / 2
    torch.testing.assert_close(geometric_median(corner, 500, 0.0).float(), torch.full((2,), place))
    sums = [
        float((X.double() - point).norm(dim=1).sum())
        for point in (geometric_median(X), X.double().mean(0))
    ]
    assert sums[0] < sums[1]
    assert torch.equal(geometric_median(X, tolerance=1e9), geometric_median(X, iterations=1))


@pytest.mark.parametrize(
    ("normalise", "value"), [("mean-square", 0.2), ("mean-norm", 2**0.5 / 5), ("none", 1.0)]
)
def test_the_factor_by_hand(normalise: str, value: float) -> None:
    rows = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    assert factor(rows, normalise) == pytest.approx(value)
    if normalise != "none":
        with pytest.raises(SettingError, match="all activations are zero"):
            factor(0 * rows, normalise)


def test_the_first_batch_gives_the_bias() -> None:
    source = Rows(X)
    first = next(source.batches(16, 5))
    model = started(config(normalise="mean-square"), source, 5)
    assert float(model.scale) == pytest.approx(float(X.square().sum(1).mean() ** -0.5))
    torch.testing.assert_close(model.bias.detach(), geometric_median(first * model.scale).float())
    assert not started(config(start_bias="zero"), source, 5).bias.any()
    more = started(config(median_rows=40), source, 5)
    rows = torch.cat([b for b, _ in zip(source.batches(16, 5), range(3), strict=False)])[:40]
    torch.testing.assert_close(more.bias.detach(), geometric_median(rows).float())


@pytest.mark.parametrize("normalise", ["mean-square", "row-norm", "layer-norm"])
def test_candidates_of_atoms_stand_in_the_units_of_the_encoder(normalise: str) -> None:
    rows = 100 + 5 * normal(64, 6)
    settings = config(dictionary="archetypal", normalise=normalise, candidates=64, batch=64)
    model = started(settings, Rows(rows), 0)
    seen = model.normalised(rows).rows  # as many candidates as rows: most are one of them
    nearest = torch.cdist(model.candidates.double(), seen.double()).amin(1)
    assert float(nearest.median()) < 0.01 * float(seen.norm(dim=1).mean())


def test_candidates_are_centroids() -> None:
    rows = torch.cat([normal(40, 6) * 0.01 + 5 * place for place in torch.eye(6)[:3]])
    found = centroids(rows, 3, 0)
    torch.testing.assert_close(
        found.sort(0).values, (5 * torch.eye(6)[:3]).sort(0).values, atol=0.05, rtol=0
    )
    with pytest.raises(SettingError, match="3 centroids were asked of 2"):
        centroids(rows[:2], 3, 0)


# -- one update ------------------------------------------------------------------------------------


def test_the_rate_rises_from_zero() -> None:
    rising = Rising(1.0, warmup=4, schedule="linear")
    assert [rising.rate(n, 8) for n in range(8)] == [0.0, 0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.25]


def test_the_first_update_moves_nothing_but_moments(tmp_path: Path) -> None:
    settings = config(warm_up=10, steps=1)
    before, after = started(settings, Rows(X), 0), fit(X, settings, seed=0, run=tmp_path)
    for name, value in before.named_parameters():
        torch.testing.assert_close(dict(after.named_parameters())[name], value, rtol=0, atol=3e-7)
    assert load_file(tmp_path / "training.safetensors")["moment.exp_avg/0.atoms"].any()
    assert not torch.equal(fit(X, config(warm_up=10, steps=2), seed=0).atoms, before.atoms)


def updated(model: SparseAutoencoder, order: str) -> dict[str, torch.Tensor]:
    """One step of Adam with a large guard (so that the size of gradients matters), in a given order."""
    settings = model.config
    first = next(Rows(X).batches(settings.batch, 0))
    found = training_pass(model, first, torch.zeros(12).long(), torch.tensor(NOT_SET), 0)
    named = dict(model.named_parameters())
    pairs = zip(named, torch.autograd.grad(found.loss, list(named.values())), strict=True)
    gradients = dict(pairs)

    def parallel() -> None:
        unit = functional.normalize(model.atoms.detach(), dim=1)
        gradients["atoms"] -= (gradients["atoms"] * unit).sum(1, keepdim=True) * unit

    def clip() -> None:
        norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
        assert norm > 0.999 * settings.clip
        for gradient in gradients.values():
            gradient *= settings.clip / norm

    for part in order.split():
        {"parallel": parallel, "clip": clip}[part]()
    made = {
        name: value.detach() - settings.rate * gradients[name] / (gradients[name].abs() + settings.adam_eps)
        for name, value in named.items()
    }  # fmt: skip
    made["atoms"] = functional.normalize(made["atoms"], dim=1)
    return made


def test_one_update_is_project_clip_step_normalise() -> None:
    settings = config(steps=1, adam_eps=0.1, clip=0.5, auxiliary="none", lr=0.3)
    after = dict(fit(X, settings, seed=0).named_parameters())
    start = started(settings, Rows(X), 0)
    for name, value in updated(start, "parallel clip").items():
        torch.testing.assert_close(after[name], value)
    for other in ("clip parallel", "clip", "parallel clip parallel clip"):
        same = torch.allclose(updated(start, other)["atoms"], after["atoms"], rtol=1e-5, atol=1e-7)
        assert same is (
            other == "parallel clip parallel clip"
        )  # doing it all twice changes nothing


@pytest.mark.parametrize("preset", ["dictionary-learning:topk", "dictionary-learning:vanilla"])
def test_atoms_stay_of_unit_norm(preset: str) -> None:
    made = SparseAutoencoderConfig.configured(
        preset, width=6, units=12, k=3, steps=5, batch=16, lr=0.1, warm_up=0
    )
    torch.testing.assert_close(fit(X, made, seed=0).atoms.norm(dim=1), torch.ones(12))


def test_official_k_sparse_atoms_drift_from_unit_norm() -> None:
    settings = config(variant="k-sparse", lr=0.1)
    drift = {
        compat: float((fit(X, dataclasses.replace(settings, compat=compat), seed=0).atoms.norm(dim=1) - 1).abs().max())
        for compat in ("paper", "official")
    }  # fmt: skip
    assert drift["paper"] < 1e-6 and drift["official"] > 1e-3


def test_what_is_not_to_learn_does_not() -> None:
    assert not fit(X, config(bias=False, start_bias="zero"), seed=0).bias.any()
    made = fit(normal(200, 6), config(dictionary="archetypal", start_bias="zero"), seed=0)
    assert not made.relaxation.any() and made.mixture.min() >= 0
    torch.testing.assert_close(made.mixture.sum(1), torch.ones(12))


# -- resampling ------------------------------------------------------------------------------------


@pytest.mark.parametrize("unit", [True, False])
def test_silent_units_become_rows_drawn_by_their_loss(tmp_path: Path, unit: bool) -> None:
    settings = config(
        variant="vanilla", auxiliary="none", resample_steps=4, steps=4, resample_unit=unit, lr=1e-3
    )
    model = started(settings, Rows(X), 0)
    with torch.no_grad():
        model.offset[[2, 7]] = -100.0
    task = _Autoencoders([model], Rows(X), 0)
    done = train(task, Loop(4, _optimiser(settings)), seed=0, run=tmp_path)
    atoms, encoder, offset = (done.values[f"0.{name}"] for name in ("atoms", "encoder", "offset"))
    assert not offset[[2, 7]].any() and (offset[[0, 1, 3]] != 0).all()
    batch = model.normalised([*zip(Rows(X).batches(16, 0), range(4), strict=False)][3][0]).rows
    live = [n for n in range(12) if n not in (2, 7)]
    size = encoder[live].norm(dim=1).mean()
    for dead in (2, 7):
        cosines = functional.cosine_similarity(batch, atoms[dead][None])
        row = batch[cosines.argmax()]
        torch.testing.assert_close(atoms[dead], functional.normalize(row, dim=0))
        torch.testing.assert_close(
            encoder[dead], (functional.normalize(row, dim=0) if unit else row) * 0.2 * size
        )
    stored = load_file(tmp_path / "training.safetensors")
    for name in ("atoms", "encoder", "offset"):
        for moment in ("exp_avg", "exp_avg_sq"):
            found = stored[f"moment.{moment}/0.{name}"]
            assert not found[[2, 7]].any() and found[live].any(), name


def test_silence_is_told_in_the_steps_that_official_k_sparse_counts() -> None:
    settings = config(
        variant="k-sparse", compat="official", auxiliary="none", resample_steps=4, steps=4, lr=1e-3
    )
    model = started(settings, Rows(X), 0)
    with torch.no_grad():
        model.encoder[[2, 7]], model.offset[[2, 7]] = 0.0, -100.0
    task = _Autoencoders([model], Rows(X), 0)
    done = train(task, Loop(4, _optimiser(settings)), seed=0)
    assert not done.values["0.offset"][[2, 7]].any() and done.values["0.encoder"][[2, 7]].any()


def test_nothing_is_resampled_where_all_units_fire() -> None:
    settings = config(variant="vanilla", auxiliary="none", steps=4)
    plain, resampled = (
        fit(X, dataclasses.replace(settings, resample_steps=n), seed=0) for n in (None, 4)
    )
    assert torch.equal(plain.atoms, resampled.atoms)


# -- runs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_trains(preset: str) -> None:
    rows, _ = planted(400)
    settings = SparseAutoencoderConfig.configured(
        preset, width=16, units=24, k=3, steps=12, batch=64, lr=1e-2, warm_up=2, dead_tokens=128, candidates=48,
    )  # fmt: skip
    model = fit(rows, settings, seed=0, held_out=rows[:100])
    assert model.quality["held_out"] and model.quality["rows"] == 100
    assert model.trained["steps"] == 12
    assert -1 < model.quality["r2"] < 1 and not any(p.requires_grad for p in model.parameters())
    assert torch.isfinite(model(rows)).all()


def test_a_planted_dictionary_is_found() -> None:
    rows, true = planted(2000, active=2)
    from expunge.core.sparse_autoencoder import recovery

    settings = config(width=16, units=32, k=2, steps=250, batch=128, lr=1e-2, dead_tokens=1000)
    model = fit(rows, settings, seed=0)
    assert recovery(true, model.dictionary()) > 0.9 > recovery(true, normal(32, 16))
    assert model.quality["r2"] > 0.8 and not model.quality["held_out"]


def test_several_autoencoders_in_one_pass_are_those_trained_alone() -> None:
    configs = [config(), config(variant="vanilla", l1=0.3), config(units=8, lr=1e-3)]
    together = fit_all(X, configs, seed=2)
    for settings, model in zip(configs, together, strict=True):
        alone = fit(X, settings, seed=2)
        assert all(
            torch.equal(a, b) for a, b in zip(alone.parameters(), model.parameters(), strict=True)
        )
        assert alone.quality == model.quality


@pytest.mark.parametrize("kill_at", [1, 4])
def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path, kill_at: int) -> None:
    configs = [
        config(dead_tokens=40, threshold_after=0),
        config(variant="batch-topk", threshold_after=1, dead_tokens=40),
        config(variant="vanilla", resample_steps=2, l1=5.0, auxiliary="none"),
        config(variant="jump-relu", auxiliary="none"),
        config(dictionary="relaxed-archetypal"),
    ]
    whole = fit_all(X, configs, seed=1)
    with writing(kill_at) as written, pytest.raises(Killed):
        fit_all(X, configs, seed=1, run=tmp_path)
    assert written == list(range(1, kill_at + 1))
    for one, two in zip(whole, fit_all(X, configs, seed=1, run=tmp_path), strict=True):
        own = two.state_dict()
        assert all(torch.equal(value, own[name]) for name, value in one.state_dict().items())
        assert one.quality == two.quality and one.trained == two.trained


def test_a_run_of_other_settings_or_activations_is_refused(tmp_path: Path) -> None:
    fit(X, config(), seed=1, run=tmp_path)
    for rows, settings, seed in ((X, config(k=2), 1), (X + 1, config(), 1), (X, config(), 2)):
        with pytest.raises(ResumeMismatch):
            fit(rows, settings, seed=seed, run=tmp_path)


def test_a_stream_is_trained_like_its_rows(tmp_path: Path) -> None:
    parts = [X[:30].reshape(5, 6, 6), X[30:]]
    whole = fit(X, config(), seed=0)
    assert torch.equal(fit(iter(parts), config(), seed=0).atoms, whole.atoms)
    cached = fit(iter(parts), config(), seed=0, run=tmp_path)
    assert (tmp_path / "activations" / "cache.json").exists()
    assert torch.equal(fit(iter([]), config(), seed=0, run=tmp_path).atoms, cached.atoms)
    assert torch.equal(fit(X.numpy(), config(), seed=0).atoms, whole.atoms)


def test_short_training_is_calibrated() -> None:
    model = fit(X, config(variant="batch-topk", threshold_after=1000), seed=0)
    assert float(model.theta) > 0 and model.encode(X).shape == (64, 12)


def test_seeds_differ_and_repeat() -> None:
    one, two, other = (fit(X, config(), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.atoms, two.atoms) and not torch.equal(one.atoms, other.atoms)


@pytest.mark.parametrize(
    ("rows", "settings", "error", "said"),
    [
        (X, [], SettingError, "no autoencoder"),
        (X, [config(), config(batch=8)], SettingError, "one value of batch; got 16, 8"),
        (X[:, :5], [config()], WrongShape, "have 5 numbers; the configuration has width 6"),
        (X, [config(dictionary="archetypal", resample_steps=2)], SettingError, "no atoms to resample"),
        (X.int(), [config()], SettingError, "rows of floats"),
        (X / 0, [config()], NonFiniteError, "NaN or infinity"),
        (3, [config()], SettingError, "activations are a int"),
    ],
)  # fmt: skip
def test_errors_are_one_sentence(rows: Any, settings: Any, error: type, said: str) -> None:
    with pytest.raises(error, match=said):
        fit_all(rows, settings, seed=0)


def test_bfloat16_trains() -> None:
    model = fit(X, config(precision="bfloat16", dead_tokens=30), seed=0)
    assert model.atoms.dtype == torch.float32
    exact = fit(X, config(dead_tokens=30), seed=0)
    assert functional.cosine_similarity(model.atoms, exact.atoms).min() > 0.9


def test_calibration_keeps_l0_within_a_tenth() -> None:
    for variant in ("topk", "batch-topk"):
        model = scrambled(variant=variant, threshold_inference=True, units=24)
        model.calibrate(normal(400, 6))
        held_out = normal(400, 6, purpose="held out")
        assert float((model.encode(held_out) > 0).sum(1).float().mean()) == pytest.approx(
            3, rel=0.1
        )
