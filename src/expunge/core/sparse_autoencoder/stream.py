"""Where activations come from: a tensor, or a cache of shards on disk; shuffled, and the same at every resume.

A source is an endless sequence of rows: every epoch all rows once, in an order drawn from (seed, epoch).  Batch ``i``
is rows ``i B`` to ``(i + 1) B`` of it, so that a run that begins at batch ``i`` sees what an uninterrupted one sees.

In a cache whole shards are drawn at random and ``mix`` of them are shuffled together: disk is read in long pieces and
only ``mix`` shards are in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from ...edit.checksums import tensor_digest
from ...edit.files import atomic_write
from ...errors import NonFiniteError, RunError, SettingError, WrongShape
from ...models.base import noise_generator

__all__ = ["ActivationCache", "Activations", "Rows", "as_activations"]

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SHARD = 2**16
"""Rows of a shard."""


class Activations(Protocol):
    """A finite set of rows that can be read shuffled, from any batch on.

    Attributes:
        rows: How many there are.
        width: d.
        digest: Changes when the rows do.
    """

    @property
    def rows(self) -> int: ...

    @property
    def width(self) -> int: ...

    @property
    def digest(self) -> str: ...

    def batches(self, size: int, seed: int, first: int = 0) -> Iterator[Tensor]:
        """Batches ``(size, d)`` float32 without end, from batch ``first``."""

    def blocks(self) -> Iterator[Tensor]:
        """All rows once, in their own order, in blocks."""


class _Shuffled:
    """Batches over groups of rows that are in memory together."""

    def __init__(self, rows: int, width: int) -> None:
        self.rows, self.width = rows, width

    def _groups(self, seed: int, epoch: int) -> list[tuple[int, Callable[[], Tensor]]]:
        """Rows of each group in the order of an epoch, and what makes the group, shuffled."""
        raise TypeError(f"{type(self).__name__} must define its groups")

    def batches(self, size: int, seed: int, first: int = 0) -> Iterator[Tensor]:
        """Batches ``(size, d)`` float32 without end, from batch ``first``."""
        epoch, skip = divmod(first * size, self.rows)
        parts: list[Tensor] = []
        held = 0
        while True:
            for count, make in self._groups(seed, epoch):
                if skip >= count:
                    skip -= count
                    continue
                group, skip = make()[skip:], 0
                while len(group):
                    part = group[: size - held]
                    group = group[len(part) :]
                    parts.append(part)
                    held += len(part)
                    if held == size:
                        yield (parts[0] if len(parts) == 1 else torch.cat(parts)).float()
                        parts, held = [], 0
            epoch += 1


class Rows(_Shuffled):
    """Rows in memory.

    Args:
        rows: ``(..., d)``, any float dtype; leading dimensions are flattened.
    """

    def __init__(self, rows: Tensor) -> None:
        self.tensor = rows.detach().reshape(-1, rows.shape[-1])
        _check(self.tensor)
        super().__init__(len(self.tensor), self.tensor.shape[1])

    @property
    def digest(self) -> str:
        """Digest of all rows."""
        return tensor_digest(self.tensor)

    def _groups(self, seed: int, epoch: int) -> list[tuple[int, Callable[[], Tensor]]]:
        order = torch.randperm(self.rows, generator=noise_generator(seed, "rows of epoch", epoch))
        order = order.to(self.tensor.device)
        size = max(1, 2**24 // self.width)  # gathered piece by piece: no second copy of everything
        return [(len(part), lambda part=part: self.tensor[part]) for part in order.split(size)]  # type: ignore[misc]

    def blocks(self) -> Iterator[Tensor]:
        """All rows once, in blocks."""
        yield from self.tensor.split(SHARD)


class ActivationCache(_Shuffled):
    """A folder of shards, ``00000.safetensors`` and on, with ``cache.json``.

    Args:
        folder: The folder; made by :meth:`write`.
        mix: Shards that are shuffled together in memory.

    Raises:
        RunError: The folder holds no finished cache.
    """

    def __init__(self, folder: str | os.PathLike[str], mix: int = 4) -> None:
        self.folder, self.mix = Path(folder), mix
        try:
            index = json.loads((self.folder / "cache.json").read_text(encoding="utf-8"))
            self.shards = [int(count) for count in index["shards"]]
            self.source, self._digest = str(index["source"]), str(index["digest"])
            super().__init__(sum(self.shards), int(index["width"]))
        except FileNotFoundError:
            raise RunError(f"{self.folder}: holds no finished cache of activations") from None
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{self.folder}: cache.json is damaged ({error})") from None

    @classmethod
    def write(
        cls,
        folder: str | os.PathLike[str],
        stream: Iterable[Tensor],
        *,
        dtype: str = "float16",
        shard_rows: int = SHARD,
        limit: int | None = None,
        source: str = "",
        mix: int = 4,
    ) -> ActivationCache:
        """Write a stream of activations ``(..., d)``, or take what an earlier call with this ``source`` finished.

        The index is written last: a kill leaves a folder that is written again from the start.

        Args:
            folder: Where.
            stream: Yields activations; not touched where the cache is there.
            dtype: float16 (the default), bfloat16 or float32.
            shard_rows: Rows of a shard.
            limit: Rows after which the stream is no longer read.
            source: Everything that can change the rows, in words: model state, prompts, site.
            mix: See the class.

        Raises:
            NonFiniteError: NaN or infinity, also where a value does not fit float16.
            SettingError: No rows, or an unknown dtype.
            RunError: The folder holds a cache of another source.
        """
        folder = Path(folder)
        if dtype not in DTYPES:
            raise SettingError(f"activations are stored as {', '.join(DTYPES)}; got {dtype!r}")
        if (folder / "cache.json").exists():
            found = cls(folder, mix)
            if found.source != source:
                raise RunError(
                    f"{folder}: holds activations of {found.source!r}, wanted are those of {source!r}"
                )
            return found
        counts, digests, width = [], hashlib.sha256(), 0
        for number, shard in enumerate(_shards(stream, shard_rows, limit)):
            stored = shard.detach().to("cpu", DTYPES[dtype]).contiguous()
            _check(stored, f" stored as {dtype}")
            if width not in (0, stored.shape[1]):
                raise WrongShape(
                    f"activations have {stored.shape[1]} numbers, earlier ones {width}"
                )
            width = stored.shape[1]
            atomic_write(folder / _name(number), safetensors.save({"rows": stored}))
            counts.append(len(stored))
            digests.update(tensor_digest(stored).encode())
        if not counts:
            raise SettingError("the stream of activations is empty")
        index = {
            "shards": counts, "width": width, "dtype": dtype, "source": source, "digest": digests.hexdigest()[:32],
        }  # fmt: skip
        atomic_write(folder / "cache.json", (json.dumps(index, indent=1) + "\n").encode())
        return cls(folder, mix)

    @property
    def digest(self) -> str:
        """Digest of all shards, as written."""
        return self._digest

    def _shard(self, number: int) -> Tensor:
        try:
            rows = safetensors.load_file(self.folder / _name(number))["rows"]
        except (SafetensorError, OSError, KeyError) as error:
            raise RunError(f"{self.folder / _name(number)}: is damaged ({error})") from None
        if rows.shape != (self.shards[number], self.width):
            raise RunError(
                f"{self.folder / _name(number)}: holds {tuple(rows.shape)} numbers, the index says "
                f"{(self.shards[number], self.width)}"
            )
        return rows

    def _groups(self, seed: int, epoch: int) -> list[tuple[int, Callable[[], Tensor]]]:
        generator = noise_generator(seed, "shards of epoch", epoch)
        order = torch.randperm(len(self.shards), generator=generator).tolist()

        def make(numbers: list[int], place: int) -> Tensor:
            rows = torch.cat([self._shard(number) for number in numbers])
            drawn = noise_generator(seed, "rows of group", f"{epoch}.{place}")
            return rows[torch.randperm(len(rows), generator=drawn)]

        parts = [order[at : at + self.mix] for at in range(0, len(order), self.mix)]
        return [
            (sum(self.shards[n] for n in part), lambda part=part, place=place: make(part, place))  # type: ignore[misc]
            for place, part in enumerate(parts)
        ]

    def blocks(self) -> Iterator[Tensor]:
        """All rows once, shard by shard."""
        for number in range(len(self.shards)):
            yield self._shard(number)


def _name(number: int) -> str:
    return f"{number:05d}.safetensors"


def _shards(stream: Iterable[Tensor], size: int, limit: int | None) -> Iterator[Tensor]:
    """The rows of a stream, cut into pieces of ``size``."""
    parts: list[Tensor] = []
    held = total = 0
    for found in stream:
        rows = found.reshape(-1, found.shape[-1])
        if limit is not None:
            rows = rows[: limit - total]
        total += len(rows)
        while len(rows):
            part = rows[: size - held]
            rows = rows[len(part) :]
            parts.append(part)
            held += len(part)
            if held == size:
                yield torch.cat(parts)
                parts, held = [], 0
        if limit is not None and total >= limit:
            break
    if held:
        yield torch.cat(parts)


def _check(rows: Tensor, more: str = "") -> None:
    if not rows.is_floating_point() or not len(rows):
        raise SettingError(
            f"activations are {tuple(rows.shape)} of {rows.dtype}; allowed are rows of floats"
        )
    if not torch.isfinite(rows).all():
        raise NonFiniteError(f"activations{more} hold NaN or infinity")


def as_activations(given: Any, folder: Path | None = None) -> Activations:
    """A source from a tensor or array, a source, or an iterable of tensors.

    Args:
        given: What it is made from.  An iterable is written to ``folder`` first.
        folder: For a cache; without it an iterable is kept in memory.
    """
    if isinstance(given, _Shuffled):
        return given  # type: ignore[return-value]
    if hasattr(given, "batches") and hasattr(given, "blocks"):
        return given  # type: ignore[no-any-return]
    if isinstance(given, Tensor):
        return Rows(given)
    if hasattr(given, "__array__"):
        return Rows(torch.as_tensor(given))
    if isinstance(given, Iterable):
        if folder is not None:
            return ActivationCache.write(folder, given, dtype="float32")
        return Rows(torch.cat([part.reshape(-1, part.shape[-1]) for part in given]))
    raise SettingError(
        f"activations are a {type(given).__name__}; allowed are a tensor, an ActivationCache, or an iterable of tensors"
    )
