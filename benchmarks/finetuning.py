"""Fine-tuning erasers against the passes they need, and against the schedule of their published code.

    python benchmarks/finetuning.py                 # every method below, on one quiet core; writes JSON
    python benchmarks/finetuning.py --methods esd   # some of them
    python benchmarks/finetuning.py --quick         # seconds; shows that it runs, writes nothing without --out

Two ratios, each taken within a round, the median over rounds:

    over_floor      our processor seconds over the counted floor: the forward passes without gradients and the
                    passes with gradients that the algorithm needs, counted by hand in ``FLOORS`` from its equations,
                    times what the bare UNet takes for such a row at its best number of rows a pass.  Target: 1.2
    over_published  a plain loop of the published schedule (one point a step, a walk of its own for each point with
                    both branches of guidance in one pass, every teacher asked by itself, nothing kept) over ours, for
                    as many trained points.  Target: 2, where the schedule wastes passes

What our own counter says was run is recorded beside the count by hand: more rows than needed is waste, fewer would
mean that a count is wrong.  Methods run under their preset for the world with fewer steps; time does not depend on what
weights say.  Seconds are processor seconds; ratios do not depend on the machine much, seconds do.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expunge import Concept, catalogue, load
from expunge.core.layer_choice import trainable
from expunge.core.reversal import depths
from expunge.models.diffusion import DiffusionModel
from expunge.testing.bench import interleaved, machine, publish, verdict
from expunge.testing.diffusion import tiny_image_prompts
from expunge.world.adapter import STEPS

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {"over_floor": 1.2, "over_published": 2.0}
STAR = Concept("star", phrases=("pentagram", "asterisk"), anchor="circle")
QUICK = {"rounds": 1, "rows": (2, 4), "points": 2, "scale": 20}


@dataclasses.dataclass(frozen=True)
class Work:
    """What one method needs.

    Attributes:
        settings: Changes to the preset for the world, for a short run.
        layers: What trains, in the words of :func:`trainable`; nothing: the texts' embeddings, which stand for what
            is learnt before the denoiser.
        forward: Rows without gradients that the equations need, given the method.
        trained: Rows with gradients.
        walk: Guided steps of a point's walk in the published schedule, on average; 0 where points are noised pictures.
        guided: The walk runs both branches.
        asked: Teacher predictions of one point in the published schedule.
        students: Student predictions of one point in the published schedule.
        again: Rows with gradients that a second backward pass goes through.
        encoded: Pictures that the published schedule encodes anew for each point.
        data: What the method is given to learn from, of the model and the method.
    """

    settings: Mapping[str, Any]
    layers: str
    forward: Callable[[Any], float]
    trained: Callable[[Any], float]
    walk: Callable[[Any], float]
    guided: bool = True
    asked: int = 2
    students: int = 1
    again: Callable[[Any], float] = lambda method: 0.0
    encoded: int = 0
    data: Callable[[DiffusionModel, Any], Any] = lambda model, method: None


def depth(method: Any) -> float:
    """Guided steps before a point, on average over ``k ~ U{0, ..., S - 1}``."""
    return float(method.sampling_steps - 1) / 2


def drawn(method: Any) -> float:
    """Rows of the pictures that a method has the model draw, both branches of guidance."""
    return float(method.pictures * method.sampling_steps * 2)


def surgery_rows(method: Any) -> float:
    """All but One's points, half of them again for the empty prompt (one branch) and for what is kept (both)."""
    empty, kept = (method.bank / 2 * (branches * depth(method) + 1) for branches in (1, 2))
    return float(method.bank * (2 * depth(method) + 2) + empty + kept)


def late(method: Any) -> float:
    """Guided steps of ANT's walks, on average: as deep as their point in the late range."""
    low, high = depths(method.sampling_steps, method.t_prime)["erase"]
    return (low + high - 1) / 2


def maps(method: Any) -> int:
    """Points of ANT's maps, a late and an early one of as many walks."""
    return int(len(method.map_templates) * method.map_seeds * method.iterations)


def noisy(model: DiffusionModel, count: int) -> np.ndarray:
    """Pictures that stand for any: time does not depend on what they show."""
    side = model.latent_shape[1] * model.layout.scale_factor
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)


