"""A small world of classes for claims: shapes of 16 x 16 pixels, a teacher that draws them and a judge that names them.

    python -m tests.claims.shapes [STEPS]

trains both and can be interrupted: the same command goes on where it stopped.  What they learn lies in the folder
``EXPUNGE_SHAPES``, by default ``out/shapes``.
"""

from __future__ import annotations

import functools
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from expunge.core import finetune
from expunge.method import Judge, Verdicts
from expunge.models.base import noise_generator
from expunge.models.class_conditional import class_conditional
from expunge.models.diffusion import DiffusionModel

CLASSES = ("circle", "square", "triangle", "cross", "ring", "diamond", "bar", "pole")
SIDE, FINE = 16, 4
FOLDER = Path(os.environ.get("EXPUNGE_SHAPES", "out/shapes"))
STEPS = int(os.environ.get("EXPUNGE_SHAPES_STEPS", "8000"))
BATCH, LR, EMA, DROP = 32, 1e-3, 0.998, 0.1
JUDGE_STEPS, JUDGE_BATCH = 600, 128


# -- pictures ------------------------------------------------------------------------------------------


def rendered(labels: Sequence[int], draw: torch.Generator) -> Tensor:
    """Shapes of random colour, place and size on a dark ground, ``(n, 3, 16, 16)`` from -1 to 1."""
    count, side = len(labels), SIDE * FINE
    places = torch.rand(count, 2, generator=draw) * 0.24 + 0.38
    radii = (torch.rand(count, generator=draw) * 0.12 + 0.26)[:, None, None]
    bright = torch.rand(count, 3, generator=draw) * 0.6 + 0.4
    dark = torch.rand(count, 3, generator=draw) * 0.3
    axis = (torch.arange(side) + 0.5) / side
    x = axis[None, None, :] - places[:, 0, None, None]
    y = axis[None, :, None] - places[:, 1, None, None]
    x, y = (x / radii).expand(-1, side, -1), (y / radii).expand(-1, -1, side)
    far, wide = (x.square() + y.square()).sqrt(), torch.maximum(x.abs(), y.abs())
    inside = torch.stack([
        far < 1, wide < 0.85, (y < 0.75) & (x.abs() < (y + 1) * 0.55),
        (torch.minimum(x.abs(), y.abs()) < 0.28) & (wide < 1), (far < 1) & (far > 0.55), x.abs() + y.abs() < 1.1,
        (y.abs() < 0.3) & (x.abs() < 1), (x.abs() < 0.3) & (y.abs() < 1),
    ])  # fmt: skip
    mask = inside[torch.as_tensor(labels), torch.arange(count)].float()[:, None]
    mask = functional.avg_pool2d(mask, FINE)
    pictures = mask * bright[:, :, None, None] + (1 - mask) * dark[:, :, None, None]
    return pictures * 2 - 1


def labels_of(count: int, draw: torch.Generator) -> Tensor:
    return torch.randint(len(CLASSES), (count,), generator=draw)


# -- the two networks ----------------------------------------------------------------------------------


def _seeded(make: Any, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def new_unet() -> Any:
    """About 0.65 million weights; the last of its embeddings stands for no class."""
    from diffusers import UNet2DModel

    return _seeded(
        lambda: UNet2DModel(
            sample_size=SIDE, block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8,
            attention_head_dim=16, down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), num_class_embeds=len(CLASSES) + 1,
        ),
        0,
    )  # fmt: skip


def new_teacher() -> DiffusionModel:
    """The model before training; DDIM on the schedule of DDPM, its guess of the picture kept in the range of pixels."""
    from diffusers import DDIMScheduler

    # Unclipped, errors at high noise add up to grounds far brighter than any picture's.
    scheduler = DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, set_alpha_to_one=False, steps_offset=1
    )
    return class_conditional(new_unet(), scheduler, CLASSES, "shapes")


class _Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(),
            nn.Conv2d(64, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(256, len(CLASSES))

    def features(self, pictures: Tensor) -> Tensor:
        return self.layers(pictures)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.features(pictures))


