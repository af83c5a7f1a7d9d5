"""FID and KID as papers print them, computed by the libraries that papers use (extra ``paper-metrics``).

    fid                 clean-fid between two folders            MACE, RECE, SPM
    fid_to_original     the same against the original model's pictures: 0 for it by construction
    kid                 clean-fid's kernel distance              concept ablation, ItD
    fid_torchmetrics    torchmetrics on 64 early features        SalUn

Inception's weights are downloaded by those libraries on first use.  Nothing else in the package is called FID: on
other features see :mod:`expunge.measure.distances`.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..core.extras import downloading, needed
from ..core.protocols import full_id
from ..errors import InputError, MissingExtra
from ..method import Measurement

__all__ = ["fid", "fid_to_original", "fid_torchmetrics", "kid"]

PICTURES = (
    "bmp", "jpg", "jpeg", "pgm", "png", "ppm", "tif", "tiff", "webp", "npy", "JPEG", "JPG", "PNG",
)  # fmt: skip
"""Ends of the names that clean-fid reads; others it passes over, and so does the count in the id."""


def fid(
    pictures: str | os.PathLike[str],
    reference: str | os.PathLike[str],
    *,
    reference_name: str,
    mode: str = "clean",
    batch: int = 32,
    device: str = "cpu",
) -> Measurement:
    """FID of a folder of pictures against a folder of reference pictures.

    Args:
        pictures, reference: Folders, read with their subfolders.
        reference_name: What the reference is, for example ``coco-2014-val``; part of the id.
        mode: clean-fid's: ``clean``, ``legacy_pytorch`` or ``legacy_tensorflow``.
        batch: Pictures at a time.
        device: Where Inception runs.

    Raises:
        MissingExtra: clean-fid is not installed.
        ModelError: Inception's weights are not there and cannot be downloaded.
        InputError: A folder holds fewer than two pictures.
    """
    return _clean(
        "fid/clean-fid", "compute_fid", pictures, reference, reference_name, mode, batch, device
    )


def fid_to_original(
    pictures: str | os.PathLike[str],
    original: str | os.PathLike[str],
    *,
    original_name: str,
    mode: str = "clean",
    batch: int = 32,
    device: str = "cpu",
) -> Measurement:
    """FID against pictures of the original model, under its own id: it says nothing of how good pictures are."""
    return _clean(
        "fid-to-original/clean-fid", "compute_fid", pictures, original, original_name, mode, batch, device
    )  # fmt: skip


def kid(
    pictures: str | os.PathLike[str],
    reference: str | os.PathLike[str],
    *,
    reference_name: str,
    mode: str = "clean",
    batch: int = 32,
    device: str = "cpu",
) -> Measurement:
    """clean-fid's KID; its subsets are drawn from numpy's global state, so two calls differ a little."""
    return _clean(
        "kid/clean-fid", "compute_kid", pictures, reference, reference_name, mode, batch, device
    )


def _clean(
    id: str,
    function: str,
    pictures: str | os.PathLike[str],
    reference: str | os.PathLike[str],
    name: str,
    mode: str,
    batch: int,
    device: str,
) -> Measurement:
    if mode not in ("clean", "legacy_pytorch", "legacy_tensorflow"):
        raise InputError(
            f"mode is {mode!r}; allowed is 'clean', 'legacy_pytorch' or 'legacy_tensorflow'"
        )
    n, m = _count(pictures), _count(reference)
    library = needed("cleanfid.fid", "clean-fid", "paper-metrics")
    import torch

    with downloading("clean-fid", "/tmp (mode legacy_pytorch: $TORCH_HOME/hub/checkpoints)"):
        value = getattr(library, function)(
            _pattern(pictures), _pattern(reference), mode=mode, batch_size=batch, num_workers=0,
            device=torch.device(device), verbose=False, use_dataparallel=False,
        )  # fmt: skip
    full = full_id(id, mode=mode, reference=name, n=str(n) if n == m else f"{n},{m}")
    return Measurement(float(value), full, min(n, m))


def _pattern(folder: str | os.PathLike[str]) -> str:
    """A folder for clean-fid, which reads its name as a pattern: brackets in it would match nothing."""
    return glob.escape(os.fspath(folder))


def _count(folder: str | os.PathLike[str]) -> int:
    place = Path(folder)
    start = os.path.join(_pattern(folder), "**")
    found = sum(len(glob.glob(f"{start}/*.{end}", recursive=True)) for end in PICTURES)
    if found < 2:
        raise InputError(f"{place} holds {found} pictures; a distance needs at least 2")
    return found


def fid_torchmetrics(
    pictures: np.ndarray | Sequence[np.ndarray],
    reference: np.ndarray | Sequence[np.ndarray],
    *,
    reference_name: str,
    feature: int = 64,
    batch: int = 32,
) -> Measurement:
    """torchmetrics' FID on early features, as SalUn prints it with 64.

    Args:
        pictures, reference: uint8 ``(n, h, w, 3)``.
        reference_name: What the reference is; part of the id.
        feature: 64, 192, 768 or 2048; part of the id.
        batch: Pictures at a time.

    Raises:
        MissingExtra: torchmetrics, or torch-fidelity that it takes Inception from, is not installed.
        ModelError: Inception's weights are not there and cannot be downloaded.
        InputError: Another feature, or a set of fewer than two pictures.
    """
    if feature not in (64, 192, 768, 2048):
        raise InputError(f"feature is {feature!r}; allowed is 64, 192, 768 or 2048")
    if min(len(pictures), len(reference)) < 2:
        raise InputError(
            f"{len(pictures)} and {len(reference)} pictures; a distance needs at least 2"
        )
    library = needed("torchmetrics.image.fid", "torchmetrics", "paper-metrics")
    import torch

    with downloading("torchmetrics", "torch's cache, $TORCH_HOME/hub/checkpoints"):
        try:
            metric = library.FrechetInceptionDistance(feature=feature)
        except ModuleNotFoundError as error:
            raise MissingExtra(
                f"torchmetrics lacks a part ({error}); install it with: pip install 'expunge[paper-metrics]'"
            ) from error
    for part, real in ((reference, True), (pictures, False)):
        for start in range(0, len(part), batch):
            rows = torch.from_numpy(np.stack(list(part[start : start + batch]))).permute(0, 3, 1, 2)
            metric.update(rows.contiguous(), real=real)
    n, m = len(pictures), len(reference)
    full = full_id(
        "fid/torchmetrics",
        feature=feature,
        reference=reference_name,
        n=str(n) if n == m else f"{n},{m}",
    )
    return Measurement(float(metric.compute()), full, min(n, m))
