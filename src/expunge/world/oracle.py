"""The oracle: a small classifier that reads off what a picture of the world shows, independent of CLIP.

It is trained on rendered pictures with noise, blur, shifts and autoencoder reconstructions, calibrated on
development seeds, and has an output for pictures that show nothing of the world ("unrecognisable").
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import InputError, nearest
from . import vocabulary as v

__all__ = ["HEADS", "Oracle"]

# Softmax heads with their classes; "none" where the attribute does not occur in the picture.
HEADS: dict[str, tuple[str, ...]] = {
    "object": (*v.OBJECTS, "none"),
    "colour": (*v.COLOURS, "none"),
    "style": (*v.STYLES, "none"),
    "background": v.BACKGROUNDS,
    "person": (*v.PEOPLE_NAMES, "none"),
    "expression": (*v.EXPRESSIONS, "none"),
}
# Independent yes/no outputs.
FLAGS = (*v.OBJECTS, v.HAZARD, *v.MARKS, "unrecognisable")
FEATURES = 160


class Oracle(nn.Module):
    """Convolutional classifier with one head an attribute; about 0.7 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        widths = (24, 48, 80, 112)
        layers: list[nn.Module] = []
        last = 3
        for width in widths:
            layers += [
                nn.Conv2d(last, width, 3, 2, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            layers += [
                nn.Conv2d(width, width, 3, 1, 1, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            ]
            last = width
        self.body = nn.Sequential(*layers)
        self.neck = nn.Sequential(nn.Flatten(), nn.Linear(last * 16, FEATURES), nn.ReLU())
        self.heads = nn.ModuleDict({name: nn.Linear(FEATURES, len(c)) for name, c in HEADS.items()})
        self.flags = nn.Linear(FEATURES, len(FLAGS))
        # Divides the logits; fitted on development seeds after training.
        self.register_buffer("temperature", torch.ones(len(HEADS) + 1))

    def logits(self, pixels: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Uncalibrated head logits and flag logits of pixels (n, 3, 64, 64) in 0..1."""
        features = self.neck(self.body(pixels - 0.5))
        return {name: head(features) for name, head in self.heads.items()}, self.flags(features)

    def _batches(self, pictures: np.ndarray | Tensor, batch: int) -> list[Tensor]:
        if isinstance(pictures, np.ndarray):
            if pictures.ndim != 4 or pictures.shape[1:] != (64, 64, 3):
                raise InputError(f"the oracle reads pictures (n, 64, 64, 3), got {pictures.shape}")
            pixels = (
                torch.from_numpy(np.ascontiguousarray(pictures)).permute(0, 3, 1, 2).float() / 255
            )
        else:
            pixels = pictures.float()
        return list(pixels.split(batch))

    @torch.no_grad()
    def forward(self, pictures: np.ndarray | Tensor, batch: int = 256) -> dict[str, Tensor]:
        """Calibrated probabilities: a row of classes for each head, and ``flags`` (n, flags).

        Args:
            pictures: uint8 (n, 64, 64, 3), or float (n, 3, 64, 64) in 0..1.
            batch: Pictures at a time.
        """
        found: dict[str, list[Tensor]] = {}
        for part in self._batches(pictures, batch):
            heads, flags = self.logits(part)
            for index, (name, logits) in enumerate(heads.items()):
                found.setdefault(name, []).append((logits / self.temperature[index]).softmax(-1))
            found.setdefault("flags", []).append((flags / self.temperature[-1]).sigmoid())
        return {name: torch.cat(parts) for name, parts in found.items()}

    @torch.no_grad()
    def features(self, pictures: np.ndarray | Tensor, batch: int = 256) -> np.ndarray:
        """Penultimate vectors, float32 (n, 160), for distances between sets of pictures."""
        return torch.cat(
            [self.neck(self.body(p - 0.5)) for p in self._batches(pictures, batch)]
        ).numpy()

    @staticmethod
    def confidence(name: str, probabilities: dict[str, Tensor]) -> Tensor:
        """How sure the oracle is that the pictures show a concept, (n,), 0 to 1."""
        if name in FLAGS:
            return probabilities["flags"][:, FLAGS.index(name)]
        for head in ("style", "colour", "background", "person", "expression"):
            if name in HEADS[head]:
                return probabilities[head][:, HEADS[head].index(name)]
        raise InputError(
            f"the world's oracle does not know {name!r}{nearest(name, v.concept_names())}"
        )

    @staticmethod
    def unrecognisable(probabilities: dict[str, Tensor]) -> Tensor:
        """Probability that a picture shows nothing of the world, (n,)."""
        return probabilities["flags"][:, FLAGS.index("unrecognisable")]

    def save(self, folder: str | Path) -> None:
        """Write weights and a description."""
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        save_file(
            {k: t.contiguous() for k, t in self.state_dict().items()}, target / "model.safetensors"
        )
        described: dict[str, Any] = {"heads": HEADS, "flags": FLAGS, "features": FEATURES}
        (target / "config.json").write_text(
            json.dumps(described, indent=1) + "\n", encoding="utf-8"
        )

    @classmethod
    def load(cls, folder: str | Path) -> Oracle:
        """Read what :meth:`save` wrote."""
        model = cls()
        model.load_state_dict(load_file(Path(folder) / "model.safetensors"))
        return model.eval().requires_grad_(False)
