"""Trains the denoisers of the world: a shared first phase, then original and never side by side.

    python -m expunge.world.train.diffusion base        # without the reference concepts
    python -m expunge.world.train.diffusion original    # from base, sees everything
    python -m expunge.world.train.diffusion never       # from base, equal steps, still without them
    python -m expunge.world.train.diffusion sibling     # from original, another style mix

Original and never start from the same committed weights and take the same number of steps with the same
noise, so that they differ in the reference concepts alone.  A step is one pass of the UNet: latents and text
embeddings are computed once.  The loss weights a timestep by min(SNR, 5) / SNR (arXiv 2303.09556).
``--more N`` goes on for N steps from the committed weights when a checkpoint is gone.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPModel, CLIPTokenizer

from expunge.world.train import common
from expunge.world.train.data import Pool, pool

PHASES = {  # phase: (data setting, phase it starts from)
    "base": ("concept-free", None),
    "original": ("original-phase2", "base"),
    "never": ("concept-free", "base"),
    "sibling": ("sibling", "original"),
}
DROPPED_CAPTIONS = 0.1
SNR_LIMIT = 5.0


def build() -> UNet2DConditionModel:
    """The untrained denoiser: 16 x 16 x 4 latents, cross-attention at 8 x 8 and 4 x 4."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 96, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=256,
        attention_head_dim=4,
        norm_num_groups=16,
    )


