"""What is settled before the first update: the factor of the activations, the bias, the candidates of atoms."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ...errors import SettingError
from ...models.base import noise_generator
from .config import ARCHETYPAL, SparseAutoencoderConfig
from .model import SparseAutoencoder
from .stream import Activations

__all__ = ["centroids", "factor", "geometric_median", "started"]

FACTOR_ROWS = 100_000
"""Rows that the factor of the activations is measured on, at most (and at least one batch)."""
CENTROID_ROWS = 50_000


@torch.no_grad()
def geometric_median(rows: Tensor, iterations: int = 100, tolerance: float = 1e-5) -> Tensor:
    """The point ``(d,)`` with the smallest sum of distances to ``rows (n, d)``, by Weiszfeld's iteration.

    It begins at the mean and stops where it moves less than ``tolerance``.
    """
    rows = rows.double()
    point = rows.mean(0)
    for _ in range(iterations):
        weights = 1 / (rows - point).norm(dim=1).clamp_min(1e-12)
        moved = (weights[:, None] * rows).sum(0) / weights.sum()
        step, point = (moved - point).norm(), moved
        if step < tolerance:
            break
    return point


def factor(rows: Tensor, normalise: str) -> float:
    """The one factor of all activations: mean ``||x||^2 = 1``, or mean ``||x|| = sqrt(d)``, or 1.

    Raises:
        SettingError: All rows are zero.
    """
    if normalise == "mean-square":
        size = float(rows.double().square().sum(1).mean().sqrt())
    elif normalise == "mean-norm":
        size = float(rows.double().norm(dim=1).mean()) / rows.shape[1] ** 0.5
    else:
        return 1.0
    if size == 0:
        raise SettingError("all activations are zero; there is nothing to learn")
    return 1 / size


def centroids(rows: Tensor, count: int, seed: int) -> Tensor:
    """k-means centroids ``(count, d)`` of rows, the candidates C of an archetypal dictionary.

    Raises:
        SettingError: Fewer rows than centroids.
    """
    from sklearn.cluster import MiniBatchKMeans

    if len(rows) < count:
        raise SettingError(
            f"{count} centroids were asked of {len(rows)} activations; allowed are at most as many as rows"
        )
    state = int(torch.randint(2**31, (), generator=noise_generator(seed, "centroids")))
    means = MiniBatchKMeans(count, random_state=state, n_init=1, batch_size=max(1024, count))
    means.fit(rows.cpu().numpy())
    return torch.from_numpy(means.cluster_centers_).to(rows.dtype)


def started(
    config: SparseAutoencoderConfig, source: Activations, seed: int, device: str | None = None
) -> SparseAutoencoder:
    """An autoencoder before its first update: random atoms, b the geometric median of the first rows.

    Args:
        config: Its settings.
        source: The activations; their first batches in the order of training are looked at.
        seed: Seed of the run.
        device: Where it is to be; default: where the activations are.
    """
    wanted = max(config.batch, config.median_rows or 0, FACTOR_ROWS)
    if config.dictionary in ARCHETYPAL:
        wanted = max(wanted, CENTROID_ROWS)
    wanted = max(1, min(wanted, source.rows) // config.batch)
    rows = torch.cat(list(itertools.islice(source.batches(config.batch, seed), wanted)))
    scale, candidates = factor(rows, config.normalise), None
    if config.dictionary in ARCHETYPAL:
        # Atoms stand in the units of the encoder, also where rows are normalised one by one.
        seen = SparseAutoencoder(config, seed=None)
        seen.scale.fill_(scale)
        first = seen.normalised(rows[:CENTROID_ROWS].cpu()).rows
        candidates = centroids(first, config.candidates, seed)
    bare = SparseAutoencoder(config, seed=seed, candidates=candidates).to(device or rows.device)
    bare.scale.fill_(scale)
    if config.bias and config.start_bias == "median":
        first = bare.normalised(
            rows[: config.median_rows or config.batch].to(bare.bias.device)
        ).rows
        median = geometric_median(first, tolerance=config.median_tolerance)
        with torch.no_grad():
            bare.bias.copy_(median)
    return bare
