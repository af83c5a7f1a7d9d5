"""AdvUnlearn with a bank of points against the published schedule, which draws every point anew.

    python benchmarks/advunlearn.py                 # a tiny random model, on one quiet core; writes JSON
    python benchmarks/advunlearn.py --model world   # the world's
    python benchmarks/advunlearn.py --quick         # seconds; shows that it runs, writes nothing without --out

Two ratios for a whole training under the paper's settings (1000 updates, 200 of them without attack, 30 attack steps,
50 sampling steps), published over ours; target of both: 4.

    rows      denoiser rows, forward and backward counted alike: ours as counted, the published schedule's by hand
    seconds   processor seconds: a plain loop of the published schedule (one walk for each point with both branches of
              guidance in one pass, every teacher asked by itself, nothing kept) over ours, within a round; the median

Updates with and without an attack are timed for both, and for ours what stands around them: bank and edit.  The whole
is their sum, weighted by how often the paper has them.  What weights say does not change the time, so few updates stand
for many.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from expunge import Concept, load
from expunge.core import finetune
from expunge.core.text_layers import ROLES, trainable_text
from expunge.erase.diffusion.advunlearn import AdvUnlearn
from expunge.models.diffusion import DiffusionModel
from expunge.testing import tiny_diffusion
from expunge.testing.bench import interleaved, machine, publish, timed, verdict

ROOT = Path(__file__).resolve().parent.parent
TARGET = 4.0
STAR = Concept("star")
QUICK = {"rounds": 1, "updates": 1, "bank": 4, "sampling_steps": 4, "attack_steps": 2}


def by_hand(method: AdvUnlearn, attacked: bool) -> float:
    """Rows of one update in the published schedule, its walks at their mean depth."""
    walk = 2 * (method.sampling_steps - 1) / 2
    attack = method.attack_steps * (walk + 2 + 2) if attacked else 0.0
    return attack + (walk + 2 + 2) + method.retain_batch * (walk + 1 + 2)


def published(model: DiffusionModel, method: AdvUnlearn, attacked: bool, updates: int) -> None:
    """Plain updates; what the numbers say does not matter, only what is run."""
    chosen = [p for _, p in trainable_text(model, ROLES[:4])]
    before = [(p.requires_grad, p.detach().clone()) for p in chosen]
    optimiser = torch.optim.Adam(chosen, lr=1e-8)
    ids, wide = model.token_ids(["star"]), method.retain_batch
    vectors = model.token_table()[ids].clone().requires_grad_(True)
    inner = torch.optim.Adam([vectors], lr=1e-8)

    def at(rows: int) -> tuple[Any, ...]:
        return model.initial_noise(range(rows), "benchmark"), torch.full((rows,), 500)

    @torch.no_grad()
    def walked(rows: int, number: int, teachers: int) -> None:
        # Depths alternate around the mean so that few points stand for many.
        two = *at(2 * rows), model.encode(["star"] * 2 * rows)
        depth = (method.sampling_steps - 1) / 2
        for _ in range(round(depth * (0.75 + 0.5 * (number % 2)))):
            model.layout.predict(*two)
        one = *at(rows), model.encode(["star"] * rows)
        for _ in range(teachers):
            model.layout.predict(*one)

    try:
        for update in range(updates):
            for step in range(method.attack_steps if attacked else 0):
                walked(1, step, 2)
                loss = (
                    model.layout.predict(*at(1), model.encode_tokens(ids, vectors)).square().mean()
                )
                inner.zero_grad()
                loss.backward()
                inner.step()
            for parameter in chosen:
                parameter.requires_grad_(True)
            walked(1, update, 2)
            loss = model.layout.predict(*at(1), model.encode_tokens(ids)).square().mean()
            walked(wide, update, 1)
            rows = model.encode_tokens(ids.expand(wide, -1))
            loss = loss + model.layout.predict(*at(wide), rows).square().mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            for parameter in chosen:
                parameter.requires_grad_(False)
    finally:
        with torch.no_grad():
            for parameter, (flag, value) in zip(chosen, before, strict=True):
                parameter.copy_(value)
                parameter.requires_grad_(flag)
                parameter.grad = None


def ours(
    model: DiffusionModel, method: AdvUnlearn, attacked: bool, updates: int
) -> tuple[float, float, Any]:
    """Seconds before and behind that many updates, those of the updates, and the edit."""
    changes: dict[str, Any] = {"warm_up": 0} if attacked else {"attack_steps": 0}
    named = {**method.settings(), **changes, "steps": updates, "lr": 1e-8}
    spent, fit = [0.0], finetune.fit

    def clocked(*given: Any, **more: Any) -> Any:
        spent[0], found = timed(lambda: fit(*given, **more))
        return found

    finetune.fit = clocked
    try:
        seconds, edit = timed(lambda: AdvUnlearn(**named).erase(model, STAR, seed=0))
    finally:
        finetune.fit = fit
    return seconds - spent[0], spent[0], edit


def rows(edit: Any, direction: str) -> float:
    """Denoiser rows an edit took."""
    return float(edit.manifest.cost[f"denoiser.{direction}"])


def whole(method: AdvUnlearn, plain: float, attacked: float, once: float = 0.0) -> float:
    """A training of the paper's length."""
    return once + method.warm_up * plain + (method.steps - method.warm_up) * attacked


