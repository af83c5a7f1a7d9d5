"""Trains the world's image-prompt branch: pictures as a second prompt of the original model.

    python -m expunge.world.train.image_prompts --bfloat16      # needs CLIP, autoencoder and the original denoiser

Pooled feature of the world's own vision tower -> 4 tokens -> keys and values of their own in every cross-attention
(IP-Adapter, arXiv 2308.06721).  Denoiser, towers and autoencoder are frozen; keys and values start from the text's.
Texts, images or both are dropped at random; a dropped image is an embedding of zeros.  Captions of this world say
nearly all there is in a picture, so a branch trained with them has little to learn: they are dropped in two
fifths of the rows, not in a twentieth as IP-Adapter does.
"""

from __future__ import annotations

import argparse
import json

import numpy as np
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPModel

from expunge.core.image_prompts import ImagePrompts, cross_attentions
from expunge.core.vision import vision_encoder
from expunge.world.train import common
from expunge.world.train.data import pool
from expunge.world.train.diffusion import PHASES, Texts, latents_of, noise_loss, scheduler

NAME = "image_prompts"
TOKENS = 4
DROPPED = {"text": 0.40, "image": 0.05, "both": 0.05}


def build(unet: UNet2DConditionModel, embedding: int) -> ImagePrompts:
    """The untrained branch: keys and values are those of the text, so that tokens start as words do."""
    layers = cross_attentions(unet)
    width = int(unet.config.cross_attention_dim)
    branch = ImagePrompts(embedding, TOKENS, width, [layer.to_k.out_features for layer in layers])  # type: ignore[union-attr]
    for layer, own in zip(layers, branch.ip_adapter.values(), strict=True):
        own.to_k_ip.weight.data.copy_(layer.to_k.weight)  # type: ignore[union-attr,operator,arg-type]
        own.to_v_ip.weight.data.copy_(layer.to_v.weight)  # type: ignore[union-attr,operator,arg-type]
    return branch.requires_grad_(True)


def dropped(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Which rows lose their text and which their image, bool ``(n,)`` each."""
    draw = torch.rand(count, generator=generator)
    text, image, both = DROPPED["text"], DROPPED["image"], DROPPED["both"]
    together = (draw >= text + image) & (draw < text + image + both)
    return (draw < text) | together, ((draw >= text) & (draw < text + image)) | together


def main() -> None:
    """Train and write the weights."""
    parser = common.arguments(__doc__ or "", steps=1000, batch=64, lr=1e-3)
    parser.add_argument("--pictures", type=int, default=40_000, help="pictures of the pool")
    parser.add_argument("--used", type=int, default=20_000, help="pictures trained on")
    parser.add_argument(
        "--decay", type=float, default=0.7, help="last share over which the rate falls"
    )
    train(parser.parse_args())


def train(options: argparse.Namespace) -> None:
    """The recipe."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    held = common.lock(options.cache, NAME)  # noqa: F841
    data = pool(options.cache, PHASES["original"][0], options.pictures, start=2_000_000)
    used = min(options.used, len(data))
    clean = torch.from_numpy(latents_of(data, options.out, options.bfloat16)[:used])
    texts = Texts(data.captions[:used], options.out)
    clip = CLIPModel.from_pretrained(str(options.out / "clip"), dtype=torch.float32).eval()
    embed = vision_encoder(clip, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), batch=200)
    embeddings = torch.cat(
        [embed(np.array(data.images[i : i + 2000])) for i in range(0, used, 2000)]
    )[:used]
    print(f"[{NAME}] {used} pictures embedded", flush=True)
    unet = UNet2DConditionModel.from_pretrained(
        str(options.out / "unet" / "original"), dtype=torch.float32
    )
    unet = unet.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    branch = build(unet, embeddings.shape[1])
    bars = scheduler().alphas_cumprod
    training = common.Training(NAME, branch, options, ema=0.995, warmup=50, decay=options.decay)

    def loss_of(step: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        """The denoiser's own loss, given text and picture."""
        rows = common.batch_indices(step, options.batch, used, options.seed)
        picked = torch.from_numpy(rows)
        latents = clean[picked].float().contiguous(memory_format=torch.channels_last)
        parts = torch.randperm(len(rows), generator=generator) + torch.rand(
            len(rows), generator=generator
        )
        times = (parts * (1000 / len(rows))).long().clamp(max=999)
        noise = torch.randn(latents.shape, generator=generator)
        no_text, no_image = dropped(len(rows), generator)
        seen = torch.where(no_image[:, None], 0.0, embeddings[picked])
        given.tokens, given.scale = branch.image_proj(seen), torch.ones(len(rows))
        return noise_loss(unet, latents, noise, times, texts(rows, no_text), bars), {}

    def write() -> None:
        """Write the present weights atomically."""
        folder = options.out / NAME
        half = {name: value.half() for name, value in training.ema.items()}
        common.save_atomically(half, folder / f"{NAME}.safetensors")
        record = {
            "step": training.step,
            "steps": options.steps,
            "pictures": used,
            "dropped": DROPPED,
        }
        record |= {key: getattr(options, key) for key in ("batch", "lr", "seed", "decay")}
        common.write_json(folder / "training.json", record)

    with branch.on(unet) as given:
        training.run(loss_of, on_save=write)
    write()
    print(json.dumps({NAME: training.step}), flush=True)


if __name__ == "__main__":
    main()
