"""Sampling: rows a second against the UNet's own best, pictures against the stock pipeline, and what caching saves.

    python benchmarks/sampling.py            # about five minutes on one quiet core; writes JSON
    python benchmarks/sampling.py --quick    # seconds; shows that it runs, writes nothing without --out

The model is the world's where its denoiser is installed, else the same configuration with random weights:
time does not depend on what weights say.  ``--model`` takes a folder of any pipeline the adapter covers.
Works, run in turn within each round:

    unet      the library's denoiser alone, without gradients, for several numbers of rows a pass, in
              channels_last and in the layout it was loaded in.  The best is the ceiling
    ours      ``DiffusionModel.generate`` with guidance, from texts to uint8 pictures, by an adapter that
              remembers nothing yet.  Rows are those its own cost counter counts
    batched   the stock pipeline, the same prompts, noise and batch
    looped    the stock pipeline, one prompt at a time, for some of the prompts

The target is 90 % of the ceiling.  It is judged twice and both answers are recorded: ``whole`` divides the
denoiser's rows by all seconds (text encoding, noise, scheduler, guidance, decoding); ``without_decoding``
leaves out the seconds of the autoencoder, which is other work than the denoiser's.  What caching saves is
counted in rows, apart from all of that.

Seconds are processor seconds, so that a busy machine does not spoil them.  Ratios are taken within a round,
and the median of the rounds is the result; seconds depend on the machine.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from expunge import load
from expunge.core.sampling import SEED_STEP, OutputCache, outputs
from expunge.method import Prompt
from expunge.models.diffusion import BATCH, DiffusionModel
from expunge.testing.bench import clocked, interleaved, machine, publish, timed, verdict
from expunge.world import models as world
from expunge.world.adapter import GUIDANCE, STEPS

ROOT = Path(__file__).resolve().parent.parent
TARGET = 0.9
ROWS = (16, 32, 64, 128)
PASSES = 2
"""Passes over the largest number of rows in a round; over fewer rows there are more."""
LAYOUTS = {"channels_last": torch.channels_last, "as_loaded": torch.preserve_format}
WORDS = (
    ("red", "blue", "green", "yellow", "purple", "orange"),
    ("star", "circle", "square", "heart", "cross", "triangle"),
    ("beach", "meadow", "night", "paper"),
)
QUICK = {"pictures": 4, "looped": 1, "steps": 2, "rounds": 1, "rows": (2, 4)}

Round = dict[str, tuple[float, Any]]


@dataclasses.dataclass(frozen=True)
class Made:
    """What one run of ours made, the rows it cost and the seconds of its parts."""

    pictures: np.ndarray
    rows: int
    spent: dict[str, float]


def opened(name: str) -> DiffusionModel:
    """The model asked for; the world's configuration with random weights where its denoiser is missing."""
    if name != "world" or (world.weights() / "unet" / "original").is_dir():
        model = load(name)
        if not isinstance(model, DiffusionModel):
            raise SystemExit(
                f"{name}: is a {model.family} model; a text-to-image pipeline is needed"
            )
        return model
    from expunge.world.train.diffusion import build, scheduler

    torch.manual_seed(0)
    pipeline = diffusers.StableDiffusionPipeline(
        vae=world.autoencoder(), text_encoder=world.text_encoder(), tokenizer=world.tokenizer(),
        unet=build(), scheduler=scheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    return DiffusionModel(
        pipeline, "the world's configuration, random weights", steps=STEPS, guidance=GUIDANCE
    )


def prompts(count: int) -> list[Prompt]:
    """Texts that differ until the words run out, each with a seed of its own."""
    texts = [
        f"a {colour} {thing} at the {place}" for colour, thing, place in itertools.product(*WORDS)
    ]
    return [Prompt(texts[i % len(texts)], seed=i) for i in range(count)]


def ceiling(
    model: DiffusionModel, sizes: Sequence[int]
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Forward passes of the denoiser alone, each over as many rows in all."""
    shape = model.latent_shape
    width, tokens = model.denoiser.config.cross_attention_dim, model.tokenizer.model_max_length
    generator = torch.Generator().manual_seed(0)
    total = PASSES * max(sizes)

    def passes(unet: Any, latents: torch.Tensor, text: torch.Tensor) -> None:
        times = torch.full((len(latents),), 500)
        with torch.no_grad():
            for _ in range(total // len(latents)):
                unet(latents, times, encoder_hidden_states=text)

    for layout, form in LAYOUTS.items():
        unet = copy.deepcopy(model.denoiser).to(memory_format=form)
        for rows in sizes:
            latents = torch.randn(rows, *shape, generator=generator).to(model.dtype)
            text = torch.randn(rows, tokens, width, generator=generator).to(model.dtype)
            yield (
                f"unet, {layout}, {rows} rows",
                functools.partial(passes, unet, latents.to(memory_format=form), text),
            )


def ours(fresh: Callable[[], DiffusionModel], asked: Sequence[Prompt], batch: int) -> Made:
    """Pictures by an adapter that has encoded nothing yet."""
    model = fresh()
    parts = (model, "encode"), (model, "pictures_of"), (model.denoiser, "forward")
    with clocked(*parts) as spent:
        pictures = model.generate(asked, batch=batch)
    return Made(pictures, model.cost.rows("denoiser"), spent)


def stock(fresh: Callable[[], DiffusionModel], asked: Sequence[Prompt], batch: int) -> np.ndarray:
    """Pictures by the library's pipeline from the same noise, ``(n, h, w, 3)`` from 0 to 1."""
    model, made = fresh(), []
    for first in range(0, len(asked), batch):
        part = asked[first : first + batch]
        made.append(
            model.pipeline(
                [p.text for p in part], latents=model.initial_noise([p.seed for p in part]),
                num_inference_steps=model.steps, guidance_scale=model.guidance, output_type="np",
            ).images
        )  # fmt: skip
    return np.concatenate(made)


def caching(fresh: Callable[[], DiffusionModel], asked: Sequence[Prompt]) -> dict[str, Any]:
    """Rows and seconds of pictures, of the same ones again, and of the same prompts with other seeds."""
    model, cache = fresh(), OutputCache()
    others = [dataclasses.replace(p, seed=p.seed + SEED_STEP) for p in asked]
    found: dict[str, Any] = {"pictures": len(asked), "texts": len({p.text for p in asked})}
    for name, wanted in (("first", asked), ("again", asked), ("other_seeds", others)):
        before = model.cost.snapshot()
        seconds, _ = timed(functools.partial(outputs, model, wanted, cache=cache))
        found[name] = {
            "denoiser_rows": model.cost.rows("denoiser", before),
            "texts_encoded": model.cost.rows("encoder", before),
            "cpu_seconds": seconds,
        }
    return found


def saved(counted: Mapping[str, Any], request: str, what: str) -> float:
    """Share of what the first request cost that a later one did not cost again."""
    return 1 - counted[request][what] / counted["first"][what]


def compared(rounds: Sequence[Round], count: int, looped: int, total: int) -> dict[str, Any]:
    """The ratios of each round, ``count`` and ``looped`` pictures and ``total`` rows of the ceiling."""
    names = [name for name in rounds[0] if name.startswith("unet")]
    best = min(names, key=lambda name: statistics.median(r[name][0] for r in rounds))
    found: dict[str, Any] = {"best": best}
    ratios: dict[str, list[float]] = {
        name: [] for name in ("whole", "without_decoding", "one_at_a_time", "batched")
    }
    for one in rounds:
        seconds, made = one["ours"]
        row = one[best][0] / total
        ratios["whole"].append(made.rows * row / seconds)
        ratios["without_decoding"].append(made.rows * row / (seconds - made.spent["pictures_of"]))
        ratios["one_at_a_time"].append((one["looped"][0] / looped) / (seconds / count))
        ratios["batched"].append(one["batched"][0] / seconds)
    return found | {
        "rounds": ratios,
        "median": {k: statistics.median(v) for k, v in ratios.items()},
    }


def arms(rounds: Sequence[Round], count: int, looped: int, total: int) -> dict[str, Any]:
    """Medians of the seconds and rates behind the ratios, and where our own seconds went."""
    middle = {name: statistics.median(r[name][0] for r in rounds) for name in rounds[0]}
    made = [one["ours"][1] for one in rounds]
    parts = {
        name: statistics.median(one["ours"][1].spent[call] / one["ours"][0] for one in rounds)
        for name, call in (
            ("denoiser", "forward"),
            ("decoding", "pictures_of"),
            ("texts", "encode"),
        )
    }
    return {
        "unet": {
            name: {"rows": total, "cpu_seconds": value, "rows_per_cpu_second": total / value}
            for name, value in middle.items()
            if name.startswith("unet")
        },
        "ours": {
            "pictures": count, "denoiser_rows": made[0].rows, "cpu_seconds": middle["ours"],
            "rows_per_cpu_second": made[0].rows / middle["ours"],
            "share_of_seconds": parts | {"rest": 1 - sum(parts.values())},
        },
        "batched": {"pictures": count, "cpu_seconds": middle["batched"]},
        "looped": {"pictures": looped, "cpu_seconds": middle["looped"]},
    }  # fmt: skip


def furthest(one: Round) -> float:
    """Largest distance of a value of our pictures to the stock pipeline's, in levels of 255."""
    return float(np.abs(one["ours"][1].pictures - 255 * one["batched"][1]).max())


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds and make the record."""
    model = opened(options.model)
    model.pipeline.set_progress_bar_config(disable=True)
    guidance = model.guidance if model.guidance != 1 else GUIDANCE
    fresh = functools.partial(
        DiffusionModel, model.pipeline, model.name, steps=options.steps, guidance=guidance
    )
    asked, total = prompts(options.pictures), PASSES * max(options.rows)
    some = asked[: options.looped]
    works: dict[str, Callable[[], Any]] = {
        "ours": functools.partial(ours, fresh, asked, options.batch),
        **dict(ceiling(model, options.rows)),
        "batched": functools.partial(stock, fresh, asked, options.batch),
        "looped": functools.partial(stock, fresh, some, 1),
    }
    for warm in (ours, stock):  # libraries load their parts on first use
        warm(functools.partial(fresh, steps=1), some[:2], 2)
    rounds = []
    for one in interleaved(works, options.rounds):
        rounds.append(one)
        spent = ", ".join(f"{name} {seconds:.2f}" for name, (seconds, _) in one.items())
        print(f"round {len(rounds)} of {options.rounds}: {spent}", flush=True)
    sizes = options.pictures, len(some), total
    found, kept = compared(rounds, *sizes), caching(fresh, some)
    middle = found["median"]
    shares = {name: middle[name] for name in ("whole", "without_decoding")}
    distance = max(furthest(one) for one in rounds)
    return {
        "benchmark": "sampling",
        "setting": {
            "model": Path(model.name).name, "dtype": str(model.dtype).removeprefix("torch."),
            "pictures": options.pictures, "looped": len(some), "batch": options.batch, "steps": options.steps,
            "rounds": options.rounds, "ceiling": found["best"], "target": TARGET, "quick": options.quick,
            "diffusers": diffusers.__version__, **machine(options.threads),
        },
        "share_of_unet_best": shares,
        "target_met": {name: share >= TARGET for name, share in shares.items()},
        "pictures_over_stock": {name: middle[name] for name in ("one_at_a_time", "batched")},
        # The stock pipeline's values are not rounded, and batches of another size round otherwise.
        "same_pictures_as_stock": distance <= 1.5,
        "denoiser_rows_saved": {"same_pictures_again": saved(kept, "again", "denoiser_rows")},
        "texts_encoded_saved": {
            name: saved(kept, request, "texts_encoded")
            for name, request in (("same_pictures_again", "again"), ("other_seeds", "other_seeds"))
        },
        "arms": arms(rounds, *sizes)
        | {"rounds": found["rounds"], "caching": kept, "largest_distance_levels": distance},
    }  # fmt: skip


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ``--quick`` makes everything small and writes nothing unless told where."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="world", help="`world`, or a folder of a pipeline")
    parser.add_argument("--pictures", type=int, default=64, help="pictures of ours and of batched")
    parser.add_argument("--looped", type=int, default=16, help="pictures of looped and of caching")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps")
    parser.add_argument("--batch", type=int, default=BATCH, help="pictures at a time")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; medians are taken over them")
    parser.add_argument("--threads", type=int, default=1, help="threads; their seconds add up")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: its numbers mean nothing"
    )
    parser.add_argument("--out", type=Path, help="where to write, default results/benchmarks")
    parser.set_defaults(rows=ROWS)
    options = parser.parse_args(given)
    if options.quick:
        vars(options).update(QUICK)
    elif options.out is None:
        options.out = ROOT / "results" / "benchmarks" / "sampling.json"
    return options


def main(given: Sequence[str] | None = None) -> None:
    """Measure, write, and say of each share whether it met the target."""
    options = arguments(given)
    torch.set_num_threads(options.threads)
    result = measure(options)
    publish(result, options.out)
    for name, share in result["share_of_unet_best"].items():
        said = f"{share:.1%} of the UNet's own best rows a second"
        print(verdict(name, said, f"{TARGET:.0%}", share >= TARGET))


if __name__ == "__main__":
    main()
