"""Feature vectors of pictures, by name: what distances between sets of pictures are taken on.

A distance is comparable only with one on the same features, so features never come without their name: a
judge's own, a CLIP's picture embedding, any transformers vision model's pooled output, or a caller's function.

:class:`FeatureCache` keeps vectors as float16 by the extractor's name and the picture's bytes.  What passed
through it says ``@float16`` in its name, whether or not it was found there, so that a number never depends on
what was cached.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..edit.files import atomic_write
from ..errors import InputError, ModelError
from ..method import Judge
from .vision import CLIP_MEAN, CLIP_STD, model_name, pixel_statistics, pixels

__all__ = [
    "FeatureCache",
    "Features",
    "cached",
    "clip_features",
    "judge_features",
    "open_features",
    "vision_features",
]


@dataclasses.dataclass(frozen=True)
class Features:
    """A named extractor of feature vectors.

    Attributes:
        name: Part of the id of every number made with it.
        extract: uint8 pictures ``(n, height, width, 3)`` -> vectors ``(n, d)``.
    """

    name: str
    extract: Callable[[np.ndarray], Any]

    def __post_init__(self) -> None:
        if not self.name or "inception" in self.name.lower() or self.name.lower().startswith("fid"):
            raise InputError(
                f"features cannot be called {self.name!r}: the name must not be empty or sound like FID's Inception"
            )

    def __call__(self, pictures: np.ndarray) -> np.ndarray:
        """float32 vectors ``(n, d)``.

        Raises:
            InputError: The pictures are not uint8 ``(n, height, width, 3)``, or the vectors are no finite matrix.
        """
        given = np.asarray(pictures)
        if given.ndim != 4 or given.shape[-1] != 3 or given.dtype != np.uint8 or not len(given):
            raise InputError(f"features {self.name!r} are of pictures uint8 (n, height, width, 3), "
                             f"got {given.dtype} {given.shape}")  # fmt: skip
        found = self.extract(given)
        made = found.detach().float().cpu().numpy() if isinstance(found, torch.Tensor) else found
        rows = np.asarray(made, np.float32)
        if rows.ndim != 2 or len(rows) != len(given) or not np.isfinite(rows).all():
            raise InputError(
                f"features {self.name!r} of {len(given)} pictures are {rows.shape}; allowed is a finite vector for each"
            )
        return rows


def judge_features(judge: Judge) -> Features:
    """The features a judge has of its own.

    Raises:
        InputError: When they are first asked for, if it has none.
    """

    def extract(pictures: np.ndarray) -> Any:
        found = judge.features(pictures)
        if found is None:
            raise InputError(f"the judge {judge.id} gives no features")
        return found

    return Features(judge.id, extract)


def clip_features(
    model: Any, name: str, processor: Any = None, batch: int = 64, squeeze: bool = False
) -> Features:
    """Unit picture embeddings of a CLIP-like model (anything with ``get_image_features``).

    Args:
        model: The model.
        name: Its name.
        processor: Its image processor; only mean and standard deviation are read.
        batch: Pictures at a time.
        squeeze: Change the shape of what is not square; otherwise its middle is cut out, as CMMD does.
    """
    mean, std = _normalisation(processor, CLIP_MEAN, CLIP_STD)
    size = int(getattr(model.config, "vision_config", model.config).image_size)

    @torch.no_grad()
    def extract(pictures: np.ndarray) -> torch.Tensor:
        rows = []
        for part in _parts(pictures, batch):
            read = pixels(part, size, mean, std, squeeze).to(model.device, model.dtype)
            found = model.get_image_features(pixel_values=read)
            # Newer transformers return an output record, older ones the projected embedding itself.
            vectors = found if isinstance(found, torch.Tensor) else found.pooler_output
            rows.append(torch.nn.functional.normalize(vectors.float(), dim=-1))
        return torch.cat(rows)

    return Features(f"{name}:squeezed" if squeeze else name, extract)


def vision_features(
    model: Any, name: str, processor: Any = None, batch: int = 64, pooling: str = "pooled"
) -> Features:
    """Features of a transformers vision model.

    Args:
        model: Takes ``pixel_values`` and gives hidden states.
        name: Its name.
        processor: Its image processor; only mean and standard deviation are read (default: 0.5).
        batch: Pictures at a time.
        pooling: ``pooled`` takes the model's own pooled output where it has one, ``mean`` the mean over places.

    Raises:
        InputError: Another pooling.
    """
    if pooling not in ("pooled", "mean"):
        raise InputError(f"pooling is {pooling!r}; allowed is 'pooled' or 'mean'")
    mean, std = _normalisation(processor, (0.5,) * 3, (0.5,) * 3)
    size = getattr(model.config, "image_size", None) or 224
    side = int(size[0] if isinstance(size, (list, tuple)) else size)

    @torch.no_grad()
    def extract(pictures: np.ndarray) -> torch.Tensor:
        """Pooled output of each picture, float32 ``(n, d)``."""
        weight = next(model.parameters())
        rows = []
        for part in _parts(pictures, batch):
            read = pixels(part, side, mean, std).to(weight.device, weight.dtype)
            made = model(pixel_values=read)
            own = getattr(made, "pooler_output", None)
            if pooling == "pooled" and own is not None:
                rows.append(own.flatten(1).float())
                continue
            hidden = made.last_hidden_state
            # (n, tokens, width) of transformers, (n, channels, height, width) of convolutions.
            rows.append((hidden.mean(1) if hidden.ndim == 3 else hidden.mean((2, 3))).float())
        return torch.cat(rows)

    return Features(name if pooling == "pooled" else f"{name}:mean", extract)


def open_features(where: str, device: str = "cpu") -> Features:
    """Features of a vision model in a folder or on the hub, named by :func:`model_name`.

    Raises:
        ModelError: It cannot be opened, or has no vision tower.
    """
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(where)
        model = AutoModel.from_pretrained(where, use_safetensors=True).to(device).eval()
    except (OSError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0]
        raise ModelError(f"features {where!r}: no vision model can be opened ({first})") from None
    processor = pixel_statistics(where)
    name = model_name(where)
    if hasattr(model, "get_image_features") and hasattr(config, "vision_config"):
        return clip_features(model, name, processor)
    if getattr(model, "main_input_name", "pixel_values") != "pixel_values":
        raise ModelError(f"features {where!r}: this {config.model_type} model reads no pictures")
    return vision_features(model, name, processor)


def _normalisation(
    processor: Any, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    own = (getattr(processor, key, None) for key in ("image_mean", "image_std"))
    first, second = (tuple(v) if v else other for v, other in zip(own, (mean, std), strict=True))
    return first, second


def _parts(pictures: np.ndarray, batch: int) -> list[np.ndarray]:
    return [pictures[start : start + batch] for start in range(0, len(pictures), batch)]


class FeatureCache:
    """Feature vectors as float16, by extractor and picture; the least recently used are dropped first.

    Args:
        folder: Where to keep them between processes; ``None`` keeps them in memory only.
        limit: Bytes held in memory.
    """

    def __init__(self, folder: str | Path | None = None, limit: int = 256 * 2**20) -> None:
        self.folder = None if folder is None else Path(folder)
        self.limit = limit
        self.hits = self.misses = 0
        self._held: OrderedDict[str, np.ndarray] = OrderedDict()
        self._bytes = 0

    def get(self, key: str) -> np.ndarray | None:
        """A vector, or ``None``; a file that is damaged counts as missing."""
        found = self._held.get(key)
        if found is not None:
            self._held.move_to_end(key)
        elif self.folder is not None:
            try:
                found = np.load(self._file(key), allow_pickle=False)
            except (OSError, ValueError, EOFError):
                found = None
            if found is not None and (found.dtype != np.float16 or found.ndim != 1):
                found = None
            if found is not None:
                self._hold(key, found)
        self.hits += found is not None
        self.misses += found is None
        return found

    def put(self, key: str, vector: np.ndarray) -> None:
        """Keep a float16 vector ``(d,)``."""
        self._hold(key, vector)
        if self.folder is not None:
            buffer = io.BytesIO()
            np.save(buffer, vector, allow_pickle=False)
            atomic_write(self._file(key), buffer.getvalue())

    def _hold(self, key: str, vector: np.ndarray) -> None:
        if key not in self._held:
            self._bytes += vector.nbytes
        self._held[key] = vector
        while self._bytes > self.limit and len(self._held) > 1:
            self._bytes -= self._held.popitem(last=False)[1].nbytes

    def _file(self, key: str) -> Path:
        assert self.folder is not None
        return self.folder / key[:2] / f"{key}.npy"


def cached(features: Features, cache: FeatureCache) -> Features:
    """The same features rounded to float16, each picture's computed once.

    Raises:
        InputError: When a vector is made, if it does not fit into float16.
    """

    def key(picture: np.ndarray) -> str:
        digest = hashlib.sha256(f"{features.name}|{picture.shape}|".encode())
        digest.update(np.ascontiguousarray(picture).tobytes())
        return digest.hexdigest()

    def extract(pictures: np.ndarray) -> np.ndarray:
        """Vectors that are kept, the missing ones made together."""
        keys = [key(picture) for picture in pictures]
        rows = {name: cache.get(name) for name in dict.fromkeys(keys)}
        first = {name: place for place, name in reversed(list(enumerate(keys)))}
        missing = [name for name, row in rows.items() if row is None]
        if missing:
            made = features(pictures[[first[name] for name in missing]])
            with np.errstate(over="ignore"):
                small = made.astype(np.float16)
            if not np.isfinite(small).all():
                raise InputError(
                    f"features {features.name!r} reach {np.abs(made).max():.3g}, more than float16 holds; do not cache"
                )
            for name, row in zip(missing, small, strict=True):
                cache.put(name, row)
                rows[name] = row
        return np.stack([np.asarray(rows[name], np.float32) for name in keys])

    return Features(f"{features.name}@float16", extract)
