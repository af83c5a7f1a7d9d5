"""Training: several autoencoders over one stream of activations, resumable bit for bit.

One update of each autoencoder (arXiv 2406.04093 and dictionary_learning, in this order): gradients; for unit-norm
atoms the component parallel to each atom is taken out; the norm of all gradients is cut to ``clip``; a step of Adam;
atoms are normalised again.  The rate rises from 0, so that the very first update moves nothing but Adam's moments (b
has its value from :func:`.start.started`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import SettingError, WrongShape
from ..finetune import Groups, Loop, Optimiser, Step, Task, Trained
from ..finetune import fit as train
from . import metrics
from .config import ARCHETYPAL, SparseAutoencoderConfig
from .losses import Pass, training_pass
from .model import NOT_SET, SparseAutoencoder
from .start import started
from .stream import Activations, as_activations

__all__ = ["Rising", "fit", "fit_all"]


@dataclasses.dataclass(frozen=True)
class Rising(Optimiser):
    """An optimiser whose warm-up begins at a rate of 0: step ``n`` (from 0) of ``warmup`` has ``lr n / warmup``."""

    def rate(self, index: int, total: int) -> float:
        """Learning rate of step ``index`` (from 0) of ``total``."""
        if index < self.warmup:
            return self.lr * index / self.warmup
        return super().rate(index, total)


@dataclasses.dataclass
class _Run:
    """One autoencoder in training, and what a later step depends on."""

    model: SparseAutoencoder
    variance: float
    silent: Tensor
    theta: Tensor
    found: Pass | None = None
    dead: int = 0
    renewed: Tensor | None = None


class _Autoencoders(Task):
    """The autoencoders as one task of the training loop: a group of parameters each."""

    def __init__(self, models: Sequence[SparseAutoencoder], source: Activations, seed: int) -> None:
        self.source, self.seed = source, seed
        self.batch = models[0].config.batch
        first = next(source.batches(self.batch, seed))
        self.runs: list[_Run] = []
        for model in models:
            rows = model.normalised(first.to(model.bias.device)).rows
            spread = float((rows - rows.mean(0)).square().mean())
            silent = torch.zeros(model.config.units, dtype=torch.int64, device=rows.device)
            self.runs.append(_Run(model, spread, silent, torch.tensor(NOT_SET, device=rows.device)))
        self.stream: tuple[int, Iterator[Tensor]] | None = None

    def parameters(self) -> Groups:
        return {
            str(number): [
                (f"{number}.{name}", parameter) for name, parameter in run.model.named_parameters()
                if _trains(run.model, name)
            ]
            for number, run in enumerate(self.runs)
        }  # fmt: skip

    def _batch(self, index: int) -> Tensor:
        if self.stream is None or self.stream[0] != index:
            self.stream = (index, self.source.batches(self.batch, self.seed, index))
        batches = self.stream[1]
        self.stream = (index + 1, batches)
        return next(batches)

    def step(self, step: Step) -> Mapping[str, Tensor]:
        x = self._batch(step.index)
        losses = {}
        for number, run in enumerate(self.runs):
            model = run.model
            # What the pass counted is kept only once the update is made: an interrupted step counts for nothing.
            run.found = training_pass(
                model, x.to(model.bias.device), run.silent, run.theta, step.index, run.variance
            )
            losses[str(number)] = run.found.loss
            if model.config.resample_steps and (step.index + 1) % model.config.resample_steps == 0:
                self.x = x
        return losses

    def gradients(self, step: Step, group: str, gradients: dict[str, Tensor]) -> None:
        model, name = self.runs[int(group)].model, f"{group}.atoms"
        if model.config.dictionary != "unit-norm" or name not in gradients:
            return
        if model.config.official and model.config.variant == "k-sparse":
            model.constrain()
        with torch.no_grad():
            unit = torch.nn.functional.normalize(model.atoms, dim=1, eps=1e-12)
            gradients[name] -= (gradients[name] * unit).sum(1, keepdim=True) * unit

    def after(self, step: Step, losses: Mapping[str, float]) -> bool:
        """Keep what the batch counted, put dictionaries back under their constraints, start dead units anew."""
        for number, run in enumerate(self.runs):
            found, model = run.found, run.model
            if found is None:
                continue
            run.silent, run.theta, run.dead = found.silent, found.theta, int(found.dead.sum())
            if not (model.config.official and model.config.variant == "k-sparse"):
                model.constrain()
            steps = model.config.resample_steps
            run.renewed = None
            if steps and (step.index + 1) % steps == 0:
                self._resample(number, run, found, step)
            run.found = None
        return False

    @torch.no_grad()
    def _resample(self, number: int, run: _Run, found: Pass, step: Step) -> None:
        """Units silent for N/2 steps become rows of the batch, drawn by their squared loss."""
        model, config = run.model, run.model.config
        # Silence is counted in rows, official k-sparse's in steps.
        size = 1 if config.official and config.variant == "k-sparse" else config.batch
        window = (config.resample_steps or 0) / 2 * size
        dead = (run.silent >= window).nonzero().flatten()
        weights = found.errors.double().square().cpu()
        count = min(len(dead), int((weights > 0).sum()))
        if not count:
            return
        drawn = torch.multinomial(weights, count, generator=step.generator(f"resampling {number}"))
        dead, live = dead[:count], run.silent < window
        rows = model.normalised(self.x.to(model.bias.device)).rows[drawn.to(model.bias.device)]
        units = torch.nn.functional.normalize(rows, dim=1)
        norm = model.encoder[live].norm(dim=1).mean() if live.any() else model.encoder.new_ones(())
        model.atoms[dead] = units
        model.encoder[dead] = (
            (units if config.resample_unit else rows) * config.resample_scale * norm
        )
        model.offset[dead] = 0.0
        run.silent[dead] = 0
        run.renewed = dead

    def renewed(self) -> Mapping[str, Tensor]:
        """The rows of units that started anew."""
        return {
            f"{number}.{name}": run.renewed
            for number, run in enumerate(self.runs) if run.renewed is not None
            for name in ("atoms", "encoder", "offset")
        }  # fmt: skip

    def state(self) -> dict[str, Tensor]:
        return {
            f"{number}.{name}": value
            for number, run in enumerate(self.runs)
            for name, value in (("silent", run.silent), ("theta", run.theta), ("dead", torch.tensor(run.dead)))
        }  # fmt: skip

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for number, run in enumerate(self.runs):
            run.silent = state[f"{number}.silent"].to(run.silent.device)
            run.theta = state[f"{number}.theta"].to(run.theta.device)
            run.dead = int(state[f"{number}.dead"])


def _trains(model: SparseAutoencoder, name: str) -> bool:
    if name == "bias":
        return model.config.bias
    return name != "relaxation" or model.config.dictionary != "archetypal"


def _optimiser(config: SparseAutoencoderConfig) -> Rising:
    first, second = config.betas
    return Rising(
        config.rate, betas=(first, second), eps=config.adam_eps, clip=config.clip, warmup=config.warm_up,
        schedule=config.schedule,
    )  # fmt: skip


def fit(
    activations: Any,
    config: SparseAutoencoderConfig,
    *,
    seed: int,
    run: str | Path | None = None,
    held_out: Any = None,
    device: str | None = None,
) -> SparseAutoencoder:
    """Train one autoencoder; see :func:`fit_all`."""
    return fit_all(activations, [config], seed=seed, run=run, held_out=held_out, device=device)[0]


def fit_all(
    activations: Any,
    configs: Sequence[SparseAutoencoderConfig],
    *,
    seed: int,
    run: str | Path | None = None,
    held_out: Any = None,
    device: str | None = None,
    checkpoint_every: int | None = None,
) -> list[SparseAutoencoder]:
    """Train several autoencoders on the same batches, each with a loss and an optimiser of its own.

    Args:
        activations: Tensor or array ``(..., d)``, an :class:`~.stream.ActivationCache`, or an iterable of tensors
            (written to the folder ``run`` first and not read again at a resume; without ``run`` kept in memory).
        configs: One each; steps, batch and precision must be equal.
        seed: Seed of the start, the order of rows and resampling.
        run: Folder for checkpoints and resume.
        held_out: Activations that the quality table is measured on; without them it is measured on those of training,
            and says so.
        device: Where to train; default: where the activations are.
        checkpoint_every: Steps between checkpoints; ``None`` spends at most about 5 % of the time on them.

    Raises:
        SettingError: Configs that cannot share batches.
        WrongShape: Activations of another width.
        NonFiniteError: A loss or gradient is not finite.
        ResumeMismatch: The folder holds a run with other settings or other activations.
    """
    source = as_activations(activations, None if run is None else Path(run) / "activations")
    _check(configs, source)
    models = [started(config, source, seed, device) for config in configs]
    task = _Autoencoders(models, source, seed)
    loop = Loop(
        configs[0].steps, _optimiser(configs[0]),
        groups={str(n): _optimiser(config) for n, config in enumerate(configs)},
        precision=configs[0].precision, checkpoint_every=checkpoint_every,
    )  # fmt: skip
    settings = {
        "version": [config.version for config in configs],
        "configs": [config.settings() for config in configs],
        "activations": source.digest,
    }
    done = train(task, loop, seed=seed, run=run, settings=settings, label="sparse autoencoders")
    measured = source if held_out is None else held_out
    for number, part in enumerate(task.runs):
        _finish(part, str(number), done)
        part.model.trained |= {"seed": seed, "activations": source.digest}
        _calibrate(part.model, source, seed)
        part.model.quality = metrics.quality(part.model, measured, held_out=held_out is not None)
    return models


def _check(configs: Sequence[SparseAutoencoderConfig], source: Activations) -> None:
    if not configs:
        raise SettingError("no autoencoder to train")
    for name in ("steps", "batch", "precision"):
        found = [str(getattr(config, name)) for config in configs]
        if len(set(found)) > 1:
            raise SettingError(
                f"{configs[0].id}: autoencoders of one pass need one value of {name}; got {', '.join(found)}"
            )
    for config in configs:
        if config.width != source.width:
            raise WrongShape(
                f"{config.id}: activations have {source.width} numbers; the configuration has width {config.width}"
            )
        if config.resample_steps and config.dictionary in ARCHETYPAL:
            raise SettingError(f"{config.id}: an archetypal dictionary has no atoms to resample")


@torch.no_grad()
def _finish(part: _Run, group: str, done: Trained) -> None:
    """Give an autoencoder what the loop learned; the loop itself put everything back."""
    model, own = part.model, dict(part.model.named_parameters())
    for name, value in done.values.items():
        head, _, tail = name.partition(".")
        if head == group:
            own[tail].copy_(value)
    model.theta.copy_(part.theta)
    model.eval().requires_grad_(False)
    model.trained = {
        "steps": done.steps, "loss": done.losses[group][-1],
        "dead_in_training": part.dead / model.config.units,
    }  # fmt: skip


def _calibrate(model: SparseAutoencoder, source: Activations, seed: int) -> None:
    """Calibrate on one batch where training was too short for a running threshold."""
    if model.needs_theta and float(model.theta) == NOT_SET:
        model.calibrate(next(source.batches(model.config.batch, seed)).to(model.bias.device))
