"""A tiny random Stable Diffusion pipeline: real library classes, made in milliseconds, nothing downloaded.

It draws nothing meaningful.  It is for mechanics: names and shapes of layers, identities, hooks, costs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch

from ..models.diffusion import DiffusionModel

__all__ = ["tiny_clip", "tiny_diffusion", "tiny_image_prompts", "tiny_tokenizer"]

LENGTH, WIDTH = 16, 32
WORDS = (
    "a", "red", "blue", "green", "star", "circle", "square", "heart", "striped", "plain", "photo", "of",
)  # fmt: skip


@cache
def _tokenizer_parts() -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    from tokenizers import pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        parts = [*word[:-1], word[-1] + "</w>"]
        while len(parts) > 1:
            pair = (parts[0], parts[1])
            if pair not in merges:
                merges.append(pair)
            parts[:2] = ["".join(pair)]
    tokens = [*letters, *(x + "</w>" for x in letters), *("".join(m) for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {t: i for i, t in enumerate(dict.fromkeys(tokens))}, tuple(merges)


def tiny_tokenizer() -> Any:
    """A CLIPTokenizer over bytes in which a dozen words are single tokens; context of 16 tokens."""
    from transformers import CLIPTokenizer

    vocab, merges = _tokenizer_parts()
    end = "<|endoftext|>"
    return CLIPTokenizer(
        vocab=dict(vocab), merges=list(merges), bos_token="<|startoftext|>", eos_token=end, pad_token=end,
        unk_token=end, model_max_length=LENGTH,
    )  # fmt: skip


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # diffusers warns that half precision is slow on a CPU, which is known and meant here.
    from diffusers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def tiny_diffusion(
    seed: int = 0, dtype: torch.dtype = torch.float32, prediction_type: str = "epsilon"
) -> DiffusionModel:
    """A random SD-like model: 8 x 8 latents, 16 x 16 pictures, text width 32, 16 tokens, 4 default steps."""
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = tiny_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=WIDTH, attention_head_dim=2, norm_num_groups=8,
        )  # fmt: skip
        vae = AutoencoderKL(
            block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4, sample_size=16,
        )  # fmt: skip
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=LENGTH,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    pipeline = StableDiffusionPipeline(
        vae=vae, text_encoder=text, tokenizer=tokenizer, unet=unet,
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type,
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    if dtype != torch.float32:
        with _quiet():
            pipeline.to(dtype)
    return DiffusionModel(pipeline, "tiny", steps=4, guidance=3.0)


def tiny_clip(seed: int = 0) -> Any:
    """A random CLIPModel that looks at pictures of 16 x 16, and its tokenizer."""
    from transformers import CLIPConfig, CLIPModel

    small = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    tokenizer = tiny_tokenizer()
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": LENGTH, **small}
    vision = {"image_size": 16, "patch_size": 8, **small}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    return made.eval(), tokenizer


def tiny_image_prompts(model: DiffusionModel, seed: int = 3) -> Any:
    """A random image-prompt branch for a model; a picture's embedding is its mean colour."""
    from ..core.image_prompts import ImagePrompts, cross_attentions

    layers: Any = cross_attentions(model.denoiser)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ImagePrompts(
            3, 4, layers[0].to_k.in_features, [layer.to_q.out_features for layer in layers],
            lambda pictures: torch.as_tensor(pictures).float().mean((1, 2)) / 255,
        )  # fmt: skip
