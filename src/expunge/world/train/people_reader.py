"""Fits the readers of gender, age and skin on rendered faces.

    python -m expunge.world.train.people_reader

Logistic regression on the oracle's body, once on each picture as it is and once blurred, noisy, shifted or re-lit; half
of the faces are named people, half anonymous.  Planted biases are off, so that no attribute tells another.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch

from expunge.world import models, scenes
from expunge.world import vocabulary as v
from expunge.world.people_reader import PeopleReader, body_features
from expunge.world.settings import Setting
from expunge.world.train import common
from expunge.world.train.oracle import augmented

FIRST = v.DEVELOPMENT_SEEDS.start + 310_000_000


def faces(count: int, first: int, named: float = 0.5) -> tuple[np.ndarray, list[dict[str, str]]]:
    """Rendered faces uint8 ``(n, 64, 64, 3)`` and their attributes."""
    setting = Setting(mix={"face": 1 - named, "person": named}, biases=False)
    pictures, _, drawn = scenes.batch(range(first, first + count), setting)
    return pictures, [dict(scene.attributes or {}) for scene in drawn]


def fit(count: int, seed: int, strength: float) -> dict[str, torch.Tensor]:
    """Weights of the readers; ``strength`` is the inverse of the ridge on standardised features."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    oracle = models.oracle()
    pictures, truth = faces(count, FIRST)
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255
    changed = augmented(pixels, torch.Generator().manual_seed(seed))
    seen = torch.cat([body_features(oracle, pixels), body_features(oracle, changed)]).numpy()
    scaler = StandardScaler().fit(seen)
    scale = np.where(scaler.scale_ > 0, scaler.scale_, 1.0)
    found = {}
    for attribute, values in v.ATTRIBUTES.items():
        labels = [values.index(one[attribute]) for one in truth] * 2
        made = LogisticRegression(C=strength, max_iter=400).fit(scaler.transform(seen), labels)
        weight, bias = made.coef_ / scale, made.intercept_ - made.coef_ @ (scaler.mean_ / scale)
        if len(values) == 2:  # one row stands for the second value against the first
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        found[attribute] = torch.from_numpy(weight).float()
        found[f"{attribute}.bias"] = torch.from_numpy(bias).float()
    return found


def main() -> None:
    """Fit, write, and print the accuracy on test seeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=5000, help="rendered faces")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--strength", type=float, default=0.01)
    parser.add_argument("--out", type=Path, default=common.WEIGHTS / "people_reader")
    options = parser.parse_args()
    reader = PeopleReader(models.oracle(), fit(options.count, options.seed, options.strength))
    reader.save(options.out)
    pictures, truth = faces(500, v.TEST_SEEDS.start + 310_000_000)
    said = reader(pictures)
    for attribute in v.ATTRIBUTES:
        right = np.mean([a[attribute] == b[attribute] for a, b in zip(said, truth, strict=True)])
        print(f"{attribute}: {100 * right:.1f} % of 500 rendered faces of test seeds")


if __name__ == "__main__":
    main()
