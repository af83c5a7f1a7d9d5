"""Few-shot erasing at the size of SD 1.5 against a plain loop, seconds a step.

    python benchmarks/few_shot_erasing.py               # pictures of 256 x 256, five minutes of one core; writes JSON
    python benchmarks/few_shot_erasing.py --latents 64  # SD's own size, about 16 GB and five times as long
    python benchmarks/few_shot_erasing.py --quick       # a tiny model; shows that it runs, writes nothing without --out

Weights are random and of SD 1.5's shapes; time does not depend on what they say.  Both arms take the same steps, two
pictures each, forward and backward:

    ours    ``FewShotErasing`` with the paper's settings, its steps alone
    plain   what a straightforward script does: each step encodes its pictures, noises them, asks the UNet, and calls
            ``backward`` with the UNet's weights left trainable, so that their gradients are made and added up; Adam
            holds every tensor of the text encoder

``step_ratio`` is plain over ours, within a round, the median over rounds; target: above 1.  ``floor_ratio`` is ours
over the bare passes it cannot do without: text encoder and UNet forward, and backward to what trains.  Target: 1.2.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from expunge import Concept
from expunge.core import training
from expunge.core.text_layers import trainable_text
from expunge.erase.diffusion.few_shot_erasing import PARAMETERS, FewShotErasing
from expunge.models.diffusion import DiffusionModel
from expunge.testing import tiny_diffusion
from expunge.testing.bench import interleaved, machine, publish, timed, verdict
from expunge.testing.diffusion import tiny_tokenizer

ROOT = Path(__file__).resolve().parent.parent
TARGETS = {"step_ratio": 1.0, "floor_ratio": 1.2}
STAR = Concept("star")
BATCH, PICTURES, TOKENS = 2, 4, 77


def sd15(latents: int) -> DiffusionModel:
    """A random pipeline with the shapes of SD 1.5, for latents of another side."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = tiny_tokenizer()
    tokenizer.model_max_length = TOKENS
    widths = (128, 256, 512, 512)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    pipeline = StableDiffusionPipeline(
        unet=UNet2DConditionModel(sample_size=latents, cross_attention_dim=768),
        vae=AutoencoderKL(
            block_out_channels=widths, down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4,
            sample_size=8 * latents,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
                num_attention_heads=12, max_position_embeddings=TOKENS, projection_dim=768,
                pad_token_id=tokenizer.pad_token_id, **ends,
            )
        ),
        tokenizer=tokenizer,
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1,
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return DiffusionModel(pipeline, "sd-1.5-sized")


@contextlib.contextmanager
def clocked_steps() -> Iterator[list[float]]:
    """Processor seconds of each step of the training loop in the block."""
    step, spent = training.Session._step, list[float]()

    def clock(self: training.Session) -> dict[str, float]:
        seconds, losses = timed(lambda: step(self))
        spent.append(seconds)
        return losses  # type: ignore[no-any-return]

    training.Session._step = clock  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        training.Session._step = step  # type: ignore[method-assign]


def shown(model: DiffusionModel, count: int) -> np.ndarray:
    """So many pictures."""
    side = model.latent_shape[1] * model.layout.scale_factor
    return np.random.default_rng(0).integers(0, 255, (count, side, side, 3), dtype=np.uint8)