class _Learning(finetune.Task):
    """One network, an average of it, fresh pictures at every step."""

    def __init__(self, network: nn.Module, loss: Any, ema: float) -> None:
        self.network, self.loss, self.ema = network, loss, ema
        self.average = {n: p.detach().clone() for n, p in network.named_parameters()}

    def parameters(self) -> finetune.Groups:
        return {"network": list(self.network.named_parameters())}

    def step(self, step: finetune.Step) -> dict[str, Tensor]:
        return {"network": self.loss(step.generator())}

    def after(self, step: finetune.Step, losses: Mapping[str, float]) -> bool:
        with torch.no_grad():
            for name, parameter in self.network.named_parameters():
                self.average[name].lerp_(parameter, 1 - self.ema)
        return False

    def state(self) -> dict[str, Tensor]:
        return dict(self.average)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        self.average = {name: value.clone() for name, value in state.items()}

    def learnt(self, steps: int, lr: float, folder: Path) -> dict[str, Tensor]:
        loop = finetune.Loop(steps, finetune.Optimiser(lr, warmup=100, schedule="cosine", clip=1.0))
        finetune.fit(
            self, loop, seed=0, modules=[self.network], run=folder, settings={}, label=folder.name
        )
        with torch.no_grad():
            for name, parameter in self.network.named_parameters():
                parameter.copy_(self.average[name])
        return self.average


@functools.cache
def teacher(steps: int = STEPS) -> DiffusionModel:
    """The multi-step model; trained where that was not done yet."""
    model = new_teacher()

    def loss(draw: torch.Generator) -> Tensor:
        labels = labels_of(BATCH, draw)
        pictures, noise = (
            rendered(labels.tolist(), draw),
            torch.randn(BATCH, 3, SIDE, SIDE, generator=draw),
        )
        times = torch.randint(1000, (BATCH,), generator=draw)
        dropped = torch.rand(BATCH, generator=draw) < DROP
        labels = torch.where(dropped, len(CLASSES), labels)
        made = model.denoiser(
            model.noised(pictures, noise, times), times, class_labels=labels
        ).sample
        return (made - noise).square().mean()

    _Learning(model.denoiser, loss, EMA).learnt(steps, LR, FOLDER / f"teacher-{steps}")
    return model


@functools.cache
def classifier() -> nn.Module:
    """Names a shape; trained on rendered pictures, some of them noisy."""
    network = _seeded(_Classifier, 1)

    def loss(draw: torch.Generator) -> Tensor:
        labels = labels_of(JUDGE_BATCH, draw)
        pictures = rendered(labels.tolist(), draw)
        pictures = pictures + 0.1 * torch.randn(pictures.shape, generator=draw)
        return functional.cross_entropy(network(pictures), labels)

    _Learning(network, loss, 0.98).learnt(JUDGE_STEPS, 2e-3, FOLDER / "judge")
    return network.eval()


# -- judging -------------------------------------------------------------------------------------------


def as_pictures(pixels: Tensor) -> np.ndarray:
    """Pixels from -1 to 1 as uint8 pictures, ``(n, 16, 16, 3)``."""
    made: np.ndarray = ((pixels + 1) * 127.5).round().permute(0, 2, 3, 1).byte().numpy()
    return made


def scaled(pictures: np.ndarray) -> Tensor:
    """uint8 pictures as the classifier takes them."""
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def named(pictures: np.ndarray) -> np.ndarray:
    """The class that each picture shows, ``(n,)``."""
    return classifier()(scaled(pictures)).argmax(1).numpy()


class ShapeJudge(Judge):
    """The classifier as a judge: a picture shows the class with the largest score."""

    id, protocol, threshold = "shapes", "shapes/1", 0.5

    def judge(self, outputs: Any, concept: Any, prompts: Any) -> Verdicts:
        with torch.no_grad():
            scores = classifier()(scaled(outputs)).softmax(1).numpy()
        own = scores[:, CLASSES.index(concept.name)]
        return Verdicts(own >= self.threshold, own, np.ones(len(own), bool))

    def features(self, outputs: Any) -> np.ndarray:
        with torch.no_grad():
            return classifier().features(scaled(outputs)).numpy()


def main() -> None:
    steps = int(sys.argv[1]) if len(sys.argv) > 1 else STEPS
    rates = {}
    draw = noise_generator(0, "judged shapes")
    labels = labels_of(1000, draw)
    real = as_pictures(rendered(labels.tolist(), draw))
    rates["judge on pictures"] = float((named(real) == labels.numpy()).mean())
    model = teacher(steps)
    for index, name in enumerate(CLASSES):
        made = model.generate([name] * 32, seeds=list(range(32)))
        rates[name] = float((named(made) == index).mean())
    rates["teacher"] = math.fsum(rates[name] for name in CLASSES) / len(CLASSES)
    print(json.dumps(rates, indent=1))


if __name__ == "__main__":
    main()
