"""Checksums: every bit of a tensor, at memory speed on any device, and once for values that stay.

A tensor is read as 64-bit words in blocks of 65,536.  A block gives two sums modulo 2^64, of its words and of
their upper halves, each word times the fixed odd random number of its place; the digest is a hash of dtype,
shape and all sums.  One changed word is always noticed, several by chance missed in at most one of 2^32 cases
a block (pure changes of sign; others far less).  It tells honest changes apart; it is no seal against somebody
who looks for a collision.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

__all__ = ["Checksums", "tensor_digest"]

BLOCK = 2**16
"""Words a block (512 KiB): large enough for few calls, small enough for a processor's cache."""


@functools.lru_cache(maxsize=8)
def _multipliers(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    # Digests stand in files, so they may not depend on any library's random numbers.
    stream = hashlib.shake_128(b"expunge checksum 1").digest(2 * 8 * BLOCK)
    odd = np.frombuffer(stream, dtype="<i8").astype(np.int64) | 1
    whole, upper = torch.from_numpy(odd).to(device).split(BLOCK)
    return whole, upper


def _words(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    whole = flat.numel() // 8 * 8
    if whole:
        part = flat[:whole]
        if part.storage_offset() % 8:  # a view of words must start at a word
            part = part.clone()
        yield from part.view(torch.int64).split(BLOCK)
    if whole < flat.numel():
        tail = flat.new_zeros(8)
        tail[: flat.numel() - whole] = flat[whole:]
        yield tail.view(torch.int64)


@torch.no_grad()
def tensor_digest(tensor: torch.Tensor) -> str:
    """Digest of dtype, shape and every bit of a tensor (32 hexadecimal digits)."""
    whole, upper = _multipliers(tensor.device)
    room, sums = torch.empty_like(whole), []
    for words in _words(tensor):
        product = room[: len(words)]
        torch.mul(words, whole[: len(words)], out=product)
        sums.append(product.sum())
        torch.bitwise_right_shift(words, 32, out=product)
        sums.append(product.mul_(upper[: len(words)]).sum())
    digest = hashlib.sha256(f"{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    if sums:
        digest.update(torch.stack(sums).cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()[:32]


class Checksums:
    """Digests of named tensors, each computed again only after its tensor was written to or replaced.

    torch counts what is written to a tensor, but not what is written through ``.data``; so a sample of the
    values is compared too.  Only a write through ``.data`` that misses every sampled value goes unseen.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[tuple[object, ...], str]] = {}

    def digest(self, name: str, tensor: torch.Tensor, sample: Sequence[float]) -> str:
        """Digest of the tensor that is called ``name`` now, ``sample`` being some of its values."""
        if tensor.is_inference():  # torch does not count what is written to these
            return tensor_digest(tensor)
        # The weak reference keeps the storage's identity (not its memory), so that no other storage can pass
        # for it by standing at the same address.
        place = (StorageWeakRef(tensor.untyped_storage()), tensor.data_ptr(), tensor._version)
        stamp = (*place, tensor.dtype, tuple(tensor.shape), tensor.stride(), tuple(sample))
        known = self._known.get(name)
        if known is None or known[0] != stamp:
            known = self._known[name] = (stamp, tensor_digest(tensor))
        return known[1]