def ours(model: DiffusionModel, steps: int) -> float:
    """Seconds a step, those that say how far words have moved at the end of an epoch included."""
    data = {"pictures": {"star": (shown(model, PICTURES), None, ("star",) * PICTURES)}}
    epochs = -(-steps * BATCH // PICTURES)
    with clocked_steps() as spent:
        FewShotErasing(batch=BATCH, epochs=epochs).erase(model, STAR, data=data)
    return sum(spent) / len(spent)


def chosen(model: DiffusionModel) -> list[torch.nn.Parameter]:
    """What the paper trains."""
    parts = PARAMETERS["feed-forward+last-attention"]
    return [p for roles, layers in parts for _, p in trainable_text(model, roles, layers)]


@contextlib.contextmanager
def put_back(model: DiffusionModel, moved: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """At the end gradients, flags and what moves are as before."""
    before = [p.detach().clone() for p in moved]
    try:
        yield
    finally:
        for parameter in model.tensors().values():
            parameter.grad = None
            parameter.requires_grad_(False)
        with torch.no_grad():
            for parameter, value in zip(moved, before, strict=True):
                parameter.copy_(value)


def loss_of(model: DiffusionModel, latents: torch.Tensor) -> torch.Tensor:
    """The negative training loss of a step."""
    scheduler = model.pipeline.scheduler
    times, noise = torch.randint(0, 1000, (BATCH,)), torch.randn_like(latents)
    noised = scheduler.add_noise(latents, noise, times)
    rows = model.text_encoder(model.token_ids(["a photo of a star"] * BATCH))[0]
    made = model.pipeline.unet(noised, times, encoder_hidden_states=rows).sample
    return -torch.nn.functional.mse_loss(made, noise)


def plain(model: DiffusionModel, steps: int) -> float:
    """Seconds a step of the plain loop."""
    moved = chosen(model)
    with put_back(model, moved):
        for parameter in (*moved, *model.pipeline.unet.parameters()):
            parameter.requires_grad_(True)
        adam = torch.optim.Adam(
            model.text_encoder.parameters(), lr=1e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=1e-8
        )
        pixels = torch.from_numpy(shown(model, BATCH)).permute(0, 3, 1, 2) / 127.5 - 1

        def step() -> None:
            with torch.no_grad():
                latents = model.vae.encode(pixels).latent_dist.sample()
            adam.zero_grad()
            loss_of(model, latents * model.vae.config.scaling_factor).backward()
            adam.step()

        return sum(timed(step)[0] for _ in range(steps)) / steps


def floor(model: DiffusionModel, steps: int) -> float:
    """Seconds of the passes alone."""
    moved, latents = chosen(model), torch.randn(BATCH, *model.latent_shape)
    with put_back(model, moved):
        for parameter in moved:
            parameter.requires_grad_(True)

        def passes() -> None:
            torch.autograd.grad(loss_of(model, latents), moved)

        return sum(timed(passes)[0] for _ in range(steps)) / steps


def measured(model: DiffusionModel, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds a step of each arm, and their ratios round by round."""
    arms: dict[str, Callable[[DiffusionModel, int], float]] = {
        "ours": ours, "plain": plain, "floor": floor,
    }  # fmt: skip
    works = {name: lambda run=run: run(model, options.steps) for name, run in arms.items()}
    rounds: list[dict[str, float]] = []
    for number, one in enumerate(interleaved(works, options.rounds), 1):
        rounds.append({name: seconds for name, (_, seconds) in one.items()})
        print(f"round {number}: { ({k: round(v, 2) for k, v in rounds[-1].items()}) }", flush=True)
    ratios = {
        "step_ratio": [one["plain"] / one["ours"] for one in rounds],
        "floor_ratio": [one["ours"] / one["floor"] for one in rounds],
    }
    found = {name: statistics.median(values) for name, values in ratios.items()}
    return {
        **found,
        "target_met": {
            "step_ratio": found["step_ratio"] > TARGETS["step_ratio"],
            "floor_ratio": found["floor_ratio"] <= TARGETS["floor_ratio"],
        },
        "arms": {"seconds_a_step": rounds, **ratios},
    }  # fmt: skip


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ``--quick`` makes everything small and writes nothing unless told where."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--latents", type=int, default=32, help="side of the latents")
    parser.add_argument("--steps", type=int, default=2, help="steps of each arm in a round")
    parser.add_argument("--rounds", type=int, default=2, help="rounds; medians are taken over them")
    parser.add_argument("--threads", type=int, default=1, help="threads; their seconds add up")
    parser.add_argument(
        "--quick", action="store_true", help="a smoke run: its numbers mean nothing"
    )
    parser.add_argument("--out", type=Path, help="where to write, default results/benchmarks")
    options = parser.parse_args(given)
    if options.quick:
        options.rounds = 1
    elif options.out is None:
        options.out = ROOT / "results" / "benchmarks" / "few_shot_erasing.json"
    return options


def main(given: Sequence[str] | None = None) -> None:
    """Measure, write, and say of each ratio whether it met its target."""
    options = arguments(given)
    torch.set_num_threads(options.threads)
    model = tiny_diffusion() if options.quick else sd15(options.latents)
    found = measured(model, options)
    result = {
        "benchmark": "few_shot_erasing",
        "setting": {
            "model": model.name, "latents": model.latent_shape[1], "batch": BATCH, "steps": options.steps,
            "rounds": options.rounds, "targets": TARGETS, "quick": options.quick, **machine(options.threads),
        },
        **found,
    }  # fmt: skip
    publish(result, options.out)
    for name, met in found["target_met"].items():
        print(verdict(name, f"{found[name]:.2f}", f"{TARGETS[name]:g}", met))


if __name__ == "__main__":
    main()
