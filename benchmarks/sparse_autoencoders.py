"""Training a TopK autoencoder: vectors a second against a plain trainer, and against sae-lens where it is installed.

    python benchmarks/sparse_autoencoders.py                # one quiet core; writes JSON
    python benchmarks/sparse_autoencoders.py --quick        # seconds; shows that it runs, writes nothing without --out

All train the same autoencoder (width, units, k, batch, steps, start, rate, order of rows, AuxK) on the same planted
activations:

    plain       the published TopK trainer written down plainly: one dense code (batch, units), a dense decode, AuxK
                through a second dense code, autograd for all of it
    sae-lens    its TopKTrainingSAE with its own loss under the same optimiser, dense codes as by default (its sparse
                ones have no backward pass on a CPU); only where the package is installed (pip install sae-lens),
                else the record says that it is missing

    over_plain, over_sae_lens   vectors a second of ours over theirs, within a round, the median over rounds.
                                Target: 1.5

R2 and L0 on held-out rows stand beside the ratios: a faster trainer that learns less would not count.  Some units are
made dead at the start (their biases are -1), so that AuxK has work to do.  Seconds are processor seconds.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from expunge.core.finetune import Loop
from expunge.core.finetune import fit as train
from expunge.core.sparse_autoencoder import SparseAutoencoder, SparseAutoencoderConfig, quality
from expunge.core.sparse_autoencoder.start import started
from expunge.core.sparse_autoencoder.stream import Rows
from expunge.core.sparse_autoencoder.trainer import _Autoencoders, _finish, _optimiser
from expunge.models.base import noise_generator
from expunge.testing.bench import interleaved, machine, publish, verdict

ROOT = Path(__file__).resolve().parent.parent
TARGET = 1.5
DEAD = 0.1
"""Share of units that are dead at the start."""

FULL = {"width": 256, "units": 4096, "k": 32, "batch": 1024, "steps": 60, "rounds": 3}
QUICK = {"width": 16, "units": 64, "k": 4, "batch": 64, "steps": 8, "rounds": 1}


@dataclasses.dataclass(frozen=True)
class Setup:
    """The activations and what is to be trained on them."""

    config: SparseAutoencoderConfig
    rows: Tensor
    held_out: Tensor

    def batches(self) -> Any:
        """The batches of all trainers, in one order."""
        return itertools.islice(Rows(self.rows).batches(self.config.batch, 0), self.config.steps)

    def start(self) -> SparseAutoencoder:
        """The start of all trainers."""
        model = started(self.config, Rows(self.rows), 0)
        with torch.no_grad():
            model.offset[: int(DEAD * self.config.units)] = -1.0
        return model


def planted(options: argparse.Namespace) -> Setup:
    """Rows that are sparse combinations of as many true atoms as there are units."""
    width, units, generator = options.width, options.units, noise_generator(0, "benchmark")
    true = functional.normalize(torch.randn(units, width, generator=generator), dim=1)
    made = []
    for _ in range(options.steps // 4 + 2):
        on = torch.randint(units, (options.batch, options.k // 2), generator=generator)
        weights = torch.rand(on.shape, generator=generator) + 0.5
        made.append(functional.embedding_bag(on, true, mode="sum", per_sample_weights=weights))
    config = SparseAutoencoderConfig.configured(
        "dictionary-learning:topk", width=width, units=units, k=options.k, batch=options.batch, steps=options.steps,
        lr=2e-3, warm_up=5, dead_tokens=2 * options.batch, threshold_after=0,
    )  # fmt: skip
    return Setup(config, torch.cat(made[1:]), made[0])


def ours(setup: Setup) -> SparseAutoencoder:
    """:func:`fit` without its quality table, which the others are measured with, too."""
    model, config = setup.start(), setup.config
    task = _Autoencoders([model], Rows(setup.rows), 0)
    done = train(task, Loop(config.steps, _optimiser(config)), seed=0)
    _finish(task.runs[0], "0", done)
    return model


def plain(setup: Setup) -> SparseAutoencoder:
    """The published trainer: dense codes, dense decodes, the same order of an update."""
    model, config = setup.start(), setup.config
    encoder, decoder = (
        nn.Linear(config.width, config.units),
        nn.Linear(config.units, config.width, bias=False),
    )
    bias = nn.Parameter(model.bias.detach().clone())
    with torch.no_grad():
        encoder.weight.copy_(model.encoder)
        encoder.bias.copy_(model.offset)
        decoder.weight.copy_(model.atoms.T)
    parameters = [*encoder.parameters(), *decoder.parameters(), bias]
    adam = torch.optim.Adam(parameters, lr=config.rate, betas=(0.9, 0.999))
    silent, theta = torch.zeros(config.units, dtype=torch.long), -1.0
    for step, raw in enumerate(setup.batches()):
        x = raw * model.scale
        u = functional.relu(encoder(x - bias))
        best = u.topk(config.kept, sorted=False, dim=-1)
        z = torch.zeros_like(u).scatter_(-1, best.indices, best.values)
        x_hat = decoder(z) + bias
        error = x - x_hat
        loss = error.pow(2).sum(-1).mean()
        fired = torch.zeros_like(silent).bool()
        fired[best.indices.flatten()] = True
        silent = torch.where(fired, 0, silent + len(x))
        dead = silent >= config.dead_tokens
        if dead.any():
            count = min(config.width // 2, int(dead.sum()))
            hopeful = torch.where(dead[None], u, -torch.inf).topk(count, sorted=False)
            revived = torch.zeros_like(u).scatter_(-1, hopeful.indices, hopeful.values)
            residual = error.detach()
            wrong = (residual - decoder(revived)).pow(2).sum(-1).mean()
            spread = (residual - residual.mean(0)).pow(2).sum(-1).mean()
            loss = loss + config.aux_weight * (wrong / spread).nan_to_num(0.0)
        loss.backward()
        with torch.no_grad():
            unit = functional.normalize(decoder.weight, dim=0)
            decoder.weight.grad -= (decoder.weight.grad * unit).sum(0, keepdim=True) * unit
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in adam.param_groups:
            group["lr"] = config.rate * min(step / config.warm_up, 1.0)
        adam.step()
        adam.zero_grad()
        with torch.no_grad():
            decoder.weight.copy_(functional.normalize(decoder.weight, dim=0))
            positive = torch.where(z > 0, z, torch.inf).amin(-1)
            least = float(positive[positive < torch.inf].mean())
            theta = least if theta < 0 else 0.999 * theta + 0.001 * least
        loss.item()
    with torch.no_grad():
        model.encoder.copy_(encoder.weight)
        model.offset.copy_(encoder.bias)
        model.atoms.copy_(decoder.weight.T)
        model.bias.copy_(bias)
    return model


def sae_lens(setup: Setup) -> SparseAutoencoder:
    """The training class of sae-lens and its loss; Adam, clipping and batches as in the others."""
    from sae_lens.saes.sae import TrainStepInput
    from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

    model, config = setup.start(), setup.config
    theirs = TopKTrainingSAE(
        TopKTrainingSAEConfig(
            d_in=config.width, d_sae=config.units, k=config.kept, aux_loss_coefficient=config.aux_weight,
        )
    )  # fmt: skip
    with torch.no_grad():
        theirs.W_enc.copy_(model.encoder.T)
        theirs.b_enc.copy_(model.offset)
        theirs.W_dec.copy_(model.atoms)
        theirs.b_dec.copy_(model.bias)
    parameters = [*theirs.parameters()]
    adam = torch.optim.Adam(parameters, lr=config.rate, betas=(0.9, 0.999))
    silent = torch.zeros(config.units, dtype=torch.long)
    for step, raw in enumerate(setup.batches()):
        given = TrainStepInput(raw * model.scale, {}, silent >= config.dead_tokens, step, False)
        out = theirs.training_forward_pass(given)
        with torch.no_grad():
            fired = (out.feature_acts > 0).any(0)
            silent = torch.where(fired, 0, silent + len(raw))
        out.loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for group in adam.param_groups:
            group["lr"] = config.rate * min(step / config.warm_up, 1.0)
        adam.step()
        adam.zero_grad()
        out.loss.item()
    made = SparseAutoencoder(dataclasses.replace(config, dictionary="free", rescale_by_norm=True))
    with torch.no_grad():
        made.encoder.copy_(theirs.W_enc.T)
        made.offset.copy_(theirs.b_enc)
        made.atoms.copy_(theirs.W_dec)
        made.bias.copy_(theirs.b_dec)
        made.scale.copy_(model.scale)
    return made


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All trainers, round by round."""
    setup = planted(options)
    trainers = {"ours": ours, "plain": plain}
    if importlib.util.find_spec("sae_lens"):
        trainers["sae_lens"] = sae_lens
    works = {name: (lambda made=made: made(setup)) for name, made in trainers.items()}  # type: ignore[misc]
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    tables: dict[str, dict[str, Any]] = {}
    for number, one in enumerate(interleaved(works, options.rounds), 1):
        for name, (spent, model) in one.items():
            seconds[name].append(spent)
            found = quality(model, setup.held_out)
            tables[name] = {key: found[key] for key in ("r2", "l0", "dead_share")}
        print(f"round {number}: { ({n: round(s[-1], 2) for n, s in seconds.items()}) }", flush=True)
    others = [name for name in trainers if name != "ours"]
    ratios = {
        f"over_{name}": statistics.median(b / a for a, b in zip(seconds["ours"], seconds[name], strict=True))
        for name in others
    }  # fmt: skip
    vectors = options.batch * options.steps
    same = {
        name: tables["ours"]["r2"] >= tables[name]["r2"] - 0.005 and tables["ours"]["l0"] <= tables[name]["l0"] + 0.1
        for name in others
    }  # fmt: skip
    return {
        "benchmark": "sparse_autoencoders",
        "setting": {
            **{name: getattr(options, name) for name in FULL}, "target": TARGET, "dead_at_start": DEAD,
            "quick": options.quick, "sae_lens": _version(), **machine(options.threads),
        },
        **ratios,
        "target_met": {name: bool(ratios[f"over_{name}"] >= TARGET and same[name]) for name in others},
        "at_equal_or_better_quality": same,
        "quality": tables,
        "arms": {
            name: {"cpu_seconds": spent, "vectors_a_second": [vectors / s for s in spent]}
            for name, spent in seconds.items()
        },
    }  # fmt: skip


def _version() -> str:
    if not importlib.util.find_spec("sae_lens"):
        return "not installed"
    import sae_lens as package

    return str(package.__version__)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ``--quick`` makes everything small and writes nothing unless told where."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, value in FULL.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=1, help="threads; their seconds add up")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: its numbers mean nothing"
    )
    parser.add_argument("--out", type=Path, help="where to write, default results/benchmarks")
    options = parser.parse_args(given)
    if options.quick:
        vars(options).update(QUICK)
    elif options.out is None:
        options.out = ROOT / "results" / "benchmarks" / "sparse_autoencoders.json"
    return options


def main(given: Sequence[str] | None = None) -> None:
    """Measure, write, and say of each ratio whether it met the target."""
    options = arguments(given)
    torch.set_num_threads(options.threads)
    result = measure(options)
    publish(result, options.out)
    for name, met in result["target_met"].items():
        print(verdict(f"over {name}", f"{result[f'over_{name}']:.2f}", f"{TARGET:g}", met))


if __name__ == "__main__":
    main()
