"""Trains the oracle classifier and calibrates it.

    python -m expunge.world.train.oracle

Pictures are seen clean, noisy, blurred, shifted, re-lit, and as reconstructions of the autoencoder (what a
latent diffusion model can draw at best).  One picture in six is turned into something that shows nothing:
noise, blends, blurs, scrambled patches, decoded random latents; there the oracle must say so.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn import functional as F

from expunge.world import vocabulary as v
from expunge.world.oracle import FLAGS, HEADS, Oracle
from expunge.world.train import common
from expunge.world.train.data import Pool, pool

BROKEN_SHARE = 1 / 6


def reconstructions(
    data: Pool, options: argparse.Namespace, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Autoencoder copies of the first ``count`` pictures, and decoded random latents, uint8, computed once."""
    file = data.folder / f"copies-{count}.npy"
    if not file.exists():
        vae = (
            AutoencoderKL.from_pretrained(str(options.out / "vae"))
            .eval()
            .to(memory_format=torch.channels_last)
        )
        generator = torch.Generator().manual_seed(options.seed)
        parts = []
        with torch.no_grad(), common.precision(options.bfloat16):
            for first in range(0, count, 100):
                real = common.as_float(data.images[first : first + 100]) * 2 - 1
                latents = vae.encode(real).latent_dist.sample(generator=generator).float()
                if first >= count - count // 10:
                    latents = random_latents(latents, generator)
                made = vae.decode(latents).sample.float()
                parts.append(
                    ((made / 2 + 0.5).clamp(0, 1) * 255)
                    .round()
                    .to(torch.uint8)
                    .permute(0, 2, 3, 1)
                    .numpy()
                )
        np.save(file, np.concatenate(parts), allow_pickle=False)
    copies = np.load(file, allow_pickle=False)
    return copies[: count - count // 10], copies[count - count // 10 :]


def random_latents(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Latents that mean nothing: smooth or rough noise of the right size, or two pictures averaged."""
    rough = torch.randn(latents.shape, generator=generator)
    smooth = F.interpolate(
        torch.randn(*latents.shape[:2], 5, 5, generator=generator), size=latents.shape[-2:]
    )
    blend = (latents + latents.roll(1, 0)) / 2
    kind = torch.randint(0, 3, (len(latents), 1, 1, 1), generator=generator)
    scale = latents.std()
    return torch.where(kind == 0, rough * scale, torch.where(kind == 1, smooth * scale, blend))


def broken(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures that no longer show anything: noise, blurs, blends of three, scrambled patches."""
    noise = torch.rand(pixels.shape, generator=generator)
    blur = F.interpolate(F.adaptive_avg_pool2d(pixels, 4), size=pixels.shape[-2:], mode="bilinear")
    blend = (pixels + pixels.roll(1, 0) + pixels.roll(2, 0)) / 3
    patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8).flatten(2, 3)
    order = torch.randperm(64, generator=generator)
    mixed = (
        patches[:, :, order].unflatten(2, (8, 8)).permute(0, 1, 2, 4, 3, 5).reshape(pixels.shape)
    )
    strong = (pixels + 0.8 * torch.randn(pixels.shape, generator=generator)).clamp(0, 1)
    kind = torch.randint(0, 5, (len(pixels), 1, 1, 1), generator=generator)
    out = noise
    for index, option in enumerate((blur, blend, mixed, strong), 1):
        out = torch.where(kind == index, option, out)
    return out


def augmented(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts, light, blur and noise that leave the content readable."""
    pixels = common.shifted(pixels, generator, 3)
    n = (len(pixels), 1, 1, 1)
    gain = 1 + 0.12 * (2 * torch.rand(n, generator=generator) - 1)
    offset = 0.05 * (2 * torch.rand(n, generator=generator) - 1)
    soft = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, 1)
    mix = torch.rand(n, generator=generator) * (torch.rand(n, generator=generator) < 0.4)
    pixels = torch.lerp(pixels, soft, mix)
    spread = 0.08 * torch.rand(n, generator=generator)
    return (pixels * gain + offset + spread * torch.randn(pixels.shape, generator=generator)).clamp(
        0, 1
    )


def labels_of(data: Pool, rows: np.ndarray) -> tuple[dict[str, Tensor], Tensor]:
    """Classes of the heads (-1: do not train) and flags (n, flags) of pictures."""
    found = {name: torch.from_numpy(data.labels[name][rows].astype(np.int64)) for name in HEADS}
    thing = torch.from_numpy(data.labels["presence"][rows].sum(1) > 0)  # objects, pairs, counts
    for name in ("object", "colour", "style"):
        found[name] = torch.where(thing, found[name], len(HEADS[name]) - 1)
    found["person"] = torch.where(found["person"] < 0, len(v.PEOPLE_NAMES), found["person"])
    found["expression"] = torch.where(
        found["expression"] < 0, len(v.EXPRESSIONS), found["expression"]
    )
    single = [data.labels[k][rows] for k in ("hazard", *(f"stamp_{m}" for m in v.MARKS))]
    flags = np.concatenate(
        [data.labels["presence"][rows], np.stack(single, 1), np.zeros((len(rows), 1))], 1
    )
    return found, torch.from_numpy(flags.astype(np.float32))


def oracle_loss(
    heads: dict[str, Tensor], flags: Tensor, aims: dict[str, Tensor], truth: Tensor
) -> Tensor:
    """Sum of the cross-entropies of all heads and all flags."""
    loss = len(FLAGS) * F.binary_cross_entropy_with_logits(flags.float(), truth)
    for name, logits in heads.items():
        loss = loss + F.cross_entropy(logits.float(), aims[name], ignore_index=-1)
    return loss


def calibrate(model: Oracle, data: Pool, count: int = 3000) -> None:
    """Fit one temperature a head on noisy, blurred and re-lit pictures of development seeds.

    On clean ones hardly a mistake is left, and any temperature that makes it surer looks better.
    """
    rows = np.arange(count)
    aims, truth = labels_of(data, rows)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        parts = [
            model.logits(
                augmented(common.as_float(data.images[rows[i : i + 200]], False), generator)
            )
            for i in range(0, count, 200)
        ]
    grid = torch.logspace(-0.7, 0.7, 57)
    for index, name in enumerate(HEADS):
        logits = torch.cat([part[0][name] for part in parts])
        losses = [F.cross_entropy(logits / t, aims[name], ignore_index=-1) for t in grid]
        model.temperature[index] = grid[int(torch.stack(losses).argmin())]
    flags = torch.cat([part[1] for part in parts])
    losses = [F.binary_cross_entropy_with_logits(flags / t, truth) for t in grid]
    model.temperature[-1] = grid[int(torch.stack(losses).argmin())]


def main() -> None:
    """Train, calibrate, write the weights."""
    parser = common.arguments(__doc__ or "", steps=1600, batch=128, lr=2e-3)
    parser.add_argument("--pictures", type=int, default=30_000, help="training pictures")
    parser.add_argument("--copies", type=int, default=10_000, help="autoencoder reconstructions")
    parser.add_argument(
        "--calibrate", action="store_true", help="only fit the temperatures of the present weights"
    )
    options = parser.parse_args()
    if options.calibrate:
        finish(Oracle.load(options.out / "oracle"), options)
    else:
        train(options)


def finish(model: Oracle, options: argparse.Namespace) -> None:
    """Calibrate and write."""
    calibrate(model, pool(options.cache, "clean-world", 3000, start=v.DEVELOPMENT_SEEDS.start))
    model.save(options.out / "oracle")
    print("temperatures", [round(float(t), 2) for t in model.temperature], flush=True)


def train(options: argparse.Namespace) -> None:
    """The recipe."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    data = pool(options.cache, "clean-world", options.pictures, start=3_000_000)
    copies, nothing = reconstructions(data, options, options.copies)
    model = Oracle().to(memory_format=torch.channels_last)
    training = common.Training("oracle", model, options, ema=0.995, warmup=100, weight_decay=0.02)

    def loss_of(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """One step's loss on a third reconstructions, a sixth broken pictures."""
        rows = common.batch_indices(step, options.batch, len(data), options.seed)
        third = len(rows) // 3
        # A third of each batch are reconstructions of other pictures, with those pictures' labels.
        rows[:third] = rows[:third] % len(copies)
        images = np.concatenate([copies[rows[:third]], data.images[rows[third:]]])
        aims, truth = labels_of(data, rows)
        pixels = augmented(common.as_float(images), generator)
        bad = torch.rand(len(rows), generator=generator) < BROKEN_SHARE
        wrecks = broken(pixels[bad], generator)
        half = len(wrecks) // 2
        pick = torch.randint(0, len(nothing), (half,), generator=generator).numpy()
        wrecks[:half] = common.as_float(nothing[pick])
        pixels[bad] = wrecks
        for name, aim in aims.items():
            aim[bad] = -1 if name == "background" else len(HEADS[name]) - 1
        truth[bad] = torch.tensor([float(flag == "unrecognisable") for flag in FLAGS])
        heads, flags = model.logits(pixels)
        return oracle_loss(heads, flags, aims, truth), {}

    training.run(loss_of)
    finished = Oracle()
    finished.load_state_dict(training.ema)
    finish(finished.eval(), options)


if __name__ == "__main__":
    main()