def shown(model: DiffusionModel, method: Any) -> dict[str, Any]:
    """SalUn's pictures of the concept and of the circle."""
    count = method.pictures
    return {
        "pictures": {n: (noisy(model, count), None, [f"a {n}"] * count) for n in ("star", "circle")}
    }


def boxed(model: DiffusionModel, method: Any) -> dict[str, Any]:
    """Geom-Erasing's pictures, each with a star in a corner."""
    count, side = method.pictures, model.latent_shape[1] * model.layout.scale_factor
    boxes = [[(1.0, (0.0, 0.0, side / 4, side / 4), "star")]] * count
    return {"pictures": noisy(model, count), "captions": ["a house"] * count, "boxes": boxes}


def branch(model: DiffusionModel, method: Any) -> Any:
    """Co-Erasing's image-prompt branch: the world's own, else a random one of the denoiser's shape."""
    return None if model.companions is not None else tiny_image_prompts(model)


WORKS: dict[str, Work] = {
    # Each point of the bank: its walk with both branches, eps(c) and eps(0).
    "esd": Work(
        {"steps": 60, "bank": 64}, "other",
        forward=lambda m: m.bank * (2 * depth(m) + 2), trained=lambda m: m.steps * m.batch, walk=depth,
    ),
    # The student is asked about each point under the concept and under nothing, and about one further point.
    "all-but-one": Work(
        {"steps": 60, "bank": 64}, "cross-attention", forward=surgery_rows,
        trained=lambda m: 3 * m.steps * m.batch, walk=depth, asked=3, students=3,
    ),
    # Anchor pictures, the teacher at each step, and the anchor's change on 16 pictures at the end, before and after.
    "concept-ablation": Work(
        {"steps": 60, "pictures": 16}, "cross-attention-kv",
        forward=lambda m: drawn(m) + m.steps * m.batch + 2 * 16, trained=lambda m: m.steps * m.batch,
        walk=lambda m: 0.0, asked=1, encoded=1,
    ),
    # A warm-up step asks both models; later ones the frozen one, and the student about two points with two backward
    # passes, one for each loss.
    "doco": Work(
        {"steps": 60, "warm_up": 15, "pictures": 16}, "cross-attention-kv",
        forward=lambda m: drawn(m) + m.batch * (m.steps + m.warm_up),
        trained=lambda m: 2 * m.batch * (m.steps - m.warm_up), walk=lambda m: 0.0, asked=1, students=2,
        again=lambda m: 2 * m.batch * (m.steps - m.warm_up), encoded=2,
    ),
    # The mask asks about each picture with and without its caption; a step asks the frozen model about one picture
    # and the student about it and a retained one.
    "salun": Work(
        {"steps": 60, "pictures": 32}, "full", forward=lambda m: m.steps * min(m.batch, m.pictures),
        trained=lambda m: 2 * m.pictures + m.steps * (min(m.batch, m.pictures) + m.batch),
        walk=lambda m: 0.0, asked=1, students=2, encoded=2, data=shown,
    ),
    # Two points of each walk, each asked with and without the concept; the maps have no term of the empty prompt.
    "ant": Work(
        {"steps": 40, "bank": 48}, "full", forward=lambda m: (maps(m) + m.bank) * (2 * late(m) + 4),
        trained=lambda m: 2 * maps(m) + 4 * m.steps * m.batch, walk=late, asked=4, students=4,
    ),
    # Pictures first; then a bank for each of the two stages, whose walks have one branch, as guidance is 1.
    "co-erasing": Work(
        {"text_steps": 30, "steps": 30, "bank": 64, "count": 4}, "other",
        forward=lambda m: m.count * 2 * STEPS + 2 * m.bank * (depth(m) + 2),
        trained=lambda m: (m.text_steps + m.steps) * m.batch, walk=depth, data=branch,
    ),
    # Tokens alone train, through the denoiser: its gradients are those of its inputs.
    "geom-erasing": Work(
        {"steps": 60, "pictures": 64}, "", forward=lambda m: 0.0, trained=lambda m: m.steps * m.batch,
        walk=lambda m: 0.0, asked=0, encoded=1, data=boxed,
    ),
}  # fmt: skip