def scheduler() -> DDIMScheduler:
    """The noise schedule of SD 1.x."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def latents_of(data: Pool, weights: Path, bfloat16: bool = False) -> np.ndarray:
    """Scaled posterior means, float16 (n, 4, 16, 16), computed once beside the pictures."""
    file = data.folder / "latents.npy"
    if not file.exists():
        vae = (
            AutoencoderKL.from_pretrained(str(weights / "vae"))
            .eval()
            .to(memory_format=torch.channels_last)
        )
        parts = []
        with torch.no_grad(), common.precision(bfloat16):
            for first in range(0, len(data), 200):
                real = common.as_float(data.images[first : first + 200]) * 2 - 1
                mean = vae.encode(real).latent_dist.mean.float()
                parts.append((mean * vae.config.scaling_factor).half().numpy())
                if first % 4000 == 0:
                    print(f"[latents] {first}/{len(data)}", flush=True)
        temporary = file.with_suffix(f".{os.getpid()}.npy")
        np.save(temporary, np.concatenate(parts), allow_pickle=False)
        temporary.replace(file)
    return np.load(file, allow_pickle=False)


class Texts:
    """Text embeddings of captions, each distinct caption encoded once and kept as float16."""

    def __init__(self, captions: list[str], weights: Path) -> None:
        tokenizer = CLIPTokenizer.from_pretrained(str(weights / "tokenizer"))
        tower = CLIPModel.from_pretrained(
            str(weights / "clip"), dtype=torch.float32
        ).text_model.eval()
        distinct = list(dict.fromkeys(["", *captions]))
        index = {text: i for i, text in enumerate(distinct)}
        self.index = torch.tensor([index[text] for text in captions])
        length = tokenizer.model_max_length
        made = tokenizer(
            distinct, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            rows = [
                tower(input_ids=part).last_hidden_state.half() for part in made.input_ids.split(256)
            ]
        self.table = torch.cat(rows)  # row 0 is the empty prompt
        print(f"[texts] {len(distinct)} distinct captions of {len(captions)}", flush=True)

    def __call__(self, rows: np.ndarray, dropped: Tensor) -> Tensor:
        """Embeddings (n, tokens, width) of the captions of pictures `rows`; empty where dropped."""
        return self.table[torch.where(dropped, 0, self.index[torch.from_numpy(rows)])].float()


def noise_loss(
    unet: UNet2DConditionModel,
    clean: Tensor,
    noise: Tensor,
    times: Tensor,
    text: Tensor,
    bars: Tensor,
) -> Tensor:
    """Weighted squared error of the predicted noise."""
    bar = bars[times].reshape(-1, 1, 1, 1)
    made = unet(
        bar.sqrt() * clean + (1 - bar).sqrt() * noise, times, encoder_hidden_states=text
    ).sample.float()
    snr = (bar / (1 - bar)).flatten()
    weight = snr.clamp(max=SNR_LIMIT) / snr
    return (weight * (made - noise).square().mean((1, 2, 3))).mean()


def main() -> None:
    """Train one phase and write its weights."""
    parser = common.arguments(__doc__ or "", steps=2500, batch=64, lr=1e-3)
    parser.add_argument("phase", choices=sorted(PHASES))
    parser.add_argument("--pictures", type=int, default=40_000, help="training pictures")
    parser.add_argument(
        "--decay", type=float, default=0.0, help="last share of the steps over which the rate falls"
    )
    parser.add_argument(
        "--more", action="store_true", help="start from this phase's own committed weights"
    )
    parser.add_argument(
        "--prepare", action="store_true", help="only compute the latents of the phase"
    )
    options = parser.parse_args()
    if options.prepare:
        torch.set_num_threads(options.threads)
        data = pool(options.cache, PHASES[options.phase][0], options.pictures, start=2_000_000)
        latents_of(data, options.out, options.bfloat16)
    else:
        train(options)


def train(options: argparse.Namespace) -> None:
    """The recipe of one phase."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    held = common.lock(options.cache, f"unet-{options.phase}")  # noqa: F841
    setting, parent = PHASES[options.phase]
    start = options.phase if options.more else parent
    data = pool(options.cache, setting, options.pictures, start=2_000_000)
    clean = torch.from_numpy(latents_of(data, options.out, options.bfloat16))
    texts = Texts(data.captions, options.out)
    unet = build()
    if start is not None:
        stored = UNet2DConditionModel.from_pretrained(
            str(options.out / "unet" / start), dtype=torch.float32
        )
        unet.load_state_dict(stored.state_dict())
    unet = unet.to(memory_format=torch.channels_last)
    bars = scheduler().alphas_cumprod
    # All phases draw the same timesteps and noise at the same step: the seed does not name the phase.
    training = common.Training(
        f"unet-{options.phase}",
        unet,
        options,
        ema=0.995,
        warmup=100,
        decay=options.decay,
        weight_decay=0.01,
    )

    def loss_of(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = common.batch_indices(step, options.batch, len(data), options.seed)
        latents = (
            clean[torch.from_numpy(rows)].float().contiguous(memory_format=torch.channels_last)
        )
        # One timestep from each of n equal parts: less variance than independent draws, at no cost.
        parts = torch.randperm(len(rows), generator=generator) + torch.rand(
            len(rows), generator=generator
        )
        times = (parts * (1000 / len(rows))).long().clamp(max=999)
        noise = torch.randn(latents.shape, generator=generator)
        dropped = torch.rand(len(rows), generator=generator) < DROPPED_CAPTIONS
        return noise_loss(unet, latents, noise, times, texts(rows, dropped), bars), {}

    def write() -> None:
        """Write the present weights atomically."""
        finished = build()
        finished.load_state_dict(training.ema)
        folder = options.out / "unet" / options.phase
        aside = folder.with_name(f".{options.phase}")
        finished.eval().half().save_pretrained(aside)
        record = {"step": training.step, "steps": options.steps, "setting": setting, "from": start}
        record |= {
            "batch": options.batch,
            "lr": options.lr,
            "seed": options.seed,
            "decay": options.decay,
        }
        common.write_json(aside / "training.json", record)
        shutil.rmtree(folder, ignore_errors=True)
        aside.replace(folder)

    training.run(loss_of, on_save=write)
    write()
    scheduler().save_pretrained(options.out / "scheduler")
    print(json.dumps({"phase": options.phase, "steps": training.step}), flush=True)


if __name__ == "__main__":
    main()
