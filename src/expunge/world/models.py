"""Loads the world's trained models into library classes, and writes them as plain library folders.

Parts that models share (tokenizer, text tower, autoencoder, scheduler) are stored once.  Weights are stored in
float16 and loaded in float32.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch

from ..errors import ModelError, nearest

__all__ = [
    "VARIANTS",
    "clip",
    "export",
    "image_prompts",
    "oracle",
    "patch_encoder",
    "pipeline",
    "weights",
]

VARIANTS = ("original", "never", "sibling")


def weights() -> Path:
    """The folder of the world's weights."""
    return Path(__file__).resolve().parent / "weights"


TRAINED_BY = {"unet": "diffusion", "scheduler": "diffusion", "vae": "autoencoder"}
"""Trainers of weights that are not called as their folder is."""


def _need(folder: Path) -> str:
    if not folder.is_dir():
        where = folder.relative_to(weights())
        trainer = TRAINED_BY.get(where.parts[0], where.parts[0])
        raise ModelError(
            f"the world's weights have no {where}; train it with `python -m expunge.world.train.{trainer}` or "
            "reinstall the package"
        )
    return str(folder)


def tokenizer() -> Any:
    """The world's CLIPTokenizer."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(_need(weights() / "tokenizer"))


def clip(dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The CLIPModel and its tokenizer."""
    from transformers import CLIPModel

    return CLIPModel.from_pretrained(_need(weights() / "clip"), dtype=dtype).eval(), tokenizer()


def text_encoder(dtype: torch.dtype = torch.float32) -> Any:
    """The text tower of the world's CLIP as a CLIPTextModel."""
    from transformers import CLIPTextModel

    model, _ = clip(dtype)
    tower = CLIPTextModel(model.config.text_config)
    inner = getattr(tower, "text_model", tower)
    inner.load_state_dict(model.text_model.state_dict())
    return tower.to(dtype).eval()


def autoencoder(dtype: torch.dtype = torch.float32) -> Any:
    """The world's AutoencoderKL."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(_need(weights() / "vae"), torch_dtype=dtype).eval()


def pipeline(variant: str = "original", dtype: torch.dtype = torch.float32) -> Any:
    """A StableDiffusionPipeline: ``original``, ``never`` or ``sibling``.

    Raises:
        ModelError: An unknown variant, or one that is not in this installation.
    """
    if variant not in VARIANTS:
        raise ModelError(f"world: there is no variant {variant!r}{nearest(variant, VARIANTS)}")
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )

    root = weights()
    return StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(_need(root / "vae"), torch_dtype=dtype),
        text_encoder=text_encoder(dtype),
        tokenizer=tokenizer(),
        unet=UNet2DConditionModel.from_pretrained(
            _need(root / "unet" / variant), torch_dtype=dtype
        ),
        scheduler=DDIMScheduler.from_pretrained(_need(root / "scheduler")),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@functools.lru_cache(maxsize=1)
def oracle() -> Any:
    """The world's oracle classifier; one a process, its weights are never changed."""
    from .oracle import Oracle

    return Oracle.load(_need(weights() / "oracle"))


@functools.lru_cache(maxsize=1)
def people_reader() -> Any:
    """Reads gender, age and skin of faces; one a process."""
    from .people_reader import PeopleReader

    return PeopleReader.load(oracle(), _need(weights() / "people_reader"))


def image_prompts() -> Any:
    """The image-prompt branch of the original denoiser; the world's vision tower reads its pictures."""
    from ..core.image_prompts import ImagePrompts
    from ..core.vision import vision_encoder

    # The tower was trained on pixels from -1 to 1.
    encoder = vision_encoder(clip()[0], (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    file = Path(_need(weights() / "image_prompts")) / "image_prompts.safetensors"
    return ImagePrompts.load(file, encoder)


def patch_encoder() -> Any:
    """The frozen eyes of a guard: the vision tower of the world's CLIP."""
    from ..core.vision import PatchEncoder

    half = (0.5, 0.5, 0.5)  # the tower was trained on pixels from -1 to 1
    return PatchEncoder(clip()[0], "world-clip", half, half)


def export(directory: str | Path) -> list[Path]:
    """Write plain library folders that ``from_pretrained`` loads: three pipelines and the CLIP.

    The oracle, our own class, is written as safetensors and JSON.
    """
    root = Path(directory)
    written = []
    for variant in VARIANTS:
        if (weights() / "unet" / variant).is_dir():
            pipeline(variant).save_pretrained(root / variant)
            written.append(root / variant)
    model, words = clip()
    model.save_pretrained(root / "clip")
    words.save_pretrained(root / "clip")
    oracle().save(root / "oracle")
    (root / "README.json").write_text(
        json.dumps({"dtype": "float32", "world": 1}) + "\n", encoding="utf-8"
    )
    return [*written, root / "clip", root / "oracle"]
