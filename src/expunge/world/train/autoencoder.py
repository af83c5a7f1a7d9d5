"""Trains the autoencoder: 64 x 64 pictures to 16 x 16 x 4 latents and back.

    python -m expunge.world.train.autoencoder           # --more goes on from the committed weights

The loss is the absolute error, the absolute error of the picture's differences (edges and fine textures
carry most of what an observer names), that of the picture averaged over 4 x 4 pixels (thin strokes lose their
colour first) and a small Kullback-Leibler term that keeps latents smooth enough for
a diffusion model.

The scaling factor is measured at the end: latents of training pictures get unit variance.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.functional import avg_pool2d

from expunge.world.train import common
from expunge.world.train.data import pool

KL_WEIGHT = 3e-4
EDGE_WEIGHT = 0.5
COLOUR_WEIGHT = 1.0


def build() -> AutoencoderKL:
    """The untrained autoencoder, about 0.7 million parameters."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    )


def differences(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Horizontal and vertical differences of neighbouring pixels."""
    return pictures[..., 1:] - pictures[..., :-1], pictures[..., 1:, :] - pictures[..., :-1, :]


def reconstruction_loss(made: Tensor, real: Tensor) -> Tensor:
    """Absolute error of pixels, of their differences and of local mean colours."""
    loss = (made - real).abs().mean()
    loss = loss + COLOUR_WEIGHT * (avg_pool2d(made, 4) - avg_pool2d(real, 4)).abs().mean()
    for one, two in zip(differences(made), differences(real), strict=True):
        loss = loss + EDGE_WEIGHT * (one - two).abs().mean()
    return loss


def scaling_factor(model: AutoencoderKL, images: Tensor) -> float:
    """One over the standard deviation of the latents' means."""
    with torch.no_grad():
        means = torch.cat([model.encode(part).latent_dist.mean for part in images.split(64)])
    return float(1 / means.std())


def main() -> None:
    """Train, measure the scaling factor, write the weights."""
    parser = common.arguments(__doc__ or "", steps=2400, batch=32, lr=2e-3)
    parser.add_argument("--pictures", type=int, default=30_000, help="training pictures")
    parser.add_argument("--more", action="store_true", help="start from the committed weights")
    train(parser.parse_args())


def train(options: argparse.Namespace) -> None:
    """The recipe."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    data = pool(options.cache, "clean-world", options.pictures)
    model = build()
    if options.more:
        model.load_state_dict(AutoencoderKL.from_pretrained(str(options.out / "vae")).state_dict())
    model = model.to(memory_format=torch.channels_last)
    training = common.Training(
        "autoencoder", model, options, ema=0.998, warmup=100, weight_decay=0.0
    )

    def loss_of(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        rows = common.batch_indices(step, options.batch, len(data), options.seed)
        real = common.as_float(data.images[rows]) * 2 - 1
        posterior = model.encode(real).latent_dist
        made = model.decode(posterior.sample(generator=generator)).sample.float()
        error = reconstruction_loss(made, real)
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return error + KL_WEIGHT * divergence, {
            "error": float(error.detach()),
            "kl": float(divergence.detach()),
        }

    def write() -> None:
        # A copy with averaged weights, so that training goes on with its own.
        finished = build()
        finished.load_state_dict(training.ema)
        finished.eval()
        sample = common.as_float(data.images[:1024], channels_last=False) * 2 - 1
        finished.register_to_config(scaling_factor=scaling_factor(finished, sample))
        finished.save_pretrained(options.out / "vae")

    training.run(loss_of, on_save=write)
    write()


if __name__ == "__main__":
    main()