# -- what a row costs ---------------------------------------------------------------------------------


def rows_of(model: DiffusionModel, rows: int) -> tuple[Any, ...]:
    """Latents, timesteps and condition of some rows."""
    noise = model.initial_noise(range(rows), "benchmark")
    return noise, torch.full((rows,), 500), model.encode(["a star"] * rows)


def frozen(model: DiffusionModel, rows: int, total: int) -> None:
    """The bare denoiser without gradients."""
    asked = rows_of(model, rows)
    with torch.no_grad():
        for _ in range(max(1, total // rows)):
            model.layout.predict(*asked)


def learnt(model: DiffusionModel, layers: str, asked: tuple[Any, ...]) -> list[Any]:
    """What gradients are taken of: parameters, or the texts' embeddings."""
    return [p for _, p in trainable(model, layers)] if layers else [asked[2].embeddings]


def student(model: DiffusionModel, layers: str, rows: int, total: int) -> None:
    """The bare denoiser forward and backward to what a method trains."""
    asked = rows_of(model, rows)
    chosen = learnt(model, layers, asked)
    before = [p.requires_grad for p in chosen]
    for parameter in chosen:
        parameter.requires_grad_(True)
    try:
        for _ in range(max(1, total // rows)):
            loss = model.layout.predict(*asked).square().mean()
            torch.autograd.grad(loss, chosen, allow_unused=True)
    finally:
        for parameter, flag in zip(chosen, before, strict=True):
            parameter.requires_grad_(flag)


# -- the published schedule ----------------------------------------------------------------------------


def published(model: DiffusionModel, work: Work, method: Any, points: int) -> None:
    """Plain steps of one point each; what the numbers say does not matter, only what is run."""
    one, mean = rows_of(model, 1), work.walk(method)
    chosen = learnt(model, work.layers, one)
    before = [(p.requires_grad, p.detach().clone()) for p in chosen]
    for parameter in chosen:
        parameter.requires_grad_(True)
    optimiser = torch.optim.Adam(chosen, lr=1e-8)
    two, side = rows_of(model, 2), model.latent_shape[1] * model.layout.scale_factor
    picture = np.zeros((1, side, side, 3), np.uint8)
    try:
        for point in range(points):
            with torch.no_grad():
                # Depths alternate around the mean so that few points stand for many.
                steps = round(mean * (0.5 + (point + 0.5) / points))
                for _ in range(steps):
                    model.layout.predict(*(two if work.guided else one))
                for _ in range(work.asked):
                    model.layout.predict(*one)
                for _ in range(work.encoded):
                    model.latents_of(picture)
            loss = sum(model.layout.predict(*one).square().mean() for _ in range(work.students))
            optimiser.zero_grad()
            for last in [False] * bool(work.again(method)) + [True]:
                loss.backward(retain_graph=not last)  # type: ignore[union-attr]
            optimiser.step()
    finally:
        with torch.no_grad():
            for parameter, (flag, value) in zip(chosen, before, strict=True):
                parameter.copy_(value)
                parameter.requires_grad_(flag)
                parameter.grad = None


# -- a method ------------------------------------------------------------------------------------------


SCALED = ("steps", "text_steps", "bank", "pictures", "count")


def built(id: str, work: Work, scale: int) -> Any:
    """The method under its preset for the world, shortened; ``scale`` divides steps and bank."""
    short = {
        # A bank has a point for each name of what is erased.
        name: max(len(STAR.names) if name == "bank" else 2, value // scale)
        if name in SCALED and value
        else value
        for name, value in work.settings.items()
    }
    if "warm_up" in short:
        short["warm_up"] = min(short["warm_up"], short["steps"] - 1)
    return catalogue.resolve(id).configured("world", **short)


def measured(model: DiffusionModel, id: str, options: argparse.Namespace) -> dict[str, Any]:
    """Ratios and counts of one method."""
    work = WORKS[id]
    method = built(id, work, options.scale)
    total, data = max(options.rows), work.data(model, method)
    works: dict[str, Callable[[], Any]] = {
        "ours": lambda: method.erase(model, STAR, keep=("circle",), data=data, seed=0),
        "published": functools.partial(published, model, work, method, options.points),
    }
    for rows in options.rows:
        works[f"frozen {rows}"] = functools.partial(frozen, model, rows, total)
        works[f"student {rows}"] = functools.partial(student, model, work.layers, rows, total)
    forward, trained, again = (count(method) for count in (work.forward, work.trained, work.again))
    ratios: dict[str, list[float]] = {name: [] for name in TARGETS}
    counted: dict[str, int] = {}
    for number, one in enumerate(interleaved(works, options.rounds), 1):
        best = {
            kind: min(one[f"{kind} {rows}"][0] / (max(1, total // rows) * rows) for rows in options.rows)
            for kind in ("frozen", "student")
        }  # fmt: skip
        seconds, edit = one["ours"]
        counted = {
            side: edit.manifest.cost.get(f"denoiser.{side}", 0) for side in ("forward", "backward")
        }
        floor = forward * best["frozen"] + trained * best["student"]
        floor += again * (best["student"] - best["frozen"])
        ratios["over_floor"].append(seconds / floor)
        points = trained / work.students
        ratios["over_published"].append(one["published"][0] / options.points * points / seconds)
        print(f"{id}, round {number}: {({k: round(v[-1], 2) for k, v in ratios.items()})}", flush=True)  # fmt: skip
    median = {name: statistics.median(found) for name, found in ratios.items()}
    return {
        **median,
        "target_met": {
            "over_floor": median["over_floor"] <= TARGETS["over_floor"],
            "over_published": median["over_published"] >= TARGETS["over_published"],
        },
        "rows": {
            "forward_needed": forward, "forward_counted": counted["forward"] - trained,
            "backward_needed": trained + again, "backward_counted": counted["backward"],
        },
        "settings": {k: getattr(method, k) for k in work.settings},
        "rounds": ratios,
    }  # fmt: skip


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All methods asked for."""
    model = load(options.model)
    if not isinstance(model, DiffusionModel):
        raise SystemExit(f"{options.model}: a text-to-image pipeline is needed")
    found = {id: measured(model, id, options) for id in options.methods}
    return {
        "benchmark": "finetuning",
        "setting": {
            "model": Path(model.name).name, "rounds": options.rounds, "published_points": options.points,
            "rows": list(options.rows), "targets": TARGETS, "quick": options.quick, **machine(options.threads),
        },
        **{
            ratio: {id: one[ratio] for id, one in found.items()} for ratio in TARGETS
        },
        "target_met": {id: one["target_met"] for id, one in found.items()},
        "arms": found,
    }  # fmt: skip


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ``--quick`` makes everything small and writes nothing unless told where."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="world", help="`world`, or a folder of a pipeline")
    parser.add_argument("--methods", default=",".join(WORKS), help="ids, joined by commas")
    parser.add_argument("--points", type=int, default=12, help="points of the published schedule")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; medians are taken over them")
    parser.add_argument("--threads", type=int, default=1, help="threads; their seconds add up")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: its numbers mean nothing"
    )
    parser.add_argument("--out", type=Path, help="where to write, default results/benchmarks")
    parser.set_defaults(rows=(16, 32, 64), scale=1)
    options = parser.parse_args(given)
    options.methods = [id.strip() for id in options.methods.split(",") if id.strip()]
    unknown = [id for id in options.methods if id not in WORKS]
    if unknown:
        parser.error(f"{unknown[0]!r} has no count of passes here; there are: {', '.join(WORKS)}")
    if options.quick:
        vars(options).update(QUICK)
    elif options.out is None:
        options.out = ROOT / "results" / "benchmarks" / "finetuning.json"
    return options


def main(given: Sequence[str] | None = None) -> None:
    """Measure, write, and say of each ratio whether it met the target."""
    options = arguments(given)
    torch.set_num_threads(options.threads)
    result = measure(options)
    publish(result, options.out)
    for id, one in result["arms"].items():
        for ratio, met in one["target_met"].items():
            print(verdict(f"{id}: {ratio}", f"{one[ratio]:.2f}", f"{TARGETS[ratio]:g}", met))


if __name__ == "__main__":
    main()
