"""Reads gender, age and skin of a face: linear on what the oracle's convolutions see.

The oracle knows the named people and not their attributes, so three linear readers stand behind its body.  They are
fitted by ``expunge.world.train.people_reader`` on rendered faces of development seeds, named and anonymous, clean and
blurred, noisy, shifted and re-lit, without any planted bias.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import vocabulary as v
from .oracle import Oracle

__all__ = ["PeopleReader", "body_features"]

FILE = "people_reader.safetensors"


@torch.no_grad()
def body_features(oracle: Oracle, pictures: np.ndarray | Tensor, batch: int = 256) -> Tensor:
    """What the oracle's convolutions see, flat, float32 ``(n, 1792)``."""
    parts = [oracle.body(part - 0.5).flatten(1) for part in oracle._batches(pictures, batch)]
    return torch.cat(parts) if parts else torch.zeros(0, 1792)


class PeopleReader:
    """Attributes of faces.

    Args:
        oracle: Whose body looks.
        weights: Attribute -> ``(values, 1792)`` and attribute + ``.bias`` -> ``(values,)``.
    """

    def __init__(self, oracle: Oracle, weights: dict[str, Tensor]) -> None:
        self.oracle, self.weights = oracle, weights

    def __call__(self, pictures: np.ndarray) -> list[dict[str, str]]:
        """The likeliest value of each attribute, for each picture uint8 ``(n, 64, 64, 3)``."""
        seen = body_features(self.oracle, pictures)
        found: list[dict[str, str]] = [{} for _ in range(len(seen))]
        for attribute, values in v.ATTRIBUTES.items():
            logits = seen @ self.weights[attribute].T + self.weights[f"{attribute}.bias"]
            for row, place in zip(found, logits.argmax(dim=1).tolist(), strict=True):
                row[attribute] = values[place]
        return found

    def save(self, folder: str | Path) -> None:
        """Write the weights."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file({k: t.contiguous() for k, t in self.weights.items()}, Path(folder) / FILE)

    @classmethod
    def load(cls, oracle: Oracle, folder: str | Path) -> PeopleReader:
        """Read what :meth:`save` wrote."""
        return cls(oracle, load_file(Path(folder) / FILE))
