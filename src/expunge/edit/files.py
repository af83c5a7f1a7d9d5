"""Reading and writing edits: safetensors only, checked before anything is trusted, atomic.

The checks run on the header before a tensor is touched, so a hostile file costs no memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pydantic
import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors

from ..errors import EditFormatError, NonFiniteError
from .manifest import FORMAT, Manifest

__all__ = ["atomic_write", "read", "tensors_digest", "write"]

KEY = "expunge"
SEAL = "expunge_sha256"
"""Key of the digest of the manifest's text, so that a flipped bit in the header shows too."""
MAX_HEADER = 16 * 2**20
MAX_TENSORS = 100_000


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to("cpu").contiguous()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def atomic_write(path: str | os.PathLike[str], content: bytes) -> None:
    """Write aside (a unique file in the same folder), fsync, rename: a kill leaves old or new."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(prefix=f".{target.name[:40]}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; results are for sharing, as the user's umask allows.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(aside, 0o666 & ~umask)
        os.replace(aside, target)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def write(
    path: str | os.PathLike[str], manifest: Manifest, tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write an edit file; the manifest stands in the header under ``expunge``."""
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    text = json.dumps(manifest.plain(), sort_keys=True)
    header = {KEY: text, SEAL: _seal(text), "format": "pt"}
    atomic_write(path, _ordered(safetensors.save(plain, metadata=header)))


def _ordered(content: bytes) -> bytes:
    # The library writes metadata keys in a random order; equal edits are to be equal files.
    length = int.from_bytes(content[:8], "little")
    text = json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True).encode()
    text += b" " * (-len(text) % 8)  # tensors stay aligned
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


def read(path: str | os.PathLike[str]) -> tuple[Manifest, dict[str, torch.Tensor]]:
    """Read and check an edit file.

    Raises:
        EditFormatError: Not there or not a regular file, not safetensors, damaged, no valid manifest, or a digest
            that does not agree.
        NonFiniteError: A tensor holds NaN or infinity.
    """
    file = Path(path)
    if not file.exists():  # with its folder: most edits are called edit.safetensors
        raise EditFormatError(f"{file}: there is no such file; an edit is one .safetensors file")
    if not file.is_file():
        raise EditFormatError(
            f"{file.name}: is not a regular file; an edit is one .safetensors file"
        )
    header = _header(file)
    try:
        metadata = header.get("__metadata__", {})
        text = metadata[KEY]
        if metadata != {KEY: text, SEAL: _seal(text), "format": "pt"}:
            raise EditFormatError(
                f"{file.name}: the manifest does not agree with its digest; it is damaged"
            )
        content = json.loads(text)
        version = content.get("format")
        if isinstance(version, int) and version != FORMAT:
            raise EditFormatError(
                f"{file.name}: is an edit of format {version}; this version of expunge reads format {FORMAT}, "
                "so make the edit anew, or read it with the version that wrote it"
            )
        manifest = Manifest.model_validate(content)
    except (KeyError, TypeError, AttributeError):
        raise EditFormatError(
            f"{file.name}: holds tensors but no expunge manifest; it was not written by expunge"
        ) from None
    except pydantic.ValidationError as error:  # a ValueError, so it stands before the next clause
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "manifest"
        raise EditFormatError(f"{file.name}: manifest key {where!r}: {first['msg']}") from None
    except (ValueError, RecursionError):
        raise EditFormatError(f"{file.name}: the manifest is not valid JSON") from None
    try:
        tensors = safetensors.load_file(file)
    except (SafetensorError, ValueError, OverflowError, KeyError, OSError, RuntimeError) as error:
        raise EditFormatError(f"{file.name}: is damaged ({error})") from None
    if tensors_digest(tensors) != manifest.tensors_digest:
        raise EditFormatError(
            f"{file.name}: the tensors do not agree with their digest; it is damaged"
        )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise NonFiniteError(f"{file.name}: tensor {name!r} holds NaN or infinity")
    return manifest, tensors


def _seal(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _header(file: Path) -> dict[str, dict[str, str]]:
    try:
        size, stream = file.stat().st_size, file.open("rb")
    except OSError as error:
        raise EditFormatError(f"{file.name}: cannot be read ({error.strerror})") from None
    with stream:
        length = int.from_bytes(stream.read(8), "little")
        if 2 <= size - 8 < length <= MAX_HEADER:
            raise EditFormatError(
                f"{file.name}: is cut short: it has {size} bytes, its header alone {length + 8}"
            )
        if size < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
            raise EditFormatError(
                f"{file.name}: is not a safetensors file (header of {length} bytes in a file of {size}; "
                f"at most {MAX_HEADER} are allowed)"
            )
        raw = stream.read(length)
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError, ValueError) as error:
        raise EditFormatError(f"{file.name}: the header is not valid JSON ({error})") from None
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise EditFormatError(f"{file.name}: the header must map at most {MAX_TENSORS} tensors")
    return header


def _no_duplicates(pairs: list[tuple[str, dict[str, str]]]) -> dict[str, dict[str, str]]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found
