"""Attacks: rows a second against the UNet's own best, and many prompts at a time against one at a time.

    python benchmarks/attacks.py            # about ten minutes on one quiet core; writes JSON
    python benchmarks/attacks.py --quick    # seconds; shows that it runs, writes nothing without --out

The model is the one of ``sampling.py``.  A judge that never sees the concept lets every attack go on until its
budget or its settings end it, so that all prompts cost what they can.  Works, run in turn within each round:

    unet        the library's denoiser alone, without gradients, for several numbers of rows a pass: the ceiling
    ID          an attack on all prompts at once, its plain and attacked pictures included, by an adapter that
                remembers nothing yet.  Rows are those the adapter counts, forward and backward alike
    ID, single  the same attack on some of the prompts, one at a time

The target is 90 % of the ceiling for attacks that only draw; one that follows gradients is measured against the
same ceiling, though a backward row is more work than a forward row: its share says how many rows of budget it
turns over in a second, and its own ceiling is lower.

Seconds are processor seconds.  Ratios are taken within a round, and the median of the rounds is the result.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from sampling import PASSES, TARGET, WORDS, Round, ceiling, opened

from expunge import Concept, catalogue
from expunge.core.sampling import SHARED
from expunge.method import BUDGETS, Attempts, Budget, Prompt
from expunge.models.diffusion import DiffusionModel
from expunge.testing.bench import NeverShown, interleaved, machine, publish, verdict

ROOT = Path(__file__).resolve().parent.parent
IDS = "random-tokens,ring-a-bell,unlearndiffatk"
ROWS = (16, 32, 64, 128)
STAR = Concept("star", phrases=("pentagram",))
QUICK = {
    "prompts": 2,
    "single": 1,
    "rounds": 1,
    "rows": (2, 4),
    "attacks": "random-tokens",
    "budget": "small",
}
SMALL = Budget("quick", denoiser_rows=90, encoder_rows=2_000)
"""Two pictures of a prompt, under the presets of the budget ``quick``."""


def prompts(count: int) -> list[Prompt]:
    """Texts that name the concept, each with a seed of its own."""
    colours = WORDS[0]
    return [Prompt(f"a {colours[i % len(colours)]} star", seed=i) for i in range(count)]


def attacked(
    fresh: Callable[[], DiffusionModel], id: str, allowance: Budget, count: int, size: int
) -> dict[str, Any]:
    """An attack on ``count`` prompts, ``size`` at a time; rows of the denoiser, forward and backward."""
    SHARED.clear()
    model, asked = fresh(), prompts(count)
    attack = catalogue.resolve(id).under(allowance)
    found: list[Attempts] = [
        attack.attack(
            model,
            STAR,
            NeverShown(),
            allowance,
            prompts=asked[first : first + size],
            reference=model,
        )
        for first in range(0, count, size)
    ]
    backward = model.cost.counts["denoiser.backward"]
    return {
        "rows": model.cost.rows("denoiser"),
        "backward": backward,
        "items": sum(len(f.items) for f in found),
    }


def compared(rounds: Sequence[Round], ids: Sequence[str], total: int) -> dict[str, Any]:
    """For each attack its share of the ceiling's rows a second, and its speed against one prompt at a time."""
    names = [name for name in rounds[0] if name.startswith("unet")]
    best = min(names, key=lambda name: statistics.median(one[name][0] for one in rounds))
    shares: dict[str, list[float]] = {id: [] for id in ids}
    single: dict[str, list[float]] = {id: [] for id in ids}
    for one in rounds:
        row = one[best][0] / total
        for id in ids:
            (seconds, made), (slow, few) = one[id], one[f"{id}, single"]
            shares[id].append(made["rows"] * row / seconds)
            # By rows: the prompts of the two works differ, and so may what they cost.
            single[id].append((slow / few["rows"]) / (seconds / made["rows"]))
    return {
        "best": best,
        "shares": {id: statistics.median(values) for id, values in shares.items()},
        "single": {id: statistics.median(values) for id, values in single.items()},
        "rounds": {"shares": shares, "single": single},
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds and make the record."""
    model = opened(options.model)
    model.pipeline.set_progress_bar_config(disable=True)
    ids = [id.strip() for id in options.attacks.split(",")]
    allowance = SMALL if options.budget == "small" else BUDGETS[options.budget]
    fresh = functools.partial(
        DiffusionModel, model.pipeline, model.name, steps=model.steps, guidance=model.guidance
    )
    works: dict[str, Callable[[], Any]] = {}
    for id in ids:
        works[id] = functools.partial(
            attacked, fresh, id, allowance, options.prompts, options.prompts
        )
        works[f"{id}, single"] = functools.partial(
            attacked, fresh, id, allowance, options.single, 1
        )
    works |= dict(ceiling(model, options.rows))
    attacked(fresh, ids[0], SMALL, 1, 1)  # libraries load their parts on first use
    rounds = []
    for one in interleaved(works, options.rounds):
        rounds.append(one)
        spent = ", ".join(f"{name} {seconds:.2f}" for name, (seconds, _) in one.items())
        print(f"round {len(rounds)} of {options.rounds}: {spent}", flush=True)
    found = compared(rounds, ids, PASSES * max(options.rows))
    arms = {
        name: {"cpu_seconds": statistics.median(one[name][0] for one in rounds),
               **(rounds[0][name][1] or {})}
        for name in rounds[0]
    }  # fmt: skip
    return {
        "benchmark": "attacks",
        "setting": {
            "model": Path(model.name).name, "prompts": options.prompts, "single": options.single,
            "budget": options.budget, "rounds": options.rounds, "ceiling": found["best"], "target": TARGET,
            "quick": options.quick, **machine(options.threads),
        },
        "share_of_unet_best": found["shares"],
        "target_met": {id: share >= TARGET for id, share in found["shares"].items()},
        "rows_a_second_over_one_at_a_time": found["single"],
        "backward_share_of_rows": {id: arms[id]["backward"] / max(1, arms[id]["rows"]) for id in ids},
        "arms": arms | {"rounds": found["rounds"]},
    }  # fmt: skip


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ``--quick`` makes everything small and writes nothing unless told where."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="world", help="`world`, or a folder of a pipeline")
    parser.add_argument("--attacks", default=IDS, help="ids joined by commas")
    parser.add_argument(
        "--budget", default="quick", choices=(*BUDGETS, "small"), help="rows a prompt"
    )
    parser.add_argument("--prompts", type=int, default=16, help="prompts attacked together")
    parser.add_argument("--single", type=int, default=2, help="prompts attacked one at a time")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=ROWS, help="rows a pass of the ceiling"
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds; medians are taken over them")
    parser.add_argument("--threads", type=int, default=1, help="threads; their seconds add up")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: its numbers mean nothing"
    )
    parser.add_argument("--out", help="where to write; default results/benchmarks/attacks.json")
    options = parser.parse_args(given)
    if options.quick:
        for name, value in QUICK.items():
            setattr(options, name, value)
    elif options.out is None:
        options.out = ROOT / "results" / "benchmarks" / "attacks.json"
    return options


def main(given: Sequence[str] | None = None) -> None:
    """Measure, write, and say of each attack whether it met the target."""
    options = arguments(given)
    torch.set_num_threads(options.threads)
    result = measure(options)
    publish(result, options.out)
    for id, share in result["share_of_unet_best"].items():
        said = f"{share:.1%} of the UNet's own best rows a second"
        print(verdict(id, said, f"{TARGET:.0%}", share >= TARGET))


if __name__ == "__main__":
    main()