def measured(
    model: DiffusionModel, method: AdvUnlearn, options: argparse.Namespace
) -> dict[str, Any]:
    """Rows, seconds of each round, and the ratios."""
    works: dict[str, Callable[[], Any]] = {}
    for name, attacked in (("plain", False), ("attacked", True)):
        works[f"ours {name}"] = functools.partial(ours, model, method, attacked, options.updates)
        works[f"published {name}"] = functools.partial(
            published, model, method, attacked, options.updates
        )
    seconds: list[float] = []
    for number, one in enumerate(interleaved(works, options.rounds), 1):
        own = {name: one[f"ours {name}"][1] for name in ("plain", "attacked")}
        each = {name: spent / options.updates for name, (_, spent, _) in own.items()}
        theirs = {name: one[f"published {name}"][0] / options.updates for name in own}
        mine = whole(method, **each, once=own["plain"][0])
        seconds.append(whole(method, **theirs) / mine)
        print(f"round {number}: {seconds[-1]:.1f}", flush=True)
    counted = {name: rows(edit, "backward") / options.updates for name, (_, _, edit) in own.items()}
    # Every row with a gradient went forward, too; what else went forward is the bank's.
    bank = rows(own["plain"][2], "forward") - rows(own["plain"][2], "backward")
    counted = {name: 2 * found for name, found in counted.items()}
    hand = {"plain": by_hand(method, False), "attacked": by_hand(method, True)}
    ratio = whole(method, **hand) / whole(method, **counted, once=bank)
    middle = statistics.median(seconds)
    return {
        "rows": ratio, "seconds": middle,
        "target_met": {"rows": ratio >= TARGET, "seconds": middle >= TARGET},
        "arms": {
            "ours": {"bank_rows": bank, "rows_an_update": counted},
            "published": {"rows_an_update": hand}, "rounds": seconds,
        },
    }  # fmt: skip


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ``--quick`` makes everything small and writes nothing unless told where."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", default="tiny", help="`tiny`, `world`, or a folder of a pipeline"
    )
    parser.add_argument("--updates", type=int, default=4, help="updates that are timed")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; medians are taken over them")
    parser.add_argument("--bank", type=int, default=256, help="points of each bank")
    parser.add_argument("--threads", type=int, default=1, help="threads; their seconds add up")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: its numbers mean nothing"
    )
    parser.add_argument("--out", type=Path, help="where to write, default results/benchmarks")
    parser.set_defaults(sampling_steps=50, attack_steps=30)
    options = parser.parse_args(given)
    if options.quick:
        vars(options).update(QUICK)
    elif options.out is None:
        options.out = ROOT / "results" / "benchmarks" / "advunlearn.json"
    return options


def main(given: Sequence[str] | None = None) -> None:
    """Measure, write, and say of both ratios whether they met the target."""
    options = arguments(given)
    torch.set_num_threads(options.threads)
    model: Any = tiny_diffusion() if options.model == "tiny" else load(options.model)
    if not isinstance(model, DiffusionModel):
        raise SystemExit(f"{options.model}: a text-to-image pipeline is needed")
    method = AdvUnlearn(
        bank=options.bank, sampling_steps=options.sampling_steps, attack_steps=options.attack_steps
    )
    found = measured(model, method, options)
    result = {
        "benchmark": "advunlearn",
        "setting": {
            "model": Path(model.name).name, "rounds": options.rounds, "updates": options.updates, "target": TARGET,
            "bank": options.bank, "quick": options.quick, **machine(options.threads),
        },
        **found,
    }  # fmt: skip
    publish(result, options.out)
    for name in ("rows", "seconds"):
        met = found["target_met"][name]
        print(verdict(name, f"{found[name]:.1f} times less", f"{TARGET:g}", met))


if __name__ == "__main__":
    main()
